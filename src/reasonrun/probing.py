"""Whether an engine answers with the weights that it should: log-probabilities of fixed tokens, under it and the trainer.

The tokens are the same for every model of one vocabulary. They mean nothing, so that no prompt cache, template or tokenizer
has a part in the comparison, and every weight has.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasonrun.errors import RunFailed

PROBE_NAME = "probe.json"
_NUM_TOKENS = 48
# A mean difference per token below which two models count as one. In float32 an engine differs from the trainer by 1e-5, in
# bfloat16 by a few hundredths (docs/benchmarks.md); other weights differ by more, or the next rule tells them apart.
TOLERANCE = 0.2
# The engine stands nearer to the policy before than to the new one, by this factor ...
_CLEARLY = 2.0
# ... which means nothing where the two hardly differ: below this the references' own rounding decides.
_TOLD_APART = 1e-3
_SEEN_IN_BFLOAT16 = 1e-2


def probe_ids(vocab_size: int) -> tuple[int, ...]:
    """The tokens; the first is the prompt of the rest."""
    stream = hashlib.shake_256(b"reasonrun weights probe 1").digest(4 * _NUM_TOKENS)
    return tuple(int.from_bytes(stream[4 * i : 4 * i + 4], "big") % vocab_size for i in range(_NUM_TOKENS))


def probe_pair(ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens as a prompt and its completion, which is what engines score."""
    return tuple(ids[:1]), tuple(ids[1:])


def write_probe(folder: Path, logps: Sequence[float]) -> None:
    """Put the trainer's own log-probabilities beside the weights that it writes."""
    (folder / PROBE_NAME).write_text(json.dumps({"logps": [float(logp) for logp in logps]}) + "\n", encoding="utf-8")


def read_probe(folder: Path) -> tuple[float, ...] | None:
    """What the trainer put beside these weights; None when no trainer made them."""
    path = folder / PROBE_NAME
    if not path.is_file():
        return None
    return tuple(json.loads(path.read_text(encoding="utf-8"))["logps"])


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the probe must come to under the weights of a policy, and what it came to under those before.

    ``policy`` and ``before`` are named in errors.
    """

    policy: str
    logps: tuple[float, ...]
    before: str = ""
    logps_before: tuple[float, ...] | None = None

    @property
    def _apart(self) -> float:
        return 0.0 if self.logps_before is None else mean_difference(self.logps, self.logps_before)

    def check(self, worker: str, logps: Sequence[float]) -> float:
        """The mean absolute difference between the engine's log-probabilities and these.

        Raises RunFailed when the engine has other weights.
        """
        off = mean_difference(logps, self.logps)
        if not off <= TOLERANCE:  # not a number, too
            raise _other_weights(f"worker {worker} does not answer with the weights of {self.policy}", off)
        if self._apart > _TOLD_APART and mean_difference(logps, self.logps_before or ()) * _CLEARLY < off:
            raise _other_weights(f"worker {worker} still answers with the weights of {self.before}", off)
        return off

    def check_moved(self, worker: str, logps: Sequence[float], engine_before: Sequence[float]) -> None:
        """Compare with what the same worker's engine came to before: at any precision a reload that did nothing shows.

        Raises RunFailed when nothing moved, although the two policies differ enough to be seen in bfloat16.
        """
        if self._apart > _SEEN_IN_BFLOAT16 and tuple(logps) == tuple(engine_before):
            off = mean_difference(logps, self.logps)
            raise _other_weights(f"worker {worker} still answers with the weights of {self.before}", off)


def mean_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference of two equally long lists; not a number when they are not, or empty."""
    if len(one) != len(other) or not one:
        return math.nan
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def mismatch(engine: Sequence[Sequence[float]], trainer: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How far an engine's log-probabilities of what it sampled are from the trainer's for the same tokens.

    Args:
        engine, trainer: one list of log-probabilities per rollout, at temperature 1.

    Returns:
        mean and largest absolute difference per token, and the estimate of KL(engine || trainer) per token by
        ``r - 1 - log r`` with r = p_trainer / p_engine (k3; Schulman 2020, "Approximating KL Divergence").
    """
    pairs = [(a, b) for ours, theirs in zip(engine, trainer, strict=True) for a, b in zip(ours, theirs, strict=True)]
    gaps = [b - a for a, b in pairs]
    if not gaps:
        return {"num_tokens": 0}
    return {
        "num_tokens": len(gaps),
        "mean": sum(abs(gap) for gap in gaps) / len(gaps),
        "max": max(abs(gap) for gap in gaps),
        "kl": sum(math.exp(gap) - 1 - gap for gap in gaps) / len(gaps),
    }


def _other_weights(message: str, off: float) -> RunFailed:
    return RunFailed(
        f"{message}: its log-probabilities of {_NUM_TOKENS - 1} fixed tokens differ from the trainer's by {off:.3g} a token on"
        f" average (allowed: {TOLERANCE:g})",
        hint="nothing was sampled with them. Start the engine anew for every policy with launcher.residency=exit; if that does"
        " not help, the engine computes this architecture otherwise than transformers: use engine=hf",
    )
