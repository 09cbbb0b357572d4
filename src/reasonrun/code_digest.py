"""Which code a run was made with: digests of the method's module and of the pure modules that decide about rows."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import reasonrun
from reasonrun.contracts import Method, Task

_PURE = (
    "metrics.py",
    "merging.py",
    "correction.py",
    "judging.py",
    "judged_pairs.py",
    "agreement.py",
    "chains.py",
    "rendering.py",
    "special_tokens.py",
    "verbs/curating.py",
    "verbs/judging.py",
    "verbs/merging.py",
    "merging.py",
    "model_folder.py",
    "credit.py",
    "on_policy.py",
    "asks.py",
)


def code_digests(method: type[Method], task: type[Task]) -> dict[str, str]:
    """SHA-256 of the source of the method's and the task's module, of the pure modules that curation calls, of engines,
    graders and trainers, and of the words of prompts, by name."""
    package = Path(reasonrun.__file__).parent
    files = {"method": Path(inspect.getfile(method)), "task": Path(inspect.getfile(task))}
    files.update({path: package / path for path in _PURE})
    for folder in ("curate", "trainers", "engines", "grading", "prompts"):
        sources = [path for path in sorted((package / folder).iterdir()) if path.suffix in (".py", ".toml")]
        files.update({f"{folder}/{path.name}": path for path in sources})
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:32] for name, path in files.items()}


def code_changed(earlier_attempts: Sequence[Mapping[str, Any]], method: type[Method], task: type[Task]) -> bool:
    """Whether the last attempt that recorded its code ran other code than this one."""
    recorded = [attempt["code"] for attempt in earlier_attempts if "code" in attempt]
    return bool(recorded) and recorded[-1] != code_digests(method, task)


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on; absent ones are left out."""
    found = {"reasonrun": reasonrun.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "peft", "vllm", "pyarrow", "numpy", "math-verify", "openai"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
