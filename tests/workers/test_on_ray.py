"""The relay's handling of bytes, files and lost nodes, with the real code of both ends and no Ray between them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from worker_stubs import expected_completions, make_checkpoint, make_request

from reasonrun.errors import EnvironmentProblem
from reasonrun.records import Checkpoint
from reasonrun.training import TrainJob
from reasonrun.workers import protocol
from reasonrun.workers.on_ray import node_files
from reasonrun.workers.on_ray.actor import RemoteWorker
from reasonrun.workers.on_ray.lines import Lines, rewrite
from reasonrun.workers.on_ray.shipping import Shipping
from reasonrun.workers.pool import GenerationPool


@pytest.mark.parametrize("size", [1, 7, 40, 100_000])
def test_wanted_lines_come_whole_and_all_others_untouched(size: int) -> None:
    load, odd = b'{"kind": "load","x":"' + b"y" * 500 + b'"}\n', b'{"kind":"loaded"}\n'
    lines = [b'{"kind":"generate","r":"\r"}\n', load, b"noise\n", odd, b"\n", b'{"kind":"train"}\n', b'{"kind":"load"']
    stream = b"".join(lines)
    reader, pieces = Lines(b"load", b"train"), []
    for start in range(0, len(stream), size):
        pieces += list(reader.feed(stream[start : start + size]))
    assert [piece for piece, wanted in pieces if wanted] == [load, b'{"kind":"train"}\n']
    rest = b"".join(piece for piece, wanted in pieces if not wanted)
    assert rest == b"".join(line for line in lines[:-1] if line not in (load, b'{"kind":"train"}\n'))


def test_rewriting_keeps_what_json_does_not_know() -> None:
    line = '{"kind":"event","call":1,"event":{"loss":NaN,"text":"\udc80é"}}\n'.encode("utf-8", "surrogatepass")
    message = protocol.decode_from_worker(rewrite(line, lambda content: None))
    assert isinstance(message, protocol.Event)
    assert message.event["text"] == "\udc80é" and message.event["loss"] != message.event["loss"]


@pytest.fixture
def worker() -> Iterator[RemoteWorker]:
    made = RemoteWorker()
    yield made
    if made._process is not None:
        made.send_signal(signal.SIGKILL)
        read_all(made)
        for stream in (made._process.stdin, made._process.stdout, made._process.stderr):
            stream.close()  # type: ignore[union-attr]


def read_all(worker: RemoteWorker) -> tuple[bytes, bytes, int]:
    out = err = b""
    for _ in range(1000):
        new_out, new_err, code = worker.read(10)
        out, err = out + new_out, err + new_err
        if code is not None:
            return out, err, code
    raise AssertionError("no end")


def test_streams_and_exit_code_arrive_complete(worker: RemoteWorker) -> None:
    program = "import os, sys; d = sys.stdin.buffer.read(60_000_000); os.write(2, b'bye')\n"
    program += "sys.stdout.buffer.write(d); sys.exit(9)"
    assert worker.start([sys.executable, "-c", program], {}, "/") == ""
    sent = os.urandom(1_000_000) * 60
    threading.Thread(target=worker.write, args=(sent,), daemon=True).start()
    out, err, code = read_all(worker)
    assert out == sent and (err, code) == (b"bye", 9)
    worker.write(b"to nobody")


def test_answer_comes_at_once_and_a_signal_is_reported(worker: RemoteWorker) -> None:
    worker.start([sys.executable, "-c", "import os\nwhile True: os.write(1, os.read(0, 99))"], {}, "/")
    worker.write(b"warm\n")
    worker.read(10)
    began = time.monotonic()
    worker.write(b"line\n")
    assert worker.read(10) == (b"line\n", b"", None)
    assert time.monotonic() - began < 0.5
    worker.send_signal(signal.SIGKILL)
    assert read_all(worker) == (b"", b"", 137)


def test_interpreter_that_the_node_lacks_is_replaced_by_rays(worker: RemoteWorker) -> None:
    worker.start(["/nowhere/python", "-c", "import os; print(os.environ['X'], os.getcwd())"], {"X": "1"}, "/nowhere")
    assert read_all(worker)[0].startswith(b"1 /")


def test_interpreter_that_does_not_run_is_named(worker: RemoteWorker, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("not a program")
    broken.chmod(0o755)
    assert f"{broken} cannot be started" in worker.start([str(broken)], {}, "/")


class NearNode:
    """A node in this process; counts what is sent."""

    def __init__(self) -> None:
        self.files = node_files.NodeFiles()
        self.calls: list[str] = []

    def ask(self, method: str, *arguments: Any) -> Any:
        self.calls.append(method)
        return getattr(self.files, method)(*arguments)

    def wait(self, asked: Any) -> Any:
        return asked


@pytest.fixture
def ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Shipping, NearNode]]:
    monkeypatch.setattr("reasonrun.workers.on_ray.shipping._CHUNK_BYTES", 1000)
    attempt_dir = tmp_path / "attempt"
    attempt_dir.mkdir()

    def make(shared: Any = "no") -> tuple[Shipping, NearNode]:
        near = NearNode()
        return Shipping(near, shared, str(tmp_path / "cache"), attempt_dir), near

    return make


def make_model(folder: Path, content: bytes) -> Checkpoint:
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "sub" / "empty").write_bytes(b"")
    return Checkpoint(path=str(folder), weights=content[:5].hex(), tokenizer="t")


def load(checkpoint: Checkpoint) -> bytes:
    return protocol.encode(protocol.Load(call=1, checkpoint=checkpoint))


def path_of(line: bytes) -> Path:
    message = protocol.decode_for_worker(line)
    assert isinstance(message, protocol.Load)
    return Path(message.checkpoint.path)


def test_model_is_sent_once_by_content(ship: Any, tmp_path: Path) -> None:
    checkpoint = make_model(tmp_path / "model", os.urandom(12_345))
    shipping, near = ship()
    there = path_of(shipping.outgoing(load(checkpoint)))
    assert there.is_relative_to(tmp_path / "cache")
    assert (there / "model.safetensors").read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()
    assert (there / "sub/empty").read_bytes() == b"" and near.calls.count("put") == 13 + 1
    other, far = ship()
    assert path_of(other.outgoing(load(checkpoint))) == there and "put" not in far.calls


def test_shared_path_sends_nothing_and_a_stale_copy_is_no_shared_path(ship: Any, tmp_path: Path) -> None:
    checkpoint = make_model(tmp_path / "model", b"weights")
    shipping, near = ship("auto")
    assert path_of(shipping.outgoing(load(checkpoint))) == tmp_path / "model" and "put" not in near.calls
    stale = [(name, size, changed - 1) for name, size, changed in node_files.list_files(checkpoint.path)]
    near.files.listing = lambda path: stale  # type: ignore[method-assign]
    assert path_of(shipping.outgoing(load(checkpoint))) != tmp_path / "model"


def test_models_that_nobody_uses_are_removed_and_used_ones_are_not(ship: Any, tmp_path: Path) -> None:
    user, _ = ship()
    kept = path_of(user.outgoing(load(make_model(tmp_path / "used", b"used!"))))
    shipping, _ = ship()
    sent = [path_of(shipping.outgoing(load(make_model(tmp_path / f"m{i}", b"%05d" % i)))) for i in range(7)]
    assert kept.is_dir() and sent[-1].is_dir() and not sent[0].exists()


def test_missing_model_is_explained(ship: Any, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="nowhere, which a worker on another node needs"):
        ship()[0].outgoing(load(Checkpoint(path=str(tmp_path / "nowhere"), weights="w", tokenizer="t")))


def train(tmp_path: Path, out_dir: Path) -> bytes:
    rows = tmp_path / "rows-00000.parquet"
    rows.write_bytes(b"rows")
    job = TrainJob(
        kind="sft",
        rows=(str(rows),),
        start=make_model(tmp_path / f"start-{out_dir.name}", b"start"),
        settings={},
        num_steps=1,
        seed=1,
        out_dir=str(out_dir),
    )
    return protocol.encode(protocol.Train(call=1, job=job))


def test_training_elsewhere_gets_its_inputs_and_brings_its_checkpoints_back(ship: Any, tmp_path: Path) -> None:
    here = tmp_path / "attempt" / "train"
    here.mkdir()
    shipping, _ = ship()
    message = protocol.decode_for_worker(shipping.outgoing(train(tmp_path, here)))
    assert isinstance(message, protocol.Train)
    there = Path(message.job.out_dir)
    assert Path(message.job.rows[0]).read_bytes() == b"rows" and message.job.rows[0].endswith("rows-00000.parquet")
    assert (Path(message.job.start.path) / "model.safetensors").read_bytes() == b"start"

    (there / "checkpoint-2").mkdir()
    (there / "checkpoint-2" / "state").write_bytes(b"s" * 2500)
    log = protocol.encode(protocol.Event(call=1, event={"event": "log", "step": 1, "loss": 0.5}))
    assert shipping.incoming(log) == log and not list(here.iterdir())
    made = protocol.Event(call=1, event={"event": "checkpoint", "step": 2, "path": str(there / "checkpoint-2")})
    told = protocol.decode_from_worker(shipping.incoming(protocol.encode(made)))
    assert isinstance(told, protocol.Event) and told.event["path"] == str(here / "checkpoint-2")
    assert (here / "checkpoint-2" / "state").read_bytes() == b"s" * 2500

    (here / "checkpoint-2").rename(tmp_path / "taken over")
    (there / "final").mkdir()
    (there / "final" / "model.safetensors").write_bytes(b"new")
    shipping.incoming(b'{"kind":"trained","call":1}\n')
    assert (here / "final" / "model.safetensors").read_bytes() == b"new"
    assert not (here / "checkpoint-2").exists()  # not fetched twice


def test_node_that_sees_the_attempt_folder_trains_in_place(ship: Any, tmp_path: Path) -> None:
    here = tmp_path / "attempt" / "train"
    here.mkdir()
    shipping, near = ship("auto")
    message = protocol.decode_for_worker(shipping.outgoing(train(tmp_path, here)))
    assert isinstance(message, protocol.Train) and message.job.out_dir == str(here)
    near.files.read_token = lambda path: ""  # type: ignore[method-assign]
    again = protocol.decode_for_worker(shipping.outgoing(train(tmp_path, here.with_name("other"))))
    assert isinstance(again, protocol.Train) and again.job.out_dir.startswith(str(tmp_path / "cache"))


CARRIER = """
import os, pathlib, subprocess, sys
folder = pathlib.Path(sys.argv[1]); folder.mkdir(exist_ok=True)
number = len(list(folder.iterdir())); (folder / str(number)).touch()
limit = int(sys.argv[2])
if number > limit >= 0:
    os.write(1, b'{"kind":"hello","version":"%s","python":"p"}\\n' % sys.argv[3].encode())
    os.write(1, b'{"kind":"no_room","message":"full","hint":"smaller"}\\n')
    sys.exit(3)
