"""``reasonrun verify``."""

from __future__ import annotations

from pathlib import Path

from reasonrun.cli.main import echo, print_json
from reasonrun.report.run_record import check_is_run
from reasonrun.report.verification import describe_verification, verification_document, verify_run


def verify_command(run: Path, *, deep: bool, as_json: bool) -> int:
    """Show what is damaged. Reads only; never takes the lock. The exit code: 1 where something is damaged, else 0."""
    check_is_run(run, or_its_remains=True)
    verification = verify_run(run, deep=deep)
    if as_json:
        print_json(verification_document(verification))
    else:
        for line in describe_verification(verification):
            echo(line)
    return 1 if verification.damages else 0
