"""A wrong argument of the public API is refused by name, and never taken for another value."""

import numpy as np
import pytest
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.clusters.kmeans import SphericalKMeans
from gvendi_fast.vendi import VendiState
from gvendi_fast.vendi.centered import RowMean, centered, centered_blocks
from gvendi_fast.vendi.centered_pool import CenteredPool

ROWS = torch.eye(3, 4)


@pytest.mark.parametrize("value", [2.5, 2.0, "2", True, None, 0, -1, [2]])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (RowMean, "dim"),
        (VendiState, "dim"),
        (SphericalKMeans, "n_clusters"),
        (lambda value: SphericalKMeans(2, max_iterations=value), "max_iterations"),
    ],
)
def test_a_number_that_is_not_whole_is_refused(make, name, value):
    if name == "n_clusters" and value is None:
        assert make(value).n_clusters is None
        return
    with pytest.raises(GvendiError, match=f"^{name} is "):
        make(value)


def test_whole_numbers_of_any_library_are_taken():
    for value in (2, np.int64(2), torch.tensor(2)):
        assert RowMean(value).dim == VendiState(value).dim == SphericalKMeans(value).n_clusters == 2
    with pytest.raises(GvendiError, match=r"^seed is .*; wanted an integer"):
        SphericalKMeans(2, seed=1.5)


@pytest.mark.parametrize("mean", ["mean.safetensors", None, ROWS[0]])
@pytest.mark.parametrize("call", [centered, centered_blocks])
def test_a_mean_that_is_none_is_refused(call, mean):
    with pytest.raises(GvendiError, match=r"wanted a RowMean: RowMean.load\(path\) reads a saved one"):
        call(ROWS, mean)
    if mean is not None:
        with pytest.raises(GvendiError, match="wanted a RowMean"):
            CenteredPool(ROWS, mean)


@pytest.mark.parametrize("kind", [VendiState, RowMean, SphericalKMeans])
def test_a_file_that_is_missing_is_named_with_its_writer(kind, tmp_path):
    for path, what in ((tmp_path / "absent", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(
            GvendiError, match=f"'{path}' {what}; wanted a file written by {kind.__name__}.save"
        ):
            kind.load(path)
