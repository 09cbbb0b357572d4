"""Reading items for a judge from files in the forms in which they are published; every fault of a file is found.

======================  ================================================================================================
``feedback``            Feedback-Collection and Feedback-Bench (Kim et al. 2023, arXiv 2310.08491)
``biggen``              BiGGen-Bench (Kim et al. 2024, arXiv 2406.05761); like its authors' scripts, ``input`` alone is the
                        instruction
``pairs``               preferred and rejected responses, as in RewardBench (Lambert et al. 2024, arXiv 2403.13787)
``prometheus_text``     whole judge prompts in the Prometheus layout, with lists of scores and feedbacks
``items``               fields of our own
======================  ================================================================================================
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from reasonrun.errors import RecipeError
from reasonrun.grading.judgement import HIGHEST, LOWEST
from reasonrun.judge_fields import Fields, tidy
from reasonrun.judge_texts import looks_like_prompt, parts_of, rubric_of
from reasonrun.prompts.judge import RUBRICS, Rubric
from reasonrun.question_files import Row, read_json
from reasonrun.records import Record, digest
from reasonrun.row_faults import check_row, listed, stated_once

Layout = Literal["feedback", "biggen", "pairs", "prometheus_text", "items"]

_DESCRIPTIONS = tuple(f"score{score}_description" for score in range(LOWEST, HIGHEST + 1))
NEEDED: dict[Layout, tuple[str, ...]] = {
    "feedback": (
        *("orig_instruction", "orig_response", "orig_reference_answer", "orig_criteria"),
        *(f"orig_{name}" for name in _DESCRIPTIONS),
        *("orig_score", "orig_feedback"),
    ),
    "biggen": ("input", "response", "score_rubric"),
    "pairs": ("prompt", "chosen", "rejected"),
    "prometheus_text": ("instruction",),
    "items": ("instruction", "response", "criteria", "score_descriptions"),
}
"""Fields that every row of a layout has."""

_OPTIONAL: dict[Layout, tuple[str, ...]] = {
    "feedback": (),
    "biggen": ("reference_answer", "capability"),
    "pairs": ("subset",),
    "prometheus_text": ("category",),
    "items": ("reference", "score", "feedback", "category"),
}
_SCORE_FIELDS: dict[Layout, tuple[str, ...]] = {
    "feedback": ("orig_score",),
    "biggen": ("human_score", "gpt4_score", "gpt4_turbo_score", "score"),
    "pairs": (),
    "prometheus_text": ("gpt4_score", "human_score", "score"),
    "items": ("score",),
}


class JudgeItem(Record):
    """One response to judge.

    ``gold_score`` may be a mean. ``gold_rationale`` is a whole judgement, feedback, marker and score, empty when there is
    none. ``prompt`` is the published judge prompt of an item that came as one. ``source`` is the item's file name and place.
    """

    id: str
    instruction: str
    response: str
    reference: str | None = None
    rubric: Rubric
    gold_score: float | None = None
    gold_rationale: str = ""
    category: str = ""
    prompt: str = ""
    source: str = ""

    @property
    def key(self) -> str:
        """What two equal items share, whatever their gold."""
        return digest([self.instruction, self.response, self.reference, self.rubric.model_dump(mode="json")])


class JudgePair(Record):
    """Two responses, of which somebody preferred one."""

    id: str
    instruction: str
    chosen: str
    rejected: str
    category: str = ""
    source: str = ""

    @property
    def key(self) -> str:
        return digest([self.instruction, self.chosen, self.rejected])


def read_items(path: Path, layout: Layout | None, score_field: str) -> tuple[list[JudgeItem | JudgePair], list[str]]:
    """The items of a file and its faults, each as ``file:line: what`` or ``file: item N: what``.

    Args:
        path: JSON lines, or one JSON array.
        layout: None tells it by the names of the fields.
        score_field: the field of the gold score; empty takes the layout's first one that all rows have.

    Raises:
        RecipeError: there is no such file, or it cannot be read.
    """
    rows, faults = read_json(path, {})
    if not rows:
        return [], faults
    layout = layout or _layout_of(rows[0].fields)
    if layout is None:
        return [], [*faults, f"{rows[0].place}: {_no_layout(rows[0].fields)}"]
    gold = score_field or _score_field(rows, layout)
    items: list[JudgeItem | JudgePair] = []
    of_rows: list[str] = []
    for row in rows:
        found: list[str] = []
        item = _READERS[layout](Fields(row.fields, found), gold)
        of_rows += [f"{row.place}: {fault}" for fault in [*found, *_misspelt(row.fields, layout)]]
        if not found:
            source = row.place.removeprefix(f"{path.parent}/")
            items.append(item.model_copy(update={"id": _id_of(item), "source": source}))
    return items, faults + stated_once(of_rows, len(rows))


def rubric_for_pairs(name: str, criteria: str, descriptions: Sequence[str], *, criteria_only: bool) -> Rubric:
    """The one rubric by which pairs are judged, which have none of their own.

    Args:
        name: of a rubric in the prompt file, unless ``criteria`` are given.
        criteria: a criterion of one's own.
        descriptions: what its scores from 1 to 5 mean.
        criteria_only: no scores are asked for, so ``descriptions`` may be empty.

    Raises:
        RecipeError: there is no such rubric, or its own one is not complete.
    """
    if not criteria:
        if descriptions:
            raise RecipeError("task judge: rubric_descriptions are given without rubric_criteria")
        if name not in RUBRICS:
            raise RecipeError(
                f"task judge: no rubric is called {name!r}; there is {', '.join(RUBRICS)}",
                hint="spell one out with task.rubric_criteria and task.rubric_descriptions",
            )
        return RUBRICS[name]
    texts = tuple(descriptions) or ("-",) * (HIGHEST if criteria_only else 0)
    if len(texts) != HIGHEST or not all(text.strip() for text in texts):
        raise RecipeError(
            f"task judge: rubric_descriptions must hold {HIGHEST} texts, one for each score from {LOWEST} to {HIGHEST};"
            f" {sum(bool(text.strip()) for text in texts)} are given"
        )
    one, two, three, four, five = texts
    return Rubric(criteria=criteria, descriptions=(one, two, three, four, five))


def _layout_of(fields: Mapping[str, Any]) -> Layout | None:
    if all(name in fields for name in NEEDED["feedback"]):
        return "feedback"  # the published rows also hold the whole prompt, as instruction
    if "response" not in fields and looks_like_prompt(str(fields.get("instruction", ""))):
        return "prometheus_text"
    shares = {
        layout: sum(name in fields for name in NEEDED[layout]) / len(NEEDED[layout])
        for layout in get_args(Layout)
        if layout != "prometheus_text"
    }
    best = max(shares, key=lambda layout: shares[layout])
    return best if shares[best] >= 0.5 else None


def layouts() -> str:
    """The layouts with the fields that each needs, a line each."""
    notes = {"prometheus_text": " (a whole prompt that begins with '###Task Description:')"}
    return "\n".join(f"  {layout}: {', '.join(names)}{notes.get(layout, '')}" for layout, names in NEEDED.items())


def _no_layout(fields: Mapping[str, Any]) -> str:
    inner = [name for name, value in fields.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    advice = f"; write the list under {inner[0]!r} alone into the file" if len(inner) == 1 else ""
    return f"the fields {listed(fields)} are those of no layout{advice}; the layouts need\n{layouts()}"


def _score_field(rows: Sequence[Row], layout: Layout) -> str:
    """The first usual field that holds something in all rows, else in some, else none."""
    counts = {name: sum(row.fields.get(name) is not None for row in rows) for name in _SCORE_FIELDS[layout]}
    whole = [name for name, count in counts.items() if count == len(rows)]
    some = [name for name, count in counts.items() if count]
    return [*whole, *some, *(_SCORE_FIELDS["feedback"] if layout == "feedback" else ()), ""][0]


def _misspelt(fields: Mapping[str, Any], layout: Layout) -> list[str]:
    """An optional field that is not read because of its name would be missed by nobody."""
    unknown = [name for name in fields if name not in NEEDED[layout] and name not in _OPTIONAL[layout]]
    scored = any(name in fields for name in _SCORE_FIELDS[layout])
    expected = (*_OPTIONAL[layout], *(() if scored else _SCORE_FIELDS[layout]))
    absent = [name for name in dict.fromkeys(expected) if name not in fields]
    near = [(name, difflib.get_close_matches(name, unknown, n=1, cutoff=0.8)) for name in absent]
    return [f"field {found[0]!r} is not read; did you mean to rename it {name!r}?" for name, found in near if found]


def _id_of(item: JudgeItem | JudgePair) -> str:
    gold = [item.gold_score, item.gold_rationale] if isinstance(item, JudgeItem) else []
    return digest(["judge", item.key, *gold])[:16]


def _feedback(row: Fields, gold: str) -> JudgeItem:
    return JudgeItem(
        id="",
        instruction=row.text("orig_instruction"),
        response=row.text("orig_response"),
        reference=row.optional("orig_reference_answer") or None,
        rubric=row.rubric("orig_criteria", [f"orig_{name}" for name in _DESCRIPTIONS]),
        **row.gold(gold, "orig_feedback"),
    )


def _biggen(row: Fields, gold: str) -> JudgeItem:
    inner = row.fields.get("score_rubric")
    if not isinstance(inner, Mapping):
        row.faults.append(check_row(row.fields, {"score_rubric": dict}))
    nested: list[str] = []
    rubric = Fields(inner if isinstance(inner, Mapping) else {}, nested).rubric("criteria", _DESCRIPTIONS)
    row.faults += [f"in score_rubric: {fault}" for fault in nested if isinstance(inner, Mapping)]
    return JudgeItem(
        id="",
        instruction=row.text("input"),
        response=row.text("response"),
        reference=row.optional("reference_answer") or None,
        rubric=rubric,
        category=row.optional("capability"),
        **row.gold(gold, gold.replace("score", "feedback")),
    )


def _pairs(row: Fields, gold: str) -> JudgePair:
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if chosen and chosen == rejected:
        row.faults.append("chosen and rejected are the same text")
    return JudgePair(
        id="", instruction=row.text("prompt"), chosen=chosen, rejected=rejected, category=row.optional("subset")
    )


def _prometheus_text(row: Fields, gold: str) -> JudgeItem:
    prompt = row.text("instruction")
    parts = {"instruction": "", "response": "", "reference": "", "rubric": ""}
    rubric = Rubric(criteria="", descriptions=("", "", "", "", ""))
    try:
        if prompt:
            parts = {name: tidy(text) for name, text in parts_of(prompt).items()}
            rubric = rubric_of(parts["rubric"])
            row.faults += [f"the prompt's {name} is empty" for name in ("instruction", "response") if not parts[name]]
    except ValueError as error:
        row.faults.append(str(error))
    return JudgeItem(
        id="",
        instruction=parts["instruction"],
        response=parts["response"],
        reference=parts["reference"] or None,
        rubric=rubric,
        category=row.optional("category"),
        prompt=row.fields.get("instruction") if prompt else "",
        **row.gold(gold, gold.replace("score", "feedback")),
    )


def _items(row: Fields, gold: str) -> JudgeItem:
    given = row.fields.get("score_descriptions")
    if isinstance(given, list) and len(given) == HIGHEST:
        descriptions = {f"score_descriptions[{number}]": text for number, text in enumerate(given)}
    else:
        descriptions = {f"score_descriptions[{number}]": "-" for number in range(HIGHEST)}
        row.faults.append(
            check_row(row.fields, {"score_descriptions": list})
            or f"field 'score_descriptions' must hold {HIGHEST} texts, it has {len(given or [])}"
        )
    texts = {**descriptions, "criteria": row.text("criteria") or "-"}
    rubric = Fields(texts, row.faults).rubric("criteria", list(descriptions))
    return JudgeItem(
        id="",
        instruction=row.text("instruction"),
        response=row.text("response"),
        reference=row.optional("reference") or None,
        rubric=rubric,
        category=row.optional("category"),
        **row.gold(gold, "feedback"),
    )


_READERS: dict[Layout, Callable[[Fields, str], JudgeItem | JudgePair]] = {
    "feedback": _feedback,
    "biggen": _biggen,
    "pairs": _pairs,
    "prometheus_text": _prometheus_text,
    "items": _items,
}
