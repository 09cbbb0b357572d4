"""Whether steps, the record of metrics and the result of a run speak of the same things. Reads no rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasonrun.errors import ReasonrunError
from reasonrun.ledger.catalogue import step_states, stored_fingerprint
from reasonrun.ledger.damage import Damage, Finding, Note
from reasonrun.ledger.files import Files, decode_json
from reasonrun.ledger.seals import Seal, read_seal
from reasonrun.ledger.steps import Committed, check_step_name
from reasonrun.model_folder import INDEX_NAME
from reasonrun.records import digest
from reasonrun.report.joins import METRICS, Join

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """A committed step whose seal and fingerprint can be read."""

    name: str
    folder: Path
    seal: Seal
    fingerprint: dict[str, Any]

    @property
    def verb(self) -> str:
        return str(self.fingerprint.get("verb", ""))

    @property
    def inputs(self) -> list[str]:
        return list(self.fingerprint.get("inputs", []))

    @property
    def result(self) -> dict[str, Any]:
        result = self.seal.content["result"]
        return result if isinstance(result, dict) else {}

    @property
    def digest(self) -> str:
        """Of what the step produced."""
        return Committed(self.name, self.folder, self.seal, Files()).digest

    @property
    def weights(self) -> str | None:
        """Digest of the weights that the step made, if it made any."""
        return self.result.get("weights") if self.verb in ("train", "train_on_policy", "merge") else None


def committed_steps(path: Path) -> dict[str, StepFacts]:
    """The committed steps of a run by name; those that cannot be read are left out, the ledger's checks name them."""
    found = {}
    for name, state in step_states(path).items():
        folder = path / "steps" / name
        if state != "committed":
            continue
        try:
            seal, fingerprint = read_seal(folder), stored_fingerprint(path, name)
            is_sealed = seal is not None and seal.content["fingerprint"] == digest(fingerprint)
        except (ReasonrunError, KeyError, TypeError):
            continue
        if seal is not None and is_sealed and isinstance(fingerprint, dict):
            found[name] = StepFacts(name=name, folder=folder, seal=seal, fingerprint=fingerprint)
    return found


