"""A sweep: every combination of the given recipes and values, each an ordinary run, sharing the steps they can."""

from __future__ import annotations

import shlex
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from reasonrun.correction import overall
from reasonrun.errors import Finding, ReasonrunError, RecipeError, Stopped
from reasonrun.ledger.catalogue import read_lines
from reasonrun.ledger.files import Files, encode_json
from reasonrun.recipe import ResolvedRecipe, load
from reasonrun.recipe_errors import COMMAND_LINE, Problem, RecipeProblems
from reasonrun.recipe_sweep import values
from reasonrun.recipe_values import leaves
from reasonrun.records import digest
from reasonrun.running import RunOptions, run
from reasonrun.settings import Effect
from reasonrun.verbs.context import Progress

SUMMARIES = "summaries"
HELD_OUT_KEYS = ("num_pairs", "reward_margin", "pair_accuracy", "reference_logp_per_token")


@dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One run of a sweep.

    ``given`` is the recipe as the command line names it, ``swept`` what this run has where the others have other
    values, ``differences`` the same in all fields of the resolved recipes, by dotted path.
    """

    recipe: ResolvedRecipe
    given: str
    overrides: tuple[str, ...]
    swept: Mapping[str, str]
    differences: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its folder in the sweep's."""
        return f"{self.recipe.name}-{self.recipe.slug}" if self.recipe.slug else self.recipe.name

    @property
    def arm(self) -> str:
        """What it shares with the runs that differ in their seed alone."""
        return " ".join([self.recipe.name, *(f"{key}={value}" for key, value in self.swept.items() if key != "seed")])

    def command(self, out: Path) -> str:
        """The command that continues this run alone."""
        return shlex.join(["reasonrun", "train", self.given, *self.overrides, "--run", str(out / self.name)])


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Where a sweep lives and how it stops; see ``RunOptions``."""

    out: Path
    command: str = "reasonrun sweep"
    interrupted: Callable[[], int] = lambda: 0


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How one run ended; ``message`` says what a person is told unless all went well."""

    exit_code: int
    message: str = ""
    evidence: Mapping[str, int | float] | None = None
    result: Mapping[str, Any] | None = None
    already_finished: bool = False


def expand(recipes: str, overrides: Sequence[str]) -> list[SweepRun]:
    """All runs of a sweep, in the order in which they are made: every arm with the first seed, then with the next.

    Args:
        recipes: a recipe, or several with commas between them.
        overrides: ``key=value`` texts; a value may be several.

    Raises:
        RecipeProblems: all mistakes of all runs, or two runs that are one.
    """
    given = [recipes] if Path(recipes).is_file() else [name for name in recipes.split(",") if name]
    choices = [values(text) for text in overrides]
    loaded: list[tuple[str, tuple[str, ...], ResolvedRecipe]] = []
    problems: list[Problem] = []
    for name, chosen in product(given, product(*choices)):
        try:
            loaded.append((name, chosen, load(name, chosen)))
        except RecipeProblems as error:
            problems += error.problems
        except RecipeError as error:
            problems.append(Problem(file=f"{COMMAND_LINE}: {name}", path="", message=str(error)))
    if problems or not loaded:
        raise RecipeProblems(problems or [Problem(file=f"{COMMAND_LINE}: {recipes}", path="", message="no recipe")])
    several = {number for number, texts in enumerate(choices) if len(texts) > 1}
    flat = [_flat(recipe) for _, _, recipe in loaded]
    runs = [
        SweepRun(
            recipe=recipe,
            given=name,
            overrides=chosen,
            swept=dict(_key_value(text) for number, text in enumerate(chosen) if number in several),
            differences={path: value for path, value in own.items() if any(o.get(path) != value for o in flat)},
        )
        for (name, chosen, recipe), own in zip(loaded, flat, strict=True)
    ]
    _refuse_twins(runs)
    seeds = list(dict.fromkeys(one.recipe.seed for one in runs))
    return sorted(runs, key=lambda one: seeds.index(one.recipe.seed))


def _key_value(text: str) -> tuple[str, str]:
    key, _, value = text.lstrip("+").partition("=")
    return key, value


def _flat(recipe: ResolvedRecipe) -> dict[str, Any]:
    return {".".join(str(part) for part in path): value for path, value in leaves(recipe.resolved)}


def _experiment(recipe: ResolvedRecipe) -> dict[str, Any]:
    free = {path for path, effect in recipe.effects.items() if effect in (Effect.NUMERIC, Effect.OPERATIONAL)}
    return {path: value for path, value in _flat(recipe).items() if path not in {*free, "seed"}}


def _refuse_twins(runs: Sequence[SweepRun]) -> None:
    seen: dict[str, SweepRun] = {}
    problems = []
    for one in runs:
        first = seen.setdefault(one.name, one)
        if first is not one:
            place = f"{COMMAND_LINE}: {' '.join([one.given, *one.overrides])}"
            message = f"another run of the sweep is the same experiment or has the same name, {one.name}"
            problems.append(Problem(file=place, path="", message=message))
    if problems:
        raise RecipeProblems(problems)


def sweep_directory(runs: Sequence[SweepRun]) -> Path:
    """``runs/sweep-<recipe>-<digest>``; the digest leaves seeds out, so that more of them go into the same folder."""
    arms = sorted({digest([one.recipe.name, _experiment(one.recipe)]) for one in runs})
    return Path("runs") / f"sweep-{runs[0].recipe.name}-{digest(arms)[:8]}"


