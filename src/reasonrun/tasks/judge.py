"""``judge``: responses to judge by a rubric, read from files, in the layout of Prometheus (Kim et al. 2024,
arXiv 2405.01535).

An item has an instruction, a response, a rubric, perhaps a reference answer and a gold score with its rationale. A pair of
a preferred and a rejected response is put as two problems: each response alone, or both of them in either order. The
forms of files are told in ``judge_files``; the files must be named, the package carries no items.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from reasonrun.contracts import Grader, Task
from reasonrun.errors import RecipeError
from reasonrun.grading.judgement import HIGHEST, LOWEST, MARKER, Decision, JudgementGrader, JudgementSettings
from reasonrun.judge_files import JudgeItem, JudgePair, Layout, layouts, read_items, rubric_for_pairs
from reasonrun.judging import judging_section
from reasonrun.prompts import judge as words
from reasonrun.question_files import duplicates, refuse, same_file
from reasonrun.records import Graded, Message, Problem, digest
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase

SPLITS = ("train", "dev", "test")


class Judge(Task):
    """Items to judge; see the module docstring."""

    name = "judge"
    prompt_version = words.VERSION
    reads_logps = True
    styles = frozenset({"plain", "score_only"})
    capabilities = frozenset({"solution", "gold_score", "question_about"})

    class Settings(SettingsBase):
        """What a recipe can say about ``judge``."""

        name: Literal["judge"] = "judge"
        path: str = setting("", Effect.SEMANTIC, "Folder with train.jsonl and test.jsonl.")
        train_path: str = setting("", Effect.SEMANTIC, "File of training items (JSON lines or one array).")
        test_path: str = setting("", Effect.SEMANTIC, "File of test items.")
        data: str = setting("", Effect.SEMANTIC, "One file for measuring only: its items are the test split.")
        layout: Literal["auto", "feedback", "biggen", "pairs", "prometheus_text", "items"] = setting(
            "auto", Effect.SEMANTIC, "Form of the files; auto tells it by the names of the fields."
        )
        score_field: str = setting("", Effect.SEMANTIC, "Field of the gold score; empty takes the layout's usual one.")
        mode: Literal["absolute", "pairwise"] = setting(
            "absolute", Effect.SEMANTIC, "How pairs are asked: each response alone, or both in either order."
        )
        rubric: str = setting("helpfulness", Effect.SEMANTIC, "Rubric by which pairs are judged, by name.")
        rubric_criteria: str = setting("", Effect.SEMANTIC, "A criterion of one's own for pairs, instead of rubric.")
        rubric_descriptions: tuple[str, ...] = setting((), Effect.SEMANTIC, "Its descriptions of the scores 1 to 5.")
        show_reference: bool = setting(True, Effect.SEMANTIC, "Show the reference answers that items have.")
        rerender: bool = setting(
            True, Effect.SEMANTIC, "Put prometheus_text items in our words; false puts their prompts as they are."
        )
        system: Literal["turn", "inline"] = setting(
            "turn", Effect.SEMANTIC, "The system line as a turn, or at the head of the user's, for templates without."
        )
        num_train: int = setting(0, Effect.SEMANTIC, "Training items at most, a pair is one; 0 takes all.", ge=0)
        num_dev: int = setting(
            500, Effect.SEMANTIC, "Items carved from train for dev, whole instructions; 0 for none.", ge=0
        )
        num_test: int = setting(
            0,
            Effect.SEMANTIC,
            "Test items at most; 0 takes all. Without a test file so many are carved from train.",
            ge=0,
        )

    def __init__(self, config: Settings) -> None:
        super().__init__(config)
        ways = {
            "path": bool(config.path),
            "train_path/test_path": bool(config.train_path or config.test_path),
            "data": bool(config.data),
        }
        given = [way for way, used in ways.items() if used]
        if len(given) != 1:
            raise RecipeError(
                f"task judge: the items come from one of {', '.join(ways)}; given: {', '.join(given) or 'none'}",
                hint="name the file with task.data (reasonrun eval judge --data FILE), or files to train on with task.path",
            )
        if same_file(config.train_path, config.test_path):
            raise RecipeError(
                f"task judge: train_path and test_path are both {config.test_path}: a test on what was trained on says nothing",
                hint="give another file as task.test_path, or leave it out and set task.num_test",
            )
        self._decision: Decision = "choice" if config.mode == "pairwise" else "score"
        if self._decision == "choice":
            self.styles, self.capabilities = frozenset({"plain"}), frozenset()
        self._rubric = rubric_for_pairs(
            config.rubric, config.rubric_criteria, config.rubric_descriptions, criteria_only=self._decision == "choice"
        )

    def problems(self, split: str) -> Sequence[Problem]:
        """All problems of ``split``; those of a pair follow each other.

        Raises:
            RecipeError: faulty items (all of them are named), a test item in train, an empty split.
        """
        if split not in SPLITS:
            raise RecipeError(f"task judge has no split {split!r}; it has {', '.join(SPLITS)}")
        items, why_empty = self._splits[split]
        if not items:
            raise RecipeError(
                f"task judge: split {split} is empty: {why_empty}", hint="change that setting of the task"
            )
        return [problem for item in items for problem in self._problems_of(item, split)]

    def messages(self, problem: Problem, style: str) -> tuple[Message, ...]:
        """plain asks for feedback and a decision; score_only for the score alone, whose marker is already there."""
        if style not in self.styles:
            raise RecipeError(f"task judge has no style {style!r}; it has {', '.join(sorted(self.styles))}")
        return self._messages(problem.meta, score_only=style == "score_only")

    def grader(self) -> Grader:
        """The decision after the last marker against the gold one."""
        return JudgementGrader(JudgementSettings(decision=self._decision))

    def opening(self, style: str) -> str:
        """The style ``score_only`` begins with the marker."""
        return words.SCORE_OPENING if style == "score_only" else ""

    def solution(self, problem: Problem) -> str:
        """The gold rationale and the gold score.

        Raises:
            RecipeError: the item has no rationale, its gold is no whole number, or the rationale argues for another score.
        """
        answer, rationale = self.direct_answer(problem), str(problem.meta["gold_rationale"])
        if not rationale.endswith(answer):
            lack = f"a rationale for another score than {problem.reference}" if rationale else "no gold rationale"
            raise RecipeError(
                f"task judge: item {_where(problem)} has {lack}", hint="take items with feedbacks for their gold scores"
            )
        return rationale

    def gold_score(self, problem: Problem) -> float | None:
        """The gold score, maybe a mean over annotators; None for pairs."""
        return float(problem.reference) if problem.reference not in ("", "A", "B") else None

    def question_about(self, problem: Problem, text: str) -> tuple[Message, ...]:
        """Asks to judge the judgement ``text`` of the item's response.

        Raises:
            RecipeError: the problem compares two responses.
        """
        meta = problem.meta
        if "response" not in meta:
            raise RecipeError(
                f"task judge: item {_where(problem)} compares two responses; judgements of one can be judged"
            )
        asked = words.meta(
            str(meta["instruction"]), str(meta["response"]), _rubric_in(meta), text, self._reference_in(meta)
        )
        return self._placed(asked)

    def direct_answer(self, problem: Problem) -> str:
        """The marker and the gold decision.

        Raises:
            RecipeError: there is no gold decision, or it is a mean that no judge can say.
        """
        if problem.reference not in ("1", "2", "3", "4", "5", "A", "B"):
            gold = f"the gold score {problem.reference}, no whole number" if problem.reference else "no gold score"
            raise RecipeError(
                f"task judge: item {_where(problem)} has {gold}", hint="take items with one whole gold score"
            )
        return f"{MARKER} {problem.reference}"

    def scripted_answer(self, problem: Problem, *, correct: bool, seed: int, prefix: str = "") -> str:
        """A short feedback and a right or wrong decision; of a pair, the preferred response gets the higher score."""
        decision = random.Random(seed).choice(_decisions(problem, correct=correct))
        whole = f"The response was read against the rubric. {MARKER} {decision}"
        if whole.startswith(prefix):
            return whole[len(prefix) :]
        return f" {decision}" if prefix.rstrip().endswith(MARKER) else f" {MARKER} {decision}"

    def tables(self, groups: Sequence[tuple[Problem, Sequence[Graded]]]) -> Mapping[str, Any]:
        """How well the decisions agree with the gold ones."""
        return {"judging": judging_section(groups, self._decision)}

    def _problems_of(self, item: JudgeItem | JudgePair, split: str) -> list[Problem]:
        """One problem of an item, two of a pair."""
        shared = {"instruction": item.instruction, "category": item.category, "source": item.source}
        if isinstance(item, JudgeItem):
            gold = "" if item.gold_score is None else _written(item.gold_score)
            meta = {**shared, **_judged(item.response, item.rubric, item.reference or "")}
            own = {"gold_rationale": item.gold_rationale, "prompt": "" if self.config.rerender else item.prompt}
            return [self._problem(item.id, split, gold, {**meta, **own})]
        shared["pair"] = item.id
        problems = []
        for chosen in (True, False):
            if self.config.mode == "absolute":
                response = item.chosen if chosen else item.rejected
                meta = {**shared, **_judged(response, self._rubric, ""), "side": "chosen" if chosen else "rejected"}
                problems.append(self._problem([item.id, meta["side"]], split, "", {**meta, "gold_rationale": ""}))
            else:
                one, other = (item.chosen, item.rejected) if chosen else (item.rejected, item.chosen)
                order = "chosen_first" if chosen else "rejected_first"
                asked = {"response_a": one, "response_b": other, "reference": "", "criteria": self._rubric.criteria}
                meta = {**shared, **asked, "order": order, "gold_rationale": ""}
                problems.append(self._problem([item.id, order], split, "A" if chosen else "B", meta))
        return problems

    def _problem(self, content: Any, split: str, gold: str, meta: dict[str, Any]) -> Problem:
        key = content if isinstance(content, str) else digest(content)[:16]
        messages = self._messages(meta, score_only=False)
        return Problem(id=key, task="judge", split=split, messages=messages, reference=gold, meta=meta)

    def _messages(self, meta: Mapping[str, Any], *, score_only: bool) -> tuple[Message, ...]:
        if meta.get("prompt"):
            return (Message(role="user", content=meta["prompt"]),)
        instruction, reference = meta["instruction"], self._reference_in(meta)
        if "response_a" in meta:
            responses = (meta["response_a"], meta["response_b"])
            return self._placed(words.pairwise(instruction, *responses, meta["criteria"], reference))
        asked = words.absolute(instruction, meta["response"], _rubric_in(meta), reference, score_only=score_only)
        return self._placed(asked)

    def _placed(self, asked: tuple[Message, ...]) -> tuple[Message, ...]:
        return words.inline(asked) if self.config.system == "inline" else asked

    def _reference_in(self, meta: Mapping[str, Any]) -> str | None:
        return str(meta["reference"]) if self.config.show_reference and meta["reference"] else None

    @cached_property
    def _loaded(self) -> dict[str, list[JudgeItem | JudgePair]]:
        """The items of the files of train and test, checked."""
        faults: list[str] = []
        items = {split: self._read(split, faults) for split in ("train", "test")}
        places = {split: [(item.key, item.source) for item in read] for split, read in items.items()}
        for split, found in places.items():
            folder = self._file(split).parent if found else Path()
            faults += [str(folder / fault) for fault in duplicates(found, "same item")]
        in_train = dict(reversed(places["train"]))
        faults += [
            f"{self._file('test').parent / place}: this test item is also in train, as {in_train[key]}"
            for key, place in places["test"]
            if key in in_train
        ]
        if faults:
            refuse(faults, hint=_hint(faults))
        return items

    def _file(self, split: str) -> Path:
        config = self.config
        given = config.train_path if split == "train" else config.test_path or config.data
        return Path(f"{config.path}/{split}.jsonl" if config.path else given).expanduser()

    def _read(self, split: str, faults: list[str]) -> list[JudgeItem | JudgePair]:
        path, config = self._file(split), self.config
        if path == Path():
            return []
        layout: Layout | None = None if config.layout == "auto" else config.layout
        items, found = read_items(path, layout, config.score_field)
        faults += found
        if config.mode == "pairwise" and any(isinstance(item, JudgeItem) for item in items):
            faults.append(f"{path}: these are no pairs, which task.mode=pairwise needs")
        return items

    @cached_property
    def _splits(self) -> dict[str, tuple[list[JudgeItem | JudgePair], str]]:
        """The items of each split, and what emptied it where it is empty."""
        config, train, test = self.config, self._loaded["train"], self._loaded["test"][: self.config.num_test or None]
        if not self._loaded["test"] and train:
            test, train = _carved(train, config.num_test, "judge-test")
        dev, kept = _carved(train, config.num_dev, "judge-dev")
        only = "task.data is for measuring only, its items are the split test" if config.data else ""
        unset = only or "train_path is not set"
        whole = f"num_dev={config.num_dev} and num_test={config.num_test} took all items of train"
        return {
            "train": (kept[: config.num_train or None], whole if self._loaded["train"] else unset),
            "dev": (dev, "num_dev is 0" if train else whole if self._loaded["train"] else unset),
            "test": (test, "there is neither a test file nor num_test, the items to carve from train"),
        }


def _carved(
    items: list[JudgeItem | JudgePair], count: int, salt: str
) -> tuple[list[JudgeItem | JudgePair], list[JudgeItem | JudgePair]]:
    """At least ``count`` items and the others, by their instructions alone, whatever the order of the file.

    Responses to one instruction often share its rubric and reference, so they stay together.
    """
    sizes = Counter(item.instruction for item in items)
    ranked = sorted(sizes, key=lambda instruction: digest([salt, instruction]))
    before = accumulate((sizes[instruction] for instruction in ranked), initial=0)
    chosen = {instruction for instruction, so_far in zip(ranked, before, strict=False) if so_far < count}
    return (
        [item for item in items if item.instruction in chosen],
        [item for item in items if item.instruction not in chosen],
    )


def _judged(response: str, rubric: words.Rubric, reference: str) -> dict[str, Any]:
    """One response and the rubric for it, as a problem's meta holds them."""
    descriptions = list(rubric.descriptions)
    return {"response": response, "reference": reference, "criteria": rubric.criteria, "descriptions": descriptions}


