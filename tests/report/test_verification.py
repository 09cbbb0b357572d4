"""What ``verify`` finds: nothing in runs as they were written, and every kind of damage by its name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from damaging import flip, reseal, rewrite
from report_runs import MakeRun

from reasonrun.cli.progress import SilentProgress
from reasonrun.errors import ReasonrunError
from reasonrun.ledger.catalogue import finished_content
from reasonrun.ledger.damage import Damage
from reasonrun.ledger.faults import FAULT_POINTS, InjectedFault
from reasonrun.ledger.files import Files
from reasonrun.ledger.lock import LOCK_NAME, RunLock
from reasonrun.ledger.repairing import plan_repair
from reasonrun.recipe import load
from reasonrun.report.verification import Verification, verify_run
from reasonrun.running import RunOptions, run

FINISHED = ("method.rounds=1",)
UNFINISHED = ("method.rounds=1", "engine.unit_rows=8", "engine.fail_at_unit=5")
BEGUN = "steps/round-001/sample"


@pytest.fixture
def finished(make_run: MakeRun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(make_run(*FINISHED), tmp_path / "run"))


@pytest.fixture
def unfinished(make_run: MakeRun, tmp_path: Path) -> Path:
    path = Path(shutil.copytree(make_run(*UNFINISHED), tmp_path / "run"))
    assert (path / BEGUN / "wal.jsonl").stat().st_size > 0
    return path


def damages(path: Path, *, deep: bool = True) -> list[Damage]:
    return verify_run(path, deep=deep).damages


def found(path: Path, *, deep: bool) -> list[str]:
    return [f"{damage.path} {damage.what}" for damage in damages(path, deep=deep)]


@pytest.mark.parametrize("overrides", [FINISHED, UNFINISHED, ("method.rounds=2", "preflight=report")])
def test_nothing_is_found_in_a_run_as_it_was_written(make_run: MakeRun, overrides: tuple[str, ...]) -> None:
    path = make_run(*overrides)
    for deep in (False, True):
        verification = verify_run(path, deep=deep)
        assert verification.findings == () and verification.worked_on_by is None
        assert verification.num_steps > 3 and verification.is_finished == (overrides != UNFINISHED)


def test_verifying_touches_no_file(finished: Path) -> None:
    flip(finished / "steps/round-001/sample/rows-00000.parquet")

    def everything() -> dict[str, tuple[int, int, int]]:
        entries = [finished, *finished.rglob("*")]
        return {str(e): (e.stat().st_mtime_ns, e.stat().st_size, e.stat().st_ino) for e in entries}

    before = everything()
    assert damages(finished) and everything() == before


# -- damage on the disk, planted in a finished run: (what is done, whether sizes show it, what is said) -------------------

Harm = Callable[[Path], object]


def swap(path: Path) -> None:
    one, other, between = path / "steps/problems/dev", path / "steps/problems/test", path / "between"
    one.rename(between)
    other.rename(one)
    between.rename(other)


def drop_line(path: Path, number: int) -> None:
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (path / "metrics.jsonl").write_bytes(b"".join(lines[:number] + lines[number + 1 :]))


def change_text(path: Path, *pairs: str) -> None:
    text = path.read_text()
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)


ON_DISK: dict[str, tuple[Harm, bool, str]] = {
    "bit flip in Parquet": (
        lambda run: flip(run / "steps/round-001/sample/rows-00000.parquet"),
        False,
        "steps/round-001/sample/rows-00000.parquet does not match its SHA-256",
    ),
    "truncated file": (
        lambda run: (run / "steps/round-001/grade/rows-00000.parquet").write_bytes(b"PAR1"),
        True,
        "steps/round-001/grade/rows-00000.parquet has 4 bytes instead of",
    ),
    "deleted file": (
        lambda run: (run / "steps/round-001/star_rows/left_out-00000.parquet").unlink(),
        True,
        "steps/round-001/star_rows/left_out-00000.parquet is missing",
    ),
    "deleted step": (
        lambda run: shutil.rmtree(run / "steps/round-001/grade"),
        True,
        "steps/round-001/grade is not committed, although round-001/",
    ),
    "extra row": (
        lambda run: rewrite(run / "steps/round-001/sample/rows-00000.parquet", lambda rows: [*rows, rows[0]]),
        True,
        "steps/round-001/sample/rows-00000.parquet has ",
    ),
    "extra shard": (
        lambda run: shutil.copy(
            run / "steps/round-001/sample/rows-00000.parquet", run / "steps/round-001/sample/rows-00001.parquet"
        ),
        True,
        "steps/round-001/sample/rows-00001.parquet stands in a committed step that was sealed without it",
    ),
    "swapped step folders": (swap, True, "steps/problems/dev/step.json is the record of step problems/test"),
    "edited count": (
        lambda run: (run / "steps/round-001/grade/_OK.json").write_text(
            (run / "steps/round-001/grade/_OK.json").read_text().replace('"num_correct": ', '"num_correct": 1')
        ),
        True,
        "steps/round-001/grade/_OK.json does not match its own digest",
    ),
    "edited fingerprint": (
        lambda run: (run / "steps/round-001/sample/step.json").write_text(
            (run / "steps/round-001/sample/step.json").read_text().replace('"n": 4', '"n": 5')
        ),
        True,
        "steps/round-001/sample/step.json holds another fingerprint than the one that was sealed",
    ),
    "missing seal": (
        lambda run: (run / "steps/round-001/train/_OK.json").unlink(),
        True,
        "steps/round-001/train is not committed, although the run finished with it",
    ),
    "damaged root seal": (lambda run: flip(run / "_OK.json", 40), True, "_OK.json does not match its own digest"),
    "replaced weights": (
        lambda run: flip(run / "steps/round-001/train/model/model.safetensors", -3),
        False,
        "steps/round-001/train/model/model.safetensors does not match its SHA-256",
    ),
    "metrics line missing": (lambda run: drop_line(run, 5), True, "metrics.jsonl has no line of step"),
    "metrics missing": (lambda run: (run / "metrics.jsonl").unlink(), True, "metrics.jsonl is missing"),
    "metrics line changed": (
        lambda run: (run / "metrics.jsonl").write_text(
            (run / "metrics.jsonl").read_text().replace('"accuracy":0.', '"accuracy":0.9', 1)
        ),
        True,
        "metrics.jsonl its line of step round-001/evaluate says other things",
    ),
    "recipe edited": (
        lambda run: (run / "run.json").write_text((run / "run.json").read_text().replace('"seed": 0', '"seed": 1')),
        True,
        "run.json does not match its own digest",
    ),
    "recipe edited and its digest renamed": (
        lambda run: change_text(run / "run.json", '"digest"', '"digesu"', '"seed": 0', '"seed": 1'),
        True,
        "run.json holds digesu, which no build writes",
    ),
    "no recipe": (
        lambda run: (run / "run.json").write_text('{"format": 1, "identity": null}'),
        True,
        "run.json holds no recipe",
    ),
    "format of one seal": (
        lambda run: change_text(run / "steps/round-001/grade/_OK.json", '"format": 1', '"format": 3'),
        True,
        "steps/round-001/grade/_OK.json does not match its own digest",
    ),
    "format of the root seal": (
        lambda run: change_text(run / "_OK.json", '"format": 1', '"format": 3'),
        True,
        "_OK.json does not match its own digest",
    ),
    "format that never was": (
        lambda run: change_text(run / "steps/round-001/grade/_OK.json", '"format": 1', '"format": 0'),
        True,
        "steps/round-001/grade/_OK.json does not match its own digest",
    ),
    "seal of a later version": (
        lambda run: change_text(
            run / "steps/round-001/grade/_OK.json", '"format": 1', '"format": 3', '"digest": "', '"digest": "0'
        ),
        True,
        "steps/round-001/grade/_OK.json cannot be read: ",
    ),
    "run.json torn": (
        lambda run: (run / "run.json").write_text('{"format": 1, "ident'),
        True,
        "run.json cannot be read",
    ),
    "attempt torn": (
        lambda run: (run / "attempts/1/attempt.json").write_text('{"att'),
        True,
        "attempts/1/attempt.json cannot be read",
    ),
}


@pytest.mark.parametrize("kind", ON_DISK)
@pytest.mark.promise("G5", "damaged files named")
def test_damage_on_the_disk_is_named(finished: Path, kind: str) -> None:
    harm, is_quick, wanted = ON_DISK[kind]
    harm(finished)
    for deep in (False, True) if is_quick else (True,):
        said = found(finished, deep=deep)
        assert any(line.startswith(wanted) for line in said), said
    if not is_quick:
        assert not found(finished, deep=False)


def test_everything_is_found_at_once_and_one_harm_is_not_reported_as_many(finished: Path) -> None:
    flip(finished / "steps/round-001/sample/rows-00000.parquet")
    assert len(damages(finished)) == 1
    (finished / "steps/problems/dev/rows-00000.parquet").unlink()
    drop_line(finished, 5)
    assert {damage.path for damage in damages(finished)} == {
        "steps/round-001/sample/rows-00000.parquet",
        "steps/problems/dev/rows-00000.parquet",
        "metrics.jsonl",
    }
    for damage in damages(finished):
        document = damage.document("RUN")
        assert document["what_to_do"].startswith("`reasonrun repair RUN`") and document["promise_text"]


# -- harm whose checksums fit: the rows themselves tell -------------------------------------------------------------------


def edit(step: str, table: str, change: Callable[[list[dict[str, object]]], list[dict[str, object]]]) -> Harm:
    def harm(run: Path) -> None:
        rewrite(run / f"steps/{step}/{table}-00000.parquet", change)
        reseal(run / f"steps/{step}")

    return harm


def of_result(step: str, **values: object) -> Harm:
    return lambda run: reseal(run / f"steps/{step}", lambda content: content["result"].update(values))


SAMPLE = "round-001/sample"
FORGED: dict[str, tuple[Harm, str]] = {
    "row twice": (
        edit(SAMPLE, "rows", lambda rows: [rows[0], rows[0], *rows[2:]]),
        f"steps/{SAMPLE} holds 1 rows whose keys stand there before",
    ),
    "row lost": (edit(SAMPLE, "rows", lambda rows: rows[:-1]), f"steps/{SAMPLE} its result says num_rollouts"),
    "rows out of order": (
        edit(SAMPLE, "rows", lambda rows: rows[4:8] + rows[:4] + rows[8:]),
        f"steps/round-001/grade was made from other rollouts than those that {SAMPLE} holds",
    ),
    "rows of one request mixed": (
        edit(SAMPLE, "rows", lambda rows: [rows[1], rows[0], *rows[2:]]),
        f"steps/{SAMPLE} its rows are not complete requests, sample by sample, in order",
    ),
    "rollouts of other weights": (
        edit(SAMPLE, "rows", lambda rows: [{**rows[0], "policy": "other"}, *rows[1:]]),
        f"steps/{SAMPLE} holds rollouts of other weights than its fingerprint names",
    ),
    "text cut": (
        edit(SAMPLE, "rows", lambda rows: [{**rows[0], "segments": []}, *rows[1:]]),
        f"steps/{SAMPLE} its result says num_completion_tokens",
    ),
    "verdict changed": (
        edit("round-001/grade", "rows", lambda rows: [{**rows[0], "value": 1.0 - rows[0]["value"]}, *rows[1:]]),  # type: ignore[operator]
        "steps/round-001/grade its result says num_correct",
    ),
    "answer changed": (
        edit("round-001/grade", "rows", lambda rows: [{**rows[0], "answer": "other"}, *rows[1:]]),
        "steps/round-001/star_rows was made from other verdicts than those that round-001/grade holds",
    ),
    "answer changed in an evaluation": (
        edit("round-001/evaluate/grade-sampled", "rows", lambda rows: [{**rows[0], "answer": "other"}, *rows[1:]]),
        "steps/round-001/evaluate was made from other verdicts than those that round-001/evaluate/grade-sampled holds",
    ),
    "accuracy changed": (
        lambda run: reseal(
            run / "steps/round-001/evaluate", lambda content: content["result"]["sampled"].update(accuracy=0.99)
        ),
        "steps/round-001/evaluate its part sampled says accuracy 0.99",
    ),
    "count changed": (
        of_result("round-001/grade", num_correct=99),
        "steps/round-001/grade its result says num_correct 99",
    ),
    "left-out row lost": (
        edit("round-001/star_rows", "left_out", lambda rows: rows[1:]),
        "steps/round-001/star_rows 1 rows that it read are neither used nor left out",
    ),
    "reasons changed": (
        of_result("round-001/star_rows", left_out={"wrong": 1}),
        "steps/round-001/star_rows its result says left_out {'wrong': 1}",
    ),
    "example of a row left out": (
        edit("round-001/star_rows", "left_out", lambda rows: [*rows, {**rows[0], "rollout_id": "x"}]),
        "steps/round-001/star_rows 0 rows that it read are neither used nor left out, and 1 that it names",
    ),
    "other examples": (
        edit("round-001/star_rows", "rows", lambda rows: [{**rows[0], "weight": 2.0}, *rows[1:]]),
        "steps/round-001/train was made from other bytes than those that round-001/star_rows holds",
    ),
    "other columns": (
        lambda run: _other_columns(run / "steps/round-001/grade"),
        "steps/round-001/grade rows-00000.parquet has other columns than a Score: grader",
    ),
    "no Parquet": (
        lambda run: (
            (run / "steps/round-001/grade/rows-00000.parquet").write_bytes(b"no"),
            reseal(run / "steps/round-001/grade"),
        ),
        "steps/round-001/grade rows-00000.parquet is no Parquet file",
    ),
    "problem exchanged": (
        edit("problems/train", "rows", lambda rows: [{**rows[0], "reference": "1"}, *rows[1:]]),
        "steps/problems/train holds other problems than its fingerprint names",
    ),
    "problem unknown": (
        edit(SAMPLE, "rows", lambda rows: [{**row, "problem_id": "x"} if n < 4 else row for n, row in enumerate(rows)]),
        f"steps/{SAMPLE} was made from other problems than those that problems/train holds",
    ),
    "weights exchanged": (
        lambda run: (
            flip(run / "steps/round-001/train/model/model.safetensors", -3),
            reseal(run / "steps/round-001/train"),
        ),
        "steps/round-001/train/model holds the weights ",
    ),
    "weights and their digest exchanged": (
        lambda run: reseal(run / "steps/round-001/train", lambda content: content["result"].update(weights="0" * 32)),
        "steps/round-001/train/model holds the weights ",
    ),
    "pickled weights": (
        lambda run: _pickled(run / "steps/round-001/train"),
        "steps/round-001/train/model/model.bin is a pickle",
    ),
    "weights that are none": (
        lambda run: (
            (run / "steps/round-001/train/model/model.safetensors").write_bytes(b"\x80\x04pickled ........"),
            reseal(run / "steps/round-001/train"),
        ),
        "steps/round-001/train/model/model.safetensors is named safetensors and is no such file",
    ),
    "cache of other rows": (
        lambda run: _other_cache(run),
        "is a cache of the rows of ",
    ),
}


def _other_columns(folder: Path) -> None:
    import pyarrow.parquet as pq

    path = folder / "rows-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["grader"]), path)
    reseal(folder)


def _pickled(folder: Path) -> None:
    from reasonrun.ledger.seals import Seal, read_seal, write_seal

    (folder / "model/model.bin").write_bytes(b"\x80\x04.")
    seal = read_seal(folder)
    assert seal is not None
    write_seal(folder, Seal({**seal.files, "model/model.bin": seal.files["step.json"]}, seal.content), Files(), "ok")
    reseal(folder)


def _other_cache(run: Path) -> None:
    """A bit of a cache turns on the disk, which leaves its size and its time as they were."""
    import os

    cache = max((run / "derived").glob("*.arrow"), key=lambda path: path.stat().st_size)
    status = cache.stat()
    place = cache.read_bytes().find(b"correct")
    flip(cache, place if place > 0 else cache.read_bytes().find(b"Answer"))
    os.utime(cache, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("kind", FORGED)
@pytest.mark.promise("G21", "wrong numbers and rows")
def test_rows_that_are_not_what_their_steps_say_are_named(finished: Path, kind: str) -> None:
    harm, wanted = FORGED[kind]
    harm(finished)
    (finished / "_OK.json").unlink()  # it names every step that was sealed again, and no more is said then
    said = found(finished, deep=True)
    assert any(wanted in line for line in said), said


# -- unfinished runs ------------------------------------------------------------------------------------------------------


def test_a_torn_tail_is_a_note_and_damage_before_it_is_not(unfinished: Path) -> None:
    log = unfinished / BEGUN / "wal.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-7])
    verification = verify_run(unfinished, deep=True)
    assert not verification.damages and [note.path for note in verification.notes] == [f"{BEGUN}/wal.jsonl"]
    assert f"from byte {whole[:-1].rfind(bytes([10])) + 1} on" in verification.notes[0].what
    first = whole.index(b"\n") + 1
    log.write_bytes(whole[:first] + whole[first:].replace(b'"finish":"', b'"finish":"x', 1))
    for deep in (False, True):
        (damage,) = damages(unfinished, deep=deep)
        assert damage.path == f"{BEGUN}/wal.jsonl" and damage.remedy == "log" and f"at byte {first})" in damage.what


def test_a_row_logged_twice_with_two_results_is_named(unfinished: Path) -> None:
    from reasonrun.ledger.wal_lines import encode_line, ordinal_of

    log = unfinished / BEGUN / "wal.jsonl"
    line = log.read_bytes().splitlines(keepends=True)[0]
    ordinal, size = ordinal_of(line), log.stat().st_size
    assert ordinal is not None
    with log.open("ab") as file:
        file.write(line)  # the same once more is no harm
        file.write(encode_line(ordinal, {"text": "other"}))
    (damage,) = damages(unfinished)
    assert damage.what == f"holds rows a second time with other results, in 1 line (at byte {size + len(line)})"


def test_a_step_of_an_unfinished_run_that_lost_its_seal_or_its_folder_is_named(unfinished: Path) -> None:
    (unfinished / "steps/round-001/evaluate/_OK.json").unlink()
    (damage,) = damages(unfinished, deep=False)
    assert damage.path == "steps/round-001/evaluate" and "metrics.jsonl has its line" in damage.what
    shutil.rmtree(unfinished / "steps/problems/train")
    said = sorted(found(unfinished, deep=True))
    assert len(said) == 2 and "steps/round-001/evaluate is not committed" in said[1]
    assert said[0] == "metrics.jsonl has a line of step problems/train, of which nothing is left"


def test_a_run_that_somebody_works_on_is_said_so(unfinished: Path) -> None:
    lock = RunLock.acquire(unfinished / LOCK_NAME, "reasonrun train it", Files())
    held: Verification = verify_run(unfinished, deep=False)
    assert held.worked_on_by is not None and held.worked_on_by.command == "reasonrun train it" and not held.damages
    lock.release()
    assert verify_run(unfinished, deep=False).worked_on_by is None  # this process lives on and has let go


@pytest.mark.parametrize("seed", [0, 2])
def test_nothing_is_found_wherever_a_run_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Faults one after the other in one run, a step made again in between; it is verified after each."""
    random = Random(seed)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    points = [point for point in FAULT_POINTS if not point.startswith(("ckpt.", "worker.", "borrow."))]
    settings = ["task.num_train=4", "task.num_dev=3", "task.num_test=3", "preflight=off", "engine.unit_rows=4"]
    path, num_interrupted = tmp_path / "run", 0
    for number in range(8):
        monkeypatch.setenv("REASONRUN_FAULT", f"{random.choice(points)}:exception:{random.randint(1, 6)}")
        redo = random.choice(["round-001/sample", "problems/dev"]) if number % 4 == 3 else None
        try:
            recipe = load("smoke_star", [*settings, f"method.rounds={1 + number // 4}"])
            run(recipe, RunOptions(directory=path, redo=redo), SilentProgress())
        except (InjectedFault, ReasonrunError):
            num_interrupted += 1
        monkeypatch.delenv("REASONRUN_FAULT")
        if (path / "run.json").exists():
            assert found(path, deep=True) == []
    assert num_interrupted >= 3


