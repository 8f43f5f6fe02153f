"""The most that a G-Vendi can be, min(n, K), and scores so near to it that they say little."""

from __future__ import annotations

from gvendi_fast.kernels.sketch_matrix import MAX_DIM

# A score of at least this share of its most is close to what any diverse data scores.
NEAR_MOST = 0.9


def near_most(value: float, n: int, dim: int) -> bool:
    """Whether a G-Vendi of n rows is so near to min(n, K), its most, that it says little."""
    return value >= NEAR_MOST * min(n, dim)


def what_can_tell(n: int, dim: int) -> str:
    """What would show how diverse data are of which n different rows score near their most, as "only ... can tell"."""
    if n > dim:
        return "only a larger --dim can tell" if dim < MAX_DIM else "no --dim is large enough to tell"
    if 2 * n <= dim:
        return "only more rows can tell"
    # Twice the rows would be near K.
    more = "only more rows and a larger --dim can tell"
    return more if dim < MAX_DIM else "no --dim is large enough for the rows that could tell"
