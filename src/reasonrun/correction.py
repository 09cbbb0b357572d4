"""What asking again changes: the attempts of one evaluation, row by row (SCoRe, Kumar et al. 2024, arXiv 2409.12917).

Pure functions on graded rollouts. An ungraded row counts as incorrect, as in ``metrics.summarise``. Shares and
accuracies lie in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from reasonrun.metrics import mcnemar_exact, summarise
from reasonrun.records import Graded

# Below, or above, these a run is worth a second look (the thresholds are this project's own).
MIN_CHANGED = 0.05
MAX_TRUNCATED = 0.05
MAX_DROP = 0.03
_Z_95 = 1.96  # two-sided 95 % of the normal distribution
_OF_AN_ATTEMPT = ("accuracy", "interval", "truncated_share", "unparseable_share")


def correction_section(attempts: Sequence[Sequence[Graded]]) -> dict[str, Any]:
    """All attempts of one part of an evaluation.

    Args:
        attempts: two or more; each holds the same rows in the same order, those of one problem side by side.

    Returns:
        ``attempts``: of each, accuracy with interval, shares that were cut and that could not be parsed, and the mean
        number of sampled tokens (None where the model gives no token ids). ``changes``: ``correction_table`` of every
        consecutive pair, and of the first and the last attempt as the last entry (once, where there are two), with
        the attempts' numbers as ``from`` and ``to``.

    Raises:
        ValueError: a row of an attempt is not the next turn of the row in its place in the attempt before.
    """
    for first, second in pairwise(attempts):
        _check_aligned(first, second)
    last = len(attempts)
    pairs = list(dict.fromkeys([*pairwise(range(1, last + 1)), (1, last)]))
    return {
        "attempts": [_attempt(rows) for rows in attempts],
        "changes": [{"from": a, "to": b, **_table(attempts[a - 1], attempts[b - 1])} for a, b in pairs],
    }


def overall(section: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a ``correction_section`` that leads from the first attempt to the last."""
    entry: dict[str, Any] = section["changes"][-1]
    return entry


