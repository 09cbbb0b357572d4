"""Small runs and sweeps on the scripted engine, and what they say about themselves."""

from reasonrun.cli.progress import SilentProgress
from reasonrun.ledger.catalogue import read_lines
from reasonrun.recipe import load
from reasonrun.running import RunOptions, run
from reasonrun.sweeping import SweepOptions, expand, run_sweep

SMALL = ["task.num_train=10", "task.num_dev=5", "task.num_test=5", "method.rounds=1", "evaluate.num_samples=2"]
NEVER_RIGHT = ["engine.spread=0", "engine.gain=0"]


class Lines(SilentProgress):
    """What a person would have read."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def sweep(out, *overrides, recipes="smoke_star", interrupted=lambda: 0):
    progress = Lines()
    options = SweepOptions(out=out, interrupted=interrupted)
    return list(run_sweep(expand(recipes, [*SMALL, *overrides]), options, progress)), progress.lines


def alone(directory, *overrides, recipe="smoke_star", donors=()):
    options = RunOptions(directory=directory, donors=tuple(donors))
    return run(load(recipe, [*SMALL, *overrides]), options, SilentProgress())


def notes(directory):
    return [note for path in sorted(directory.glob("attempts/*/notes.jsonl")) for note in read_lines(path)]


def made(directory):
    """Verbs of the steps that the run worked on itself, without those that are taken over."""
    return [note["verb"] for note in notes(directory) if "verb" in note]


def borrowed(directory):
    return {note["step"] for note in notes(directory) if "borrowed_from" in note}
