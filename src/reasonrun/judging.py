"""How well a judge's decisions agree with gold ones. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reasonrun.grading.judgement import Decision
from reasonrun.records import Graded, Problem


def judging_section(groups: Sequence[tuple[Problem, Sequence[Graded]]], decision: Decision = "score") -> dict[str, Any]:
    """How many rows were read, of how many."""
    rows = [row for _, rows in groups for row in rows]
    return {"decision": decision, "num_rows": len(rows), "num_read": sum(row.score.answer is not None for row in rows)}
