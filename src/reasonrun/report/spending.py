"""What a run has spent on models behind endpoints: tokens as their servers counted them, and dollars where prices are known.

Steps that hold answers of an endpoint are counted once, however many attempts they took: every answer is kept when it
arrives. What was asked for in a step that is not committed yet, or that ``--redo`` made again, is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reasonrun.generation import Usage, endpoint_weights, price
from reasonrun.ledger.attempts import attempt_records
from reasonrun.ledger.catalogue import run_identity, stored_fingerprint

ENDPOINTS = "endpoints"
"""Key of ``attempt.json``: model and prices of every endpoint, by role. They may change under a run; the last ones count."""


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What one step, or all of them, took from one endpoint. ``usd`` is None where no price is known."""

    model: str
    step: str  # empty for the sum
    num_prompt_tokens: int
    num_completion_tokens: int
    num_without_usage: int  # answers of which the server told no tokens; they count as none
    usd: float | None


def spending(path: Path, rows: Iterable[Mapping[str, Any]]) -> list[Spending]:
    """By endpoint, its sum and then its steps; empty for a run that asked none.

    Args:
        path: the run directory.
        rows: lines of its ``metrics.jsonl``.
    """
    asked = [row for row in rows if row["verb"] == "sample" and "num_without_usage" in row]
    if not asked:
        return []
    names = {endpoint_weights(str(entry["model"])): entry for entry in _endpoints(path).values()}
    by_model: dict[str, list[Spending]] = {}
    for row in asked:
        weights = (stored_fingerprint(path, row["step"]) or {}).get("policy", "")
        entry = names.get(weights, {"model": "unknown"})
        usage = Usage(row["num_prompt_tokens"], row["num_completion_tokens"])
        by_model.setdefault(entry["model"], []).append(
            Spending(
                model=entry["model"],
                step=row["step"],
                num_prompt_tokens=usage.prompt,
                num_completion_tokens=usage.completion,
                num_without_usage=row["num_without_usage"],
                usd=price(usage, entry.get("prompt_price", 0.0), entry.get("completion_price", 0.0)),
            )
        )
    return [line for steps in by_model.values() for line in (total(steps), *steps)]


def total(steps: Sequence[Spending]) -> Spending:
    """The sum of steps; of no price when one of them has none."""
    prices = [step.usd for step in steps if step.usd is not None]
    models = dict.fromkeys(step.model for step in steps)
    return Spending(
        model=", ".join(models),
        step="",
        num_prompt_tokens=sum(step.num_prompt_tokens for step in steps),
        num_completion_tokens=sum(step.num_completion_tokens for step in steps),
        num_without_usage=sum(step.num_without_usage for step in steps),
        usd=sum(prices) if len(prices) == len(steps) else None,
    )


def _endpoints(path: Path) -> dict[str, dict[str, Any]]:
    """Model and prices by role: as the run began, then as later attempts had them."""
    models = run_identity(path)["recipe"].get("models", {})
    found = {role: dict(model["endpoint"]) for role, model in models.items() if model.get("endpoint")}
    for record in attempt_records(path):
        found |= record.get(ENDPOINTS, {})
    return found


def format_spending(lines: Sequence[Spending]) -> list[str]:
    """As text: a line for each endpoint, its steps below it."""
    text = []
    for line in lines:
        cost = "" if line.usd is None else f", {line.usd:.4f} USD"
        unknown = f", and {line.num_without_usage:,} answers without usage" if line.num_without_usage else ""
        label = f"  {line.step}" if line.step else f"endpoint {line.model}"
        text.append(
            f"{label}: {line.num_prompt_tokens:,} prompt and {line.num_completion_tokens:,} completion tokens{cost}{unknown}"
        )
    return text


def spending_document(lines: Sequence[Spending]) -> list[dict[str, Any]]:
    """The same as plain data."""
    return [asdict(line) for line in lines]
