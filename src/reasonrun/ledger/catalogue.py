"""What a run directory holds, read without holding it: identity, steps, fingerprints, whether it is finished."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from reasonrun.errors import ReasonrunError, RunConflict, RunFailed
from reasonrun.ledger.files import Files, decode_json, encode_json
from reasonrun.ledger.lock import LOCK_NAME
from reasonrun.ledger.seals import OK_NAME, read_seal, verify_files
from reasonrun.ledger.steps import STEP_NAME, Committed, check_step_name, redo_hint

RUN_NAME = "run.json"
_OWN_NAMES = {LOCK_NAME, "attempts", "steps", "derived", "quarantine", "jobs", f"{RUN_NAME}.tmp"}

StepState = Literal["committed", "begun"]


def step_states(run_path: Path) -> dict[str, StepState]:
    """Every step of a run directory by name, whoever holds it."""
    root = run_path / "steps"
    states: dict[str, StepState] = {}
    for folder in sorted({path.parent for file in (STEP_NAME, OK_NAME) for path in root.rglob(file)}):
        name = folder.relative_to(root).as_posix()
        with suppress(ValueError):  # checkpoints have an _OK.json of their own
            check_step_name(name)
            states[name] = "committed" if (folder / OK_NAME).exists() else "begun"
    return states


def holds_work(run_path: Path) -> bool:
    """Whether a step was begun that does more than read problems: something was sampled, graded, trained."""
    return any(not name.startswith("problems/") for name in step_states(run_path))


def stored_fingerprint(run_path: Path, name: str) -> Any:
    """The fingerprint in a step's ``step.json``; None when the step was never begun. Raises RunFailed on damage."""
    path = run_path / "steps" / name / STEP_NAME
    if not path.is_file():
        return None
    with suppress(ValueError, KeyError, TypeError):
        return decode_json(path.read_bytes())["fingerprint"]
    raise RunFailed(f"{path} is damaged: it is no step record.", hint=redo_hint(name))


def step_inputs(run_path: Path, name: str) -> list[str]:
    """The steps whose results a step reads, as its fingerprint lists them; none where its record is damaged."""
    with suppress(RunFailed, ValueError):
        return listed_inputs(stored_fingerprint(run_path, name))
    return []


def listed_inputs(fingerprint: Any) -> list[str]:
    """The inputs that a fingerprint lists. Raises ValueError when they are no names."""
    inputs = fingerprint.get("inputs") if isinstance(fingerprint, dict) else None
    if inputs is None:
        return []
    if not isinstance(inputs, list) or not all(isinstance(name, str) for name in inputs):
        raise ValueError("its inputs are no names of steps")
    return inputs


def dependents_first(name: str, inputs: Mapping[str, list[str]]) -> list[str]:
    """``name`` and all that depends on it, each after everything that depends on it."""
    order: list[str] = []
    seen: set[str] = set()
    waiting = [(name, False)]
    while waiting:
        step, is_expanded = waiting.pop()
        if is_expanded:
            order.append(step)
        elif step not in seen:
            seen.add(step)
            waiting.append((step, True))
            waiting += [(other, False) for other, read in inputs.items() if step in read]
    return order


def closure(run_path: Path, names: Iterable[str]) -> list[str]:
    """Steps and all that depends on them, each after everything that depends on it."""
    inputs = {step: step_inputs(run_path, step) for step in step_states(run_path)}
    return list(dict.fromkeys(step for name in names for step in dependents_first(name, inputs)))


def named_steps(run_path: Path) -> list[str]:
    """Steps that a run has, or that it names although their files are gone: something was made from them."""
    states = step_states(run_path)
    names = [*states, *(source for name in states for source in step_inputs(run_path, name))]
    with suppress(ReasonrunError, KeyError, TypeError):
        seal = read_seal(run_path)
        names += [] if seal is None else seal.content["steps"]
    return list(dict.fromkeys(names))


def run_identity(path: Path) -> dict[str, Any]:
    try:
        identity: dict[str, Any] = decode_json((path / RUN_NAME).read_bytes())["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFailed(
            f"{path / RUN_NAME} is damaged or unreadable ({error}).",
            hint="restore the file, or start again with --run NEW",
        ) from error
    return identity


def identity_digest(identity: Any) -> str:
    """What ``run.json`` holds beside the identity, so that a change by hand is noticed."""
    return hashlib.sha256(encode_json(identity, sort_keys=True)).hexdigest()[:32]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; empty when there is none. A torn last line is left out."""
    if not path.exists():
        return []
    return [decode_json(line) for line in path.read_bytes().split(b"\n")[:-1] if line]


def finished_content(path: Path, files: Files) -> dict[str, Any] | None:
    """The content of the root seal when it and every step that it names verify (sizes)."""
    with suppress(RunFailed):
        seal = read_seal(path)
        if seal is None or not (path / RUN_NAME).is_file():
            return None
        for name, expected in seal.content["steps"].items():
            step = read_seal(path / "steps" / name)
            if step is None or Committed(name, path / "steps" / name, step, files).digest != expected:
                return None
            verify_files(path / "steps" / name, step, files, deep=False)
        return dict(seal.content)
    return None


def check_is_ours(path: Path) -> None:
    """Refuse to make a run inside a folder that holds something else."""
    if path.is_dir() and not (path / RUN_NAME).exists():
        others = sorted(entry.name for entry in path.iterdir() if entry.name not in _OWN_NAMES)
        if others:
            raise RunConflict(
                f"{path} is not a run directory and not empty (it holds {', '.join(others[:5])}).",
                hint="give an empty or new folder with --run DIR",
            )
