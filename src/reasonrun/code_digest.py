"""Which code a run was made with: digests of the method's module and of the pure modules that decide about rows."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

import reasonrun
from reasonrun.contracts import Method


def code_digests(method: type[Method]) -> dict[str, str]:
    """SHA-256 of the source of the method's module, of ``curate/`` and of ``metrics.py``, by name."""
    package = Path(reasonrun.__file__).parent
    files = {"method": Path(inspect.getfile(method)), "metrics": package / "metrics.py"}
    files.update({f"curate/{path.name}": path for path in sorted((package / "curate").glob("*.py"))})
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:32] for name, path in files.items()}
