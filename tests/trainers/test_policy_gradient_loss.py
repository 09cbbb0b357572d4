"""Policy-gradient losses against gradients that are known exactly: policies small enough to write down every sequence, each
weighted with its probability. Nothing is sampled, so nothing is near enough: it is equal or wrong."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from reasonrun.credit import advantages, k1_penalties, leave_one_out, row_weights
from reasonrun.curate.attempts import TurnRewards, turn_rewards
from reasonrun.on_policy import Collected
from reasonrun.records import Graded, Rollout, Sampling, Score, Segment
from reasonrun.trainers.objective import Fixed
from reasonrun.trainers.policy_gradient_loss import k2_losses, surrogate_losses
from reasonrun.trainers.policy_gradient_objective import PolicyGradientObjective
from reasonrun.training import PolicyGradientSettings

CPU = torch.device("cpu")
V = 3
SEQUENCES = list(itertools.product(range(V), repeat=2))  # all nine of two tokens
FIRST, SECOND = (torch.tensor(column) for column in zip(*SEQUENCES, strict=True))
BETA = 0.3
WHOLE = torch.ones(len(SEQUENCES), 2, dtype=torch.bool)
ONE_EACH = torch.tensor(row_weights(np.array([2]), "sequence", 9)).expand(len(SEQUENCES))


def random_numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TwoTokens(torch.nn.Module):
    """Logits of the first token, and of the second one after each first one. Inputs begin with a prompt of one token."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(random_numbers(V, seed=seed))
        self.second = torch.nn.Parameter(random_numbers(V, V, seed=seed + 1))

    def token_logps(self) -> torch.Tensor:
        """Log-probabilities of both tokens of every sequence, shape (9, 2)."""
        return torch.stack(
            [self.first.log_softmax(0)[FIRST], self.second.log_softmax(1)[FIRST, SECOND]],
            dim=1,
        )

    def probabilities(self) -> torch.Tensor:
        return self.token_logps().sum(dim=1).exp()

    def forward(self, input_ids: torch.Tensor, logits_to_keep: torch.Tensor, use_cache: bool) -> Any:
        logits = [self.first.expand(len(input_ids), V)]
        if input_ids.shape[1] > 1:
            logits += [self.second[input_ids[:, 1]]] * (input_ids.shape[1] - 1)
        return SimpleNamespace(logits=torch.stack(logits, dim=1)[:, logits_to_keep])


POLICY, REFERENCE = 0, 10
REWARDS = random_numbers(len(SEQUENCES), seed=20)


def gradient(value: torch.Tensor, policy: TwoTokens) -> torch.Tensor:
    found = torch.autograd.grad(value, [*policy.parameters()], allow_unused=True, retain_graph=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, policy.parameters(), strict=True)]
    )


def kl(policy: TwoTokens, reference: TwoTokens) -> torch.Tensor:
    """KL(policy || reference), summed over all sequences."""
    logps = policy.token_logps().sum(dim=1)
    return (logps.exp() * (logps - reference.token_logps().sum(dim=1).detach())).sum()


def log_ratios(policy: TwoTokens, reference: TwoTokens) -> torch.Tensor:
    return (policy.token_logps() - reference.token_logps()).detach().sum(dim=1)


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_k1_in_the_reward_follows_the_gradient_of_reward_minus_kl(ratio: Any) -> None:
    policy, reference = TwoTokens(POLICY), TwoTokens(REFERENCE)
    taken_off = k1_penalties(np.full(9, BETA), log_ratios(policy, reference).numpy())
    alone, attempt = np.arange(9), np.ones(9, dtype=np.int64)
    made = advantages(REWARDS.numpy(), taken_off, alone, attempt, baseline="reward", scale="none")
    logps = policy.token_logps()
    losses, _, _ = surrogate_losses(logps, logps.detach(), WHOLE, torch.tensor(made), ONE_EACH, ratio=ratio)
    expected = (policy.probabilities() * REWARDS).sum() - BETA * kl(policy, reference)
    found = gradient((policy.probabilities().detach() * losses).sum(), policy)
    assert torch.allclose(-found, gradient(expected, policy), atol=1e-10, rtol=0)
    assert gradient(BETA * kl(policy, reference), policy).abs().max() > 0.01  # the pull is part of what was compared


