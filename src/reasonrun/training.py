"""What a trainer is asked and what it answers. Settings live here so that methods name them and trainers read them."""

from __future__ import annotations

from typing import Literal

from reasonrun.records import Checkpoint, Record
from reasonrun.settings import Effect, Settings, setting

TrainKind = Literal["sft", "preference", "policy_gradient", "scalar"]


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


class TrainResult(Record):
    """What a finished training step reports. ``metrics`` are means over the last tenth of the steps unless named."""

    num_steps: int
    num_tokens: int  # tokens that carried loss, over all steps
    num_padded_tokens: int  # tokens that went through the forward pass, padding included
    metrics: dict[str, float]
