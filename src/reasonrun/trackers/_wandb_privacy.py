"""What may leave the run directory: recipe values without paths and environment, texts without secrets."""

from __future__ import annotations

import netrc
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue

_SECRET_NAME = re.compile(r"key|token|secret|passw|passphrase|credential|auth", re.IGNORECASE)
_PATH_KEY = re.compile(r"(^|_)(path|paths|dir|dirs|file|files|folder|python|home)$")
_LOOKS_LIKE_PATH = re.compile(r"~|/|\.\.?/|\.\.?\\|\\\\|[A-Za-z]:[\\/]|file:", re.IGNORECASE)
_ENVIRONMENT_KEY = re.compile(r"(^|_)(env|environ|environment)$")
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+@")
_SHORTEST_SECRET = 8  # shorter values ("1", "true") name no secret and would blank out ordinary text

_DROPPED = object()


def secret_values(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Values of variables whose names sound like credentials, and the passwords of ``~/.netrc``; longest first."""
    values = {value for name, value in environment.items() if _SECRET_NAME.search(name)}
    values |= {password for _, _, password in _netrc_entries(environment).values() if password}
    return tuple(sorted((v for v in values if len(v) >= _SHORTEST_SECRET), key=lambda v: (-len(v), v)))


def has_api_key(environment: Mapping[str, str]) -> bool:
    """Whether W&B would find a key without asking: ``WANDB_API_KEY``, or the server's entry in ``~/.netrc``."""
    if environment.get("WANDB_API_KEY"):
        return True
    url = environment.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    host = url.partition("://")[2].partition("/")[0].rpartition("@")[2].partition(":")[0]
    return bool(_netrc_entries(environment).get(host, ("", "", ""))[2])


def _netrc_entries(environment: Mapping[str, str]) -> dict[str, tuple[str, str | None, str]]:
    path = Path(environment.get("NETRC") or Path(environment.get("HOME") or "~").expanduser() / ".netrc")
    try:
        return {host: (a, b, c or "") for host, (a, b, c) in netrc.netrc(path).hosts.items()}
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return {}


class Scrubber:
    """Replaces the secrets that this process can see."""

    def __init__(self, secrets: tuple[str, ...]) -> None:
        self._pattern = re.compile("|".join(map(re.escape, secrets))) if secrets else None

    def text(self, text: str) -> str:
        return self._pattern.sub("***", text) if self._pattern else text

    def recipe(self, recipe: Mapping[str, Any]) -> dict[str, JsonValue]:
        """The recipe without values that name places on this machine or come from its environment.

        Dropped: absolute, home-relative and dotted paths, whatever stands under a key that says path, file, folder or
        environment, and expressions that read the environment. A bare name under ``path`` stays: it names a model.
        """
        kept = self._kept("", recipe)
        return kept if isinstance(kept, dict) else {}

    def _kept(self, key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            if _ENVIRONMENT_KEY.search(key):
                return _DROPPED
            items = {str(name): self._kept(str(name), inner) for name, inner in value.items()}
            return {name: inner for name, inner in items.items() if inner is not _DROPPED}
        if isinstance(value, list | tuple):
            return [inner for inner in (self._kept(key, item) for item in value) if inner is not _DROPPED]
        if isinstance(value, str):
            return self._kept_text(key, value)
        return value

    def _kept_text(self, key: str, value: str) -> Any:
        is_place = _LOOKS_LIKE_PATH.match(value) or (_PATH_KEY.search(key) and re.search(r"[/\\]", value))
        if is_place or "${oc.env:" in value or (_SECRET_NAME.search(key) and value in os.environ.values()):
            return _DROPPED
        return self.text(_USER_IN_URL.sub("", value))
