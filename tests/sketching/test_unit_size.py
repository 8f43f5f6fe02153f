"""How a new run's corpus is cut into work units, and what is said of it."""

import pytest

from gvendi_fast.base.engine import LocalEngine
from gvendi_fast.base.progress import Silent
from gvendi_fast.data.unit_cuts import Cut
from gvendi_fast.sketching import unit_size
from gvendi_fast.sketching.corpus import Settings
from gvendi_fast.sketching.proxy.load import load_proxy


class Noting(Silent):
    """Keeps what a run says."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def proxy():
    return load_proxy("tiny", dtype="float32")


# Of a corpus of 100 kB: of how many bytes a slow core does a minute's work, the tokens a second that are measured, and
# the cut.
@pytest.mark.parametrize(
    ("minute", "rate", "cut", "is_said"),
    [
        (200_000, 60.0, Cut(unit_size.ROWS), False),
        (50_000, 60.0, Cut(unit_size.MOST_ROWS, 1 << 14), True),
        (50_000, 1e4, Cut(unit_size.MOST_ROWS, 1 << 21), False),
        (50_000, None, Cut(unit_size.ROWS), False),
    ],
    ids=["too small to ask", "many units", "less than one unit", "no row to measure"],
)
def test_a_minute_is_spoken_of_where_the_corpus_takes_longer(
    tmp_path, monkeypatch, proxy, minute, rate, cut, is_said
):
    path, progress = tmp_path / "a.jsonl", Noting()
    path.write_bytes(b"\n" * 100_000)
    parameters = sum(p.numel() for p in proxy.model.parameters())
    flops = minute * 4 * parameters / unit_size.BYTES_A_TOKEN / unit_size.WORTH_S
    monkeypatch.setattr(unit_size, "FLOPS_A_SECOND", flops)
    monkeypatch.setattr(unit_size, "_rate", lambda *_: rate)
    arguments = (lambda **_: None, proxy, None, None, Settings(), LocalEngine(), progress)
    run = tmp_path / "run"
    assert unit_size.choose_cut(path, run, *arguments) == cut
    assert any("about a minute" in note for note in progress.notes) is is_said
    # What was measured once holds, whatever the rate is now.
    monkeypatch.setattr(unit_size, "_rate", lambda *_: 1.0)
    if cut.bytes is not None:
        assert unit_size.choose_cut(path, run, *arguments) == cut


def test_the_demo_is_too_small_to_ask(tmp_path, proxy):
    (tmp_path / "a.jsonl").write_bytes(b"\n" * 110_000)
    run, progress = tmp_path / "run", Noting()
    arguments = (None, proxy, None, None, Settings(), LocalEngine(), progress)
    assert unit_size.choose_cut(tmp_path / "a.jsonl", run, *arguments) == Cut(unit_size.ROWS)
    assert not progress.notes
    assert not run.exists()
