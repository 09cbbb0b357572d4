"""What a trainer is asked and what it answers. Settings live here so that methods name them and trainers read them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import field_validator, model_validator

from reasonrun.records import Checkpoint, Record
from reasonrun.settings import Effect, Settings, setting

TrainKind = Literal["sft", "preference", "policy_gradient", "scalar"]
Sharding = Literal["none", "fsdp"]
"""What the processes of a training step divide: the batch alone, or also weights, gradients and optimizer state."""


class LoRASettings(Settings):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685); merged into the weights when the step ends."""

    rank: int = setting(16, Effect.SEMANTIC, "Rank of the adapter matrices.", ge=1)
    alpha: float = setting(32.0, Effect.SEMANTIC, "Scale: the update is multiplied by alpha / rank.", gt=0)
    dropout: float = setting(0.0, Effect.SEMANTIC, "Dropout on the adapter input.", ge=0, lt=1)
    target_modules: tuple[str, ...] | Literal["all-linear"] = setting(
        "all-linear", Effect.SEMANTIC, "Names of the linear layers that get adapters."
    )


class OptimizerSettings(Settings):
    """Optimizer, schedule and batch of one training step; shared by every trainer."""

    lr: float = setting(1e-6, Effect.SEMANTIC, "Peak learning rate.", gt=0)
    schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", Effect.SEMANTIC, "Learning-rate shape after the warm-up."
    )
    warmup_steps: int = setting(0, Effect.SEMANTIC, "Optimizer steps of linear warm-up from 0.", ge=0)
    warmup_ratio: float = setting(
        0.0, Effect.SEMANTIC, "Share of the optimizer steps that warm up, when warmup_steps is 0.", ge=0, le=1
    )
    batch_size: int = setting(8, Effect.SEMANTIC, "Examples per optimizer step, over all devices.", ge=1)
    weight_decay: float = setting(0.0, Effect.SEMANTIC, "AdamW weight decay.", ge=0)
    adam_beta1: float = setting(0.9, Effect.SEMANTIC, "Adam beta 1.", ge=0, lt=1)
    adam_beta2: float = setting(0.999, Effect.SEMANTIC, "Adam beta 2.", ge=0, lt=1)
    max_grad_norm: float = setting(1.0, Effect.SEMANTIC, "Gradient-norm clip; 0 switches it off.", ge=0)
    max_length: int = setting(1024, Effect.SEMANTIC, "Longest example in tokens; longer ones are left out, counted.")
    lora: LoRASettings | None = setting(None, Effect.SEMANTIC, "Train low-rank adapters instead of all weights.")
    micro_batch_size: int = setting(
        0,
        Effect.NUMERIC,
        "Examples per forward pass and device; 0 takes the whole batch, halved when memory runs out.",
        ge=0,
    )
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", Effect.NUMERIC, "Arithmetic of the forward pass; auto is bfloat16 on a GPU, float32 on the CPU."
    )
    gradient_checkpointing: bool = setting(False, Effect.NUMERIC, "Trade compute for memory.")
    checkpoint_every: int = setting(200, Effect.OPERATIONAL, "Optimizer steps between durable checkpoints.", ge=1)


class SFTSettings(OptimizerSettings):
    """Supervised fine-tuning on weighted, masked token sequences."""

    loss_reduction: Literal["token", "example"] = setting(
        "token", Effect.SEMANTIC, "Average over the learnt tokens of the batch, or first inside each example."
    )


class PreferenceSettings(OptimizerSettings):
    """Learning from pairs against a frozen reference; the losses are spelt out in ``trainers/preference_loss.py``."""

    loss: Literal["sigmoid", "robust", "hinge", "ipo", "sppo"] = setting(
        "sigmoid", Effect.SEMANTIC, "sigmoid is DPO's; a pair's smoothing makes it conservative DPO."
    )
    beta: float = setting(0.1, Effect.SEMANTIC, "Strength of the pull towards the reference.", gt=0)
    nll_weight: float = setting(
        0.0, Effect.SEMANTIC, "Weight of an added negative log-likelihood per chosen token.", ge=0
    )


_KL_REFUSED = {
    "k1_in_loss": "k1 as a loss has an expected gradient of zero: it would regularise nothing",
    "k3_in_loss": "the gradient of k3 as a loss is that of KL(reference || policy), the other direction",
}


