"""The exporter process: reads the run's files, writes W&B. Nothing waits for it, and it may die at any point.

Every history entry has a fixed W&B step, so exporting is "log the points that W&B does not have yet". What it has is
said by the server when it resumes a run, by W&B's own file when the last session was offline, else by the mark.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from reasonrun.errors import RunConflict
from reasonrun.trackers._wandb_mark import Mark, next_point, read_mark, write_mark
from reasonrun.trackers._wandb_points import Point, Projection, read_rows, read_seconds
from reasonrun.trackers._wandb_privacy import Scrubber
from reasonrun.trackers._wandb_samples import COLUMNS, sample_rows

POLL_SECONDS = 1.0
LOCK_SECONDS = 60.0
"""How long to wait for the exporter of an earlier attempt, which has a bounded time to finish."""
ORPHAN_SECONDS = 10.0
"""How long W&B's own process may go on writing after its exporter was killed."""
FLUSH_SECONDS = 1.0
MARK_SECONDS = 0.2
"""Replacing a file can cost 10 ms; W&B's own file says what the mark misses."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to export and as what. ``config`` is fit to leave the machine."""

    run_dir: Path  # absolute
    project: str
    entity: str | None
    mode: Literal["online", "offline"]
    num_sample_rows: int
    config: dict[str, Any]
    scrubber: Scrubber


class Session:
    """One ``wandb.init`` to ``finish``."""

    def __init__(self, job: Job, run_id: str) -> None:
        _prepare_environment(job.run_dir)
        import wandb

        self._wandb = wandb
        quiet = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            save_code=False,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
            x_transaction_log_flush_interval=FLUSH_SECONDS,
        )
        resume: dict[str, Any] = {"resume": "allow"} if job.mode == "online" else {}
        self._run = wandb.init(
            project=job.project,
            entity=job.entity,
            id=run_id,
            name=job.run_dir.name,
            dir=str(job.run_dir),
            mode=job.mode,
            config=job.config,
            settings=quiet,
            **resume,
        )
        self._defined: set[str] = set()

    @property
    def directory(self) -> Path:
        """W&B's folder of this session."""
        return Path(self._run.dir).parent

    @property
    def first_missing_step(self) -> int:
        """After the last step that the server has; 0 for a run that is new to it, and offline."""
        return int(self._run.starting_step)

    def log(self, step: int, point: Point, table: list[list[Any]]) -> None:
        """Hand one history entry over; W&B writes it in its own time."""
        for metric in point.metrics:
            glob = f"{metric.rpartition('/')[0]}/*"
            if "/" in metric and glob not in self._defined:
                self._run.define_metric(glob, step_metric=point.axis)
                self._defined.add(glob)
        data: dict[str, Any] = dict(point.metrics)
        if table:
            data[point.samples_key] = self._wandb.Table(columns=list(COLUMNS), data=table)
        self._run.log(data, step=step)

    def finish(self) -> None:
        """Give everything to W&B. Online this waits for the server."""
        self._run.finish()