def alarms(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What a person should know of a policy that was taught to correct itself, one line each.

    Args:
        before: ``overall`` of the base on some split.
        after: ``overall`` of the policy on the same.
    """
    found = []
    if after["changed_share"] < MIN_CHANGED:
        found.append(
            f"second attempts repeat the first: {after['changed_share']:.1%} of the answers change (below"
            f" {MIN_CHANGED:.0%})"
        )
    lost, had = after["correct_to_incorrect"], before["correct_to_incorrect"]
    error = math.sqrt(lost * (1 - lost) / after["num_rows"] + had * (1 - had) / before["num_rows"])
    if lost - had > 2 * error:
        found.append(f"more right answers are made wrong: {lost:.1%} of all, {had:.1%} by the base")
    for which in ("first", "last"):
        if after[f"truncated_share_{which}"] > MAX_TRUNCATED:
            found.append(
                f"{which} attempts are cut: {after[f'truncated_share_{which}']:.1%} (above {MAX_TRUNCATED:.0%})"
            )
    return found


def first_attempt_moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Whether a stage that was to hold the first attempt let it drop."""
    drop = before["accuracy_first"] - after["accuracy_first"]
    if drop <= MAX_DROP:
        return []
    return [
        f"Stage I let first attempts drop by {100 * drop:.1f} points (above {100 * MAX_DROP:.0f}): raise beta2, or have"
        " fewer steps of it"
    ]


def correction_table(first: Sequence[Graded], second: Sequence[Graded]) -> dict[str, Any]:
    """What became of every row from one attempt to the next.

    Args:
        first: graded rollouts, one or several a problem.
        second: their next turns, row by row.

    Returns:
        ``num_rows`` and ``num_problems``; ``accuracy_first`` and ``accuracy_last``; ``delta``, last minus first, with
        ``delta_se`` and ``delta_interval`` (95 %, delta ± 1.96 SE). The standard error is that of a mean whose problems
        are independent and whose rows of one problem are not: sqrt(sum over problems of (sum of deviations)^2) / n (the
        cluster-robust one, Liang & Zeger 1986, Biometrika 73:13, without small-sample factor). With one row a problem
        this is sqrt((p_ic + p_ci - delta^2) / n). ``incorrect_to_correct`` and ``correct_to_incorrect`` are shares of
        ALL rows; ``…_given_incorrect`` and ``…_given_correct`` are shares of the rows whose first attempt was so, None
        without such a row. ``mcnemar_p``: exact p-value of the flips, None with several rows a problem.
        ``changed_share``: another extracted answer (two without one are the same), ``changed_share_given_incorrect``
        the same among wrong first attempts. ``identical_text_share``; ``edit_ratio``: mean of the Levenshtein distance
        over the sum of both lengths, in characters; 0 where both are empty. ``truncated_share_first`` and ``…_last``.

    Raises:
        ValueError: no row, or a row of ``second`` whose ``parent_id`` is not the id of its row in ``first``.
    """
    _check_aligned(first, second)
    return _table(first, second)


def _check_aligned(first: Sequence[Graded], second: Sequence[Graded]) -> None:
    if not first or len(first) != len(second):
        raise ValueError(f"attempts of {len(first)} and {len(second)} rows cannot be aligned")
    for row, (before, after) in enumerate(zip(first, second, strict=True)):
        if after.rollout.parent_id != before.rollout.id:
            raise ValueError(
                f"row {row}: {after.rollout.id} is a turn after {after.rollout.parent_id}, not after {before.rollout.id}"
            )


def _attempt(rows: Sequence[Graded]) -> dict[str, Any]:
    summary = summarise([list(group) for _, group in groupby(rows, key=lambda row: row.rollout.problem_id)])
    lengths = [sum(len(s.token_ids) for s in row.rollout.segments if s.loss) for row in rows]
    has_ids = any(row.rollout.segments for row in rows)
    return {
        **{key: summary[key] for key in _OF_AN_ATTEMPT},
        "mean_num_tokens": sum(lengths) / len(lengths) if has_ids else None,
    }


def _table(first: Sequence[Graded], second: Sequence[Graded]) -> dict[str, Any]:
    was_N = np.array([row.correct for row in first])
    is_N = np.array([row.correct for row in second])
    changed_N = np.array([a.score.answer != b.score.answer for a, b in zip(first, second, strict=True)])
    texts = [(a.rollout.text, b.rollout.text) for a, b in zip(first, second, strict=True)]
    gained, lost = int((~was_N & is_N).sum()), int((was_N & ~is_N).sum())
    size, num_right = len(first), int(was_N.sum())
    num_wrong = size - num_right
    problems = [row.rollout.problem_id for row in first]
    is_single = len(set(problems)) == size
    delta = (gained - lost) / size
    error = _clustered_error(is_N.astype(np.float64) - was_N, problems)
    return {
        "num_rows": size,
        "num_problems": len(set(problems)),
        "accuracy_first": num_right / size,
        "accuracy_last": int(is_N.sum()) / size,
        "delta": delta,
        "delta_se": error,
        "delta_interval": [delta - _Z_95 * error, delta + _Z_95 * error],
        "incorrect_to_correct": gained / size,
        "correct_to_incorrect": lost / size,
        "incorrect_to_correct_given_incorrect": _share(gained, num_wrong),
        "correct_to_incorrect_given_correct": _share(lost, num_right),
        "mcnemar_p": mcnemar_exact(lost, gained) if is_single else None,
        "changed_share": int(changed_N.sum()) / size,
        "changed_share_given_incorrect": _share(int(changed_N[~was_N].sum()), num_wrong),
        "identical_text_share": sum(a == b for a, b in texts) / size,
        "edit_ratio": sum(_edit_ratio(a, b) for a, b in texts) / size,
        "truncated_share_first": sum(row.score.reason == "truncated" for row in first) / size,
        "truncated_share_last": sum(row.score.reason == "truncated" for row in second) / size,
    }


def _clustered_error(values_N: Any, clusters_N: Sequence[str]) -> float:
    _, cluster_N = np.unique(np.asarray(clusters_N), return_inverse=True)
    sums_C = np.bincount(cluster_N, weights=values_N - values_N.mean())
    return math.sqrt(float((sums_C**2).sum())) / len(values_N)


def _share(count: int, total: int) -> float | None:
    return count / total if total else None


def _edit_ratio(first: str, second: str) -> float:
    from rapidfuzz.distance import Levenshtein  # reports read tables without it

    length = len(first) + len(second)
    return Levenshtein.distance(first, second) / length if length else 0.0
