"""Cases of kernels that run slowly without a GPU: which of them are run every day."""

from collections.abc import Callable, Sequence

import pytest
import torch


def cases(
    shapes: Sequence[tuple], dtypes: Sequence[torch.dtype], is_slow: Callable[[tuple], bool]
) -> pytest.MarkDecorator:
    """Parameters `shape` and `dtype`, each with each; slow shapes in float32 alone every day, in the others in soak."""
    return pytest.mark.parametrize(
        ("shape", "dtype"),
        [
            pytest.param(
                shape,
                dtype,
                id="-".join(map(str, (*shape, dtype))).replace("torch.", ""),
                marks=pytest.mark.soak if dtype != torch.float32 and is_slow(shape) else (),
            )
            for shape in shapes
            for dtype in dtypes
        ],
    )
