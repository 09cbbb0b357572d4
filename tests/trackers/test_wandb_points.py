from __future__ import annotations

import json
from pathlib import Path

from wandb_runs import evaluate_row, round_rows, write_round

from reasonrun.trackers._wandb_points import Projection, read_rows, read_seconds
from reasonrun.trackers._wandb_samples import sample_rows


def test_names_and_axes_of_a_round(tmp_path: Path) -> None:
    projection = Projection(run_dir=tmp_path)
    points = [point for row in round_rows(2) for point in projection.points(row)]
    assert [point.metrics for point in points] == [
        {
            "round": 2,
            "dev/num_problems": 4,
            "dev/greedy": 0.2,
            "dev/greedy/low": 0.3,
            "dev/greedy/high": 0.7,
            "dev/greedy/num_samples": 4,
        },
        {"round": 2, "sample/num_rollouts": 6, "sample/num_completion_tokens": 62},
        {
            "round": 2,
            "grade/num_rollouts": 6,
            "grade/num_correct": 3,
            "grade/reasons/correct": 3,
            "grade/reasons/wrong": 3,
            "grade/accuracy": 0.5,
        },
        {
            "round": 2,
            "star_rows/num_examples": 3,
            "star_rows/kept_share": 0.5,
            "star_rows/sources/self": 3,
            "round/num_examples": 3,
            "round/kept_share": 0.5,
            "round/sources/self": 3,
        },
        {"round": 2, "round/num_steps": 2, "round/loss": 0.25},  # no curve file: the row alone
    ]
    assert [point.samples_of for point in points] == [None, None, "round-002/grade", None, None]
    assert {point.axis for point in points} == {"round"}


def test_the_curve_counts_on_over_rounds_and_ignores_other_training_steps(tmp_path: Path) -> None:
    for number in (1, 2):
        write_round(tmp_path, number)
    critic = tmp_path / "steps" / "round-001" / "train-critic"
    critic.mkdir()
    (critic / "curve.json").write_text('[{"step": 5, "loss": 9.0}]')
    projection = Projection(run_dir=tmp_path)
    rows = [
        {"step": "round-001/train", "verb": "train", "num_steps": 2},
        {"step": "round-001/train-critic", "verb": "train", "num_steps": 5},
        {"step": "round-002/train", "verb": "train", "num_steps": 2},
    ]
    curves = [point for row in rows for point in projection.points(row) if point.axis != "round"]
    assert [point.axis for point in curves] == [
        *["train/optimizer_step"] * 2,
        "train-critic/optimizer_step",
        *["train/optimizer_step"] * 2,
    ]
    assert [point.metrics[point.axis] for point in curves] == [1, 2, 5, 3, 4]
    assert curves[2].metrics == {"round": 1, "train-critic/optimizer_step": 5, "train-critic/loss": 9.0}


def test_scopes_that_are_no_rounds_keep_their_name() -> None:
    projection = Projection(run_dir=Path("nowhere"))
    rows = [
        {"step": "problems/train", "verb": "problems", "num_problems": 8},
        {"step": "probe-T=0.5/sample", "verb": "sample", "num_rollouts": 2},
        evaluate_row("probe-T=0.5/evaluate", "dev", 0.1),
        {"step": "round-004/sample", "verb": "sample", "num_rollouts": 2},
        {"step": "round-004/evaluate/grade-greedy", "verb": "grade", "num_rollouts": 2, "num_correct": 1},
        evaluate_row("final/evaluate", "dev", 0.2),
        evaluate_row("final-trainings=3/test-best", "test", 0.3),
        {"step": "final-trainings=3/sample", "verb": "sample", "num_rollouts": 2},
        {"step": "measure", "verb": "sample", "num_rollouts": 2},
    ]
    points = [point for row in rows for point in projection.points(row)]
    assert [point.metrics["round"] for point in points] == [0, 0, 0, 4, 4, 5, 5, 5, 5]
    assert points[0].metrics["problems/train/num_problems"] == 8
    assert points[1].metrics["probe-T=0.5/sample/num_rollouts"] == 2
    assert points[2].metrics["probe-T=0.5/dev/greedy"] == 0.1
    assert points[4].metrics == {"round": 4}  # the evaluation's own row says it better
    assert points[4].samples_of is None
    assert points[5].metrics["dev/greedy"] == 0.2
    assert points[6].metrics["test/best/greedy"] == 0.3
    assert points[7].metrics["final/sample/num_rollouts"] == 2
    assert points[8].metrics["measure/num_rollouts"] == 2


