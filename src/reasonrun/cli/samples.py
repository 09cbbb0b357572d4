"""``reasonrun samples``."""

from __future__ import annotations

from pathlib import Path

from reasonrun.cli.main import echo, print_json
from reasonrun.report.rollout_text import describe_page, describe_rollout, page_document
from reasonrun.report.rollouts import RolloutFilters, read_rollouts
from reasonrun.report.run_record import open_run


def samples_command(run: Path, filters: RolloutFilters, *, with_prompt: bool, as_json: bool) -> None:
    """Show rollouts with their verdicts. Reads only; never takes the lock."""
    record = open_run(run)
    page = read_rollouts(record, filters)
    if as_json:
        print_json(page_document(record, page, with_prompt=with_prompt))
        return
    for shown in page.shown:
        for line in describe_rollout(shown, with_prompt=with_prompt):
            echo(line)
        echo("")
    for line in describe_page(record, page):
        echo(line)
