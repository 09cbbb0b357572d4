"""The policy-gradient trainer on a real model: beside TRL's trainers on the same rollouts, and in what it promises."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_policy_jobs import PROBLEMS, TINY, experience, final, make_job, train
from sft_rows import Events, sha256, weights_of
from transformers import AutoModelForCausalLM

from reasonrun.curate.attempts import TurnRewards, turn_rewards
from reasonrun.engines.hf import HuggingFace
from reasonrun.errors import Finding, RunFailed
from reasonrun.on_policy import State
from reasonrun.records import Checkpoint, Graded, PolicyGradientExample
from reasonrun.tasks.arith import Arith
from reasonrun.trainers.execution import _with_adapters
from reasonrun.trainers.live_weights import live_weights
from reasonrun.training import LoRASettings, TrainJob

LR = 1e-4


def load(checkpoint: Checkpoint) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)


def perturbed(model: Any, size: float, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The carried model with other weights: a reference that the policy is not at."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for path in Path(TINY.path).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    perturbed(load(TINY), 0.01, 3).save_pretrained(folder)
    return TINY.model_copy(update={"path": str(folder), "weights": "elsewhere"})


@pytest.fixture
def clipped_gradients() -> Iterator[list[list[tuple[Any, torch.Tensor]]]]:
    """Parameters and gradients of every optimizer step in this process, one entry a step."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    seen: list[list[tuple[Any, torch.Tensor]]] = []

    def look(optimizer: Any, args: Any, kwargs: Any) -> None:
        seen.append([(p, p.grad.clone()) for group in optimizer.param_groups for p in group["params"]])

    handle = register_optimizer_step_pre_hook(look)
    yield seen
    handle.remove()


# -- beside TRL ----------------------------------------------------------------------------------------------------------


