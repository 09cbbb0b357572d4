"""No training: the base policy on one split. What ``reasonrun eval`` runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from reasonrun.contracts import Method
from reasonrun.judging import unread_findings
from reasonrun.records import Checkpoint
from reasonrun.settings import Effect, setting
from reasonrun.settings import Settings as SettingsBase
from reasonrun.training import TrainKind

if TYPE_CHECKING:
    from reasonrun.lab import Lab


class Measure(Method):
    """Evaluates the base policy as the recipe's ``evaluate`` says and returns it."""

    trains: ClassVar[tuple[TrainKind, ...]] = ()

    class Settings(SettingsBase):
        """Recipe fields of ``method: measure``."""

        name: Literal["measure"] = "measure"
        split: Literal["train", "dev", "test"] = setting("test", Effect.SEMANTIC, "The split to measure on.")
        max_new_tokens: int = setting(256, Effect.SEMANTIC, "Longest completion in tokens.", ge=1)

    def run(self, lab: Lab) -> Checkpoint:
        lab.evaluate(lab.base, split=self.config.split)
        return lab.base

    def findings(self, lab: Lab) -> list[str]:
        """Most judgements of a judge could not be read."""
        tables = lab.evaluations[-1].metrics.get("judging", {})
        return [f"{part}: {line}" for part, table in tables.items() for line in unread_findings(table)]