class PolicyGradientSettings(OptimizerSettings):
    """REINFORCE and its relatives on the policy's own rollouts.

    ``credit.py`` turns rewards into advantages, ``trainers/policy_gradient_loss.py`` spells out the losses.
    """

    batch_size: int = setting(
        512, Effect.SEMANTIC, "Rollouts of one sampling, over all devices; turns of one count once.", ge=2
    )
    group_size: int = setting(4, Effect.SEMANTIC, "Rollouts of one problem, which are each other's baseline.", ge=1)
    num_iterations: int = setting(1, Effect.SEMANTIC, "Optimizer steps on the rollouts of one sampling.", ge=1)
    advantage: Literal["leave_one_out", "group_normalised", "reward"] = setting(
        "leave_one_out",
        Effect.SEMANTIC,
        "Baseline: mean of the siblings (RLOO), mean and deviation of the group (GRPO), or none (REINFORCE).",
    )
    advantage_scale: Literal["none", "per_attempt"] = setting(
        "none", Effect.SEMANTIC, "per_attempt divides those of an attempt by their deviation, where that is above 1."
    )
    kl: Literal["k1_in_reward", "k2_in_loss"] = setting(
        "k1_in_reward",
        Effect.SEMANTIC,
        "Where the pull towards the reference acts; both follow KL(policy || reference).",
    )
    kl_reduction: Literal["sum", "mean"] = setting(
        "sum", Effect.SEMANTIC, "KL of a turn, or of its mean token, which makes the coefficient depend on lengths."
    )
    loss_reduction: Literal["sequence", "sequence_mean", "token", "constant"] = setting(
        "sequence",
        Effect.SEMANTIC,
        "Sum over the tokens of a row (RLOO), their mean (GRPO), mean over all tokens (DAPO), sum / max_length (Dr. GRPO).",
    )
    ratio: Literal["sequence", "token"] = setting(
        "sequence", Effect.SEMANTIC, "Probability ratio to the sampling policy: of whole rows, or of each token."
    )
    clip_ratio: float | None = setting(
        None, Effect.SEMANTIC, "Clip the ratio to 1 - x … 1 + x, as PPO does; null does not.", gt=0, lt=1
    )
    importance_cap: float | None = setting(
        None,
        Effect.SEMANTIC,
        "Weight each token by min(trainer's / engine's probability, cap); null does not correct their mismatch.",
        gt=0,
    )
    max_mismatch: float = setting(
        0.05, Effect.OPERATIONAL, "Mean |log-probability of trainer - of engine| above which the run says so.", gt=0
    )
    checkpoint_every: int = setting(25, Effect.OPERATIONAL, "Optimizer steps between durable checkpoints.", ge=1)

    @field_validator("kl", mode="before")
    @classmethod
    def _follows_the_right_kl(cls, kl: object) -> object:
        if kl in _KL_REFUSED:
            raise ValueError(f"{_KL_REFUSED[str(kl)]}; take k1_in_reward or k2_in_loss")
        return kl

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.batch_size % self.group_size:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of group_size {self.group_size}")
        if self.group_size == 1 and self.advantage != "reward":
            raise ValueError(f"advantage {self.advantage} compares rollouts of one problem, and group_size is 1")
        return self

    @property
    def problems_per_sampling(self) -> int:
        return self.batch_size // self.group_size


class Part(Record):
    """A class or module-level function and the settings that go with it: what another process can find."""

    path: str  # package.module:name
    settings_path: str  # of their class
    settings: dict[str, object]


ON_POLICY_FILE = "on_policy.json"
"""In a checkpoint of an on-policy job: what its reward function remembers, and the digest of the code that made it."""


class OnPolicyJob(Record):
    """What a policy-gradient trainer needs to make its own rows while it trains."""

    code: str = ""  # digest of the code that makes rows and losses
    tokenizer: str  # model folder with tokenizer and template
    problems: str  # JSON-lines file of Problem
    given: str = ""  # JSON-lines file of Rollout that functions may go on from
    task: Part
    engine: Part
    rollout: Part
    rewards: Part


def experience_path(out_dir: Path, optimizer_step: int) -> Path:
    """Where a job leaves the rollouts of the sampling before ``optimizer_step``: one ``records.Experience`` a line."""
    return out_dir / f"experience-{optimizer_step:08d}.jsonl"


class TrainJob(Record):
    """One training step, complete: a worker needs nothing else.

    ``rows`` are sealed Parquet files of examples, in order. ``out_dir`` is an empty folder of this attempt; the
    trainer writes ``final/`` there, and ``checkpoint-<step>/`` folders on the way. ``resume_from`` is a committed
    checkpoint folder of an earlier attempt of the same step.
    """

    kind: TrainKind
    rows: tuple[str, ...]
    start: Checkpoint
    reference: Checkpoint | None = None
    carry_optimizer: bool = False
    settings: dict[str, object]  # the JSON of the kind's settings class
    num_steps: int
    seed: int
    out_dir: str
    resume_from: str | None = None
    num_processes: int = 1
    sharding: Sharding = "none"
    on_policy: OnPolicyJob | None = None  # instead of rows


class MergeJob(Record):
    """One merge, complete. ``weights`` sum to 1; the model goes into ``final/`` of the empty folder ``out_dir``."""

    models: tuple[Checkpoint, ...]
    weights: tuple[float, ...]
    out_dir: str


class TrainResult(Record):
    """What a finished training step reports. ``metrics`` are means over the last tenth of the steps unless named."""

    num_steps: int
    num_tokens: int  # tokens that carried loss, over all steps
    num_padded_tokens: int  # tokens that went through the forward pass, padding included
    metrics: dict[str, float]
