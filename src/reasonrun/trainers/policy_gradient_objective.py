"""Rows that the policy makes itself while it trains: sampling, credit and loss of every optimizer step."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from reasonrun.contracts import Engine
from reasonrun.credit import advantages, cells, k1_penalties, row_weights
from reasonrun.on_policy import Collected, Collector, plan_problems
from reasonrun.records import PolicyGradientExample
from reasonrun.trainers.batches import Indexes, share_of_rank
from reasonrun.trainers.live_weights import live_weights
from reasonrun.trainers.objective import Computed, Fixed, Objective
from reasonrun.trainers.passes import Together, in_passes
from reasonrun.trainers.policy_gradient_loss import k2_losses, surrogate_losses
from reasonrun.trainers.ranks import gathered, rank, summed, world
from reasonrun.trainers.sharding import is_sharded
from reasonrun.trainers.shared_prefixes import merge
from reasonrun.trainers.token_nll import pad, token_nll
from reasonrun.training import ON_POLICY_FILE, PolicyGradientSettings

Floats = npt.NDArray[np.float64]


class PolicyGradientObjective(Objective):
    """Samples with the weights of the moment, turns rewards into advantages, and gives the losses of the rows.

    Log-probabilities of the sampling policy and of the reference are the trainer's own, from the forward pass that the
    update uses; those of the engine serve to measure, and on request to correct, how far the two differ. A row that begins
    another one shares its forward pass, so what the step trainer calls rows are sequences (``shared_prefixes.py``).
    """

    statistics: ClassVar[tuple[str, ...]] = ("ratio", "clipped_share")

    def __init__(self, collector: Collector, engine: Engine, settings: PolicyGradientSettings, out_dir: Path) -> None:
        self.settings = settings
        self.lengths: Indexes = np.empty(0, dtype=np.int64)
        self.steps_per_checkpoint = settings.num_iterations
        self._collector, self._engine, self._out_dir = collector, engine, out_dir
        self._problems: list[list[int]] = []
        self._statistics: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._sampled_at = 0.0
        self._reference: Any = None
        self._model: Any = None
        self._importance: Floats | None = None
        self._warned = False
        self._pass_size = settings.micro_batch_size  # 0 takes all at once

    # -- a job ---------------------------------------------------------------------------------------------------

    def plan(self, batch_size: int, num_steps: int, seed: int) -> Indexes:
        """The problems of every sampling: each is used once before any is used again. No row is known before it."""
        num_samplings = -(-num_steps // self.settings.num_iterations)
        num_problems = len(self._collector.problems)
        self._problems = plan_problems(num_problems, self.settings.problems_per_sampling, num_samplings, seed)
        return np.empty(0, dtype=np.int64)

    def begin(self, fixed: Fixed) -> None:
        self._model, self._tell = fixed.start, fixed.tell
        self._load_reference = fixed.load_reference
        self._base_is_reference = fixed.start_is_reference and hasattr(fixed.start, "disable_adapter")
        if fixed.resume_from is not None:
            self._collector.state = json.loads((fixed.resume_from / ON_POLICY_FILE).read_text("utf-8"))["state"]

    def save(self, folder: Path) -> None:
        kept = {"state": self._collector.state, "code": self._collector.code}
        (folder / ON_POLICY_FILE).write_text(json.dumps(kept), encoding="utf-8")

    def close(self) -> None:
        self._collector.close()
        self._engine.close()

    def name(self, row: int) -> str:
        return self.merged.sequences.names[row]

    def num_tokens(self, batch: Indexes) -> int:
        return int(self.merged.num_tokens_P[np.isin(self.merged.owner_P, batch)].sum())

    def step_statistics(self) -> dict[str, float]:
        return self._statistics

    def seconds(self) -> dict[str, float]:
        spent = {**self._seconds, "update": time.monotonic() - self._sampled_at}
        self._seconds, self._sampled_at = {}, time.monotonic()
        return spent

    def totals(self, history: Sequence[Mapping[str, float]], batch_size: int) -> dict[str, float]:
        """``mean_reward`` is over all steps: what a checkpoint can be chosen by."""
        return {"mean_reward": float(np.mean([line["reward"] for line in history]))}

    # -- an optimizer step ---------------------------------------------------------------------------------------

    def batch(self, step: int) -> Indexes:
        if step % self.settings.num_iterations == 0:
            self._sample(step // self.settings.num_iterations, step + 1)
        return np.arange(len(self.lengths), dtype=np.int64)

    def _sample(self, sampling: int, optimizer_step: int) -> None:
        """Rows of one sampling with all that stays fixed until the next one. Raises Finding when none could be made."""
        began = time.monotonic()
        self._engine.update(live_weights(self._model))
        problems = [self._collector.problems[i] for i in self._problems[sampling]]
        graded = gathered(lambda share: self._collector.collect(sampling + 1, share), problems)
        collected = self._collector.reward(graded)
        examples = collected.rows
        self.merged = merge(examples)
        self.lengths = self.merged.sequences.lengths
        self._kl_coefs = np.array([example.kl_coef for example in examples])
        scoring = time.monotonic()
        self._old = self._scored(self._model)
        self._reference_logps = self._scored_by_reference()
        self._credit(collected, optimizer_step)
        ended = time.monotonic()
        self._seconds = {
            "push": scoring - began - sum(collected.seconds.values()),
            **collected.seconds,
            "score": ended - scoring,
        }
        self._sampled_at = ended

    def _credit(self, collected: Collected, optimizer_step: int) -> None:
        examples, settings = collected.rows, self.settings
        num_tokens = self.merged.num_tokens_P
        log_ratios = self.merged.sums(self._old - self._reference_logps)
        if settings.kl_reduction == "mean":
            self._kl_coefs = self._kl_coefs / np.maximum(num_tokens, 1)
        rewards = np.array([example.reward for example in examples])
        penalties = k1_penalties(self._kl_coefs, log_ratios)
        attempts = np.array([example.attempt for example in examples], dtype=np.int64)
        self._advantages = advantages(
            rewards,
            penalties if settings.kl == "k1_in_reward" else np.zeros_like(penalties),
            cells([example.group for example in examples], attempts.tolist()),
            attempts,
            baseline=settings.advantage,
            scale=settings.advantage_scale,
        )
        self._weights = row_weights(num_tokens, settings.loss_reduction, settings.max_length)
        self._statistics = {**collected.statistics(), **self._mismatch(examples)}
        for attempt in np.unique(attempts).tolist():
            here = attempts == attempt
            if self._kl_coefs.any():
                self._statistics[f"kl_{attempt}"] = float(log_ratios[here].mean())
            self._statistics[f"advantage_{attempt}"] = float(np.sqrt(np.mean(self._advantages[here] ** 2)))
        if not rank():
            collected.keep(self._out_dir, optimizer_step, kl=log_ratios, advantage=self._advantages)

    def losses(self, model: Any, batch: Indexes, micro: Indexes, device: torch.device) -> Computed:
        own = batch[micro]
        ids_BT, learnt_BT = pad([(self.merged.sequences, own)])
        nll_BK, columns_K = token_nll(model, ids_BT, learnt_BT, device)
        rows, sequence_R, columns_RT, mask_RT = self._places(own, columns_K)

        def tokens(values_N: Floats) -> torch.Tensor:
            spread_RT = np.zeros(mask_RT.shape, dtype=np.float32)
            spread_RT[mask_RT] = np.concatenate([values_N[here] for here in self.merged.tokens_of(rows)])
            return torch.from_numpy(spread_RT).to(device)

        def column(values_P: Floats) -> torch.Tensor:
            return torch.from_numpy(values_P[rows].astype(np.float32)).to(device)

        in_BK = (torch.from_numpy(sequence_R)[:, None], torch.from_numpy(columns_RT))
        logps_RT = -nll_BK[in_BK[0].to(device), in_BK[1].to(device)]
        mask = torch.from_numpy(mask_RT).to(device)
        losses_R, ratio_R, clipped_R = surrogate_losses(
            logps_RT,
            tokens(self._old),
            mask,
            column(self._advantages),
            column(self._weights),
            ratio=self.settings.ratio,
            clip_ratio=self.settings.clip_ratio,
            importance_BK=None if self._importance is None else tokens(self._importance),
        )
        if self.settings.kl == "k2_in_loss":
            pull = (tokens(self._reference_logps), mask, column(self._kl_coefs), column(self._weights))
            losses_R = losses_R + k2_losses(logps_RT, *pull)

        def by_sequence(values_R: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(own), device=device).index_add(0, in_BK[0][:, 0].to(device), values_R)

        share = len(self.lengths) / len(self.merged.owner_P)  # their mean over sequences is then that over rows
        means = tuple(by_sequence(values_R.detach() * share) for values_R in (ratio_R, clipped_R))
        return Computed(losses_B=by_sequence(losses_R), num_tokens=int(ids_BT.size), statistics=means)

    def _places(self, own: Indexes, columns_K: Indexes) -> tuple[Indexes, Indexes, Indexes, npt.NDArray[np.bool_]]:
        """The rows R inside the sequences ``own``: which, in which of them, and in which of the K columns each of their
        tokens is, with a mask of the real ones."""
        position = {int(sequence): place for place, sequence in enumerate(own)}
        rows = np.flatnonzero(np.isin(self.merged.owner_P, own))
        lengths_R = self.merged.num_tokens_P[rows]
        mask_RT = np.arange(lengths_R.max()) < lengths_R[:, None]
        column_of = np.zeros(int(columns_K.max()) + 1, dtype=np.int64)
        column_of[columns_K] = np.arange(len(columns_K))
        columns_RT = np.zeros(mask_RT.shape, dtype=np.int64)
        columns_RT[mask_RT] = column_of[
            np.concatenate([self.merged.places_N[here] for here in self.merged.tokens_of(rows)])
        ]
        sequence_R = np.array([position[int(owner)] for owner in self.merged.owner_P[rows]], dtype=np.int64)
        return rows, sequence_R, columns_RT, mask_RT

    # -- log-probabilities, flat over the learnt tokens of all rows --------------------------------------------------

    def _scored(self, model: Any) -> Floats:
        """Under ``model``, by the same forward pass as the update's, so that a policy that has not moved has ratio 1."""
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        sequences = self.merged.sequences
        everything = np.arange(len(sequences), dtype=np.int64)
        own = share_of_rank(everything, self.lengths, rank(), world())
        found = np.zeros(len(sequences.token_ids))

        def run(some: Indexes) -> None:
            ids_BT, learnt_BT = pad([(sequences, some)])
            nll_BK, columns_K = token_nll(model, ids_BT, learnt_BT, device)
            logps_BK = -nll_BK.double().cpu().numpy()
            for i, sequence in enumerate(some):
                found[sequences.offsets[sequence] + columns_K[learnt_BT[i, columns_K]]] = logps_BK[
                    i, learnt_BT[i, columns_K]
                ]

        together = None
        if is_sharded(model):
            shortest = everything[[np.argmin(self.lengths)]]
            together = Together(
                num_rows=-(-len(everything) // world()),
                idle=lambda: token_nll(model, *pad([(sequences, shortest)]), device),
            )
        size = self._pass_size or max(1, together.num_rows if together else len(own))
        what = "the log-probabilities of rollouts"
        fitted = in_passes(own, size, run, what=what, single="rollout", together=together)
        self._pass_size = fitted if fitted < size else self._pass_size
        model.train(was_training)
        starts_P = sequences.offsets[self.merged.owner_P]
        logps_N: Floats = summed(found, device)[np.repeat(starts_P, self.merged.num_tokens_P) + self.merged.places_N]
        return logps_N

    def _scored_by_reference(self) -> Floats:
        if not self._kl_coefs.any():
            return self._old  # nothing reads it
        if self._base_is_reference:  # adapters that are switched off leave the base
            with self._model.disable_adapter():
                return self._scored(self._model)
        if self._reference is None:
            self._reference = self._load_reference().requires_grad_(False)
        return self._scored(self._reference)

    def _mismatch(self, examples: Sequence[PolicyGradientExample]) -> dict[str, float]:
        """How far trainer and engine disagree about the sampled tokens; an alarm when it is too far."""
        sampled = np.concatenate([np.asarray(example.sampled_logps, dtype=np.float64) for example in examples])
        gaps = self._old - sampled
        if self.settings.importance_cap is not None:
            whole = self.settings.ratio == "sequence"
            logs = np.repeat(self.merged.sums(gaps), self.merged.num_tokens_P) if whole else gaps
            self._importance = np.minimum(np.exp(logs), self.settings.importance_cap)
        mean = float(np.abs(gaps).mean())
        if mean > self.settings.max_mismatch and not self._warned:
            self._warned = True
            self._tell(
                f"engine and trainer disagree about sampled tokens by {mean:.3f} nats on average (max_mismatch is"
                f" {self.settings.max_mismatch:g}): the rollouts are not quite the policy's own; the same dtype in both, or"
                " importance_cap, helps"
            )
        return {"mismatch": mean, "largest_mismatch": float(np.abs(gaps).max())}
