"""Seeds and uniforms as pure functions of names, so that no result depends on the order of work."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed from named parts: ``derive_seed(run_seed, "round-001/sample", problem_id)``."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def row_seed(request_seed: int, index: int) -> int:
    """The seed of sample ``index`` of a request."""
    return derive_seed("row", request_seed, index)


def uniforms(row_seeds_B: npt.NDArray[np.uint64], position: int) -> npt.NDArray[np.float64]:
    """One uniform in [0, 1) per row for the token at ``position``: splitmix64 (Steele et al. 2014) of seed + position.

    Args:
        row_seeds_B: seeds, one per row.
        position: index of the token in the completion, from 0.
    """
    import numpy as np

    with np.errstate(over="ignore"):
        state = row_seeds_B + np.uint64(_GOLDEN) * np.uint64(position + 1)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(_MIX_1)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(_MIX_2)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
