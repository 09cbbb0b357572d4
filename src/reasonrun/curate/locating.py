"""Finding the first wrong step of wrong solutions: one loop over the verbs, shared by the methods that need it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from reasonrun.curate.first_error import judged_errors, probed_errors, probes, programmatic_errors
from reasonrun.curate.judging import ask_judge
from reasonrun.records import Checkpoint, Sampling
from reasonrun.settings import Effect, Settings, setting

if TYPE_CHECKING:
    from reasonrun.lab import Lab
    from reasonrun.samples import GradedSet, PrefixSet


class LocateSettings(Settings):
    """How first wrong steps are found."""

    kind: Literal["mc_rollout", "programmatic", "llm_no_ref", "llm_with_ref"] = setting(
        "mc_rollout",
        Effect.SEMANTIC,
        "mc_rollout: where the policy's own continuations stop ending right. programmatic: by the task's program."
        " llm_no_ref: as a model says. llm_with_ref: as a model says that sees the task's solution.",
    )
    judge: str = setting("policy", Effect.SEMANTIC, "llm_*: role of the model that is asked.", min_length=1)
    neutral_is_error: bool = setting(
        False, Effect.SEMANTIC, "llm_*: take a neutral step for the wrong one, as the released code does."
    )
    verdict_tokens: int = setting(1024, Effect.SEMANTIC, "llm_*: longest verdict, in tokens.", ge=1)
    steps: Literal["labels", "lines", "task"] = setting(
        "labels", Effect.SEMANTIC, "What a step is: Step 1:, Step 2: … at line starts, lines, or the task's own."
    )
    errors_per_problem: int = setting(2, Effect.SEMANTIC, "Wrong solutions of a problem at most; 0 is all.", ge=0)
    num_continuations: int = setting(8, Effect.SEMANTIC, "mc_rollout: continuations of each prefix.", ge=1)
    search: Literal["all", "binary"] = setting(
        "all", Effect.SEMANTIC, "mc_rollout: probe the prefix before every step, or halve."
    )
    temperature: float = setting(0.8, Effect.SEMANTIC, "Of continuations and judges.", ge=0)
    top_p: float = setting(0.95, Effect.SEMANTIC, "Nucleus filter of the same.", gt=0, le=1)

    @property
    def asks_judge(self) -> bool:
        return self.kind.startswith("llm_")

    def needs(self) -> Mapping[str, str]:
        """Capabilities of the task that these settings ask for, each with the setting that does."""
        by_kind = {"programmatic": {"first_error": "kind"}, "llm_with_ref": {"solution": "kind"}}.get(self.kind, {})
        return {**by_kind, **({"segment": "steps"} if self.steps == "task" else {})}


def locate(lab: Lab, policy: Checkpoint, tried: GradedSet, config: LocateSettings, max_new_tokens: int) -> PrefixSet:
    """The prefix of each wrong solution that ends with the label of its first wrong step.

    Args:
        lab: the lab; the steps are named ``locate``, and ``probe-<wave>/…`` or ``ask`` and ``read``.
        policy: the model whose continuations tell (``mc_rollout``).
        tried: graded solutions; the wrong ones are looked into.
        config: how.
        max_new_tokens: what a continuation may take; prefixes that leave less of the context are left out.
    """
    how = {"steps": config.steps, "cap": config.errors_per_problem, "room": max_new_tokens}
    if config.kind == "programmatic":
        return lab.cut(programmatic_errors, tried, name="locate", **how)
    if config.asks_judge:
        judged = ask_judge(
            lab,
            config.judge,
            tried,
            steps=config.steps,
            cap=config.errors_per_problem,
            with_solution=config.kind == "llm_with_ref",
            neutral_is_error=config.neutral_is_error,
            sampling=Sampling(temperature=config.temperature, top_p=config.top_p, max_new_tokens=config.verdict_tokens),
        )
        return lab.cut(judged_errors, tried, judged, name="locate", **how)
    binary = config.search == "binary"
    sampling = Sampling(temperature=config.temperature, top_p=config.top_p, max_new_tokens=max_new_tokens)
    probed: list[GradedSet] = []
    while True:
        name = f"probe-{len(probed) + 1}"
        wanted = lab.cut(probes, tried, *probed, name=f"{name}/prefixes", binary=binary, **how)
        if not len(wanted):
            return lab.cut(probed_errors, tried, *probed, name="locate", binary=binary, **how)
        tries = lab.sample(policy, wanted, n=config.num_continuations, sampling=sampling, name=f"{name}/sample")
        probed.append(lab.grade(tries, name=f"{name}/grade"))
