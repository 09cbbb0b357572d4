"""Measure a build of ``tiny`` against the gates of decision note 0001, with 95 % intervals.

python scripts/tiny_gates.py runs/tiny/final --num-problems 300            # the dev split, for choosing the phases
python scripts/tiny_gates.py src/reasonrun/assets/tiny-1 --num-problems 2000 --split test   # what is reported
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reasonrun.chains import (
    chain_of,
    judge_prompt,
    rubric_score,
    solution_text,
    solve_with_mistakes,
)
from reasonrun.engines.hf import HuggingFace
from reasonrun.generation import Request
from reasonrun.metrics import bootstrap_interval, wilson_interval
from reasonrun.models import weights_digest
from reasonrun.prompts import arith as words
from reasonrun.randomness import derive_seed
from reasonrun.records import Checkpoint, Message, Problem, Sampling, digest
from reasonrun.rendering import Renderer
from reasonrun.tasks.arith import Arith


class Bench:
    """The model, asked in batches."""

    def __init__(self, folder: Path) -> None:
        self.renderer = Renderer.load(folder)
        self.engine = HuggingFace(HuggingFace.Settings())
        self.engine.load(Checkpoint(path=str(folder), weights="gates", tokenizer=self.renderer.digest))

    def ask(self, conversations: Sequence[Sequence[Message]], temperature: float, n: int = 1) -> list[list[str]]:
        """Texts of ``n`` answers to each conversation."""
        sampling = Sampling(temperature=temperature, max_new_tokens=100)
        requests = [
            Request(
                key=str(number),
                problem_id="",
                prompt_ids=prompt_ids,
                n=n,
                # Of the prompt, so that a second attempt does not repeat the draws of the first.
                seed=derive_seed("gates", digest(list(prompt_ids)), str(temperature)),
                sampling=sampling,
            )
            for number, prompt_ids in enumerate(map(self.renderer.render, conversations))
        ]
        texts = [[""] * n for _ in conversations]
        for completion in self.engine.generate(requests):
            texts[int(completion.request)][completion.index] = completion.text
        return texts


def user(text: str) -> Message:
    return Message(role="user", content=text)


def solving(
    bench: Bench, task: Arith, problems: Sequence[Problem], right: Callable[[Problem, str], bool]
) -> dict[str, Any]:
    """Greedy, T=1, pass@8, hinted greedy; and second attempts after T=1 first ones."""
    plain = [task.messages(problem, "plain") for problem in problems]
    greedy = [right(p, texts[0]) for p, texts in zip(problems, bench.ask(plain, 0.0), strict=True)]
    sampled = bench.ask(plain, 1.0, 8)
    counts = [sum(right(p, text) for text in texts) for p, texts in zip(problems, sampled, strict=True)]
    hinted = bench.ask([task.messages(problem, "hinted") for problem in problems], 0.0)
    firsts = [texts[0] for texts in sampled]
    turns = [
        [*messages, Message(role="assistant", content=first), user(words.CORRECTION)]
        for messages, first in zip(plain, firsts, strict=True)
    ]
    seconds = [texts[0] for texts in bench.ask(turns, 1.0)]
    before = np.array([right(p, text) for p, text in zip(problems, firsts, strict=True)])
    after = np.array([right(p, text) for p, text in zip(problems, seconds, strict=True)])
    changed = np.array([answer(a) != answer(b) for a, b in zip(firsts, seconds, strict=True)])
    return {
        "greedy": proportion(greedy),
        "sampled T=1": [sum(counts) / (8 * len(counts)), *bootstrap_interval([c / 8 for c in counts])],
        "pass@8": proportion([count > 0 for count in counts]),
        "hinted greedy": proportion([right(p, texts[0]) for p, texts in zip(problems, hinted, strict=True)]),
        "second: wrong to right": proportion(~before & after),
        "second: right to wrong": proportion(before & ~after),
        "second: changed": proportion(changed),
    }


def judging(bench: Bench, problems: Sequence[Problem]) -> dict[str, Any]:
    """Parse rate, exact scores and Pearson correlation of greedy judgements; wrong steps uniform in 0 to all."""
    rng = random.Random(0)
    prompts, gold = [], []
    for problem in problems:
        chain = chain_of(problem)
        num_steps = len(chain.operations)
        wrong = frozenset(rng.sample(range(num_steps), rng.randint(0, num_steps)))
        steps = solve_with_mistakes(chain, wrong, rng)
        prompts.append([user(judge_prompt(problem.messages[-1].content, solution_text(steps)))])
        gold.append(rubric_score(steps))
    matches = [re.search(r"\[RESULT\] ([1-5])$", texts[0].strip()) for texts in bench.ask(prompts, 0.0)]
    pairs = np.array([[int(match[1]), score] for match, score in zip(matches, gold, strict=True) if match])
    return {
        "judge: parsed": proportion([match is not None for match in matches]),
        "judge: exact": proportion(pairs[:, 0] == pairs[:, 1]),
        "judge: Pearson": correlation(pairs),
    }


def correlation(pairs: Any) -> list[float] | None:
    """Pearson's r with Fisher's interval; None where it is not defined."""
    if len(pairs) < 4 or not pairs.std(axis=0).all():
        return None
    r = float(np.corrcoef(pairs.T)[0, 1])
    reach = 1.96 / math.sqrt(len(pairs) - 3)
    return [r, math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach)]


def proportion(flags: Any) -> list[float]:
    return [float(np.mean(flags)), *wilson_interval(int(np.sum(flags)), len(flags))]


def answer(text: str) -> str | None:
    found = re.findall(r"Answer: (\d+)", text)
    return found[-1] if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--num-problems", type=int, default=300)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    args = parser.parse_args()
    task = Arith(Arith.Settings(num_dev=args.num_problems, num_test=args.num_problems))
    problems = task.problems(args.split)
    grader = task.grader()

    def right(problem: Problem, text: str) -> bool:
        return grader.grade(problem, text, truncated=False).correct

    bench = Bench(args.model)
    measured = {**solving(bench, task, problems, right), **judging(bench, problems)}
    weights = weights_digest(args.model)
    print(json.dumps({"split": args.split, "weights": weights, "num_problems": len(problems), **measured}, indent=1))


if __name__ == "__main__":
    main()