def test_further_attempts_have_names_below_their_part() -> None:
    row = evaluate_row("round-001/evaluate", "dev", 0.5)
    attempts = [
        {"accuracy": 0.5, "interval": [0.3, 0.7]},
        {"accuracy": 0.7, "interval": [0.5, 0.9], "mean_num_tokens": None},
    ]
    change = {"from": 1, "to": 2, "delta": 0.2, "delta_interval": [0.1, 0.3], "mcnemar_p": None}
    row["correction"] = {"greedy": {"attempts": attempts, "changes": [change]}}
    (point,) = Projection(run_dir=Path("nowhere")).points(row)
    plain = Projection(run_dir=Path("nowhere")).points(evaluate_row("round-001/evaluate", "dev", 0.5))[0].metrics
    assert {key: value for key, value in point.metrics.items() if key not in plain} == {
        "dev/greedy/attempt-2": 0.7,
        "dev/greedy/attempt-2/low": 0.5,
        "dev/greedy/attempt-2/high": 0.9,
        "dev/greedy/correction/delta": 0.2,
    }
    assert point.metrics["dev/greedy"] == 0.5 and "correction" in row  # the record itself is not touched


def test_seconds_add_up_over_attempts_and_within_a_round(tmp_path: Path) -> None:
    for attempt, lines in {
        "1": ['{"step": "round-001/sample", "verb": "sample", "seconds": 2}'],
        "2": [
            '{"step": "round-001/sample", "verb": "sample", "seconds": 3}',
            '{"step": "round-001/sample-hinted", "verb": "sample", "seconds": 4}',
            '{"step": "round-001/evaluate/greedy", "verb": "sample", "seconds": 5}',
            '{"step": "round-002/sample", "verb": "sample", "seconds": 6}',
            '{"step": "round-002/gr',
        ],
    }.items():
        (tmp_path / "attempts" / attempt).mkdir(parents=True)
        (tmp_path / "attempts" / attempt / "notes.jsonl").write_text("\n".join(lines))
    projection = Projection(run_dir=tmp_path, seconds=read_seconds(tmp_path))
    steps = ["round-001/sample", "round-001/evaluate/greedy", "round-001/sample-hinted", "round-002/sample"]
    points = [point for step in steps for point in projection.points({"step": step, "verb": "sample"})]
    times = [{key: value for key, value in point.metrics.items() if key != "round"} for point in points]
    assert times == [{"seconds/sample": 5}, {"seconds/evaluate": 5}, {"seconds/sample": 9}, {"seconds/sample": 6}]


def test_lines_that_are_still_written_wait(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == []
    (tmp_path / "metrics.jsonl").write_bytes(b'{"a": 1}\n{"b"')
    assert read_rows(tmp_path / "metrics.jsonl") == [b'{"a": 1}']


def test_samples_are_spread_evenly_and_come_from_the_graded_step(tmp_path: Path) -> None:
    write_round(tmp_path, 1)
    earlier = [{"step": "round-001/sample", "verb": "sample"}]
    rows = sample_rows(tmp_path, "round-001/grade", earlier, 3)
    assert rows[1] == ["problem-1", "plain", "user: What is 2 + 1?", "It is 3.", "stop", "wrong", "2"]
    assert [row[6] for row in rows] == ["0", "2", "4"]
    assert len(sample_rows(tmp_path, "round-001/grade", earlier, 100)) == 6
    assert sample_rows(tmp_path, "round-001/grade", [], 3) == []  # nobody knows which completions were graded

    fingerprint = {"fingerprint": {"inputs": ["round-001/sample"]}}
    (tmp_path / "steps" / "round-001" / "grade" / "step.json").write_text(json.dumps(fingerprint))
    other = [*earlier, {"step": "round-001/sample-hinted", "verb": "sample"}]
    assert sample_rows(tmp_path, "round-001/grade", other, 3) == rows
