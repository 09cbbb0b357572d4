"""``verify`` and ``repair`` as a user meets them: exit codes, one JSON document, and a run that ends as if nothing had been."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from test_commands import reasonrun_cli

from reasonrun.cli.main import main
from reasonrun.cli.progress import SilentProgress
from reasonrun.errors import ReasonrunError, RunFailed
from reasonrun.ledger.files import Files
from reasonrun.ledger.lock import LOCK_NAME, RunLock
from reasonrun.recipe import load
from reasonrun.running import RunOptions, run

SMALL = ("task.num_train=8", "task.num_dev=4", "task.num_test=4", "method.rounds=2", "preflight=off")
FINAL = ("steps", "metrics.jsonl", "run.json", "_OK.json")


def train(path: Path, *overrides: str) -> Path:
    with suppress(RunFailed):
        run(load("smoke_star", [*SMALL, *overrides]), RunOptions(directory=path), SilentProgress())
    return path


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("clean") / "run")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped while it sampled in round 1; see ``engine.fail_at_unit``."""
    return train(tmp_path_factory.mktemp("stopped") / "run", "engine.unit_rows=8", "engine.fail_at_unit=4")


def tree(path: Path) -> dict[str, bytes]:
    found = [file for name in FINAL for file in [path / name, *(path / name).rglob("*")] if file.is_file()]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in found}


