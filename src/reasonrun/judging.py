"""How well a judge's decisions agree with gold ones. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reasonrun.records import Graded, Problem


def judging_section(groups: Sequence[tuple[Problem, Sequence[Graded]]]) -> dict[str, Any]:
    """Stub, replaced at merge."""
    import numpy as np

    rows = [(float(p.reference), int(r.score.answer)) for p, rs in groups for r in rs if r.score.answer]
    a = np.array(rows)
    return {
        "pearson": float(np.corrcoef(a.T)[0, 1]) if len(a) > 2 and a.std(0).all() else None,
        "hist": [int((a[:, 1] == k).sum()) for k in range(1, 6)],
        "gold": [int((a[:, 0] == k).sum()) for k in range(1, 6)],
        "tokens": float(np.mean([len(r.rollout.completion_ids) for _, rs in groups for r in rs])),
    }


def judging_findings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Stub, replaced at merge."""
    return []
