"""``gsm8k``: grade-school maths word problems (Cobbe et al. 2021, arXiv 2110.14168), graded by the exact number.

Rows come from the Hub or from JSON-lines files with the fields ``question`` and ``answer`` (a solution that ends with
``#### number``). The published data has no dev split; one is carved from train by content hash, so that it stays the
same under another order of rows. Test is never used for choices.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

from reasonrun.contracts import Grader, Task
from reasonrun.errors import EnvironmentProblem, RecipeError
from reasonrun.grading.answers import read_number, write_number
from reasonrun.grading.number import NumberGrader
from reasonrun.question_files import Row, duplicates, read_json_lines, refuse, same_file
from reasonrun.records import Message, Problem, digest
from reasonrun.row_faults import check_row, stated_once
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase

SPLITS = ("train", "dev", "test")
FIELDS = {"question": str, "answer": str}
MAX_HINT_CHARS = 20  # a hint that long would be a solution (the released STaR code hints with all of it)
_STEP = re.compile(r"<<[^<>\n]*>>")


def load_prompts(version: int) -> dict[str, Any]:
    """The prompt texts of ``prompts/gsm8k-<version>.toml``."""
    return tomllib.loads(resources.files("reasonrun.prompts").joinpath(f"gsm8k-{version}.toml").read_text("utf-8"))


PROMPT_VERSION = 1
_PROMPTS = load_prompts(PROMPT_VERSION)


class Gsm8k(Task):
    """GSM8K; see the module docstring."""

    name = "gsm8k"
    prompt_version = PROMPT_VERSION
    styles = frozenset({"plain", "few_shot", "steps", "hinted", "direct"})
    capabilities = frozenset({"solution", "correction"})
    hint_markers: ClassVar[tuple[str, ...]] = tuple(_PROMPTS["hint_markers"])

    class Settings(SettingsBase):
        """What a recipe can say about ``gsm8k``."""

        name: Literal["gsm8k"] = "gsm8k"
        source: str = setting("openai/gsm8k", Effect.SEMANTIC, "Data set on the Hub, read when no path is given.")
        revision: str = setting("main", Effect.SEMANTIC, "Branch, tag or commit of the Hub data set.")
        path: str = setting("", Effect.SEMANTIC, "Folder with train.jsonl and test.jsonl, instead of the Hub.")
        train_path: str = setting("", Effect.SEMANTIC, "File of training rows, instead of path.")
        test_path: str = setting("", Effect.SEMANTIC, "File of test rows, instead of path.")
        num_train: int = setting(0, Effect.SEMANTIC, "Training problems at most; 0 takes all.", ge=0)
        num_dev: int = setting(500, Effect.SEMANTIC, "Problems carved from train for the dev split; 0 for none.", ge=0)
        num_test: int = setting(0, Effect.SEMANTIC, "Test problems at most; 0 takes all.", ge=0)
        max_steps: int = setting(
            0, Effect.SEMANTIC, "Keep problems whose gold solution has at most so many <<…>> steps; 0 keeps all.", ge=0
        )
        num_shots: int = setting(6, Effect.SEMANTIC, "Demonstrations in the few_shot and steps styles.", ge=0)
        num_hinted_shots: int = setting(6, Effect.SEMANTIC, "Hinted demonstrations in the hinted style.", ge=0)

    def __init__(self, config: Settings) -> None:
        super().__init__(config)
        files = config.train_path or config.test_path
        if config.path and files:
            raise RecipeError(
                "task gsm8k: path and train_path/test_path are both given",
                hint="keep task.path (a folder with train.jsonl and test.jsonl), or the two file paths",
            )
        if files and not config.train_path:
            raise RecipeError(
                "task gsm8k: test_path is given without train_path",
                hint="add task.train_path, the file of training rows",
            )
        if same_file(config.train_path, config.test_path):
            raise RecipeError(
                f"task gsm8k: train_path and test_path are both {config.test_path}: a test on what was trained on says nothing",
                hint="give another file as task.test_path",
            )

    def problems(self, split: str) -> Sequence[Problem]:
        """All problems of ``split``.

        Raises:
            RecipeError: faulty rows (all of them are named), a test question in train, an empty split.
            EnvironmentProblem: the Hub cannot be reached.
        """
        if split not in SPLITS:
            raise RecipeError(f"task gsm8k has no split {split!r}; it has {', '.join(SPLITS)}")
        chosen, why_empty = self._splits[split]
        if not chosen:
            raise RecipeError(
                f"task gsm8k: split {split} is empty: {why_empty}", hint="change that setting of the task"
            )
        return chosen

    def messages(self, problem: Problem, style: str) -> tuple[Message, ...]:
        """plain and direct ask once; few_shot, steps and hinted come after demonstrations, the first training problems."""
        if style not in self.styles:
            raise RecipeError(f"task gsm8k has no style {style!r}; it has {', '.join(sorted(self.styles))}")
        num_shots = self.config.num_hinted_shots if style == "hinted" else self.config.num_shots
        if style in ("plain", "direct"):
            num_shots = 0
        turns = [
            message for shot in self._demonstrations(num_shots, problem) for message in self._exchange(shot, style)
        ]
        return (*turns, self._question(problem, style))

    def grader(self) -> Grader:
        """The exact number after ``####``, else in a box, else after "the answer is"."""
        return NumberGrader()

    def direct_answer(self, problem: Problem) -> str:
        """The answer line alone."""
        return f"#### {problem.reference}"

    def opening(self, style: str) -> str:
        """The style ``steps`` begins with a labelled first step (Lai et al. 2024, arXiv 2406.18629, §3.2)."""
        return str(_PROMPTS["opening"]).strip() if style == "steps" else ""

    def solution(self, problem: Problem) -> str:
        """The gold solution with the opening and a label before each of its lines."""
        *lines, answer = [line for line in bare_solution(problem).split("\n") if line.strip()]
        opening = self.opening("steps").rpartition("\n")[0]
        steps = [f"Step {number}: {line}" for number, line in enumerate(lines or ["The answer is given."], start=1)]
        return "\n".join([opening, *steps, answer])

    def correction(self) -> str:
        """Asks to correct what may be wrong and to write the whole solution again, whatever the first one was."""
        return str(_PROMPTS["correction"]).strip()

    def scripted_answer(self, problem: Problem, *, correct: bool, seed: int, prefix: str = "") -> str:
        """What is left of the gold solution after as many lines as ``prefix`` has, or the same with another number."""
        solution = self.solution(problem) if prefix else bare_solution(problem)
        gold = read_number(problem.reference)
        if not correct and gold is not None:
            offset = random.Random(seed).choice((1, -1, 2, 10, -10))
            solution = f"{solution.rpartition('####')[0]}#### {write_number(gold + offset)}"
        whole, _, label = prefix.rpartition("\n")
        rest = "\n".join(solution.split("\n")[whole.count("\n") + 1 :]) if whole else solution
        return rest.removeprefix(label) if label else rest

    def _question(self, problem: Problem, style: str) -> Message:
        # not str.format, and the answer only behind the question: a question may hold braces
        before, _, after = _PROMPTS[style].strip().partition("{question}")
        answer = problem.reference if style == "hinted" else ""
        question = problem.messages[-1].content
        return Message(role="user", content=before + question + after.replace("{answer}", answer))

    def _exchange(self, problem: Problem, style: str) -> tuple[Message, Message]:
        solution = self.solution(problem) if style == "steps" else bare_solution(problem)
        return self._question(problem, style), Message(role="assistant", content=solution)

    def _demonstrations(self, num_shots: int, asked: Problem) -> list[Problem]:
        """The first problems of train, without the one that is asked: its prompt must not hold its solution."""
        if not num_shots:
            return []
        # train before its cap, so that a smaller num_train keeps the same demonstrations
        others = [problem for problem in self._carved[0][: num_shots + 1] if problem.id != asked.id]
        if num_shots > len(others):
            raise RecipeError(
                f"task gsm8k: {num_shots} demonstrations were asked for, train has {len(others)} other problems",
                hint="lower task.num_shots and task.num_hinted_shots",
            )
        return others[:num_shots]

    @cached_property
    def _loaded(self) -> dict[str, tuple[Problem, ...]]:
        """The problems of the published splits, train and test, checked."""
        faults: list[str] = []
        rows = {split: self._read(split, faults) for split in ("train", "test")}
        problems: dict[str, tuple[Problem, ...]] = {}
        questions: dict[str, list[tuple[str, str]]] = {}
        for split, split_rows in rows.items():
            faults += duplicates(
                [(str(row.fields["id"]), row.place) for row in split_rows if "id" in row.fields], "same id"
            )
            questions[split] = [(question_key(row), row.place) for row in split_rows]
            faults += duplicates(questions[split], "same question")
            found: list[str] = []
            problems[split] = tuple(p for row in split_rows if (p := _problem(row, split, found)) is not None)
            faults += stated_once(found, len(split_rows))
        in_train = dict(reversed(questions["train"]))
        faults += [
            f"{place}: this test question is also in train, as {in_train[key]}"
            for key, place in questions["test"]
            if key in in_train
        ]
        if faults:
            leaks = any(" is also in train, as " in fault for fault in faults)
            advice = "take the test questions out of the file of train, or the copies out of test; " if leaks else ""
            refuse(faults, hint=advice + 'a good row: {"question": "…", "answer": "… #### 72"}')
        return problems

    @cached_property
    def _carved(self) -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
        """Train and dev, before the cap on train."""
        train = [problem for problem in self._loaded["train"] if self._short_enough(problem)]
        ranked = sorted(train, key=lambda problem: digest(["gsm8k-dev", problem.id]))
        chosen = {problem.id for problem in ranked[: self.config.num_dev]}
        dev = tuple(p.model_copy(update={"split": "dev"}) for p in train if p.id in chosen)
        return tuple(p for p in train if p.id not in chosen), dev

    @cached_property
    def _splits(self) -> dict[str, tuple[tuple[Problem, ...], str]]:
        """Each split, and what emptied it where it is empty."""
        config, rows = self.config, self._loaded
        train, dev = self._carved
        test = tuple(problem for problem in rows["test"] if self._short_enough(problem))
        filtered = f"max_steps={config.max_steps} left none of {{}} problems"
        train_filtered = "" if train or dev else filtered.format(len(rows["train"]))
        return {
            "train": (
                train[: config.num_train or None],
                train_filtered or f"num_dev={config.num_dev} took all {len(dev)} problems of train",
            ),
            "dev": (dev, train_filtered or "num_dev is 0"),
            "test": (
                test[: config.num_test or None],
                filtered.format(len(rows["test"])) if rows["test"] else "test_path is not set",
            ),
        }

    def _short_enough(self, problem: Problem) -> bool:
        num_steps = problem.meta["num_steps"]
        return not self.config.max_steps or (isinstance(num_steps, int) and num_steps <= self.config.max_steps)

    def _read(self, split: str, faults: list[str]) -> list[Row]:
        config = self.config
        if not config.path and not config.train_path:
            return _read_hub(config.source, config.revision, split, faults)
        path = f"{config.path}/{split}.jsonl" if config.path else getattr(config, f"{split}_path")
        if not path:
            return []
        rows, found = read_json_lines(Path(path).expanduser(), FIELDS)
        faults += found
        return rows