def run_sweep(runs: Sequence[SweepRun], options: SweepOptions, progress: Progress) -> Iterator[dict[str, Any]]:
    """Make the runs, one after another, and yield the summary of each once it is on disk.

    What is finished is skipped, what was interrupted goes on; a finding or a failure ends one run, not the sweep.

    Raises:
        Stopped: a signal arrived; the same command continues.
    """
    files = Files()
    for number, one in enumerate(runs):
        progress.say(f"[{number + 1}/{len(runs)}] {one.name}")
        ending = _make(one, options, progress)
        summary = summarise(one, options.out, ending, number)
        data = encode_json(summary, indent=1, sort_keys=True) + b"\n"
        files.write_atomic(options.out / SUMMARIES / f"{one.name}.json", data, "json")
        progress.say(f"[{number + 1}/{len(runs)}] {one.name}: {_described(ending)}")
        yield summary


def _make(one: SweepRun, options: SweepOptions, progress: Progress) -> Ending:
    """The one place where the failure of a run is recorded instead of ending everything."""
    run_options = RunOptions(
        directory=options.out / one.name,
        command=options.command,
        donors=tuple(sorted(path.parent for path in options.out.glob("*/run.json"))),
        interrupted=options.interrupted,
    )
    try:
        _check_stop(options)
        outcome = run(one.recipe, run_options, progress)
    except Stopped:
        raise
    except Finding as finding:
        return Ending(exit_code=finding.exit_code, message=str(finding), evidence=finding.evidence)
    except ReasonrunError as error:
        return Ending(exit_code=error.exit_code, message=str(error))
    except Exception:  # a bug, perhaps in somebody's own task, is no reason to lose the other arms
        return Ending(exit_code=1, message=traceback.format_exc())
    return Ending(exit_code=0, result=outcome.result, already_finished=outcome.already_finished)


def _check_stop(options: SweepOptions) -> None:
    exit_code = options.interrupted()
    if exit_code:
        raise Stopped(
            f"stopped; what is committed in {options.out} is safe",
            exit_code=exit_code,
            hint="the same command continues this sweep",
        )


def _described(ending: Ending) -> str:
    if ending.exit_code:
        kind = "finding" if ending.exit_code == Finding.exit_code else f"failed (exit {ending.exit_code})"
        return f"{kind}: {ending.message}"
    said = [f"; finding: {finding}" for finding in (ending.result or {}).get("findings", ())]
    return ("finished before" if ending.already_finished else "done") + "".join(said)


def sweep_exit_code(summaries: Sequence[Mapping[str, Any]]) -> int:
    """0 when every run is done and none has a finding; 1 when one failed; else 5, as of a single run."""
    codes = {summary["exit_code"] for summary in summaries}
    codes |= {Finding.exit_code for summary in summaries if summary.get("findings")}
    if codes <= {0}:
        return 0
    return Finding.exit_code if codes <= {0, Finding.exit_code} else 1


def summarise(one: SweepRun, out: Path, ending: Ending, position: int) -> dict[str, Any]:
    """The numbers of a run that the table and its readers need.

    Args:
        one: the run.
        out: folder of the sweep.
        ending: how the run ended.
        position: its place in the sweep, so that the table can be printed from the summaries alone.
    """
    directory = out / one.name
    rows = read_lines(directory / "metrics.jsonl")
    notes = [note for path in sorted(directory.glob("attempts/*/notes.jsonl")) for note in read_lines(path)]
    result = dict(ending.result or {})
    trained = [row for row in rows if row["verb"] == "train"]
    held_out = [row for row in rows if row["verb"] == "evaluate_pairs" and row["num_pairs"]]
    return {
        "run": one.name,
        "command": one.command(out),
        "position": position,
        "arm": one.arm,
        "recipe": one.recipe.name,
        "seed": one.recipe.seed,
        "differences": dict(one.differences),
        "exit_code": ending.exit_code,
        "message": ending.message,
        "evidence": dict(ending.evidence or {}),
        "dev": [_headline(row) for row in rows if row["verb"] == "evaluate" and row["split"] == "dev"],
        "test": result.get("test") or _measured(result),
        "selected_by": result.get("selected_by"),
        "nominees": result.get("nominees", {}),
        "findings": result.get("findings", []),
        "train_metrics": _train_metrics(trained[-1]) if trained else {},
        "held_out_pairs": {key: held_out[-1][key] for key in HELD_OUT_KEYS} if held_out else {},
        "num_optimizer_steps": sum(row["num_steps"] for row in trained),
        "num_generated_tokens": sum(row.get("num_completion_tokens", 0) for row in rows),
        "num_steps": len(rows),
        "num_borrowed_steps": len({note["step"] for note in notes if "borrowed_from" in note}),
        "seconds": round(sum(note.get("seconds", 0.0) for note in notes), 3),
    }


def _measured(result: Mapping[str, Any]) -> dict[str, Any]:
    """A method that trains nothing ends with one measurement, of its last and only policy."""
    parts = {part: result[part] for part in ("greedy", "sampled", "correction", "judging") if part in result}
    return {"last": parts} if parts else {}


def _headline(row: Mapping[str, Any]) -> dict[str, Any]:
    parts = {part: row[part]["accuracy"] for part in ("greedy", "sampled") if part in row}
    changes = {part: overall(section) for part, section in row.get("correction", {}).items()}
    last = {f"{part}_last_attempt": change["accuracy_last"] for part, change in changes.items()}
    judged = {
        f"{part}_pearson": table["pearson"]["value"]
        for part, table in row.get("judging", {}).items()
        if "pearson" in table
    }
    return {"step": row["step"], **parts, **last, **judged}


def _train_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """What the trainer measured at the end: no counts, nothing of the first step, no setting."""
    return {
        key: value
        for key, value in row.items()
        if isinstance(value, float) and not key.startswith(("num_", "first_")) and key != "lr"
    }
