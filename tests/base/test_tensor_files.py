"""Files of means, states and clusters: what was written is what is read."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gvendi_fast import GvendiError, VendiState
from gvendi_fast.clusters import SphericalKMeans
from gvendi_fast.vendi.centered import RowMean, centred_spec

ROWS = torch.nn.functional.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(1)), dim=1)
MADE = {
    "mean": lambda: RowMean(8, {"sketch": {"dim": 8}}).update(ROWS),
    "state": lambda: VendiState(8, {"sketch": {"dim": 8}}).update(ROWS),
    "clusters": lambda: SphericalKMeans(3).fit(ROWS),
}
SETTINGS = {
    "n_clusters": 3,
    "seed": 0,
    "max_iterations": 50,
    "tolerance": 1e-5,
    "iterations": 2,
    "converged": True,
}
# Of which file, what is put in the place of a tensor or a word (None: it is left out).
EDITS = {
    "no sum": ("mean", {"sum": None}),
    "floats": ("mean", {"sum": torch.full((8,), math.nan)}),
    "a table": ("mean", {"sum": torch.ones(2, 4, dtype=torch.int64)}),
    "a number": ("mean", {"sum": torch.tensor(3)}),
    "too long": ("mean", {"sum": torch.full((8,), 2**62)}),
    "the lowest": ("mean", {"sum": torch.full((8,), -(2**63))}),
    "no n": ("mean", {"n": None}),
    "n of text": ("mean", {"n": "abc"}),
    "n below 0": ("mean", {"n": "-5"}),
    "n of 30 digits": ("mean", {"n": "9" * 30}),
    "n of 6,000 digits": ("mean", {"n": "9" * 6000}),
    "fewer rows": ("mean", {"n": "1"}),
    "broken spec": ("mean", {"spec": "{"}),
    "deep spec": ("mean", {"spec": "[" * 100_000}),
    "spec a list": ("mean", {"spec": "[1]"}),
    "NaN": ("state", {"matrix": torch.full((8, 8), math.nan, dtype=torch.float64)}),
    "not square": ("state", {"matrix": torch.zeros(8, 4, dtype=torch.float64)}),
    "not symmetric": ("state", {"matrix": torch.ones(8, 8, dtype=torch.float64).triu() * 2.5}),
    "infinite corner": ("state", {"matrix": torch.eye(8, dtype=torch.float64).fill_diagonal_(math.inf)}),
    "state of more rows": ("state", {"n": "40"}),
    "half precision": ("state", {"matrix": torch.eye(8).half()}),
    "NaN centroid": ("clusters", {"centroids": torch.full((3, 8), math.nan)}),
    "no centroid": ("clusters", {"centroids": torch.zeros(0, 8)}),
    "counts of four": ("clusters", {"counts": torch.ones(4, dtype=torch.int64)}),
    "counts below 0": ("clusters", {"counts": torch.tensor([-1, 20, 1])}),
    "long sums": ("clusters", {"sums": torch.full((3, 8), 2**50)}),
    "cosines": ("clusters", {"cosines": torch.tensor(2**60)}),
    "settings a list": ("clusters", {"settings": "[]"}),
    "settings of text": ("clusters", {"settings": json.dumps(SETTINGS | {"tolerance": "0"})}),
    "settings lacking one": ("clusters", {"settings": "{}"}),
}


def edit(path, changes):
    """The file with these changes, as an earlier version wrote it: without a digest."""
    with safe_open(path, framework="pt") as file:
        words = file.metadata()
    tensors = load_file(path)
    words.pop("digest", None)
    for name, value in changes.items():
        into = tensors if name in tensors else words
        if value is None:
            del into[name]
        else:
            into[name] = value
    save_file(tensors, path, words)


@pytest.mark.parametrize("name", EDITS)
def test_what_its_writer_never_writes_is_refused(tmp_path, name):
    kind, changes = EDITS[name]
    made, path = MADE[kind](), tmp_path / "file"
    made.save(path)
    edit(path, {})
    type(made).load(path)
    edit(path, changes)
    with pytest.raises(GvendiError, match=r"file is damaged or was edited \(.*\); wanted a file written by"):
        type(made).load(path)


@pytest.mark.parametrize("kind", MADE)
def test_every_byte_counts(tmp_path, kind):
    made, path = MADE[kind](), tmp_path / "file"
    made.save(path)
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(GvendiError):
            type(made).load(path)


def test_a_mean_of_another_width_is_named_though_it_says_nothing_of_its_sketches():
    with pytest.raises(GvendiError, match="the mean has dim 8 and the pool dim 16"):
        centred_spec({"sketch": {"dim": 16}}, RowMean(8).update(ROWS), 16)
    with pytest.raises(GvendiError, match="the mean holds no rows"):
        centred_spec(None, RowMean(16), 16)