def check_metrics(path: Path, steps: Mapping[str, StepFacts]) -> Iterator[Finding | Join]:
    """``metrics.jsonl`` says of every committed step what its seal says, and of nothing else."""

    def damaged(what: str, step: str = "") -> Damage:
        return Damage(path=METRICS, what=what, promise="G21", remedy="aside", step=step)

    states = step_states(path)
    is_finished = (path / "_OK.json").exists()
    if not (path / METRICS).is_file():
        what = f"is missing, although {len(steps)} steps are committed"
        if is_finished:
            yield damaged(what)
        elif len(steps) > 1:  # each stop between a commit and its line leaves one more
            yield Note(path=METRICS, what=f"{what}; the same train command writes it again")
        return
    lines: dict[str, dict[str, Any]] = {}
    for number, line in enumerate((path / METRICS).read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = decode_json(line)
            name = row["step"]
            check_step_name(name)
        except (ValueError, KeyError, TypeError, AttributeError):
            yield damaged(f"line {number} is no line of a step")
            continue
        if name in lines:
            yield damaged(f"line {number} speaks of step {name} for the second time", name)
        lines[name] = row
    for name, row in lines.items():
        if states.get(name) == "committed":
            if name in steps:
                agrees = _is_line_of(row, steps[name])
                yield Join(source=name, reader=METRICS, things="things", agrees=agrees, promise="G21")
        elif not any(path.glob(f"quarantine/*/steps/{name}")):
            if name in states:
                what = f"is not committed, although {METRICS} has its line: its seal is gone"
                yield Damage(path=f"steps/{name}", what=what, promise="G5", remedy="redo", step=name)
            else:
                yield damaged(f"has a line of step {name}, of which nothing is left", name)
    yield from _unlisted(steps, lines, _finished_with(path))


def _is_line_of(row: dict[str, Any], step: StepFacts) -> bool:
    verb = "train" if step.verb == "train_on_policy" else step.verb
    wanted = {"step": step.name, "verb": verb, **step.result}
    return bool(row == json.loads(json.dumps(wanted)))


def _unlisted(
    steps: Mapping[str, StepFacts], lines: Mapping[str, Any], finished_with: frozenset[str]
) -> Iterator[Finding]:
    """Lines are written in order, so a step that a listed one was made from has a line of its own."""
    read = {source for name in lines if name in steps for source in steps[name].inputs}
    for name in steps:
        if name in lines:
            continue
        if name in read or name in finished_with:
            what = f"has no line of step {name}, which is committed"
            yield Damage(path=METRICS, what=what, promise="G21", remedy="aside", step=name)
        else:
            what = "is committed and not in the record: the method no longer reaches it, or stopped before noting it"
            yield Note(path=f"steps/{name}", what=what)


def _finished_with(path: Path) -> frozenset[str]:
    try:
        seal = read_seal(path)
        return frozenset() if seal is None else frozenset(seal.content["steps"])
    except (ReasonrunError, KeyError, TypeError):  # the ledger's checks name it
        return frozenset()


def check_weights(path: Path, steps: Mapping[str, StepFacts]) -> Iterator[Damage | Join]:
    """Weights are safetensors, are those that their step says, and are the ones that later steps name."""
    for step in steps.values():
        for name in step.seal.files:
            if "/" in name:
                yield from _check_format(path, step, name)
        if step.weights is not None and (made := _sealed_weights(step)) not in (None, step.weights):
            what = f"holds the weights {made}, and the step says that it made {step.weights}"
            where = f"steps/{step.name}/model"
            yield Damage(path=where, what=what, promise="G5", remedy="redo", step=step.name)
    yield from _check_names(steps)


def _check_format(path: Path, step: StepFacts, name: str) -> Iterator[Damage]:
    file = step.folder / name
    problem = ""
    if file.suffix in _PICKLES:
        problem = "is a pickle, which runs code when it is opened; weights are safetensors"
    elif file.suffix == ".safetensors" and file.is_file() and not _has_header(file):
        problem = "is named safetensors and is no such file"
    if problem:
        where = file.relative_to(path).as_posix()
        yield Damage(path=where, what=problem, promise="G19", remedy="redo", step=step.name)


def _has_header(file: Path) -> bool:
    """Whether a file begins like safetensors: a length, and so many bytes of JSON."""
    try:
        with file.open("rb") as content:
            size = int.from_bytes(content.read(8), "little")
            return size <= _MAX_HEADER_BYTES and isinstance(decode_json(content.read(size)), dict)
    except (OSError, ValueError):
        return False


def _sealed_weights(step: StepFacts) -> str | None:
    """``models.weights_digest`` of what is sealed: the hashes were compared with the files, so nothing is read twice."""
    sealed = {name.removeprefix("model/"): entry.sha256 for name, entry in step.seal.files.items()}
    names = {name for name in sealed if name.endswith(".safetensors") and "/" not in name}
    if f"model/{INDEX_NAME}" in step.seal.files:
        try:
            names = set(decode_json((step.folder / "model" / INDEX_NAME).read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # its checksum says so
    if not names or not names <= sealed.keys():
        return None
    return digest([[name, sealed[name]] for name in sorted(names)])


def _check_names(steps: Mapping[str, StepFacts]) -> Iterator[Join]:
    """A step names the weights that the training steps among its inputs made, and an evaluation those that were sampled."""
    for step in steps.values():
        named = _named(step)
        for source in _inputs(step, steps):
            if source.weights is not None:
                yield Join(source=source.name, reader=step.name, things="weights", agrees=source.weights in named)
        if step.verb != "evaluate":
            continue
        sampled = {first.name: first for graded in _inputs(step, steps) for first in _inputs(graded, steps)[:1]}
        for source in sampled.values():
            if source.verb == "sample":
                things = "samples, of other weights,"
                yield Join(source=source.name, reader=step.name, things=things, agrees=_named(source) == named)


def check_inputs(steps: Mapping[str, StepFacts]) -> Iterator[Join]:
    """Where a fingerprint holds the digest of a step that it reads, that step still seals just this."""
    for step in steps.values():
        for name, wanted in zip(step.inputs, _digests_of_steps(step), strict=False):
            if name in steps:
                yield Join(source=name, reader=step.name, things="bytes", agrees=steps[name].digest == wanted)


def _digests_of_steps(step: StepFacts) -> list[str]:
    """The digests of its first inputs, where the fingerprint names them by what they seal."""
    fingerprint = step.fingerprint
    if step.verb == "train":
        return list(fingerprint.get("rows", []))
    if step.verb == "logprobs":
        return [fingerprint.get("pairs", "")]
    return [fingerprint.get("policy", ""), fingerprint.get("reference", "")] if step.verb == "evaluate_pairs" else []


def _inputs(step: StepFacts, steps: Mapping[str, StepFacts]) -> list[StepFacts]:
    return [steps[name] for name in step.inputs if name in steps]


def _named(step: StepFacts) -> set[str]:
    """Digests of weights that a fingerprint names."""
    fingerprint = step.fingerprint
    single = [fingerprint.get(key) for key in ("policy", "start", "reference")]
    return {name for name in [*single, *fingerprint.get("models", [])] if isinstance(name, str)}
