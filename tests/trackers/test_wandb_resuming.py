"""Which points a session begins with, against a W&B that keeps what it is sent, as the server does."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from wandb_runs import write_metrics

from reasonrun.errors import RunConflict
from reasonrun.trackers import _wandb_export
from reasonrun.trackers._wandb_export import Exporter, Job, follow, locked
from reasonrun.trackers._wandb_mark import Mark, read_mark
from reasonrun.trackers._wandb_points import read_rows
from reasonrun.trackers._wandb_privacy import Scrubber


class Server:
    """Keeps each run's history; refuses steps out of order, which W&B would drop."""

    def __init__(self) -> None:
        self.runs: dict[str, list[tuple[int, Any]]] = {}
        self.sessions: list[dict[str, Any]] = []
        self.is_up = True

    def init(self, **options: Any) -> Any:
        if not self.is_up:
            raise RuntimeError("no network")
        self.sessions.append(options)
        held = self.runs.setdefault(options["id"], []) if options["mode"] == "online" else []

        def log(data: dict[str, Any], step: int) -> None:
            assert step == (held[-1][0] + 1 if held else 0) or options["mode"] == "offline"
            held.append((step, data["n/value"]))

        return SimpleNamespace(
            dir=str(Path(options["dir"]) / "wandb" / f"session-{len(self.sessions)}" / "files"),
            starting_step=held[-1][0] + 1 if held else 0,
            define_metric=lambda *a, **k: None,
            log=log,
            finish=lambda: None,
        )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    found = Server()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=found.init, Settings=SimpleNamespace))  # type: ignore[arg-type]
    monkeypatch.setattr(_wandb_export, "_prepare_environment", lambda run_dir: None)
    return found


def write(run: Path, values: list[int]) -> None:
    write_metrics(run, [{"step": "n", "verb": "sample", "value": value} for value in values])


def job(run: Path, mode: Literal["online", "offline"] = "online") -> Job:
    return Job(run_dir=run, project="p", entity=None, mode=mode, num_sample_rows=5, config={}, scrubber=Scrubber(()))


def export(run: Path, mode: Literal["online", "offline"] = "online") -> str:
    return follow(job(run, mode), lambda: True).run_id


def test_the_server_says_what_it_has(server: Server, tmp_path: Path) -> None:
    write(tmp_path, [10, 11, 12, 13])
    run_id = export(tmp_path)
    assert server.runs[run_id] == [(0, 10), (1, 11), (2, 12), (3, 13)]
    assert server.sessions[0]["resume"] == "allow"

    exporter = Exporter.resume(job(tmp_path))  # dies before it finishes: nobody knows what arrived
    write(tmp_path, [10, 11, 12, 13, 14, 15])
    exporter.export(read_rows(tmp_path / "metrics.jsonl"))
    del server.runs[run_id][5:]  # the last entry never reached the server
    write(tmp_path, [10, 11, 12, 13, 14, 15, 16])
    assert export(tmp_path) == run_id
    assert server.runs[run_id] == [(n, 10 + n) for n in range(7)]


def test_a_server_that_lags_behind_gets_nothing_twice(server: Server, tmp_path: Path) -> None:
    write(tmp_path, [10, 11])
    run_id = export(tmp_path)
    server.runs[run_id].clear()
    exporter = Exporter.resume(job(tmp_path))
    write(tmp_path, [10, 11, 12])
    with pytest.raises(AssertionError):  # this server refuses a gap: the session began after the two rows it took
        exporter.export(read_rows(tmp_path / "metrics.jsonl"))


def test_nothing_new_opens_no_session(server: Server, tmp_path: Path) -> None:
    write(tmp_path, [10, 11])
    export(tmp_path)
    export(tmp_path)
    assert len(server.sessions) == 1


def test_going_online_sends_what_the_offline_sessions_kept_to_themselves(server: Server, tmp_path: Path) -> None:
    write(tmp_path, [10, 11])
    run_id = export(tmp_path, "offline")
    assert "resume" not in server.sessions[0]
    assert export(tmp_path) == run_id
    assert server.runs[run_id] == [(0, 10), (1, 11)]


def test_a_step_made_again_begins_a_new_wandb_run(server: Server, tmp_path: Path) -> None:
    write(tmp_path, [10, 11, 12])
    old = export(tmp_path)
    exporter = Exporter.resume(job(tmp_path))
    for values in ([10, 11], [10, 21], [10, 21, 22]):  # the second step is made again: the record shrinks, then differs
        write(tmp_path, values)
        exporter.export(read_rows(tmp_path / "metrics.jsonl"))
    exporter.close()
    mark = read_mark(tmp_path)
    assert mark is not None and mark.superseded == (old,)
    assert server.runs == {old: [(0, 10), (1, 11), (2, 12)], mark.run_id: [(0, 10), (1, 21), (2, 22)]}


def test_a_step_made_again_with_the_same_result_changes_nothing(server: Server, tmp_path: Path) -> None:
    write(tmp_path, [10, 11, 12])
    old = export(tmp_path)
    for values in ([10], [10, 11, 12, 13]):
        write(tmp_path, values)
        assert export(tmp_path) == old
    assert server.runs == {old: [(0, 10), (1, 11), (2, 12), (3, 13)]}


def test_a_failed_init_leaves_the_mark_for_later(server: Server, tmp_path: Path) -> None:
    write(tmp_path, [10])
    server.is_up = False
    with pytest.raises(RuntimeError, match="no network"):
        export(tmp_path)
    begun = read_mark(tmp_path)
    assert begun is not None and begun.num_rows == 0
    server.is_up = True
    assert export(tmp_path) == begun.run_id
    write(tmp_path, [10, 11])
    server.is_up = False
    with pytest.raises(RuntimeError, match="no network"):
        export(tmp_path)
    server.is_up = True
    assert export(tmp_path) == begun.run_id
    assert server.runs == {begun.run_id: [(0, 10), (1, 11)]}


def test_going_over_exported_rows_forgets_none_of_them() -> None:
    mark = Mark(run_id="r")
    for position, line in enumerate([b"a", b"b", b"c"]):
        mark = mark.with_row(position, line, position + 1)
    again = mark.with_row(0, b"a", 3)  # a new session reads the rows from the top, and may die here
    assert (again.num_rows, again.num_points) == (3, 3)
    assert again.contradicts([b"a", b"b", b"x"])
    assert not again.contradicts([b"a", b"b", b"c", b"d"])


def test_one_exporter_at_a_time(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_wandb_export, "LOCK_SECONDS", 0.1)
    write(tmp_path, [10])
    with locked(tmp_path), pytest.raises(RunConflict, match="another process exports"):
        export(tmp_path)
    assert server.sessions == []
    export(tmp_path)
    assert len(server.sessions) == 1