def test_k2_in_the_loss_follows_the_gradient_of_kl() -> None:
    policy, reference = TwoTokens(POLICY), TwoTokens(REFERENCE)
    coefs = torch.full((9,), BETA, dtype=torch.float64)
    losses = k2_losses(policy.token_logps(), reference.token_logps().detach(), WHOLE, coefs, ONE_EACH)
    found = gradient((policy.probabilities().detach() * losses).sum(), policy)
    assert torch.allclose(found, gradient(BETA * kl(policy, reference), policy), atol=1e-10, rtol=0)
    assert found.abs().max() > 0.01


def test_k1_as_a_loss_would_pull_nowhere_and_is_refused() -> None:
    policy, reference = TwoTokens(POLICY), TwoTokens(REFERENCE)
    estimates = policy.token_logps().sum(dim=1) - reference.token_logps().detach().sum(dim=1)
    weighted = (policy.probabilities().detach() * estimates).sum()
    assert weighted.item() == pytest.approx(kl(policy, reference).item())  # the right number …
    assert gradient(weighted, policy).abs().max() < 1e-12  # … with a gradient of nothing
    with pytest.raises(ValidationError, match="k1 as a loss has an expected gradient of zero"):
        PolicyGradientSettings(kl="k1_in_loss")


def test_k3_as_a_loss_would_follow_the_other_kl_and_is_refused() -> None:
    policy, reference = TwoTokens(POLICY), TwoTokens(REFERENCE)
    estimates = policy.token_logps().sum(dim=1) - reference.token_logps().detach().sum(dim=1)
    weighted = (policy.probabilities().detach() * (torch.exp(-estimates) - 1 + estimates)).sum()
    other = (reference.probabilities() * -estimates).sum()  # KL(reference || policy)
    assert torch.allclose(gradient(weighted, policy), gradient(other, policy), atol=1e-12, rtol=0)
    assert not torch.allclose(gradient(other, policy), gradient(kl(policy, reference), policy), atol=0.01)
    with pytest.raises(ValidationError, match=r"that of KL\(reference \|\| policy\), the other direction"):
        PolicyGradientSettings(kl="k3_in_loss")


@pytest.mark.parametrize("group_size", [2, 3])
def test_a_leave_one_out_baseline_leaves_the_expected_gradient_as_it_is(group_size: int) -> None:
    policy = TwoTokens(POLICY)
    groups = torch.tensor(list(itertools.product(range(9), repeat=group_size)))  # all groups of independent siblings
    chosen = groups.flatten()
    cells = np.repeat(np.arange(len(groups)), group_size)
    made = leave_one_out(REWARDS[chosen].numpy(), cells)
    logps = policy.token_logps()[chosen]
    weights = torch.full((len(chosen),), 1 / group_size, dtype=torch.float64)
    mask = torch.ones_like(logps, dtype=torch.bool)
    losses, _, _ = surrogate_losses(logps, logps.detach(), mask, torch.tensor(made), weights, ratio="sequence")
    likely = policy.probabilities().detach()[groups].prod(dim=1).repeat_interleave(group_size)
    found = gradient((likely * losses).sum(), policy)
    expected = gradient((policy.probabilities() * REWARDS).sum(), policy)
    assert torch.allclose(-found, expected, atol=1e-10, rtol=0)


# -- ratios, by hand -----------------------------------------------------------------------------------------------------


def one_row(
    ratios: list[float], advantage: float, mask: list[bool] | None = None, **options: Any
) -> tuple[float, list[float], float, float]:
    """Loss of one row whose tokens have these ratios, its gradient by token, mean ratio, clipped share."""
    logps = torch.tensor([ratios], dtype=torch.float64).log().requires_grad_()
    losses, ratio, clipped = surrogate_losses(
        logps,
        torch.zeros_like(logps),
        torch.tensor([mask or [True] * len(ratios)]),
        torch.tensor([advantage], dtype=torch.float64),
        torch.tensor([0.5], dtype=torch.float64),
        **options,
    )
    losses.sum().backward()
    assert logps.grad is not None
    return losses.item(), logps.grad[0].tolist(), ratio.item(), clipped.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.5, 2.0, -1.2, 0.0),  # likelier already and wanted: held at 1.2
        (1.5, -2.0, 1.5, 1.5),  # likelier and unwanted: brought back
        (0.5, 2.0, -0.5, -0.5),  # less likely and wanted: brought back
        (0.5, -2.0, 0.8, 0.0),  # less likely already and unwanted: held at 0.8
        (1.1, 2.0, -1.1, -1.1),
        (1.1, -2.0, 1.1, 1.1),
    ],
)
@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_clipping_holds_a_ratio_only_where_it_has_gone_far_enough(
    kind: Any, ratio: float, advantage: float, loss: float, slope: float
) -> None:
    found = one_row([ratio], advantage, ratio=kind, clip_ratio=0.2)
    assert found[0] == pytest.approx(loss) and found[1] == pytest.approx([slope])
    assert found[2:] == (pytest.approx(ratio), float(slope == 0.0))
    free = one_row([ratio], advantage, ratio=kind)
    assert free[0] == pytest.approx(-0.5 * ratio * advantage) and free[3] == 0.0


