"""``lab.merge``: a durable step that costs no model on the scripted engine, and survives kills with a real one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from reasonrun.cli.progress import SilentProgress
from reasonrun.contracts import Method
from reasonrun.curate.filtering import gold_rows
from reasonrun.errors import RecipeError, RunConflict, RunFailed, Stopped
from reasonrun.models import resolve
from reasonrun.planning import Assumptions, compare, format_plan, plan
from reasonrun.recipe import load
from reasonrun.recipe_fields import ModelSettings
from reasonrun.running import RunOptions, run
from reasonrun.settings import Settings as SettingsBase
from reasonrun.training import MergeJob, SFTSettings
from reasonrun.worker_host import WorkerHost
from reasonrun.workers.merging import merge_in_process

SMALL = ["task.num_train=8", "task.num_dev=2", "task.num_test=2", "evaluate.num_samples=0", "evaluate.max_new_tokens=8"]
ENDPOINT = "{url: 'http://127.0.0.1:9/v1', model: big, api_key_env: null}"
BODY = None


class Toy(Method):
    """Runs ``BODY``."""

    class Settings(SettingsBase):
        name: str = "test_merge.Toy"

    def run(self, lab):
        return BODY(lab)


def write_recipe(path, engine="scripted", models="{}"):
    path.write_text(
        f"defaults:\n  - model: tiny\n  - engine: {engine}\n  - launcher: local\n  - _self_\n"
        f"task: {{name: arith}}\nmethod: {{name: test_merge.Toy}}\nmodels: {models}\npreflight: 'off'\n"
    )
    return path


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return lambda body, **more: (setting_body(body), load(write_recipe(tmp_path / "toy.yaml", **more), SMALL))[1]


def setting_body(body):
    import test_merge

    test_merge.BODY = body


def go(recipe, directory, **options):
    return run(recipe, RunOptions(directory=directory, **options), SilentProgress())


def learn(lab, name, seed_lr=1e-4):
    rows = lab.curate(gold_rows, lab.problems("train"), name=f"rows-{name}")
    return lab.train("sft", rows, start=lab.base, settings=SFTSettings(lr=seed_lr), num_steps=4, name=name)


def two_merged(lab):
    one, other = learn(lab, "one"), learn(lab, "other", 1e-3)
    return lab.merge([one, other], [0.25, 0.75])


def tree(directory):
    files = (path for path in (directory / "steps").rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


# -- on the scripted engine --------------------------------------------------------------------------------------------


def test_a_merge_is_a_step_like_a_training_and_a_replay_does_no_work(recipe, tmp_path, monkeypatch):
    seen = []

    def body(lab):
        merged = two_merged(lab)
        seen.append((merged, lab.metrics(merged)))
        return merged

    outcome = go(recipe(body), tmp_path / "run")
    (merged, metrics), before = seen[0], tree(tmp_path / "run")
    one = json.loads((tmp_path / "run/steps/one/_OK.json").read_text())["content"]["result"]["weights"]
    assert merged.step == "merge" and merged.parent == one and merged.path.endswith("steps/merge/model")
    assert metrics == {"step": "merge", "verb": "merge", "weights": merged.weights, "num_models": 2}
    assert outcome.result["last"] == {"step": "merge", "weights": merged.weights}
    assert metrics in [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (tmp_path / "run/_OK.json").unlink()  # so that the method is called again
    monkeypatch.setattr("reasonrun.hosts.InProcessHost.merge", None)
    monkeypatch.setattr("reasonrun.hosts.InProcessHost.train", None)
    go(recipe(body), tmp_path / "run")
    assert seen[1] == seen[0] and tree(tmp_path / "run") == before


def test_the_script_of_a_merge_has_learnt_what_the_best_has_and_depends_on_all(recipe, tmp_path):
    made = {}

    def body(lab):
        one, other = learn(lab, "one"), learn(lab, "other", 1e-3)
        for name, models, weights in (
            ("first", [one, lab.base], [0.5, 0.5]),
            ("shares", [one, lab.base], [0.25, 0.75]),
            ("order", [lab.base, one], [0.5, 0.5]),
            ("models", [one, other], None),
        ):
            made[name] = lab.merge(models, weights, name=name)
        return made["first"]

    go(recipe(body), tmp_path / "run")
    assert len({checkpoint.weights for checkpoint in made.values()}) == 4
    scripts = [json.loads((Path(c.path) / "scripted.json").read_text())["num_trainings"] for c in made.values()]
    assert scripts == [1, 1, 1, 1]


def test_other_weights_under_a_run_are_a_conflict_and_redo_makes_the_merge_and_what_follows_again(recipe, tmp_path):
    go(recipe(two_merged), tmp_path / "run")

    def other(lab):
        one, other = learn(lab, "one"), learn(lab, "other", 1e-3)
        return lab.merge([one, other], [0.5, 0.5])

    (tmp_path / "run/_OK.json").unlink()
    with pytest.raises(RunConflict, match="weights"):
        go(recipe(other), tmp_path / "run")
    before = tree(tmp_path / "run")
    go(recipe(two_merged), tmp_path / "run", redo="one")
    assert (tmp_path / "run/quarantine").is_dir() and tree(tmp_path / "run") == before
    moved = {path.parent.name for path in (tmp_path / "run/quarantine").rglob("_OK.json")}
    assert {"one", "merge"} <= moved


@pytest.mark.promise("G20", "plans against runs")
def test_a_plan_shows_the_merge_with_its_disk_and_is_what_the_run_does(recipe, tmp_path):
    found = plan(recipe(two_merged), Assumptions(), SilentProgress())
    (step,) = [step for step in found.steps if step.verb == "merge"]
    size = sum(path.stat().st_size for path in Path(resolve(ModelSettings(name="tiny")).path).iterdir())
    assert (step.step, step.unit, step.units.expected, step.units.exact) == ("merge", "models", 2, True)
    assert step.disk_bytes.worst == size and not step.tokens.worst
    assert any(line.startswith("merge ") and "2 models" in line for line in format_plan(found))
    outcome = go(recipe(two_merged), tmp_path / "run")
    difference = compare(found, outcome.rows)
    assert not (difference.not_planned or difference.not_run or difference.other_size)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([0.5, 0.6], "weights 0.5, 0.6 sum to 1.1, not to 1"),
        ([1.0, 1.0], "sum to 2"),
        ([1.5, -0.5], "0 or more"),
        ([float("nan"), 1.0], "0 or more"),
        ([1.0], "2 models were given, and 1 weights"),
    ],
)
def test_weights_that_are_no_shares_are_refused_in_the_plan(recipe, weights, said):
    with pytest.raises(RecipeError, match=said):
        plan(recipe(lambda lab: lab.merge([lab.base, lab.base], weights)), Assumptions(), SilentProgress())


def test_thirds_sum_to_one(recipe, tmp_path):
    go(
        recipe(lambda lab: lab.merge([lab.base, lab.base, lab.base], [0.3333333, 0.3333333, 0.3333334])),
        tmp_path / "run",
    )


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (lambda lab: [], "needs two models or more, and got 0"),
        (lambda lab: [lab.base], "needs two models or more, and got 1"),
        (lambda lab: [lab.base, lab.model("judge")], "behind an endpoint"),
        (lambda lab: [lab.base, lab.model("critic")], "models 1 .* and 2 .* differ in tokenizer or chat template"),
    ],
)
def test_models_that_cannot_be_merged_are_refused(recipe, tmp_path, models, said):
    other = tmp_path / "other"
    shutil.copytree(resolve(ModelSettings(name="tiny")).path, other)
    (other / "chat_template.jinja").write_text("critic " + (other / "chat_template.jinja").read_text())
    roles = f"{{judge: {{endpoint: {ENDPOINT}}}, critic: {{path: {other}}}}}"
    with pytest.raises(RecipeError, match=said):
        go(recipe(lambda lab: lab.merge(models(lab)), models=roles), tmp_path / "run")


# -- in a process of its own -------------------------------------------------------------------------------------------


@pytest.fixture
def twin(tmp_path):
    """The carried model, every number a little off."""
    tiny, folder = Path(resolve(ModelSettings(name="tiny")).path), tmp_path / "twin"
    shutil.copytree(tiny, folder)
    tensors, generator = load_file(tiny / "model.safetensors"), np.random.default_rng(1)
    off = {name: (t + 0.001 * generator.standard_normal(t.shape)).astype(t.dtype) for name, t in tensors.items()}
    save_file(off, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def job_of(tmp_path, *folders):
    tiny = resolve(ModelSettings(name="tiny"))
    models = tuple(tiny.model_copy(update={"path": str(folder)}) for folder in folders)
    return MergeJob(models=models, weights=(0.5,) * len(folders), out_dir=str(tmp_path / "out"))


def test_the_process_is_recorded_and_its_refusals_are_ours(tmp_path, twin):
    recorded = []
    tiny = Path(resolve(ModelSettings(name="tiny")).path)
    merge_in_process(job_of(tmp_path, tiny, twin), lambda *ids: recorded.append(ids), lambda: 0)
    (pid, group) = recorded[0]
    assert pid == group and (tmp_path / "out/final/model.safetensors").is_file()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    tensors = load_file(twin / "model.safetensors")
    tensors["model.norm.weight"][0] = np.inf
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(RunFailed, match=r"model\.norm\.weight of the merged model is not finite"):
        merge_in_process(job_of(tmp_path, tiny, twin), lambda *_: None, lambda: 0)
    tensors["extra"] = tensors.pop("model.norm.weight")
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"model\.norm\.weight is in the first only"):
        merge_in_process(job_of(tmp_path, tiny, twin), lambda *_: None, lambda: 0)


def test_a_stop_ends_the_process_and_a_dead_one_is_told(tmp_path, twin):
    recorded = []

    def freeze(pid, group):
        recorded.append(pid)
        os.killpg(group, signal.SIGSTOP)

    with pytest.raises(Stopped) as stop:
        merge_in_process(job_of(tmp_path, twin, twin), freeze, lambda: 130 if recorded else 0)
    assert stop.value.exit_code == 130
    with pytest.raises(ProcessLookupError):
        os.kill(recorded[0], 0)
    with pytest.raises(RunFailed, match="ended by signal 9"):
        merge_in_process(job_of(tmp_path, twin, twin), lambda _, group: os.killpg(group, signal.SIGKILL), lambda: 0)


def base_and_twin(lab):
    return lab.merge([lab.base, lab.model("twin")], [0.25, 0.75])


def real_run(directory, models, fault):
    """A run with the Hugging Face engine; ``fault`` is a point of the ledger, or one inside the merge."""
    setting_body(base_and_twin)
    if fault == "merging":

        def record_and_die(self, pid, group):
            recorded(self, pid, group)
            os.killpg(group, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGKILL)

        from reasonrun.ledger.run_dir import RunDir

        recorded, RunDir.record_worker = RunDir.record_worker, record_and_die
    elif fault:
        os.environ["REASONRUN_FAULT"] = f"{fault}:kill"
    recipe = write_recipe(Path(directory).with_suffix(".yaml"), "hf", models)
    go(load(recipe, [*SMALL, "engine.num_threads=1", "engine.device=cpu"]), Path(directory))


def command(directory, models, fault=""):
    here = Path(__file__).parent
    code = f"import sys; import test_merge; test_merge.real_run({str(directory)!r}, {models!r}, {fault!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)


@pytest.mark.heavy
def test_a_kill_inside_a_merge_leaves_the_bytes_of_a_clean_run(tmp_path, twin):
    models = f"{{twin: {{path: {twin}}}}}"
    clean = command(tmp_path / "clean", models)
    assert clean.returncode == 0, clean.stderr.decode()
    result = json.loads((tmp_path / "clean/_OK.json").read_text())["content"]["result"]
    assert result["last"]["step"] == "merge" and result["test"]["last"]["greedy"]["num_problems"] == 2
    for fault in ("merging", "adopt.mid_file", "adopt.after_rename"):
        directory = tmp_path / fault
        assert command(directory, models, fault).returncode == -signal.SIGKILL, fault
        assert not (directory / "steps/merge/_OK.json").exists()
        again = command(directory, models)
        assert again.returncode == 0, again.stderr.decode()
        merged = {name: data for name, data in tree(directory).items() if name.startswith("steps/merge/")}
        assert merged == {n: data for n, data in tree(tmp_path / "clean").items() if n.startswith("steps/merge/")}
        assert len(merged) > 5


def test_the_worker_host_merges_in_a_process(tmp_path, twin, monkeypatch):
    """Torch stays out of the supervisor, and the run remembers the process."""
    host = WorkerHost.__new__(WorkerHost)
    recorded = []
    host._run_dir = type("Place", (), {"record_worker": lambda self, *ids: recorded.append(ids)})()
    host._interrupted = lambda: 0
    host.merge(job_of(tmp_path, twin, twin))
    assert (
        recorded
        and (tmp_path / "out/final/model.safetensors").read_bytes() == (twin / "model.safetensors").read_bytes()
    )
