"""Run directories and steps: what is committed, refused, redone, set aside."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from reasonrun.errors import EnvironmentProblem, RecipeError, RunConflict, RunFailed, Stopped
from reasonrun.ledger import tables
from reasonrun.ledger.faults import Faults
from reasonrun.ledger.files import Files
from reasonrun.ledger.fingerprints import differences
from reasonrun.ledger.repairing import keep_good_rows
from reasonrun.ledger.run_dir import RunDir
from reasonrun.ledger.steps import Committed, OpenStep
from reasonrun.records import Score, digest
from reasonrun.sets import Rows
from toy_run import toy_row, toy_run

Tree = Callable[[Path], dict[str, bytes]]

pytestmark = pytest.mark.usefixtures("no_fsync")


def open_run(path: Path, **options: Any) -> RunDir:
    return RunDir.open(path, identity={"recipe": "r", "rounds": 2}, command="c", files=Files(Faults()), **options)


def begin(run: RunDir, name: str, fingerprint: dict[str, Any] | None = None) -> OpenStep:
    step = run.step(name, {"verb": "x"} if fingerprint is None else fingerprint)
    assert isinstance(step, OpenStep)
    return step


def commit(run: RunDir, name: str, inputs: tuple[str, ...] = ()) -> Committed:
    return begin(run, name, {"verb": "x", "inputs": inputs}).commit({"name": name})


def everything(path: Path) -> dict[str, tuple[bytes, int]]:
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def test_a_finished_run_hands_back_its_result_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run"
    result = toy_run(path, num_units=2)
    before = everything(path)
    run = open_run(path)
    assert run.finished == result and run.identity == {"recipe": "toy", "num_units": 2} and run.attempt is None
    with pytest.raises(ValueError, match="not held"):
        run.step("a", {})
    run.close()
    assert everything(path) == before
    (path / "steps/round-001/train/model/state.txt").unlink()
    with open_run(path) as run:  # no longer what was finished
        assert run.finished is None and run.attempt is not None and run.attempt.number == 2


def test_a_committed_step_comes_back_with_what_was_put_in(tmp_path: Path) -> None:
    rows = [toy_row(i) for i in range(5)]
    with open_run(tmp_path / "run") as run:
        assert run.attempt is not None
        step = begin(run, "round-001/sample")
        assert step.seal_table("rows", Score, rows) == 5
        assert step.seal_table("left-out", Score, []) == 0
        step.put_json("counts", {"kept": 5, "é\ud800": None})
        made = run.attempt.path / "made"
        made.mkdir()
        (made / "weights").write_bytes(b"w")
        step.adopt_folder(made, "model")
        step.commit({"kept": 5})
    with open_run(tmp_path / "run") as run:
        step_again = run.step("round-001/sample", {"verb": "x"})
        assert isinstance(step_again, Committed)
        step_again.verify(deep=True)
        assert step_again.result == {"kept": 5} and step_again.fingerprint_digest == digest({"verb": "x"})
        assert list(Rows.load(Score, step_again.table_paths(), tmp_path / "cache")) == rows
        assert len(Rows.load(Score, step_again.table_paths("left-out"), tmp_path / "cache")) == 0
        assert step_again.json("counts") == {"kept": 5, "é\ud800": None}
        assert (step_again.folder("model") / "weights").read_bytes() == b"w"
        hashes = {
            name: hashlib.sha256((step_again.path / name).read_bytes()).hexdigest()
            for name in ("counts.json", "left-out-00000.parquet", "model/weights", "rows-00000.parquet")
        }
        assert step_again.digest == digest({"files": hashes, "result": {"kept": 5}})
        for call in (step_again.table_paths, step_again.folder, step_again.json):
            with pytest.raises(KeyError, match="absent"):
                call("absent")
        assert run.steps() == {"round-001/sample": "committed"}


@pytest.mark.parametrize("is_committed", [True, False])
def test_another_fingerprint_is_refused_and_every_difference_named(tmp_path: Path, is_committed: bool) -> None:
    old = {"verb": "train", "settings": {"lr": 0.1, "steps": 3}, "rows": ["a", "b"], "text": "x" * 200}
    new = {"verb": "train", "settings": {"lr": 0.2, "steps": 3, "beta": True}, "rows": ["a"], "text": "y"}
    with open_run(tmp_path / "run") as run:
        step = begin(run, "train", old)
        if is_committed:
            step.commit({})
    with open_run(tmp_path / "run") as run:
        with pytest.raises(RunConflict) as caught:
            run.step("train", new)
        long = '"' + "x" * 58 + "…"
        assert caught.value.message.splitlines()[1:] == [
            '  rows.1: "b" -> (absent)',
            "  settings.beta: (absent) -> true",
            "  settings.lr: 0.1 -> 0.2",
            f'  text: {long} -> "y"',
        ]
        assert "Step train" in caught.value.message
        assert all(way in caught.value.hint for way in ("revert", "--run NEW", "--redo train"))
        assert isinstance(run.step("train", old), Committed if is_committed else OpenStep)


def test_at_most_ten_differences_are_shown_and_types_count(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        begin(run, "a", {f"k{i:02d}": i for i in range(13)}).commit({})
        with pytest.raises(RunConflict) as caught:
            run.step("a", {})
    assert len(caught.value.message.splitlines()) == 12 and "and 3 more" in caught.value.message
    assert differences({"a": 1, "b": 1}, {"a": True, "b": 1.0}) == ["a: 1 -> true", "b: 1 -> 1.0"]


def test_damage_to_committed_files_is_found(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with open_run(path) as run:
        step = begin(run, "a")
        step.put_json("value", {"n": 1})
        step.commit({})
    value = path / "steps" / "a" / "value.json"
    value.write_bytes(value.read_bytes().replace(b"1", b"2"))
    with open_run(path) as run:
        committed = run.step("a", {"verb": "x"})
        assert isinstance(committed, Committed)
        with pytest.raises(RunFailed, match=r"value\.json does not match"):
            committed.verify(deep=True)
        value.write_bytes(b"{}")
        with pytest.raises(RunFailed, match="has 2 bytes") as caught:
            run.step("a", {"verb": "x"})
        assert "--redo a" in caught.value.hint
        value.unlink()
        with pytest.raises(RunFailed, match="is missing"):
            run.step("a", {"verb": "x"})
        seal = path / "steps" / "a" / "_OK.json"
        seal.write_bytes(seal.read_bytes().replace(b'"size": ', b'"size": 1'))
        with pytest.raises(RunFailed, match="own digest"):
            run.step("a", {"verb": "x"})
        assert run.redo("a") == ["a"]
        assert isinstance(run.step("a", {"verb": "x"}), OpenStep)
    (path / "run.json").write_text("{")
    with pytest.raises(RunFailed, match=r"run\.json is damaged"):
        open_run(path)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        commit(run, "a")
        seal = tmp_path / "run/steps/a/_OK.json"
        value = {**json.loads(seal.read_text()), "format": 99}
        seal.write_text(json.dumps(value))
        with pytest.raises(RunFailed, match="is damaged"):  # its digest is that of the present format
            run.step("a", {"verb": "x", "inputs": []})
        seal.write_text(json.dumps({**value, "digest": "computed otherwise"}))
        with pytest.raises(EnvironmentProblem, match="format 99"):
            run.step("a", {"verb": "x", "inputs": []})


def test_redo_moves_a_step_and_what_depends_on_it(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with open_run(path) as run:
        commit(run, "sample")
        commit(run, "sample/nested")
        commit(run, "grade", ("sample",))
        commit(run, "curate", ("grade", "sample"))
        commit(run, "other")
        begin(run, "train", {"inputs": ["curate"]})
        with pytest.raises(ValueError, match="train was begun"):
            run.finish({})
    with open_run(path) as run:
        with pytest.raises(RecipeError, match="no step 'grad'") as caught:
            run.redo("grad")
        assert "grade" in caught.value.hint
        order = run.redo("sample")
        assert sorted(order) == ["curate", "grade", "sample", "train"]
        assert [order.index(name) for name in ("train", "curate", "grade", "sample")] == [0, 1, 2, 3]
        assert run.steps() == {"other": "committed", "sample/nested": "committed"}
        assert json.loads((path / "quarantine/1/steps/grade/_OK.json").read_text())["content"]["result"] == {
            "name": "grade"
        }
        commit(run, "sample")
        run.step("other", {"verb": "x", "inputs": []})
        run.finish({"done": 1})
    with open_run(path, reopen=True) as run:
        assert run.finished == {"done": 1}
        run.redo("other")
        assert run.finished is None
    assert (path / "quarantine/2/_OK.json").exists() and not (path / "_OK.json").exists()


def test_a_step_whose_files_are_gone_is_made_again_with_what_read_it(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with open_run(path) as run:
        commit(run, "gone")
        commit(run, "last")
        commit(run, "reader", ("gone",))
        run.finish({})
    root = (path / "_OK.json").read_bytes()
    for name, moved in (("gone", ["reader"]), ("last", [])):
        shutil.rmtree(path / "steps" / name)
        (path / "_OK.json").write_bytes(root)
        with open_run(path, reopen=True) as run:
            with pytest.raises(RecipeError, match="has no step 'other'"):
                run.redo("other")
            assert run.redo(name) == moved and not (path / "_OK.json").exists()


def test_unreached_steps_are_listed_and_pruned_only_by_name(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        for name in ("a", "b", "b/c"):
            commit(run, name)
    with open_run(tmp_path / "run") as run:
        run.step("a", {"verb": "x", "inputs": []})
        begin(run, "new")
        begin(run, "begun")
        run.reached.discard("begun")
        assert run.reached == {"a", "new"} and run.unreached() == ["b", "b/c", "begun"]
        with pytest.raises(RunConflict, match="Step a is in use"):
            run.prune(["a"])
        run.prune(["b", "begun"])
        assert run.steps() == {"a": "committed", "b/c": "committed", "new": "begun"}


def test_only_the_latest_intact_checkpoint_counts_and_all_leave_at_commit(tmp_path: Path) -> None:
    path = tmp_path / "run"

    def save(run: RunDir, step: OpenStep, number: int) -> Path:
        assert run.attempt is not None
        folder = run.attempt.path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "state").write_text(f"state {number}")
        return step.adopt_checkpoint(folder, number)

    with open_run(path) as run:
        step = begin(run, "train")
        assert step.latest_checkpoint() is None
        save(run, step, 5)
        kept = {file: file.read_bytes() for file in save(run, step, 10).iterdir()}
        assert [folder.name for folder in (step.path / "checkpoints").iterdir()] == ["10"]
        damaged = save(run, step, 15)
        (damaged / "state").write_text("state 1X")
        kept_folder = damaged.parent / "10"
        kept_folder.mkdir()
        for file, data in kept.items():
            file.write_bytes(data)
        (damaged.parent / "20").mkdir()  # no seal
    with open_run(path) as run:
        step = begin(run, "train")
        assert step.latest_checkpoint() == (kept_folder, 10)
        save(run, step, 15)
        assert step.latest_checkpoint() == (damaged, 15)
        assert (path / "quarantine/1/steps/train/checkpoints/15/state").read_text() == "state 1X"
        step.commit({})
        assert sorted(file.name for file in step.path.iterdir()) == ["_OK.json", "step.json"]


def test_what_an_earlier_attempt_left_unsealed_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with open_run(path) as run:
        step = begin(run, "a")
        step.put_json("old", 1)
        step.seal_table("rows", Score, [toy_row(1)])
    with open_run(path) as run:
        begin(run, "a").commit({})
        assert sorted(file.name for file in (path / "steps/a").iterdir()) == ["_OK.json", "step.json"]
    aside = sorted(file.name for file in (path / "quarantine/1/steps/a").iterdir())
    assert aside == ["old.json", "rows-00000.parquet"]


def test_sealed_bytes_depend_on_the_rows_alone_and_shards_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "SHARD_ROWS", 50)
    monkeypatch.setattr(tables, "ROW_GROUP_ROWS", 20)
    rows = [toy_row(i) for i in range(120)]
    digests = []
    for name in ("one", "two"):
        with open_run(tmp_path / name) as run:
            step = begin(run, "a")
            assert step.seal_table("rows", Score, iter(rows)) == 120
            committed = step.commit({})
            digests.append(committed.digest)
            files = [pq.ParquetFile(shard) for shard in committed.table_paths()]
            sizes = [[f.metadata.row_group(i).num_rows for i in range(f.num_row_groups)] for f in files]
            assert sizes == [[20, 20, 10], [20, 20, 10], [20]]
            assert all(f.schema_arrow.metadata is None for f in files)
            assert list(Rows.load(Score, committed.table_paths(), tmp_path / "cache")) == rows
    assert digests[0] == digests[1]


def test_names_that_collide_with_a_steps_own_files_are_refused(tmp_path: Path) -> None:
    with open_run(tmp_path / "run") as run:
        for name in ("", "/a", "a//b", "a/../b", "a/model", "checkpoints", "a.json", "_OK.json", "a/b.parquet", "a b"):
            with pytest.raises(ValueError, match="cannot name a step"):
                run.step(name, {})
        step = begin(run, "round-001/T=0.5")
        for name in ("step", "../x", "_OK"):
            with pytest.raises(ValueError, match="cannot name a value"):
                step.put_json(name, 1)
        for name in ("checkpoints/1", "other", "model/../x"):
            with pytest.raises(ValueError, match="cannot name a folder"):
                step.adopt_folder(tmp_path, name)
        with pytest.raises(ValueError, match="open already"):
            run.step("round-001/T=0.5", {"verb": "x"})


def test_a_folder_with_other_things_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RunConflict, match=r"thesis\.tex"):
        open_run(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(EnvironmentProblem, match="Cannot access"):
        open_run(tmp_path / "thesis.tex" / "run")


def test_attempts_are_numbered_and_remembered_and_an_amended_run_is_open_again(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with open_run(path, attempt={"code": {"star": "abc"}}) as run:
        assert run.attempt is not None and run.attempt.number == 1 and run.earlier_attempts == []
        run.finish({"accuracy": 1})
    with open_run(path, reopen=True) as run:
        assert [(a["attempt"], a["code"], a["command"]) for a in run.earlier_attempts] == [(1, {"star": "abc"}, "c")]
        run.amend({"recipe": "r", "rounds": 3})
    with open_run(path) as run:
        assert run.finished is None and run.identity == {"recipe": "r", "rounds": 3}
    assert json.loads((path / "quarantine/1/run.json").read_text())["identity"]["rounds"] == 2


def test_a_projection_is_replaced_only_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    with open_run(tmp_path / "run") as run:
        run.write_projection("metrics.jsonl", [{"a": 1}, {"a": 2}])
        inode = path.stat().st_ino
        run.write_projection("metrics.jsonl", [{"a": 1}, {"a": 2}])
        assert path.read_text() == '{"a":1}\n{"a":2}\n' and path.stat().st_ino == inode
        run.write_projection("metrics.jsonl", [{"a": 3}])
        assert path.read_text() == '{"a":3}\n'


def test_a_stopped_run_flushes_its_logs_and_a_damaged_log_can_be_repaired(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(Stopped), open_run(path) as run:
        step = begin(run, "a")
        step.wal().append([(i, {"n": i}) for i in range(3)])
        step.wal("other").append([(0, {"n": 0})])
        raise Stopped("stopped")
    log = path / "steps/a/wal.jsonl"
    inode = (path / "steps/a/wal-other.jsonl").stat().st_ino
    log.write_bytes(log.read_bytes().replace(b'"n":1', b'"n":7'))
    with open_run(path) as run:
        with pytest.raises(RunFailed, match="damaged at byte") as caught:
            begin(run, "a").wal()
        assert f"reasonrun repair {path}" in caught.value.hint and "--redo a" in caught.value.hint
    with open_run(path) as run:
        assert keep_good_rows(run, "a") == 1
        assert begin(run, "a").wal().missing(3).tolist() == [1]
    assert (path / "steps/a/wal-other.jsonl").stat().st_ino == inode  # a healthy one is not written again


def test_a_failed_flush_ends_the_attempt(tmp_path: Path) -> None:
    files = Files(Faults("json.before_fsync", "EIO"))
    with RunDir.open(tmp_path / "run", identity={}, command="c", files=files) as run:
        step = begin(run, "a")
        with pytest.raises(RunFailed, match="disk failed"):
            step.put_json("value", 1)
        with pytest.raises(RunFailed, match="writes no more"):
            step.put_json("value", 1)
        with pytest.raises(RunFailed, match="writes no more"):
            step.commit({})
    with open_run(tmp_path / "run") as run:
        assert run.steps() == {"a": "begun"}
        step = begin(run, "a")
        step.put_json("value", 1)
        assert step.commit({}).json("value") == 1


def test_nothing_of_clock_host_or_process_is_in_a_step(tmp_path: Path, tree: Tree) -> None:
    for name in ("one", "two"):
        toy_run(tmp_path / name, num_units=3)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert not [name for name in tree(tmp_path / "one") if "wal" in name or "checkpoint" in name or ".tmp" in name]
