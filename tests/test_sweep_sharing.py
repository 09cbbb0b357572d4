"""Which steps the runs of a sweep share, and which they must not."""

import pytest

from reasonrun import conditions
from reasonrun.engines.scripted import Scripted
from sweep_runs import alone, borrowed, made, sweep
from test_running import content


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # proves nothing while the machine stays up


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    directory = tmp_path_factory.mktemp("donor") / "run"
    alone(directory)
    return directory


@pytest.fixture(scope="module")
def second_seed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("second") / "run"
    alone(directory, "seed=1")
    return directory


def test_arms_that_differ_in_training_share_all_that_comes_before_and_have_the_bytes_of_runs_alone(
    second_seed, tmp_path, monkeypatch
):
    calls = []
    generate = Scripted.generate

    def counted(self, requests):
        calls.extend(request.key for request in requests)
        return generate(self, requests)

    monkeypatch.setattr(Scripted, "generate", counted)
    summaries, lines = sweep(tmp_path / "out", "method.sft.lr=1e-6,1e-5", "seed=0,1")
    first, second, third, fourth = (tmp_path / "out" / summary["run"] for summary in summaries)
    assert len(calls) == len(set(calls))  # nothing was sampled twice in four runs
    assert borrowed(first) == set()
    before = ["round-001/evaluate", "round-001/sample", "round-001/grade-hinted", "round-001/star_rows"]
    for one in (second, fourth):
        assert {*before, "final-trainings=1/test-base"} <= borrowed(one)
        assert next(verb for verb in made(one)) == "train"  # and what depends on it follows
    assert "round-001/sample" not in borrowed(third)  # another seed
    assert "round-001/evaluate/greedy" in borrowed(third)  # evaluation seeds name no run
    assert summaries[1]["num_borrowed_steps"] == len(borrowed(second)) > len(made(second))
    assert f"round-001/sample: taken from {first}" in lines
    monkeypatch.undo()
    alone(tmp_path / "alone", "method.sft.lr=1e-5")
    assert content(second) == content(tmp_path / "alone")
    assert content(third) == content(second_seed)


@pytest.mark.parametrize("override", ["engine.accuracy=0.5", "launcher.devices=cpu", "model.dtype=float32"])
def test_another_engine_or_arithmetic_shares_nothing(override, donor, tmp_path):
    """Fingerprints hold neither: the first sample step of both runs has the same one."""
    alone(tmp_path / "run", override, donors=[donor])
    step = "steps/round-001/evaluate/greedy/step.json"
    assert (tmp_path / "run" / step).read_bytes() == (donor / step).read_bytes()
    assert borrowed(tmp_path / "run") == set()


def test_other_arithmetic_of_the_trainer_shares_all_but_training(donor, tmp_path):
    alone(tmp_path / "run", "method.sft.dtype=bfloat16", donors=[donor])
    step = "steps/round-001/train/step.json"
    assert (tmp_path / "run" / step).read_bytes() == (donor / step).read_bytes()
    assert {"round-001/sample", "round-001/grade"} <= borrowed(tmp_path / "run")
    assert "round-001/train" not in borrowed(tmp_path / "run")


def test_a_step_that_keeps_its_optimizer_is_another_one(donor, tmp_path):
    alone(tmp_path / "run", "method.carry_optimizer=true", donors=[donor])
    assert "round-001/star_rows" in borrowed(tmp_path / "run")
    assert "round-001/train" not in borrowed(tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "shared"), [("metrics.py", set()), ("curate/filtering.py", set()), ("method", {"problems", "sample"})]
)
def test_other_code_shares_only_what_it_cannot_touch(changed, shared, donor, tmp_path, monkeypatch):
    digests = conditions.code_digests
    monkeypatch.setattr(conditions, "code_digests", lambda *classes: {**digests(*classes), changed: "other"})
    alone(tmp_path / "run", donors=[donor])
    names = borrowed(tmp_path / "run")
    assert bool(names) == bool(shared)
    assert "round-001/star_rows" not in names
    if shared:
        assert {"problems/train", "round-001/sample", "round-001/train"} <= names


def test_other_versions_share_nothing(donor, tmp_path, monkeypatch):
    monkeypatch.setattr(conditions, "versions", lambda: {"torch": "other"})
    alone(tmp_path / "run", donors=[donor])
    assert borrowed(tmp_path / "run") == set()


def test_a_damaged_step_of_a_sibling_is_made_here_and_the_line_says_why(tmp_path):
    alone(tmp_path / "clean", "method.sft.lr=1e-5")
    alone(tmp_path / "out" / "sibling")
    rows = tmp_path / "out" / "sibling" / "steps" / "round-001" / "sample" / "rows-00000.parquet"
    data = rows.read_bytes()
    rows.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    summaries, lines = sweep(tmp_path / "out", "method.sft.lr=1e-5")
    directory = tmp_path / "out" / summaries[0]["run"]
    assert any(line.startswith("round-001/sample: not taken from") and "SHA-256" in line for line in lines)
    assert "round-001/evaluate/greedy" in borrowed(directory) and "sample" in made(directory)
    assert content(directory) == content(tmp_path / "clean")
