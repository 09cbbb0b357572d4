"""Finding right steps for wrong ones: continuations of an error's prefix, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from reasonrun.curate.pairs import step_ends
from reasonrun.records import Checkpoint, Sampling
from reasonrun.settings import Effect, Settings, setting

if TYPE_CHECKING:
    from reasonrun.lab import Lab
    from reasonrun.samples import GradedSet, PrefixSet


class RectifySettings(Settings):
    """How right steps are found for the wrong ones."""

    num_samples: int = setting(20, Effect.SEMANTIC, "Continuations of each error's prefix.", ge=1)
    temperature: float = setting(0.8, Effect.SEMANTIC, "Sampling temperature, of a teacher too.", gt=0)
    top_p: float = setting(0.95, Effect.SEMANTIC, "Nucleus filter; 1 is off.", gt=0, le=1)
    pairs_per_error: int = setting(
        4, Effect.SEMANTIC, "Most pairs of one wrong step after one prefix; 0 is no cap.", ge=0
    )
    check: Literal["none", "continuations", "program"] = setting(
        "none",
        Effect.SEMANTIC,
        "How winning steps are checked, because a right answer can follow a wrong step: by continuations of both steps, or"
        " by the task's program.",
    )
    check_continuations: int = setting(8, Effect.SEMANTIC, "check=continuations: after each of the steps.", ge=1)
    min_gain: float = setting(
        0.0,
        Effect.SEMANTIC,
        "check=continuations: by how much the winning step's success must exceed the wrong one's.",
        ge=0,
        lt=1,
    )

    @model_validator(mode="after")
    def _gain_is_measured(self) -> Self:
        if self.min_gain and self.check != "continuations":
            raise ValueError("min_gain is what check=continuations measures; set both or neither")
        return self

    def needs(self) -> Mapping[str, str]:
        """Capabilities of the task that these settings ask for, each with the setting that does."""
        return {"first_error": "check"} if self.check == "program" else {}


def rectify(
    lab: Lab,
    policy: Checkpoint,
    tried: GradedSet,
    prefixes: PrefixSet,
    config: RectifySettings,
    sampling: Sampling,
    steps: str,
) -> list[GradedSet]:
    """Graded continuations of the prefixes, then, if they are asked for, of the winning and wrong steps.

    The steps are named ``rectify``, ``grade-rectified``, ``step-ends``, ``check`` and ``grade-checked``.
    """
    continuations = lab.sample(policy, prefixes, n=config.num_samples, sampling=sampling, name="rectify")
    rectified = lab.grade(continuations, name="grade-rectified")
    if config.check != "continuations":
        return [rectified]
    ends = lab.cut(step_ends, tried, rectified, name="step-ends", steps=steps, room=sampling.max_new_tokens)
    tries = lab.sample(policy, ends, n=config.check_continuations, sampling=sampling, name="check")
    return [rectified, lab.grade(tries, name="grade-checked")]
