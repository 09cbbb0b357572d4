"""Graded answers per second on GSM8K-like rows, against math-verify called in a loop (figure P7).

Both sides grade the same completions in one process, in alternating chunks so that the load of the machine falls on
both; rates are per CPU second and per second of wall time. Verdicts are compared and every difference is counted.
Also grades answers that never end, and says how long the longest kept the pool. Prints one JSON line.

    python scripts/bench_grading.py --num-rows 2000
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from reasonrun.grading.number import NumberGrader
from reasonrun.grading.symbolic import SymbolicGrader
from reasonrun.records import Message, Problem

CHUNK = 100
HOSTILE = (
    r"(10^9)!",
    r"9^{9^{9}}",
    "(" * 3_000 + "1" + ")" * 3_000,
    "7" * 200_000,
    r"\sum_{n=1}^{10000000} \frac{1}{n}",
    r"\prod_{i=1}^{99999} (x+i)",
    r"(x^{9999}+1)^{9999}",
)
Item = tuple[Problem, str, bool]


@dataclass
class Side:
    """One way to grade, and the time it took."""

    grade: Callable[[list[Item]], list[bool]]
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0

    def run(self, items: list[Item]) -> list[bool]:
        cpu, wall = time.process_time(), time.perf_counter()
        verdicts = self.grade(items)
        self.cpu_seconds += time.process_time() - cpu
        self.wall_seconds += time.perf_counter() - wall
        return verdicts


def completions(num_rows: int, seed: int) -> Iterator[Item]:
    """Problems with solutions of two to five steps in GSM8K's form; a third of the answers is wrong."""
    rng = random.Random(seed)
    for number in range(num_rows):
        value, lines = rng.randint(2, 4_000), []
        for _ in range(rng.randint(2, 5)):
            operand = rng.randint(2, 900)
            lines.append(f"Then there are {value}+{operand} = {value + operand} of them in the box by the evening.")
            value += operand
        stated = value if rng.random() < 2 / 3 else value + rng.choice((1, -1, 10, 100))
        spelling = rng.choice((f"{stated}", f"{stated:,}", f"${stated}", f"{stated}.0"))
        question = (Message(role="user", content="How many are there?"),)
        problem = Problem(id=str(number), task="gsm8k", split="dev", messages=question, reference=f"{value:,}")
        yield problem, "\n".join([*lines, f"#### {spelling}"]), False


def math_verify_loop(items: list[Item]) -> list[bool]:
    """What a loop over math-verify does with its defaults: gold first, prediction second."""
    from math_verify import parse, verify

    return [bool(verify(parse(problem.reference), parse(text))) for problem, text, _ in items]


def hostile_seconds(grader: SymbolicGrader) -> tuple[Counter[str], float]:
    """Reasons given to answers that never end, and the longest wall time of one of them."""
    question = (Message(role="user", content="How many?"),)
    problem = Problem(id="p", task="maths", split="dev", messages=question, reference="3")
    reasons: Counter[str] = Counter()
    longest = 0.0
    for answer in HOSTILE:
        started = time.perf_counter()
        reasons[grader.grade(problem, f"\\boxed{{{answer}}}", truncated=False).reason] += 1
        longest = max(longest, time.perf_counter() - started)
    return reasons, longest


def compare(num_rows: int, seed: int) -> dict[str, Any]:
    """Grade ``num_rows`` completions on all sides."""
    items = list(completions(num_rows, seed))
    with closing(SymbolicGrader()) as symbolic:
        number = NumberGrader()
        sides = {
            "math_verify": Side(math_verify_loop),
            "number": Side(lambda chunk: [score.correct for score in number.grade_many(chunk)]),
            "symbolic": Side(lambda chunk: [score.correct for score in symbolic.grade_many(chunk)]),
        }
        math_verify_loop(items[:CHUNK])  # its imports and grammar are not what is measured
        verdicts: dict[str, list[bool]] = {name: [] for name in sides}
        for start in range(0, num_rows, CHUNK):
            for name, side in sides.items():
                verdicts[name] += side.run(items[start : start + CHUNK])
        reasons, longest = hostile_seconds(symbolic)
        cap = symbolic.settings.cpu_seconds
    base = sides["math_verify"]
    result: dict[str, Any] = {"figure": "P7", "num_rows": num_rows, "machine": platform.machine()}
    for name, side in sides.items():
        result[name] = {
            "per_cpu_second": round(num_rows / side.cpu_seconds),
            "per_second": round(num_rows / side.wall_seconds),
            "times_math_verify": round(base.cpu_seconds / side.cpu_seconds, 1),
            "correct_share": sum(verdicts[name]) / num_rows,
            "differences": sum(a != b for a, b in zip(verdicts[name], verdicts["math_verify"], strict=True)),
        }
    hostile = {"reasons": dict(reasons), "longest_wall_seconds": round(longest, 2), "cap_cpu_seconds": cap}
    return {**result, "hostile": hostile}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-rows", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    print(json.dumps(compare(arguments.num_rows, arguments.seed)))


if __name__ == "__main__":
    main()
