"""G4, G5: the order of writes, flushes and renames that loss of power cannot break."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reasonrun.ledger.faults import Faults
from reasonrun.ledger.files import Files, decode_json, encode_json
from toy_run import toy_run


class Recorder:
    """Stands between the ledger and the operating system and writes down what happens to which inode."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self.flushed: set[int] = set()
        self.unsafe_seals: list[str] = []
        self._real = {name: getattr(os, name) for name in ("write", "fsync", "rename")}
        for name in self._real:
            monkeypatch.setattr(os, name, getattr(self, name))

    def write(self, descriptor: int, data: bytes) -> int:
        self.calls.append(("write", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        self.flushed.discard(os.fstat(descriptor).st_ino)
        return int(self._real["write"](descriptor, data))

    def fsync(self, descriptor: int) -> None:
        self.calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        self.flushed.add(os.fstat(descriptor).st_ino)

    def rename(self, source: Path, target: Path) -> None:
        self.calls.append(("rename", f"{Path(source).name} {Path(target).name}"))
        if Path(target).name == "_OK.json":
            self._check(Path(target).parent)
        self._real["rename"](source, target)
        # The new name is not safe until its folder is flushed again.
        self.flushed -= {Path(target).parent.stat().st_ino}

    def _check(self, folder: Path) -> None:
        """Everything that a seal vouches for must be safe before the seal gets its name."""
        for path in [folder, *folder.rglob("*")]:
            is_scratch = path.name.startswith("wal") or "checkpoints" in path.parts
            is_of_the_run = folder.name == "run" and path != folder
            if not is_scratch and not is_of_the_run and path.stat().st_ino not in self.flushed:
                self.unsafe_seals.append(str(path))


def test_an_atomic_write_flushes_before_it_renames_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    files = Files(Faults())
    assert files.write_atomic(tmp_path / "a.json", b"123", "json").size == 3
    folder = tmp_path.name
    assert recorder.calls == [
        ("write", "a.json.tmp"),
        ("fsync", "a.json.tmp"),
        ("rename", "a.json.tmp a.json"),
        ("fsync", folder),
    ]
    recorder.calls.clear()
    files.mkdir(tmp_path / "x" / "y")
    assert recorder.calls == [("fsync", folder), ("fsync", "x")]
    recorder.calls.clear()
    files.move(tmp_path / "a.json", tmp_path / "x" / "b.json")
    assert recorder.calls == [("rename", "a.json b.json"), ("fsync", "x"), ("fsync", folder)]


def test_a_seal_gets_its_name_after_all_that_it_vouches_for_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(monkeypatch)
    toy_run(tmp_path / "run", num_units=3, files=Files(Faults()))
    seals = [target for call, target in recorder.calls if call == "rename" and target.endswith(" _OK.json")]
    assert len(seals) == 7  # three steps, three checkpoints, the run
    assert recorder.unsafe_seals == []


def test_a_folder_moves_across_file_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "from" / "sub").mkdir(parents=True)
    (tmp_path / "from" / "sub" / "file").write_bytes(b"data")
    real_rename = os.rename

    def rename(source: Path, target: Path) -> None:
        if Path(source).name == "from":
            raise OSError(errno.EXDEV, "cross-device link")
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", rename)
    Files(Faults()).move(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to" / "sub" / "file").read_bytes() == b"data"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["to"]


def test_json_bytes_are_exact_where_escapes_would_not_be() -> None:
    for value in ({"z": "\ud83d\ude00", "a": "😀"}, ["\0", 2**80, -0.0, 1e-320, None, True]):
        assert decode_json(encode_json(value)) == value
    assert list(decode_json(encode_json({"z": 1, "a": 2}))) == ["z", "a"]


def test_a_hang_lasts_until_the_process_is_ended(tmp_path: Path) -> None:
    code = (
        f"from toy_run import toy_run; from pathlib import Path; toy_run(Path({str(tmp_path / 'run')!r}), num_units=1)"
    )
    environment = {**os.environ, "REASONRUN_FAULT": "run.before_rename:hang", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        while not (tmp_path / "run" / "run.json.tmp").exists() and process.poll() is None:
            time.sleep(0.01)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "run.json").exists()