def test_ratios_of_tokens_are_clipped_one_by_one_and_a_rows_ratio_as_a_whole() -> None:
    # 1.5 x 0.5 x 1.25 = 0.9375, inside 0.8 … 1.2 although two of its tokens are not. The fourth token is not learnt.
    ratios, mask = [1.5, 0.5, 1.25, 9.0], [True, True, True, False]
    loss, slopes, ratio, clipped = one_row(ratios, 2.0, mask, ratio="token", clip_ratio=0.2)
    assert loss == pytest.approx(-(1.2 + 0.5 + 1.2)) and slopes == pytest.approx([0, -0.5, 0, 0])
    assert (ratio, clipped) == (pytest.approx(3.25 / 3), pytest.approx(2 / 3))
    loss, slopes, ratio, clipped = one_row(ratios, 2.0, mask, ratio="sequence", clip_ratio=0.2)
    assert loss == pytest.approx(-0.9375) and slopes == pytest.approx([-0.9375] * 3 + [0])
    assert (ratio, clipped) == (pytest.approx(0.9375), 0.0)


def test_importance_weights_multiply_the_gain() -> None:
    importance = torch.tensor([[0.5, 2.0, 7.0]], dtype=torch.float64)
    options = {"mask": [True, True, False], "importance_BK": importance}
    loss, slopes, _, _ = one_row([1.0, 1.0, 1.0], 2.0, ratio="token", **options)
    assert loss == pytest.approx(-2.5) and slopes == pytest.approx([-0.5, -2.0, 0])
    # A row has one weight, the mean over what it learns.
    loss, slopes, _, _ = one_row([1.0, 1.0, 1.0], 2.0, ratio="sequence", **options)
    assert loss == pytest.approx(-1.25) and slopes == pytest.approx([-1.25, -1.25, 0])


# -- two turns, through the objective itself -----------------------------------------------------------------------------

RIGHT_FIRST = [True, False, False]  # by first token
RIGHT_SECOND = [[True, False, True], [True, True, False], [False, True, False]]  # by first and second token
PAIRS = list(itertools.product(range(9), repeat=2))  # of independent trajectories: one problem each, two siblings


def turn(name: str, problem: str, prompt: tuple[int, ...], token: int, right: bool, parent: str | None) -> Graded:
    rollout = Rollout(
        id=name,
        problem_id=problem,
        index=0,
        parent_id=parent,
        kind="turn",
        messages=(),
        prompt_ids=prompt,
        segments=(Segment(token_ids=(token,), src="model", loss=True),),
        text="",
        finish_reason="stop",
        logps=(0.0,),
        policy="w",
        sampling=Sampling(),
        seed=0,
    )
    return Graded(rollout=rollout, score=Score(value=float(right), reason="said", grader="table-1"))


def trajectories(right_second: list[list[bool]]) -> dict[str, list[Graded]]:
    """All pairs of trajectories: their first attempts, then their second ones."""
    made = {}
    for a, b in PAIRS:
        problem, rows = f"{a}-{b}", []
        for place, (first, _) in enumerate((SEQUENCES[a], SEQUENCES[b])):
            rows.append(turn(f"{problem}/{place}", problem, (0,), first, RIGHT_FIRST[first], None))
        for place, (first, second) in enumerate((SEQUENCES[a], SEQUENCES[b])):
            right = right_second[first][second]
            rows.append(turn(f"{problem}/{place}+", problem, (0, first), second, right, f"{problem}/{place}"))
        made[problem] = rows
    return made


