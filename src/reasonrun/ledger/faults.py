"""Named fault points: the places where a test, or a sceptical user, can make the ledger die.

``REASONRUN_FAULT="point:action[:nth]"`` arms one point; the action happens the nth time (from 1) it is passed.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from reasonrun.errors import EnvironmentProblem

FAULT_VARIABLE = "REASONRUN_FAULT"

FileKind = Literal["run", "attempt", "step", "seal", "json", "ok", "ckpt", "projection", "finish"]
Action = Literal["kill", "exception", "ENOSPC", "EIO", "hang"]

_MOMENTS = ("mid_write", "before_fsync", "before_rename", "after_rename")

FAULT_POINTS: tuple[str, ...] = (
    *(f"{kind}.{moment}" for kind in get_args(FileKind) for moment in _MOMENTS),
    "run.mid_create",
    "worker.mid_write",
    "wal.mid_write",
    "wal.before_fsync",
    "wal.before_truncate",
    "adopt.mid_file",
    "adopt.before_rename",
    "adopt.after_rename",
    "ckpt.mid_file",
    "ckpt.before_adopt",
    "ckpt.after_adopt",
    "borrow.before_link",
    "borrow.after_link",
    "borrow.before_commit",
    "commit.before_cleanup",
    "set_aside.before_rename",
    "set_aside.after_rename",
)
"""Every fault point. A test kills a run at each of them."""


class InjectedFault(RuntimeError):
    """What the action ``exception`` raises."""


@dataclass
class Faults:
    """One armed fault point, or none.

    Args:
        point: a name from ``FAULT_POINTS``, or empty.
        action: what happens there.
        nth: at which pass, from 1.
    """

    point: str = ""
    action: Action = "kill"
    nth: int = 1
    num_passed: int = 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Faults:
        """Read ``REASONRUN_FAULT``.

        Raises:
            EnvironmentProblem: the variable names an unknown point or action.
        """
        text = (os.environ if environment is None else environment).get(FAULT_VARIABLE, "")
        if not text:
            return cls()
        point, _, rest = text.partition(":")
        action, _, nth = rest.partition(":")
        actions = get_args(Action)
        if point not in FAULT_POINTS or action not in actions or not (nth or "1").isdigit() or nth == "0":
            raise EnvironmentProblem(
                f"{FAULT_VARIABLE}={text!r} is not point:action[:nth] with nth from 1.\n"
                f"  points: {', '.join(FAULT_POINTS)}\n  actions: {', '.join(actions)}",
                hint=f"unset {FAULT_VARIABLE}; it is for testing only",
            )
        return cls(point=point, action=cast(Action, action), nth=int(nth or "1"))

    def armed(self, point: str) -> bool:
        """Whether something may happen at ``point``; half-writes are done only then."""
        return point == self.point

    def hit(self, point: str) -> None:
        """Pass a point: do the armed action if it is this one's turn.

        Raises:
            InjectedFault: action ``exception``.
            OSError: actions ``ENOSPC`` and ``EIO``.
            ValueError: the point is not registered.
        """
        if point not in FAULT_POINTS:
            raise ValueError(f"fault point {point!r} is not registered in FAULT_POINTS")
        if point != self.point:
            return
        self.num_passed += 1
        if self.num_passed == self.nth:
            self._act(point)

    def _act(self, point: str) -> None:
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.action == "exception":
            raise InjectedFault(f"injected at {point}")
        elif self.action == "hang":
            while True:
                time.sleep(3600)
        else:
            code = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}[self.action]
            raise OSError(code, f"{os.strerror(code)} (injected at {point})")