def _read_hub(source: str, revision: str, split: str, faults: list[str]) -> list[Row]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise EnvironmentProblem(
            "task gsm8k reads the Hub through the package datasets, which is not installed",
            hint="pip install 'reasonrun[hub]', or set task.path to a folder with train.jsonl and test.jsonl",
        ) from None
    try:
        table = load_dataset(source, "main", split=split, revision=revision)
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(
            f"task gsm8k: {source} (revision {revision}, split {split}) cannot be loaded from the Hub: {error}",
            hint="check the network, or set task.path to a folder with train.jsonl and test.jsonl",
        ) from error
    rows = [Row(f"{source}/{split}:{number}", dict(fields)) for number, fields in enumerate(table, start=1)]
    found = [(row, check_row(row.fields, FIELDS)) for row in rows]
    faults += stated_once([f"{row.place}: {fault}" for row, fault in found if fault], len(rows))
    return [row for row, fault in found if not fault]


def _problem(row: Row, split: str, faults: list[str]) -> Problem | None:
    question, solution = row.fields["question"].strip(), row.fields["answer"].strip()
    _, marker, reference = (part.strip() for part in solution.rpartition("####"))
    fault = ""
    if not marker:
        fault = "the answer has no line '#### number'"
    elif read_number(reference, units=False) is None:
        fault = f"the text after #### is not a number: {reference[:40]!r}"
    elif len(reference) >= MAX_HINT_CHARS:
        fault = f"the number after #### has {len(reference)} characters, a hint must have fewer than {MAX_HINT_CHARS}"
    if fault:
        faults.append(f"{row.place}: {fault}")
        return None
    return Problem(
        id=digest(["gsm8k", question, reference])[:16],
        task="gsm8k",
        split=split,
        messages=(Message(role="user", content=question),),
        reference=reference,
        meta={"solution": solution, "num_steps": len(_STEP.findall(solution)), "source": row.place.rpartition("/")[2]},
    )


def question_key(row: Row) -> str:
    """What two equal questions share: their words, whatever their spaces and capitals."""
    return " ".join(str(row.fields["question"]).casefold().split())


def bare_solution(problem: Problem) -> str:
    """The gold solution without calculator annotations."""
    return _STEP.sub("", str(problem.meta["solution"]))