class AllPairs:
    """Stands for a sampler that draws every pair of trajectories once."""

    def __init__(self, rewards: TurnRewards, right_second: list[list[bool]]) -> None:
        self.state: dict[str, Any] = {}
        self._rewards, self._graded = rewards, trajectories(right_second)
        self.problems = [SimpleNamespace(id=problem) for problem in self._graded]

    def collect(self, number: int, share: list[Any]) -> list[Graded]:
        return [row for problem in share for row in self._graded[problem.id]]

    def reward(self, graded: list[Graded]) -> Collected:
        _, self.rows = turn_rewards({}, graded, self._rewards)
        return Collected(graded=graded, rows=self.rows, num_dropped=0, seconds={})


def objective_of(
    folder: Path,
    policy: TwoTokens,
    rewards: TurnRewards,
    right_second: list[list[bool]],
    num_steps: int,
    **settings: Any,
) -> PolicyGradientObjective:
    engine: Any = SimpleNamespace(update=lambda weights: None)
    collector: Any = AllPairs(rewards, right_second)
    chosen = PolicyGradientSettings(batch_size=2 * len(PAIRS), group_size=2, max_mismatch=100, **settings)
    objective = PolicyGradientObjective(collector, engine, chosen, folder)
    objective.plan(chosen.batch_size, num_steps, 0)
    objective.begin(
        Fixed(
            start=policy,
            start_is_reference=False,
            load_reference=lambda: TwoTokens(REFERENCE),
            resume_from=None,
            rows=np.arange(0),
            tell=lambda text: None,
        )
    )
    return objective


def expected_loss(objective: PolicyGradientObjective, policy: TwoTokens, step: int = 0) -> torch.Tensor:
    """The loss of an attempt, averaged over a pair's two, in expectation over all pairs; both attempts added."""
    batch = objective.batch(step)
    losses = objective.losses(policy, batch, batch, CPU).losses_B
    likely = policy.probabilities().detach()
    pairs = [objective.name(row).partition("/")[0].split("-") for row in batch]
    weights = torch.stack([likely[int(a)] * likely[int(b)] for a, b in pairs])
    return (losses * weights).sum() * len(objective.merged.owner_P) / 2


STAGE_1 = {"rewarded": (2,), "kl_coefs": (0.1, 0.01)}
STAGE_2 = {"rewarded": (1, 2), "kl_coefs": (0.01,)}


