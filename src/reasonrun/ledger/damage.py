"""What is found wrong in a run directory, which promise that touches, and what helps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Promise = Literal["G1", "G2", "G4", "G5", "G7", "G17", "G19", "G21"]
PROMISES: dict[Promise, str] = {
    "G1": "the same command continues, and a finished run says so",
    "G2": "a stopped run ends with the bytes of an uninterrupted one",
    "G4": "nothing under a final name is half-written",
    "G5": "what is committed stays as it is",
    "G7": "no change is applied in silence",
    "G17": "rows in = rows used + rows left out with a reason",
    "G19": "no code comes from data or weights",
    "G21": "every number leads to its rows",
}
"""The guarantees that damage can touch."""

Remedy = Literal["redo", "log", "aside", "cache", "restore"]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is not as it was written.

    Attributes:
        path: relative to the run directory.
        what: what is wrong with it.
        promise: the guarantee that it touches.
        remedy: what repairing does. ``redo`` sets the step, and all that reads it, aside; ``log`` keeps the rows of a log
            that verify; ``aside`` moves the file; ``cache`` removes it; for ``restore`` only a backup helps.
        step: the step that it belongs to, where it belongs to one.
    """

    path: str
    what: str
    promise: Promise
    remedy: Remedy
    step: str = ""

    def way_out(self, run: str) -> str:
        """What to do, the cheapest first; ``run`` is how the user names the directory."""
        repair = f"`reasonrun repair {run}`"
        return {
            "redo": f"{repair} sets {self.step} and what reads it aside, and the same train command makes it again;"
            f" train with --redo {self.step} does both; or restore the file from a backup",
            "log": f"{repair} keeps the rows that verify, the others are made again; or restore the file from a backup",
            "aside": f"{repair} moves it to quarantine; or restore it from a backup",
            "cache": f"{repair} removes it; it is built again when it is needed",
            "restore": "restore it from a backup, or start again with --run NEW",
        }[self.remedy]

    def document(self, run: str) -> dict[str, Any]:
        """As plain data."""
        return {
            "path": self.path,
            "what": self.what,
            "promise": self.promise,
            "promise_text": PROMISES[self.promise],
            "step": self.step or None,
            "remedy": self.remedy,
            "what_to_do": self.way_out(run),
        }


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something worth knowing that is no damage: what a stop leaves behind. ``stale`` files may be set aside; of a stale
    ``step`` all of its own."""

    path: str
    what: str
    stale: bool = False
    step: str = ""


Finding = Damage | Note