code = subprocess.call(sys.argv[4:])
sys.exit(69 if code == 9 else code)
"""


@pytest.fixture
def carried(tmp_path: Path, make_pool: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., GenerationPool]:
    """A pool behind a carrier that calls exit 9 of a worker the loss of its node, and has room for a number of starts."""
    import reasonrun

    def make(*, room: int = -1, **options: Any) -> GenerationPool:
        pool = make_pool(trouble="exit", **options)
        for spec in pool._crew.specs:
            through = [sys.executable, "-c", CARRIER, str(tmp_path / spec.name), str(room), reasonrun.__version__]
            object.__setattr__(spec, "through", tuple(through))
        return pool

    return make


def units(num: int) -> list[Any]:
    return [(number, [make_request(number)]) for number in range(num)]


def answers(num: int) -> dict[int, Any]:
    return {number: expected_completions([make_request(number)]) for number in range(num)}


def test_lost_node_costs_its_unit_and_no_mark(carried: Any, tmp_path: Path) -> None:
    pool = carried(trouble_keys=("request-2",), marker_path=str(tmp_path / "lost"), log_path=str(tmp_path / "calls"))
    pool.load(make_checkpoint())
    assert dict(pool.generate(units(4))) == answers(4)
    asked = [line.split()[1] for line in (tmp_path / "calls").read_text().splitlines()]
    assert asked == ["request-0", "request-1", "request-2", "request-2", "request-3"]


def test_others_go_on_when_a_lost_node_leaves_no_room(carried: Any, tmp_path: Path) -> None:
    pool = carried(num_workers=2, room=0, trouble_keys=("request-2",), marker_path=str(tmp_path / "lost"), seconds=0.05)
    pool.load(make_checkpoint())
    assert dict(pool.generate(units(12))) == answers(12)
    pool.load(make_checkpoint("w2"))  # does not wait for the one without a node
    assert len(dict(pool.generate(units(3)))) == 3


def test_no_room_at_all_is_an_environment_problem(carried: Any, tmp_path: Path) -> None:
    pool = carried(room=0, trouble_keys=("request-2",), marker_path=str(tmp_path / "lost"))
    pool.load(make_checkpoint())
    with pytest.raises(EnvironmentProblem, match="full") as caught:
        list(pool.generate(units(4)))
    assert caught.value.hint == "smaller"