def test_a_run_of_a_build_with_other_digests_is_noted_and_not_called_damaged(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reasonrun.report.sealed_rows.ScoreFacts.digest", lambda *_: "computed otherwise")
    verification = verify_run(finished, deep=True)
    assert not verification.damages and "joins by digest are not checked" in verification.notes[0].what


def test_a_result_without_the_form_of_its_verb_is_named(finished: Path) -> None:
    reseal(finished / "steps/round-001/star_rows", lambda content: content["result"].update(kind="unheard of"))
    assert any(
        "have not the form of a curate step (KeyError('unheard of'))" in line for line in found(finished, deep=True)
    )


def test_one_bit_in_a_seal_stops_neither_repair_nor_training(finished: Path) -> None:
    change_text(finished / "steps/round-001/train/_OK.json", '"format": 1', '"format": 3')
    (damage,) = damages(finished, deep=False)
    assert damage.remedy == "redo"
    assert finished_content(finished, Files()) is None


STRANGE: dict[str, tuple[str, bytes, str]] = {
    "line of a list": ("metrics.jsonl", b'{"step":["a"]}\n', "metrics.jsonl line 1 is no line of a step"),
    "line of a path": ("metrics.jsonl", b'{"step":"../x"}\n', "metrics.jsonl line 1 is no line of a step"),
    "deep nesting": ("metrics.jsonl", b"[" * 200_000 + b"\n", "metrics.jsonl line 1 is no line of a step"),
    "inputs that are none": (
        f"steps/{SAMPLE}/step.json",
        b'{"name":"round-001/sample","fingerprint":{"inputs":5}}',
        f"steps/{SAMPLE}/step.json is no step record (its inputs are no names of steps)",
    ),
    "weights that are no names": (
        f"steps/{SAMPLE}/step.json",
        b'{"name":"round-001/sample","fingerprint":{"verb":"train","models":5,"rows":5}}',
        f"steps/{SAMPLE}/step.json holds another fingerprint than the one that was sealed",
    ),
    "seal of nothing": (f"steps/{SAMPLE}/_OK.json", b"[" * 200_000, f"steps/{SAMPLE}/_OK.json does not match"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_content_is_named_and_no_traceback(finished: Path, kind: str) -> None:
    file, content, wanted = STRANGE[kind]
    (finished / file).write_bytes(content)
    for deep in (False, True):
        assert any(line.startswith(wanted) for line in found(finished, deep=deep))


def test_hidden_files_and_unknown_folders_are_notes(finished: Path) -> None:
    step = finished / "steps/round-001/train"
    (step / "model/.DS_Store").write_bytes(b"x")
    (step / ".nfs0001").write_bytes(b"x")
    (step / "extra").mkdir()
    (step / "extra/a.bin").write_bytes(b"x")
    verification = verify_run(finished, deep=True)
    assert not verification.damages
    assert {Path(note.path).name: note.stale for note in verification.notes} == {
        ".DS_Store": False,
        ".nfs0001": False,
        "extra": True,
    }
    assert plan_repair(finished, verification.findings).files == ("steps/round-001/train/extra",)
