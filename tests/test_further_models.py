"""Models by role: what a recipe may say, what a method gets, and whose tokenizer reads a question."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from engines.endpoint_stub import Reply, Stub, serving
from reasonrun.cli.progress import SilentProgress
from reasonrun.contracts import Method
from reasonrun.curate.filtering import gold_rows
from reasonrun.curate.first_error import programmatic_errors
from reasonrun.engines import endpoint
from reasonrun.errors import RecipeError, RunFailed, Stopped
from reasonrun.models import resolve
from reasonrun.planning import Assumptions, plan
from reasonrun.recipe import load
from reasonrun.recipe_errors import RecipeProblems
from reasonrun.recipe_fields import ModelSettings
from reasonrun.records import Checkpoint, Message, Sampling
from reasonrun.rendering import Renderer
from reasonrun.running import RunOptions, run
from reasonrun.settings import Effect
from reasonrun.settings import Settings as SettingsBase
from reasonrun.training import SFTSettings

ENDPOINT = "{url: 'http://127.0.0.1:9/v1', model: big, api_key_env: null}"
SMALL = ["task.num_train=8", "task.num_dev=4", "task.num_test=4"]
SAMPLING = Sampling(temperature=1.0, max_new_tokens=64)
BODY = None


class Toy(Method):
    """Runs ``BODY``."""

    class Settings(SettingsBase):
        name: str = "test_further_models.Toy"

    trains = ()

    def run(self, lab):
        BODY(lab)
        lab.evaluate(lab.base)
        return lab.base


@pytest.fixture
def other_tiny(tmp_path):
    """The carried model with a chat template of its own, and so another tokenizer digest."""
    folder = tmp_path / "other"
    shutil.copytree(resolve(ModelSettings(name="tiny")).path, folder)
    template = folder / "chat_template.jinja"
    if not template.exists():
        config = json.loads((folder / "tokenizer_config.json").read_text())
        template.write_text(config["chat_template"])
    template.write_text("judge " + template.read_text())
    return folder


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Run a body as a method on the scripted engine, with the given ``models``."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def go(body, models="{}", *overrides):
        import test_further_models

        test_further_models.BODY = body
        recipe = tmp_path / "toy.yaml"
        recipe.write_text(
            "defaults:\n  - model: tiny\n  - engine: scripted\n  - launcher: local\n  - _self_\n"
            f"task: {{name: arith}}\nmethod: {{name: test_further_models.Toy}}\nmodels: {models}\n"
        )
        return run(load(recipe, [*SMALL, *overrides]), RunOptions(directory=tmp_path / "run"), SilentProgress())

    return go


def sampled(lab, policy=None, **more):
    return lab.sample(policy or lab.base, lab.problems("train"), n=1, sampling=SAMPLING, **more)


def question(problem, rollout):
    return (Message(role="user", content=f"{problem.messages[-1].content}\n{rollout.text}\nIs this right?"),)


# -- recipes -------------------------------------------------------------------------------------------------------------


def problems_of(text, tmp_path, *overrides):
    path = tmp_path / "mine.yaml"
    path.write_text(f"defaults: [smoke_step_dpo, _self_]\n{text}\n")
    with pytest.raises(RecipeProblems) as error:
        load(path, list(overrides))
    return [f"{p.line or 0}: {p.path}: {p.message}" for p in error.value.problems]


def test_roles_are_fields_with_effects_and_a_word_stands_for_a_name(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"defaults: [smoke_step_dpo, _self_]\nmodels:\n  judge:\n    endpoint: {ENDPOINT}\n  critic: tiny\n"
    )
    recipe = load(path)
    assert set(recipe.further_models) == {"judge", "critic"} and recipe.further_models["critic"].name == "tiny"
    at = "models.judge.endpoint."
    semantic = {p.removeprefix(at) for p, e in recipe.effects.items() if p.startswith(at) and e is Effect.SEMANTIC}
    assert semantic == {"model"}
    assert load("smoke_step_dpo").resolved["models"] == {}


def test_the_policy_cannot_be_an_endpoint(tmp_path):
    (problem,) = problems_of(f"model:\n  endpoint: {ENDPOINT}", tmp_path)
    assert problem.startswith("3: model.endpoint.url: the policy cannot be an endpoint")


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ("{policy: tiny}", "models.policy: the policy is what `model` names"),
        ("{Judge: tiny}", "models.Judge: cannot name a role"),
        ("{copy: tiny}", "models.copy: cannot name a role"),
        ("{judge: {}}", "models.judge: exactly one of name, path, hub and endpoint"),
        ("{judge: {name: tiny, path: x}}", "given: name, path"),
        ("{judge: {endpoint: {url: 'ftp://x', model: m}}}", "models.judge.endpoint.url: must begin with http"),
        ("{judge: {endpoint: {url: 'http://me:pw@x/v1', model: m}}}", "a URL holds no user"),
        ("{judge: {endpoint: {url: 'http://x/v1?key=1', model: m}}}", "a URL holds no user"),
        ("{judge: {endpoint: {url: 'http://x/v1'}}}", "models.judge.endpoint.model: required key is missing"),
    ],
)
def test_mistakes_in_models_are_told_with_their_place(tmp_path, models, said):
    (problem,) = problems_of(f"models: {models}", tmp_path)
    assert problem.startswith("2: ") and said in problem


def test_a_key_in_the_place_of_its_variable_is_a_secret(tmp_path):
    with pytest.raises(RecipeProblems, match="looks like a secret") as error:
        load("smoke_step_dpo", ["models.judge.endpoint.api_key_env=sk-canary-0123456789abcdefghij"])
    assert "canary" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (["method.localize.kind=llm_no_ref", "method.localize.judge=judg"], "method.localize.judge: no model has the role"),
        (["method.arm=step_dpo_teacher", "method.teacher=teacher"], "method.teacher: no model has the role 'teacher'"),
        (["task=gsm8k", "method.localize.kind=programmatic"], "method.localize.kind: this needs first_error"),
        (["task=gsm8k"], "method.localize.steps: this needs segment"),
    ],
)  # fmt: skip
def test_what_a_method_asks_for_must_be_there(tmp_path, override, said):
    task = "task: {name: gsm8k, num_train: 0, num_dev: 0, num_test: 0}" if "task=gsm8k" in override else ""
    found = problems_of(task, tmp_path, *override) if not task else gsm8k_problems(tmp_path, override)
    assert any(said in problem for problem in found), found


def gsm8k_problems(tmp_path, override):
    path = tmp_path / "mine.yaml"
    more = "\n".join(["method:", "  name: step_dpo", "  localize: {steps: task}"])
    path.write_text(f"task: {{name: gsm8k, path: {tmp_path}}}\n{more}\n")
    with pytest.raises(RecipeProblems) as error:
        load(path, [text for text in override if text != "task=gsm8k"])
    return [f"{p.path}: {p.message}" for p in error.value.problems]


def test_a_judge_that_sees_the_solution_needs_a_task_that_has_one(tmp_path, monkeypatch):
    monkeypatch.setattr("reasonrun.tasks.arith.Arith.capabilities", frozenset({"segment", "first_error"}))
    (problem,) = problems_of("", tmp_path, "method.localize.kind=llm_with_ref")
    assert "method.localize.kind: this needs solution, which the task arith does not offer" in problem
    assert load("smoke_step_dpo", ["method.localize.kind=llm_no_ref"])


# -- methods -------------------------------------------------------------------------------------------------------------


def test_roles_give_models_and_an_unknown_one_lists_them(toy):
    seen = {}

    def body(lab):
        seen.update({role: lab.model(role) for role in ("policy", "judge", "critic")})
        with pytest.raises(RecipeError, match=r"no model has the role 'teacher'.*policy, judge, critic"):
            lab.model("teacher")

    toy(body, f"{{judge: {{endpoint: {ENDPOINT}}}, critic: tiny}}")
    assert seen["policy"] == seen["critic"]
    judge = seen["judge"]
    assert isinstance(judge, Checkpoint) and judge.remote and judge.path == "http://127.0.0.1:9/v1"
    assert len(judge.weights) == 32 and judge.weights != seen["policy"].weights


def test_a_question_about_a_rollout_is_rendered_by_the_model_that_reads_it(toy, other_tiny):
    seen = {}

    def body(lab):
        tried = sampled(lab)
        seen["tried"] = list(tried)
        for role in ("policy", "judge"):
            seen[role] = list(
                lab.sample(lab.model(role), tried, prompt=question, n=2, sampling=SAMPLING, name=f"ask-{role}")
            )

    toy(body, f"{{judge: {{path: {other_tiny}}}}}")
    renderers = {
        "policy": Renderer.load(resolve(ModelSettings(name="tiny")).path),
        "judge": Renderer.load(other_tiny),
    }
    for role, renderer in renderers.items():
        assert len(seen[role]) == 2 * len(seen["tried"]) == 16
        for rollout in seen[role]:
            assert rollout.prompt_ids == renderer.render(rollout.messages)
            assert rollout.kind == "about" and "Is this right?" in rollout.messages[0].content
        assert [r.parent_id for r in seen[role][::2]] == [r.id for r in seen["tried"]]
    assert seen["policy"][0].prompt_ids != seen["judge"][0].prompt_ids
    assert len({r.id for role in renderers for r in seen[role]}) == 32


def test_ids_of_one_tokenizer_never_reach_a_model_with_another(toy, other_tiny):
    def body(lab):
        tried = lab.grade(sampled(lab))
        prefixes = lab.cut(programmatic_errors, tried, steps="task", cap=0, room=64)
        assert len(prefixes)
        for role in ("judge", "remote"):
            with pytest.raises(RecipeError, match="made of the policy's token ids"):
                lab.sample(lab.model(role), prefixes, n=1, sampling=SAMPLING, name=f"on-{role}")
        turns = lab.sample(lab.model("judge"), tried.wrong(), turn="Again.", n=1, sampling=SAMPLING, name="turn")
        renderer = Renderer.load(other_tiny)
        for rollout in turns:
            assert [message.role for message in rollout.messages] == ["user", "assistant", "user"]
            assert rollout.prompt_ids == renderer.render(rollout.messages)

    toy(body, f"{{judge: {{path: {other_tiny}}}, remote: {{endpoint: {ENDPOINT}}}}}")


def test_an_endpoint_is_refused_where_weights_or_ids_are_needed(toy, monkeypatch):
    monkeypatch.setattr("reasonrun.tasks.arith.Arith.opening", lambda *_: "Step 1:")

    def body(lab):
        remote = lab.model("judge")
        rows = lab.curate(gold_rows, lab.problems("train"))
        with pytest.raises(RecipeError, match="no weights here"):
            lab.train("sft", rows, start=remote, settings=SFTSettings(lr=1e-4), num_steps=1)
        with pytest.raises(RunFailed, match="no log-probabilities"):
            lab.logprobs(remote, rows)
        with pytest.raises(RecipeError, match="begins every answer with words of its own"):
            sampled(lab, remote, name="open")

    toy(body, f"{{judge: {{endpoint: {ENDPOINT}}}}}")


def test_a_judge_that_was_measured_too_is_not_what_the_run_ends_with(toy, other_tiny, monkeypatch):
    monkeypatch.setattr(Toy, "trains", ("sft",))

    def body(lab):
        with lab.scope("reference"):
            lab.evaluate(lab.model("judge"))

    weights = other_tiny / "model.safetensors"
    copy = bytearray(weights.read_bytes())
    copy[-1] ^= 1
    weights.write_bytes(bytes(copy))
    perfect = ["engine.accuracy=1", "engine.spread=0", "engine.truncated=0", "engine.unanswered=0"]
    outcome = toy(body, f"{{judge: {{path: {other_tiny}}}}}", *perfect)  # as good as the policy, and measured earlier
    assert outcome.result["best"]["weights"] == resolve(ModelSettings(name="tiny")).weights


def test_only_the_missing_samples_of_a_question_are_asked_for(toy):
    def body(lab):
        tried = sampled(lab)
        answered = lab.sample(lab.model("judge"), tried, prompt=question, n=4, sampling=SAMPLING, name="ask")
        assert len(answered) == 32 and len({rollout.text for rollout in answered}) == 32

    def fails_after_six(body):
        seed = str(body["seed"])
        return Reply(seed) if len(stub.answered) < 6 else Reply(status=500)

    with serving(Stub(fails_after_six)) as stub:
        models = "{judge: {endpoint: {url: '%s', model: m, api_key_env: null, max_retries: 0, max_parallel: 1}}}"
        with pytest.raises(Stopped):
            toy(body, models % stub.url)
        stub.reply = lambda body: Reply(str(body["seed"]))
        toy(body, models % stub.url)
    seeds = [body["seed"] for body in stub.answered]
    assert len(seeds) == len(set(seeds)) == 32


# -- plans ---------------------------------------------------------------------------------------------------------------


def test_a_plan_asks_no_server_and_needs_no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(endpoint, "EndpointEngine", None)
    overrides = ["method.localize.kind=llm_with_ref", "method.localize.judge=big", "method.held_out=false"]
    overrides += ["models.big.endpoint.url=http://127.0.0.1:9/v1", "models.big.endpoint.model=big"]
    overrides += ["method.arm=step_dpo_teacher", "method.teacher=big"]
    found = plan(load("smoke_step_dpo", overrides), Assumptions(), SilentProgress())
    steps = {step.step: step for step in found.steps}
    assert found.finding is None
    assert steps["round-001/localize/ask"].units.expected > 0 and steps["round-001/localize/ask"].tokens.expected > 0
    assert steps["round-001/teach"].units.expected > 0 and "round-001/train" in steps