def trl_step(
    kind: str, job: TrainJob, folder: Path, reference: Checkpoint | None, **config: Any
) -> tuple[Any, dict[str, float]]:
    """TRL's optimizer step on the rollouts of ``job``: the model after it, and what was logged."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    rows = experience(job)
    model = load(TINY)
    arguments = getattr(trl, f"{kind}Config")(
        output_dir=str(folder / "trl"),
        # The same batch, optimizer and arithmetic.
        per_device_train_batch_size=len(rows),
        gradient_accumulation_steps=1,
        num_generations=4,
        max_steps=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_dropout=True,
        shuffle_dataset=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **config,
    )

    class Given(getattr(trl, f"{kind}Trainer")):  # type: ignore[misc]
        """Trains on rollouts that were sampled before."""

        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            assert prompts == [row.rollout.problem_id for row in rows]
            return [list(row.rollout.prompt_ids) for row in rows], None, {}

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            ids = [list(row.rollout.completion_ids) for row in rows]
            return (ids, None) if kind == "GRPO" else ids

    trainer = Given(
        model=model,
        args=arguments,
        reward_funcs=lambda completions, **columns: [row.score.value for row in rows],
        train_dataset=Dataset.from_list([{"prompt": row.rollout.problem_id} for row in rows[::4]]),
        processing_class=AutoTokenizer.from_pretrained(TINY.path),
    )
    if reference is not None:
        trainer.ref_model.load_state_dict(load(reference).state_dict())
    trainer.train()
    return model, trainer.state.log_history[0]


# TRL's names for what is configured here. Both divide by all rows of the batch in GRPO's loss and in RLOO's.
#   dr_grpo divides by max_completion_length, ours by max_length, which counts the prompt, too: the same number is given.
#   GRPO's epsilon clips and RLOO's does, ours not: at ratio 1 neither clips anything.
SAME_AS_TRL = {
    "rloo": ("RLOO", {"beta": 0.0}, {}),
    "rloo-kl": ("RLOO", {"beta": 0.2}, {}),
    "grpo": ("GRPO", {"loss_type": "grpo"}, {"loss_reduction": "sequence_mean"}),
    "dapo": ("GRPO", {"loss_type": "dapo"}, {"loss_reduction": "token"}),
    "dr_grpo": (
        "GRPO",
        {"loss_type": "dr_grpo", "max_completion_length": 300},
        {"loss_reduction": "constant", "max_length": 300},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAME_AS_TRL)
def test_one_optimizer_step_is_that_of_trl_on_the_same_rollouts(
    tmp_path: Path, elsewhere: Checkpoint, clipped_gradients: list[Any], name: str
) -> None:
    kind, theirs, ours = SAME_AS_TRL[name]
    beta = theirs.get("beta", 0.0)
    if kind == "GRPO":
        theirs = {"beta": 0.0, "importance_sampling_level": "token", **theirs}
        ours = {"advantage": "group_normalised", "ratio": "token", **ours}
    events = Events()
    job = make_job(tmp_path, job={"reference": elsewhere}, rewards={"kl_coefs": (beta,)}, lr=LR, **ours)
    train(job, events)
    model, logged = trl_step(kind, job, tmp_path, elsewhere if beta else None, **theirs)

    rows = experience(job)
    for group in (rows[:4], rows[4:]):
        assert 0 < sum(row.score.value or 0 for row in group) < 4  # mixed, or there would be nothing to compare
    assert len({len(row.rollout.completion_ids) for row in rows}) > 1  # else all reductions are one
    if beta:
        assert abs(beta * sum(row.credit.kl or 0 for row in rows)) > 0.05
    (log,) = events.of("log")
    # Advantages of a group add up to 0 and every ratio is 1, so the loss is 0 in some reductions; the norm of the gradient is
    # not. It is taken before clipping, and Adam's first step forgets the scale: without it a factor would go unseen.
    assert log["loss"] == pytest.approx(logged["loss"], abs=1e-5)
    assert log["grad_norm"] == pytest.approx(logged["grad_norm"], rel=1e-4)
    mine, reference = clipped_gradients
    biggest = max(grad.abs().max().item() for _, grad in reference)
    for (_, own), (_, grad) in zip(mine, reference, strict=True):
        assert (own - grad).abs().max().item() < 1e-5 * biggest
    start, after = weights_of(TINY.path), weights_of(final(job))
    grads = {id(parameter): grad for parameter, grad in reference}
    num_clear = num_weights = 0
    for key, weight in model.named_parameters():
        # Adam's first step is lr in the direction of the sign, which rounding decides where a gradient is nearly 0.
        clear = grads[id(weight)].abs() > 1e-5 * biggest
        assert torch.allclose(after[key][clear], weight.detach()[clear], atol=1e-5, rtol=0), key
        num_clear, num_weights = num_clear + int(clear.sum()), num_weights + clear.numel()
        moved = (weight.detach() - start[key])[clear].abs()
        assert moved.min() > 0.4 * LR, key  # a step in the other direction would be off by twice this
    assert num_clear > 0.8 * num_weights


# -- the engine's weights ------------------------------------------------------------------------------------------------


def engine_with(checkpoint: Checkpoint) -> HuggingFace:
    engine = HuggingFace(HuggingFace.Settings(num_threads=1))
    engine.load(checkpoint)
    return engine


def test_live_weights_of_adapters_are_the_merged_ones_and_nothing_in_training_moves() -> None:
    torch.manual_seed(0)
    model = _with_adapters(load(TINY), LoRASettings(rank=4, alpha=8.0))
    perturbed(model, 0.02, 1)  # an adapter that has learnt something, its half that starts as zero included
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    live = dict(live_weights(model))
    merged = copy.deepcopy(model).merge_and_unload()
    assert live.keys() == dict(merged.named_parameters()).keys()
    for name, weight in merged.named_parameters():
        assert (live[name] - weight).abs().max().item() < 1e-6, name
    plain = dict(model.get_base_model().named_parameters())
    adapted = "model.layers.0.self_attn.q_proj"
    assert (live[f"{adapted}.weight"] - plain[f"{adapted}.base_layer.weight"]).abs().max().item() > 1e-3
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_an_updated_engine_gives_the_log_probabilities_of_the_live_model() -> None:
    engine, model = engine_with(TINY), perturbed(load(TINY), 0.02, 2)
    rng = np.random.default_rng(0)
    rows = [tuple(rng.integers(3, 600, size=size).tolist() for size in sizes) for sizes in ((5, 9), (12, 3), (1, 20))]
    stale = engine.logprobs(rows)
    engine.update(live_weights(model))
    for (prompt, completion), found, old in zip(rows, engine.logprobs(rows), stale, strict=True):
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        expected = [logps[len(prompt) - 1 + t, token].item() for t, token in enumerate(completion)]
        assert found == pytest.approx(expected, abs=1e-5)
        assert old != pytest.approx(expected, abs=1e-2)


def test_weights_that_are_missing_misshapen_or_unknown_are_refused() -> None:
    engine, weights = engine_with(TINY), dict(live_weights(load(TINY)))
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(RunFailed, match=f"gave no weights for {name}"):
        engine.update((key, weight) for key, weight in weights.items() if key != name)
    with pytest.raises(RunFailed, match=f"no parameter {name} of shape"):
        engine.update({**weights, name: weights[name][:-1]}.items())
    with pytest.raises(RunFailed, match=r"no parameter model\.stranger of shape"):
        engine.update({**weights, "model.stranger": weights[name]}.items())


class Stale(HuggingFace):
    """Takes the first weights it is given and no others."""

    def load(self, checkpoint: Checkpoint) -> None:
        super().load(checkpoint)
        self.num_updates = 0

    def update(self, weights: Any) -> None:
        self.num_updates += 1
        if self.num_updates == 1:
            super().update(weights)


@pytest.mark.parametrize("lora", [None, {"rank": 4}], ids=["full", "lora"])
def test_every_sampling_is_from_the_weights_of_the_moment(tmp_path: Path, lora: Any) -> None:
    events = Events()
    train(make_job(tmp_path, num_steps=3, lr=3e-3, lora=lora, max_mismatch=1e-4), events)
    assert [log["mismatch"] < 1e-5 for log in events.of("log")] == [True] * 3
    assert events.of("note") == []


def test_an_engine_with_stale_weights_sets_off_the_alarm_once(tmp_path: Path) -> None:
    events = Events()
    train(make_job(tmp_path, num_steps=4, lr=3e-3, engine=Stale, max_mismatch=1e-4), events)
    first, *later = [log["mismatch"] for log in events.of("log")]
    assert first < 1e-5 and min(later) > 1e-3
    (note,) = events.of("note")
    assert "engine and trainer disagree" in note["text"] and "max_mismatch is 0.0001" in note["text"]


# -- samplings and their rows --------------------------------------------------------------------------------------------


class Counting(HuggingFace):
    """Counts how often it is asked."""

    calls: list[int] = []  # noqa: RUF012 - a job makes its engine itself

    def generate(self, requests: Any) -> Any:
        self.calls.append(len(requests))
        return super().generate(requests)


def test_one_sampling_serves_several_optimizer_steps(tmp_path: Path) -> None:
    events = Events()
    Counting.calls.clear()
    job = make_job(tmp_path, num_steps=4, num_iterations=2, lr=1e-3, engine=Counting, checkpoint_every=1)
    result = train(job, events)
    assert Counting.calls == [2, 2]
    assert sorted(path.name for path in Path(job.out_dir).glob("experience-*")) == [
        "experience-00000001.jsonl",
        "experience-00000003.jsonl",
    ]
    ratios = [log["ratio"] for log in events.of("log")]
    assert ratios[0::2] == pytest.approx([1, 1], abs=1e-5)
    assert all(abs(ratio - 1) > 1e-3 for ratio in ratios[1::2])
    # A checkpoint between the two would have to keep the rollouts.
    assert [event["step"] for event in events.of("checkpoint")] == [2]
    assert result.metrics["mean_reward"] == pytest.approx(np.mean([log["reward"] for log in events.of("log")]))


def test_nothing_but_ungraded_rollouts_ends_the_step_with_a_finding(tmp_path: Path) -> None:
    unreadable = [problem.model_copy(update={"reference": "?"}) for problem in PROBLEMS[:2]]
    with pytest.raises(Finding, match="nothing to learn from") as caught:
        train(make_job(tmp_path, problems=unreadable))
    assert caught.value.evidence == {"rollouts": 8, "groups with an ungraded rollout": 2}


class Flaky(Arith):
    """A task whose verifier fails on one rollout of its first problem."""

    def grader(self) -> Any:
        grader = super().grader()
        exact = grader.grade_many

        def grade_many(items: Sequence[Any]) -> list[Any]:
            scores = list(exact(items))
            lost = next(i for i, (problem, *_) in enumerate(items) if problem.id == PROBLEMS[0].id)
            scores[lost + 1] = scores[lost + 1].model_copy(update={"value": None, "reason": "crash"})
            return scores

        grader.grade_many = grade_many
        return grader


@pytest.mark.promise("G17", "rows that cannot be learnt")
def test_a_group_with_one_ungraded_rollout_is_dropped_whole_and_counted(tmp_path: Path) -> None:
    events = Events()
    job = make_job(tmp_path, task=Flaky)
    train(job, events)
    assert events.of("log")[0]["dropped_problems"] == 1
    rows = experience(job)
    assert len(rows) == 8 and sum(row.score.value is None for row in rows) == 1  # all are kept to be looked at
    learnt = [row.rollout.problem_id for row in rows if row.credit.advantage is not None]
    assert learnt == [PROBLEMS[1].id] * 4


def test_each_attempt_is_rewarded_held_and_logged_by_itself(tmp_path: Path, elsewhere: Checkpoint) -> None:
    events = Events()
    rewards = {"rewarded": (2,), "learnt": (1, 2), "kl_coefs": (0.1, 0.01)}
    job = make_job(tmp_path, attempt={"num_attempts": 2}, rewards=rewards, job={"reference": elsewhere})
    train(job, events)
    rows = experience(job)
    assert [row.rollout.parent_id is None for row in rows] == ([True] * 4 + [False] * 4) * 2
    (log,) = events.of("log")
    for attempt, coef in ((1, 0.1), (2, 0.01)):
        own = [row for row in rows if (row.rollout.parent_id is None) == (attempt == 1)]
        values = [0.0 if attempt == 1 else row.score.value for row in own]
        assert [row.credit.reward for row in own] == values and {row.credit.kl_coef for row in own} == {coef}
        returns = np.array(values) - coef * np.array([row.credit.kl for row in own])
        # Siblings stand together: those of the first problem, then those of the second.
        expected = [r - (group.sum() - r) / 3 for group in returns.reshape(2, 4) for r in group]
        assert [row.credit.advantage for row in own] == pytest.approx(expected, abs=1e-9)
        assert log[f"kl_{attempt}"] == pytest.approx(np.mean([row.credit.kl for row in own]))
        assert log[f"advantage_{attempt}"] == pytest.approx(np.mean(np.square(expected)) ** 0.5)
        assert log[f"accuracy_{attempt}"] == np.mean([row.score.value for row in own])


# -- going on ------------------------------------------------------------------------------------------------------------


def grown(state: State, graded: Sequence[Graded], settings: TurnRewards) -> tuple[State, list[PolicyGradientExample]]:
    """Rewards that are larger at every sampling, by what the function remembers."""
    number = int(str(state.get("number", 0))) + 1
    _, rows = turn_rewards(state, graded, settings)
    return {"number": number}, [row.model_copy(update={"reward": row.reward * number}) for row in rows]


LORA = {"rank": 4, "dropout": 0.1}


@pytest.mark.parametrize(
    ("lora", "reference"), [(None, TINY), (LORA, TINY), (LORA, None)], ids=["full", "lora", "lora-without-reference"]
)
def test_a_resumed_job_ends_at_the_same_bytes(tmp_path: Path, lora: Any, reference: Checkpoint | None) -> None:
    """The same rollouts, rewards and weights. Adapters without a named reference are held to what they were put on."""

    def job(out: str, **fields: Any) -> TrainJob:
        return make_job(
            tmp_path,
            out,
            problems=PROBLEMS[:3],
            num_steps=4,
            checkpoint_every=2,
            lr=1e-3,
            lora=lora,
            rewards={"kl_coefs": (0.05,)},
            reward_function=grown,
            job={"reference": reference, **fields},
        )

    whole, events, later = job("whole"), Events(), Events()
    expected = train(whole, events)
    torch.manual_seed(99)  # what is left in this process must not matter
    resumed = job("resumed", resume_from=f"{whole.out_dir}/checkpoint-2")
    assert train(resumed, later) == expected
    assert later.of("log") == events.of("log")[2:]
    assert [experience(resumed, step) == experience(whole, step) for step in (3, 4)] == [True, True]
    assert sha256(final(resumed) / "model.safetensors") == sha256(final(whole) / "model.safetensors")
    assert (
        max(row.credit.reward or 0 for row in experience(whole, 4)) == 4
    )  # what was remembered of the first half counts


@pytest.mark.heavy
def test_two_processes_sample_and_learn_what_one_does(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "problems": PROBLEMS[:4],
        "num_steps": 2,
        "batch_size": 12,  # three problems: the two processes get different numbers of them
        "attempt": {"num_attempts": 2},
        "rewards": {"rewarded": (1, 2), "learnt": (1, 2), "kl_coefs": (0.05,), "bonus": 1.0},
    }
    alone, both = Events(), Events()
    one, two = make_job(tmp_path, "one", **settings), make_job(tmp_path, "two", job={"num_processes": 2}, **settings)
    train(one, alone)
    train(two, both)
    for step in (1, 2):
        mine, theirs = experience(one, step), experience(two, step)
        assert [row.rollout.completion_ids for row in mine] == [row.rollout.completion_ids for row in theirs]
        assert [row.rollout.id for row in mine] == [row.rollout.id for row in theirs]
        assert [row.credit.advantage for row in mine] == pytest.approx(
            [row.credit.advantage for row in theirs], abs=1e-5
        )
    for mine, theirs in zip(alone.of("log"), both.of("log"), strict=True):
        # Padding differs, for each process pads its own rows.
        assert {**mine, "num_padded_tokens": 0} == pytest.approx({**theirs, "num_padded_tokens": 0}, abs=1e-4)
    start, final_one, final_two = weights_of(TINY.path), weights_of(final(one)), weights_of(final(two))
    gaps = torch.cat([(final_one[name] - final_two[name]).abs().flatten() for name in final_one])
    moves = torch.cat([(final_one[name] - start[name]).abs().flatten() for name in final_one])
    # Where a gradient is nearly 0 its rounding decides Adam's direction.
    assert (gaps > 1e-5).float().mean() < 1e-3 and (moves > 5e-5).float().mean() > 0.5
