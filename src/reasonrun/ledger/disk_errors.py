"""What the operating system says about files, in words with a next step."""

from __future__ import annotations

import errno
from pathlib import Path

from reasonrun.errors import EnvironmentProblem, ReasonrunError, RunFailed

NO_LINKS = frozenset(
    {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
)
"""Answers of a disk that makes no hard link where a copy may still succeed."""


def explained(error: OSError, path: Path) -> ReasonrunError:
    """The error that a user sees instead of ``error``, which happened at ``path``."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return EnvironmentProblem(
            f"No space left while writing {path}: {reason}. Nothing that was committed is damaged.",
            hint=f"free space on the disk that holds {path.parent}; the same command then continues",
        )
    if error.errno == errno.EIO:
        return RunFailed(
            f"The disk failed while accessing {path}: {reason}.",
            hint="check the disk; what is committed is verified when the same command continues",
        )
    return EnvironmentProblem(f"Cannot access {path}: {reason}.", hint="check that the path exists and is writable")