@dataclass
class Exporter:
    """Exports the rows of one run directory; hold ``locked`` around it."""

    job: Job
    mark: Mark
    _session: Session | None = None
    _next: int = 0  # the first point that W&B lacks
    _point: int = 0  # the point that comes next when the rows are read on
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _projection: Projection | None = None
    _marked: float = 0.0

    @classmethod
    def resume(cls, job: Job) -> Exporter:
        """Continue the export of ``job.run_dir``, or begin it."""
        mark = read_mark(job.run_dir)
        if mark is None:
            return cls(job, Mark(run_id=_new_run_id()))
        _outlive(mark.processes)
        return cls(job, mark, _next=next_point(job.run_dir, mark))

    def export(self, lines: list[bytes]) -> None:
        """Log what W&B lacks of these rows (all lines of the metrics record so far)."""
        if self.mark.contradicts(lines):
            self.close()
            old = self.mark
            self.mark, self._next = Mark(run_id=_new_run_id(), superseded=(*old.superseded, old.run_id)), 0
        if self._session is None:
            if not self._lacks(lines):
                return
            self._open()
        assert self._session is not None and self._projection is not None
        self._projection.seconds = read_seconds(self.job.run_dir)
        for position in range(len(self._rows), len(lines)):
            row = json.loads(lines[position])
            for point in self._projection.points(row):
                if self._point >= self._next:
                    self._session.log(self._point, point, self._samples(point))
                self._point += 1
            self._rows.append(row)
            self._next = max(self._next, self._point)
            self.mark = self.mark.with_row(position, lines[position], self._next)
            self._write_mark(MARK_SECONDS)
        self._write_mark()

    def close(self) -> None:
        """Finish the session, if there is one, and note that W&B has all of it."""
        if self._session is not None:
            self._session.finish()
            self._session = None
            self.mark = replace(self.mark, is_clean=True, processes=())
            self._write_mark()

    def _lacks(self, lines: list[bytes]) -> bool:
        is_unsure = self.job.mode == "online" and not (self.mark.mode == "online" and self.mark.is_clean)
        projection = Projection(run_dir=self.job.run_dir)
        num_points = sum(len(projection.points(json.loads(line))) for line in lines)
        return num_points > (0 if is_unsure else self._next)

    def _open(self) -> None:
        self._write_mark()  # a start that fails halfway must not leave a second W&B run behind
        self._session = session = Session(self.job, self.mark.run_id)
        if self.job.mode == "online":
            is_known = self.mark.mode == "online" and self.mark.is_clean
            self._next = max(session.first_missing_step, self._next if is_known else 0)
        self._point, self._rows, self._projection = 0, [], Projection(run_dir=self.job.run_dir)
        self.mark = replace(
            self.mark,
            mode=self.job.mode,
            session_dir=os.path.relpath(session.directory, self.job.run_dir),
            first_point=self._next,
            is_clean=False,
            processes=tuple((p.pid, p.create_time()) for p in psutil.Process().children(recursive=True)),
        )
        self._write_mark()

    def _write_mark(self, wait_seconds: float = 0.0) -> None:
        if time.monotonic() - self._marked >= wait_seconds:
            write_mark(self.job.run_dir, self.mark)
            self._marked = time.monotonic()

    def _samples(self, point: Point) -> list[list[Any]]:
        if point.samples_of is None or not self.job.num_sample_rows:
            return []
        rows = sample_rows(self.job.run_dir, point.samples_of, self._rows, self.job.num_sample_rows)
        return [[self.job.scrubber.text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]


def follow(job: Job, is_over: Callable[[], bool]) -> Mark:
    """Export until ``is_over``, and once more after it; then finish. Returns how far the export is.

    Raises:
        RunConflict: another exporter is at work on this run.
    """
    with locked(job.run_dir):
        exporter = Exporter.resume(job)
        path, seen = job.run_dir / "metrics.jsonl", None
        while True:
            is_last = is_over()
            now = _version(path)
            if now != seen:
                exporter.export(read_rows(path))
                seen = now
            if is_last:
                exporter.close()
                return exporter.mark
            time.sleep(POLL_SECONDS)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """One exporter at a time. Raises RunConflict when another one does not end."""
    path = run_dir / "derived" / "wandb.lock"
    path.parent.mkdir(exist_ok=True)
    deadline = time.monotonic() + LOCK_SECONDS
    with path.open("ab") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RunConflict(
                        f"another process exports {run_dir} to W&B", hint="try again when that run has ended"
                    ) from None
                time.sleep(POLL_SECONDS / 5)
        yield


def _version(path: Path) -> tuple[int, int, int] | None:
    with suppress(FileNotFoundError):
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None


def _outlive(processes: tuple[tuple[int, float], ...]) -> None:
    """Wait until W&B's own process of a killed exporter has written what it holds, so that its file can be believed."""
    alive = []
    for pid, began in processes:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            if abs(process.create_time() - began) < 1:
                alive.append(process)
    _, stuck = psutil.wait_procs(alive, timeout=ORPHAN_SECONDS)
    for process in stuck:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _new_run_id() -> str:
    return os.urandom(5).hex()


def _prepare_environment(run_dir: Path) -> None:
    """All of W&B's files go below the run; what says which W&B run this is comes from the mark alone."""
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM", "WANDB_NAME", "WANDB_SERVICE"):
        os.environ.pop(name, None)
    folder = run_dir / "wandb"
    folder.mkdir(exist_ok=True)
    os.environ["WANDB_DATA_DIR"] = os.environ["WANDB_ARTIFACT_DIR"] = str(folder / "data")
    os.environ["WANDB_CACHE_DIR"] = str(folder / "cache")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
