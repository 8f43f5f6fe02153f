"""Rows that pass by get the sketches that a run directory would have."""

import pyarrow as pa
import pytest
import torch

import gvendi_fast
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.engines import SketchActor
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.corpus import Settings

ROWS = [
    *({"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}, as ever."} for i in range(9)),
    {"prompt": "no answer", "completion": None},
]
SETTINGS = Settings(spec=SketchSpec(dim=64), batch_tokens=256)


def test_a_table_gets_the_sketches_of_a_run_directory_and_why_a_row_has_none(tmp_path):
    actor = SketchActor("tiny", SETTINGS, "z", dtype="float32")
    table = actor(pa.Table.from_pylist(ROWS))
    assert table.column_names == ["prompt", "completion", "z", "z_rejected"]
    assert table.column("z").type == pa.list_(pa.float32(), 64)
    reasons = table.column("z_rejected").to_pylist()
    assert reasons[:-1] == [None] * 9
    assert "completion" in reasons[-1]
    z = torch.tensor(table.column("z").to_pylist())
    assert not z[-1].any()
    proxy = gvendi_fast.load_proxy("tiny", dtype="float32")
    with pytest.warns(match="rows"):
        run = gvendi_fast.sketch(ROWS, out=tmp_path / "run", proxy=proxy, settings=SETTINGS)
    (part,) = run.iterate()
    torch.testing.assert_close(z[:-1], torch.as_tensor(part.sketches))
    assert actor(pa.Table.from_pylist(ROWS).slice(0, 0)).num_rows == 0
    # As Ray gives them without a batch_format, and rows that went by before.
    with pytest.raises(GvendiError, match=r"is a dict, .* batch_format='pyarrow'"):
        actor({"prompt": ["a"], "completion": ["b"]})
    with pytest.raises(GvendiError, match="have a column 'z' already; drop it"):
        actor(table)
    with pytest.raises(GvendiError, match="have a column 'z_rejected' already; drop it"):
        actor(table.drop_columns("z"))


def test_what_needs_the_whole_corpus_is_refused():
    with pytest.raises(GvendiError, match="auto_dim"):
        SketchActor("tiny", Settings(auto_dim=True))