def everything(path: Path) -> dict[str, tuple[int, bytes]]:
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Exit code and output of a command, without a process of its own."""

    def invoke(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["reasonrun", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().out

    return invoke


Call = Callable[..., tuple[int, str]]


def test_a_sound_run_exits_0_and_has_nothing_to_repair(clean: Path, stopped: Path, call: Call) -> None:
    for path in (clean, stopped):
        before = everything(path)
        for command in (["verify"], ["verify", "--deep"], ["repair"], ["repair", "--yes"]):
            code, out = call(*command, str(path))
            assert code == 0 and ("nothing is damaged" in out or "nothing to repair" in out)
        document = json.loads(call("verify", str(path), "--deep", "--json")[1])
        assert document["ok"] and document["damages"] == [] and document["worked_on_by"] is None
        assert document["state"] == ("finished" if path == clean else "unfinished")
        assert everything(path) == before


def test_no_run_directory_is_exit_2_and_one_document(tmp_path: Path) -> None:
    for command in ("verify", "repair"):
        done = reasonrun_cli(tmp_path, command, "nowhere", "--json")
        assert done.returncode == 2 and json.loads(done.stdout)["exit_code"] == 2


def test_damage_is_exit_1_with_path_promise_and_way_out(clean: Path, tmp_path: Path, call: Call) -> None:
    path = Path(shutil.copytree(clean, tmp_path / "run"))
    (path / "steps/round-001/grade/rows-00000.parquet").unlink()
    code, out = call("verify", str(path))
    assert code == 1 and "damaged: steps/round-001/grade/rows-00000.parquet is missing" in out
    assert "promise: G5, what is committed stays as it is" in out and f"`reasonrun repair {path}`" in out
    code, out = call("verify", str(path), "--json")
    (damage,) = json.loads(out)["damages"]
    assert code == 1 and damage["step"] == "round-001/grade" and damage["remedy"] == "redo"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def swap(run: Path) -> None:
    (run / "steps/round-001/grade").rename(run / "between")
    (run / "steps/round-002/grade").rename(run / "steps/round-001/grade")
    (run / "between").rename(run / "steps/round-002/grade")


def several(run: Path) -> None:
    flip(run / "steps/round-001/sample/rows-00000.parquet")
    truncate(run / "metrics.jsonl")
    (run / "attempts/1/attempt.json").write_text("{")
    (run / "steps/round-002/half.tmp").write_text("half")


HARMS: dict[str, Callable[[Path], Any]] = {
    "bit flip": lambda run: flip(run / "steps/round-001/sample/rows-00000.parquet"),
    "truncated": lambda run: truncate(run / "steps/problems/train/rows-00000.parquet"),
    "deleted file": lambda run: (run / "steps/round-001/train/model/model.safetensors").unlink(),
    "deleted step": lambda run: shutil.rmtree(run / "steps/round-002/grade"),
    "deleted last step": lambda run: shutil.rmtree(run / "steps/final-trainings=2/test-base"),
    "seal gone": lambda run: (run / "steps/round-001/star_rows/_OK.json").unlink(),
    "seal edited": lambda run: truncate(run / "steps/round-001/star_rows/_OK.json"),
    "record torn": lambda run: truncate(run / "steps/round-001/sample/step.json"),
    "extra file": lambda run: (run / "steps/round-001/sample/extra.json").write_text("1"),
    "exchanged folders": swap,
    "metrics line gone": lambda run: (run / "metrics.jsonl").write_bytes(
        b"".join((run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[1:])
    ),
    "metrics gone": lambda run: (run / "metrics.jsonl").unlink(),
    "root seal": lambda run: truncate(run / "_OK.json"),
    "several": several,
}


@pytest.mark.parametrize("kind", HARMS)
def test_a_repaired_run_verifies_and_ends_with_the_bytes_of_an_undamaged_one(
    clean: Path, tmp_path: Path, call: Call, kind: str
) -> None:
    path = Path(shutil.copytree(clean, tmp_path / "run"))
    HARMS[kind](path)
    harmed = everything(path)
    code, out = call("repair", str(path))
    assert code == 0 and "nothing was touched; --yes does this" in out
    assert out.count("removed: ") <= 1
    planned = json.loads(call("repair", str(path), "--json")[1])
    assert not planned["done"] and planned["damages"] and everything(path) == harmed
    done = json.loads(call("repair", str(path), "--yes", "--json")[1])
    kept = ("steps_to_quarantine", "files_to_quarantine", "logs_to_cut")
    assert done["done"] and {key: done[key] for key in kept} == {key: planned[key] for key in kept}
    moved = {content for _, content in everything(path / "quarantine").values()}
    gone = {name: content for name, (_, content) in harmed.items() if not Path(name).exists()}
    assert all(content in moved for name, content in gone.items() if "/derived/" not in name)  # nothing is deleted
    assert call("verify", str(path), "--deep")[0] == 0
    assert call("repair", str(path)) == (0, f"{path}: nothing to repair\n")
    train(path)
    assert tree(path) == tree(clean)
    assert call("verify", str(path), "--deep")[0] == 0


def damage_log(run: Path) -> None:
    log = run / "steps/round-001/sample/wal.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([lines[0], lines[1].replace(b"finish", b"finisH"), *lines[2:]]))


@pytest.mark.parametrize("with_more", [False, True])
def test_a_damaged_log_keeps_the_rows_that_verify(
    clean: Path, stopped: Path, tmp_path: Path, call: Call, with_more: bool
) -> None:
    path = Path(shutil.copytree(stopped, tmp_path / "run"))
    damage_log(path)
    if with_more:
        (path / "steps/round-001/evaluate/_OK.json").unlink()
    log = path / "steps/round-001/sample/wal.jsonl"
    before, num_lines = log.read_bytes(), log.read_bytes().count(b"\n")
    offset = before.index(b"\n") + 1
    code, out = call("repair", str(path))
    assert code == 0 and f"1 line (at byte {offset}) in the middle" in out and log.read_bytes() == before
    assert "done, 1 lines of logs given up" in call("repair", str(path), "--yes")[1]
    assert log.read_bytes().count(b"\n") == num_lines - 1
    (aside,) = path.glob("quarantine/*/steps/round-001/sample/wal.jsonl.damaged")
    assert aside.read_bytes() == before
    assert call("verify", str(path), "--deep")[0] == 0
    train(path)
    assert {name: data for name, data in tree(path).items() if name != "run.json"} == {
        name: data
        for name, data in tree(clean).items()
        if name != "run.json"  # it was begun with smaller units
    }


def test_two_stops_before_the_first_line_of_the_record_are_no_damage(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    monkeypatch.setenv("REASONRUN_FAULT", "projection.before_rename:EIO")
    for _ in range(2):
        train(path)
    monkeypatch.delenv("REASONRUN_FAULT")
    assert len(list(path.glob("steps/**/_OK.json"))) == 2 and not (path / "metrics.jsonl").exists()
    code, out = call("verify", str(path))
    assert code == 0 and "note: metrics.jsonl is missing, although 2 steps are committed" in out
    code, out = call("repair", str(path), "--yes")
    assert code == 0 and "metrics.jsonl\n" not in out and call("verify", str(path))[0] == 0


@pytest.mark.promise("G7", "changed recipes")
def test_a_changed_recipe_is_not_guessed(clean: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(clean, tmp_path / "run"))
    (path / "run.json").write_text((path / "run.json").read_text().replace('"seed": 0', '"seed": 1'))
    before = everything(path)
    done = reasonrun_cli(tmp_path, "repair", "run", "--yes")
    assert done.returncode == 1 and "restore it from a backup" in done.stderr and "Traceback" not in done.stderr
    assert everything(path) == before
    done = reasonrun_cli(tmp_path, "repair", "run")
    assert done.returncode == 1 and "left as it is: run.json" in done.stdout


def test_a_run_that_lost_its_recipe_is_a_run_and_stays_as_it_is(clean: Path, tmp_path: Path, call: Call) -> None:
    path = Path(shutil.copytree(clean, tmp_path / "run"))
    (path / "run.json").unlink()
    before = everything(path)
    code, out = call("verify", str(path), "--deep")
    assert code == 1 and "damaged: run.json is missing" in out and "1 damaged" in out
    assert "restore it from a backup" in call("repair", str(path))[1] and call("repair", str(path), "--yes")[0] == 1
    assert everything(path) == before
    (tmp_path / "empty/steps").mkdir(parents=True)  # a stop before the recipe was written
    assert call("verify", str(tmp_path / "empty"))[0] == 2


def test_a_run_that_somebody_works_on_is_not_repaired(clean: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(clean, tmp_path / "run"))
    flip(path / "steps/round-001/sample/rows-00000.parquet")
    lock = RunLock.acquire(path / LOCK_NAME, "reasonrun train it", Files())
    before = everything(path)
    done = reasonrun_cli(tmp_path, "repair", "run", "--yes", "--json")
    assert done.returncode == 4 and "in use by process" in json.loads(done.stdout)["message"]
    done = reasonrun_cli(tmp_path, "verify", "run", "--deep")
    assert done.returncode == 1 and "is working on this run: reasonrun train it" in done.stdout
    assert everything(path) == before
    lock.release()


@pytest.mark.parametrize("point", ["set_aside.before_rename", "set_aside.after_rename"])
def test_a_repair_that_is_interrupted_is_repeated(
    clean: Path, tmp_path: Path, call: Call, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for nth in (1, 2, 5, 30):
        path = Path(shutil.copytree(clean, tmp_path / str(nth)))
        flip(path / "steps/round-001/sample/rows-00000.parquet")
        monkeypatch.setenv("REASONRUN_FAULT", f"{point}:EIO:{nth}")
        with suppress(ReasonrunError):
            call("repair", str(path), "--yes")
        monkeypatch.delenv("REASONRUN_FAULT")
        assert call("repair", str(path), "--yes")[0] == 0 and call("verify", str(path), "--deep")[0] == 0
        train(path)
        assert tree(path) == tree(clean)


def test_neither_command_imports_torch_or_the_recipes_libraries(clean: Path) -> None:
    code = "import sys; from reasonrun.cli.main import main; sys.argv = ['reasonrun', *sys.argv[1:]]\ntry: main()\n"
    code += (
        "except SystemExit: pass\nbad = {'torch', 'transformers', 'hydra'} & set(sys.modules); sys.exit(str(bad or ''))"
    )
    import subprocess

    for command in (["verify", str(clean), "--deep"], ["repair", str(clean)]):
        done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
        assert done.stderr.strip() == "", done.stderr
