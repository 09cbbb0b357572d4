"""What judgements of `arith_judge` get wrong, step by step: numbers, verdicts, quotes, scores.

    reasonrun eval arith_judge --split dev --num-problems 300 --run runs/judged
    python scripts/judgement_errors.py runs/judged evaluate/greedy

Counts over all judgements of one sample step, as one JSON line.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from reasonrun.chains import apply
from reasonrun.grading.judgement import read_decision
from reasonrun.records import Problem, Rollout
from reasonrun.report.run_record import open_run

LINE = re.compile(r"^Step \d+: (\d+) ([*+-]) (\d+) = (\d+) , I get (\d+) (right|wrong)$", re.MULTILINE)


def errors(problem: Problem, text: str) -> Counter[str]:
    """Faults of one judgement; ``other_form`` alone where its lines are not those of the steps."""
    steps: Any = problem.meta["steps"]
    lines, (score, _) = LINE.findall(text), read_decision(text, "score")
    if len(lines) != len(steps) or score is None:
        return Counter({"judgements": 1, "other_form": 1})
    found = Counter({"judgements": 1, "steps": len(lines)})
    for (left, operator, right, claimed, got, verdict), step in zip(lines, steps, strict=True):
        kind = "products" if operator == "*" else "sums"
        is_wrong = int(got) != apply(int(left), operator, int(right))
        found[kind] += 1
        found[f"{kind}_wrong"] += is_wrong
        found["wrong_and_copied"] += is_wrong and got == claimed
        found["misquoted"] += [int(left), operator, int(right), int(claimed)] != step
        found["verdict_against_own_numbers"] += (got == claimed) != (verdict == "right")
    from_verdicts = 1 + 4 * sum(line[-1] == "right" for line in lines) // len(lines)
    found["score_against_own_verdicts"] += from_verdicts != int(score)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("step", help="a sample step, such as evaluate/greedy or round-001/judge")
    args = parser.parse_args()
    run = open_run(args.run)
    rollouts = list(run.table(Rollout, args.step))
    problems = run.problems({rollout.problem_id for rollout in rollouts})
    total: Counter[str] = Counter()
    for rollout in rollouts:
        total += errors(problems[rollout.problem_id], rollout.text)
    print(json.dumps(dict(sorted(total.items()))))


if __name__ == "__main__":
    main()
