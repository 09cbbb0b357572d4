"""Whether a run is worth starting: a small sample of the base must hold what the method learns from."""

from __future__ import annotations

from typing import Any

from reasonrun.contracts import Method
from reasonrun.errors import Finding
from reasonrun.lab import Lab

_MANY = 0.5  # a share above which a cause is named before others


def preflight(lab: Lab, method: Method, mode: str) -> None:
    """Probe the base as ``method.preflight()`` asks.

    Args:
        lab: the lab; the steps are named ``preflight/…``.
        method: what will run.
        mode: the recipe's: ``refuse`` stops where there is nothing to learn from, ``report`` only records what was
            found, ``off`` skips the probe.

    Raises:
        Finding: there is nothing to learn from, with the counts and a way out.
    """
    probe = None if mode == "off" else method.preflight()
    if probe is None:
        return
    table = lab.preflight(probe)
    lacking = lacks(table, probe.needs)
    if lacking and mode == "refuse":
        raise Finding(
            f"preflight: {lacking}, so there is nothing to learn from",
            evidence={"problems": table["num_problems"], "samples": table["num_samples"], **table["reasons"]},
            hint=f"{way_out(table)}; or go on all the same with preflight=report",
        )


def lacks(table: dict[str, Any], needs: frozenset[str]) -> str:
    """What the sample has none of although the method needs it; empty when nothing is lacking."""
    if "right" in needs and table["accuracy"] == 0:
        return "no answer of the base is right"
    if "wrong" in needs and table["accuracy"] == 1:
        return "every answer of the base is right"
    if "variance" in needs and table["zero_variance_share"] == 1:
        return "no problem has both right and wrong answers"
    return ""


def way_out(table: dict[str, Any]) -> str:
    """What to change, by what most answers suffer from."""
    if table["accuracy"] == 1:
        return "take harder problems"
    if table["truncated_share"] > _MANY:
        return "most answers were cut off: raise max_new_tokens"
    if table["no_answer_share"] + table["unparseable_share"] > _MANY:
        return "most answers cannot be read: choose a prompt style that this model follows, such as few_shot"
    return "take easier problems, a stronger model or more samples at a higher temperature"