def _rubric_in(meta: Mapping[str, Any]) -> words.Rubric:
    return words.Rubric(criteria=meta["criteria"], descriptions=meta["descriptions"])


def _decisions(problem: Problem, *, correct: bool) -> list[str]:
    """The decisions that are right, or those that are wrong."""
    if problem.reference in ("A", "B"):
        return [choice for choice in "AB" if (choice == problem.reference) == correct]
    scores = range(LOWEST, HIGHEST + 1)
    if problem.reference:
        return [str(score) for score in scores if (abs(score - float(problem.reference)) <= 0.5) == correct]
    high = (problem.meta.get("side") != "rejected") == correct
    return [str(score) for score in scores if (score > 3 if high else score < 3)]


def _written(gold: float) -> str:
    """``3``, ``3.5``, ``3.6667``."""
    return f"{gold:.4f}".rstrip("0").rstrip(".")


def _where(problem: Problem) -> str:
    return f"{problem.id} ({problem.meta['source']})"


def _hint(faults: Sequence[str]) -> str:
    hint = "correct the rows, or remove copies; task.layout names the form of files whose fields do not tell it"
    if not any("is missing" in fault for fault in faults):
        return hint
    good = '{"instruction": "…", "response": "…", "criteria": "…", "score_descriptions": [five texts, for 1 to 5], "score": 4}'
    return f"{hint}\n  a good row: {good}\n  the layouts need\n{layouts()}"
