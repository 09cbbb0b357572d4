"""Where superseded and damaged files go. Nothing is deleted on resume."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from reasonrun.ledger.files import Files


class Quarantine:
    """Numbered folders under ``quarantine/``; inside one, paths are relative to the run directory."""

    def __init__(self, run_path: Path, files: Files) -> None:
        self._run_path, self._files = run_path, files
        self.path = run_path / "quarantine"

    def new_folder(self) -> Path:
        """A number that is not taken yet; the folder appears with its first file."""
        return self.path / str(next_number(self.path))

    def set_aside(self, paths: Iterable[Path], folder: Path | None = None) -> None:
        """Move files and folders of the run here, in the given order."""
        folder = folder or self.new_folder()
        for path in paths:
            self._files.point("set_aside.before_rename")
            self._files.move(path, folder / path.relative_to(self._run_path))
            self._files.point("set_aside.after_rename")


def next_number(folder: Path) -> int:
    """One more than the largest number that names something in ``folder``, from 1."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return 1 + max((int(name) for name in names if name.isdigit()), default=0)
