"""Models, rows and checkpoints between the run directory and a node that does not see it."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from reasonrun.errors import EnvironmentProblem
from reasonrun.workers.on_ray.lines import rewrite
from reasonrun.workers.on_ray.node_files import list_files

_CHUNK_BYTES = 16 << 20
_NUM_UNDER_WAY = 3  # chunks

SharedPath = Literal["auto", "yes", "no"]


class Node(Protocol):
    """Calls of the actor's methods: ``ask`` starts one, ``wait`` gives the answer of one."""

    def ask(self, method: str, *arguments: Any) -> Any: ...

    def wait(self, asked: Any) -> Any: ...


class Shipping:
    """Turns paths of this machine into paths of the node, and brings back what a trainer writes there.

    With ``shared`` "yes" paths are the same in both places. With "auto" they are where name, size and time of change of
    every file agree, which copies on two disks do not.
    """

    def __init__(self, node: Node, shared: SharedPath, cache_dir: str, scratch_dir: Path) -> None:
        self._node, self._shared, self._cache_dir, self._scratch_dir = node, shared, cache_dir, scratch_dir
        self._out: tuple[str, str] | None = None  # a job's out_dir here and on the node
        self._fetched: dict[str, tuple[int, int]] = {}
        self._digests: dict[tuple[str, int, int], str] = {}

    def outgoing(self, line: bytes) -> bytes:
        """A ``load`` or ``train`` line with the node's paths, once everything that they name is there."""
        if self._shared == "yes":
            return line
        self._call("forget")
        return rewrite(line, self._localize)

    def incoming(self, line: bytes) -> bytes:
        """A line of the worker with this machine's paths, once the files that it speaks of are here."""
        if self._out is None:
            return line
        here, there = (json.dumps(path)[1:-1].encode() for path in self._out)
        if there not in line and b"trained" not in line[:32]:
            return line
        self._fetch(*self._out)
        return line.replace(there, here)

    def _localize(self, message: dict[str, Any]) -> None:
        if message["kind"] == "load":
            self._localize_model(message["checkpoint"])
            return
        job = message["job"]
        for model in (job["start"], job.get("reference")):
            if model:
                self._localize_model(model)
        job["rows"] = [self._ship(path) for path in job["rows"]]
        for owner, key in (
            (job, "resume_from"),
            *((job["on_policy"], key) for key in ("tokenizer", "problems", "given") if job.get("on_policy")),
        ):
            if owner.get(key):
                owner[key] = self._ship(owner[key])
        job["out_dir"] = self._out_dir(job["out_dir"])

    def _localize_model(self, checkpoint: dict[str, Any]) -> None:
        if not checkpoint.get("remote"):
            checkpoint["path"] = self._ship(checkpoint["path"], weights=checkpoint["weights"])
        if checkpoint.get("optimizer_path"):
            checkpoint["optimizer_path"] = self._ship(checkpoint["optimizer_path"])

    def _out_dir(self, path: str) -> str:
        self._out, self._fetched = None, {}
        if self._shared == "auto" and self._sees(Path(path)):
            return path
        self._out = (path, self._call("make_out", self._cache_dir))
        return self._out[1]

    def _sees(self, folder: Path) -> bool:
        """Whether the node reads what is written here now: a folder of that name may be another one."""
        token = uuid.uuid4().hex
        mark = self._scratch_dir / f"ray-{token}"
        mark.write_text(token, "utf-8")
        try:
            same = self._call("read_token", str(mark)) == token
        finally:
            mark.unlink()
        return same and folder.is_relative_to(self._scratch_dir)

    def _ship(self, path: str, *, weights: str = "") -> str:
        """Where the node finds the file or folder; copied there if need be."""
        files = list_files(path)
        if not files:
            raise EnvironmentProblem(f"{path}, which a worker on another node needs, is empty or does not exist")
        if self._shared == "auto" and [tuple(file) for file in self._call("listing", path)] == files:
            return path
        key = self._key(path, files, weights)
        folder, complete = self._call("open_entry", self._cache_dir, key)
        if not complete:
            for name, size, _ in files:
                self._send(Path(path, name), f"{folder}/{name or Path(path).name}", size)
            folder = self._call("finish", self._cache_dir, key)
        return f"{folder}/{Path(path).name}" if files[0][0] == "" else str(folder)

    def _key(self, path: str, files: list[tuple[str, int, int]], weights: str) -> str:
        digest = hashlib.sha256()
        for name, size, changed in files:
            file = Path(path, name)
            # The digest of a model's weights is known, and reading them is most of the work.
            known = weights if weights and file.suffix == ".safetensors" else ""
            identity = (str(file), size, changed)
            content = known or self._digests.get(identity) or _digest(file)
            self._digests[identity] = content
            digest.update(json.dumps([name or file.name, size, content]).encode())
        return digest.hexdigest()[:32]

    def _send(self, source: Path, target: str, size: int) -> None:
        under_way: deque[Any] = deque()
        with source.open("rb") as file:
            for offset in range(0, max(size, 1), _CHUNK_BYTES):
                under_way.append(self._node.ask("put", target, offset, file.read(_CHUNK_BYTES)))
                if len(under_way) >= _NUM_UNDER_WAY:
                    self._node.wait(under_way.popleft())
        while under_way:
            self._node.wait(under_way.popleft())

    def _fetch(self, here: str, there: str) -> None:
        """Bring what is new or changed in the trainer's folder."""
        for name, size, changed in self._call("listing", there):
            if self._fetched.get(name) == (size, changed):
                continue
            target = Path(here, name)
            if not target.resolve().is_relative_to(Path(here).resolve()):
                raise EnvironmentProblem(f"a worker made a file outside its folder: {name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            staged = target.with_name(target.name + ".fetching")
            try:
                with staged.open("wb") as file:
                    for chunk in self._chunks(f"{there}/{name}", size):
                        file.write(chunk)
                staged.rename(target)
            except FileNotFoundError:
                staged.unlink(missing_ok=True)  # the trainer has removed or renamed it since
                continue
            self._fetched[name] = (size, changed)

    def _chunks(self, path: str, size: int) -> Iterator[bytes]:
        under_way: deque[Any] = deque()
        for offset in range(0, size, _CHUNK_BYTES):
            under_way.append(self._node.ask("get", path, offset, min(_CHUNK_BYTES, size - offset)))
            if len(under_way) >= _NUM_UNDER_WAY:
                yield self._node.wait(under_way.popleft())
        while under_way:
            yield self._node.wait(under_way.popleft())

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._node.wait(self._node.ask(method, *arguments))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