def two_turn_gradients(
    folder: Path, right_second: list[list[bool]], **rewards: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """On the parameters of the first turn, and on those of the second."""
    policy = TwoTokens(POLICY)
    found = gradient(
        expected_loss(objective_of(folder, policy, TurnRewards(**rewards), right_second, 1), policy), policy
    )
    return found[:V], found[V:]


def test_the_gradient_of_the_first_attempt_does_not_depend_on_the_second_ones_verdict(tmp_path: Path) -> None:
    turned = [[not right for right in row] for row in RIGHT_SECOND]
    for stage in (STAGE_1, STAGE_2):
        made = [
            two_turn_gradients(tmp_path, table, bonus=bonus, **stage)
            for table in (RIGHT_SECOND, turned)
            for bonus in (0.0, 10.0)
        ]
        for first, second in made[1:]:
            assert torch.allclose(first, made[0][0], atol=1e-7, rtol=0)
            assert (second - made[0][1]).abs().max() > 0.01  # where it should be seen, it is
    with_bonus_1, with_bonus_2 = (
        two_turn_gradients(tmp_path, RIGHT_SECOND, bonus=b, **STAGE_2)[1] for b in (0.0, 10.0)
    )
    assert (with_bonus_1 - with_bonus_2).abs().max() > 0.01


def test_the_first_attempt_follows_its_own_reward_in_stage_2_and_only_the_reference_in_stage_1(tmp_path: Path) -> None:
    policy, reference = TwoTokens(POLICY), TwoTokens(REFERENCE)
    logps, fixed = policy.first.log_softmax(0), reference.first.log_softmax(0).detach()
    pull = (logps.exp() * (logps - fixed)).sum()
    own_reward = (logps.exp() * torch.tensor(RIGHT_FIRST)).sum()
    for stage, aim in ((STAGE_1, -0.1 * pull), (STAGE_2, own_reward - 0.01 * pull)):
        first, _ = two_turn_gradients(tmp_path, RIGHT_SECOND, bonus=10.0, **stage)
        assert torch.allclose(-first, gradient(aim, policy)[:V], atol=1e-6, rtol=0)


def test_the_second_attempt_follows_verdict_and_bonus_given_the_first(tmp_path: Path) -> None:
    policy, reference = TwoTokens(POLICY), TwoTokens(REFERENCE)
    seconds, fixed = policy.second.log_softmax(1), reference.second.log_softmax(1).detach()
    pulls = (seconds.exp() * (seconds - fixed)).sum(dim=1)
    # The change of the verdict has the second verdict's gradient: the first one is a constant to the second attempt.
    rewards = (seconds.exp() * torch.tensor(RIGHT_SECOND)).sum(dim=1)
    aim = (policy.first.softmax(0).detach() * (11 * rewards - 0.01 * pulls)).sum()
    _, second = two_turn_gradients(tmp_path, RIGHT_SECOND, bonus=10.0, **STAGE_2)
    assert torch.allclose(-second, gradient(aim, policy)[V:], atol=1e-5, rtol=0)


def test_crediting_the_last_verdict_to_both_makes_the_first_attempt_depend_on_it(tmp_path: Path) -> None:
    turned = [[not right for right in row] for row in RIGHT_SECOND]
    one, other = (two_turn_gradients(tmp_path, table, credit="last", **STAGE_2)[0] for table in (RIGHT_SECOND, turned))
    assert (one - other).abs().max() > 0.01


@pytest.mark.parametrize("how", ["k1_in_reward", "k2_in_loss"])
def test_stage_1_pulls_a_policy_that_went_astray_back_to_the_reference(tmp_path: Path, how: str) -> None:
    all_right = [[True] * V] * V

    def descend(kl_coefs: tuple[float, ...], num_steps: int) -> tuple[list[float], TwoTokens]:
        policy = TwoTokens(REFERENCE)
        with torch.no_grad():
            for number, parameter in enumerate(policy.parameters()):
                parameter.add_(0.7 * random_numbers(*parameter.shape, seed=30 + number))
        rewards = TurnRewards(rewarded=(2,), kl_coefs=kl_coefs)
        objective = objective_of(tmp_path, policy, rewards, all_right, num_steps, kl=how)
        distances = [kl(policy, TwoTokens(REFERENCE)).item()]
        for step in range(num_steps):
            change = gradient(expected_loss(objective, policy, step), policy)
            with torch.no_grad():
                policy.first -= 15 * change[:V]
                policy.second -= 150 * change[V:].view(V, V)  # whose coefficient is a tenth
            distances.append(kl(policy, TwoTokens(REFERENCE)).item())
        return distances, policy

    distances, _ = descend((0.1, 0.01), 60)
    assert distances[0] > 0.05 and distances[-1] < 0.01 * distances[0]
    assert all(later < earlier for earlier, later in itertools.pairwise(distances))
    free, _ = descend((0.0,), 3)
    assert free == [free[0]] * 4


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_importance_weights_are_the_trainers_probability_over_the_engines_up_to_the_cap(
    tmp_path: Path, ratio: str
) -> None:
    policy, cap = TwoTokens(POLICY), 0.4
    settings: dict[str, Any] = {"ratio": ratio, "importance_cap": cap}
    objective = objective_of(tmp_path, policy, TurnRewards(), RIGHT_SECOND, 1, **settings)
    batch = objective.batch(0)
    losses = objective.losses(policy, batch, batch, CPU).losses_B.detach().numpy()
    logps = policy.token_logps().detach().numpy()
    made: Any = objective._collector
    rows = [row.rollout_id.partition("/") for row in made.rows]
    sequences = [int(pair.split("-")[int(place[0])]) for pair, _, place in rows]
    # The engine gave each token the probability 1 (see ``turn``).
    weights = np.exp(
        [logps[sequence, int(place.endswith("+"))] for sequence, (*_, place) in zip(sequences, rows, strict=True)]
    )
    assert weights.min() < cap < weights.max()
    expected = -objective._advantages * np.minimum(weights, cap) / len(rows)
    assert len(batch) < len(rows)  # first attempts go through the forward pass of second ones
    assert losses == pytest.approx(np.bincount(objective.merged.owner_P, weights=expected), abs=1e-8)
