"""Progress stands below the rooms that show it: choosing and clustering rows load no model code."""

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hangs import HANG_S

from gvendi_fast.base.progress import Lines, Silent, progress_for


@pytest.mark.parametrize("room", ["gvendi_fast.selection", "gvendi_fast.clusters.kmeans"])
def test_rooms_that_show_progress_load_no_model_code(room):
    code = f"import sys, {room}; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert room in out
    heavy = {"transformers", "rich"} | {
        f"gvendi_fast.{x}" for x in ("sketching", "proxy", "gradients", "text")
    }
    assert heavy.isdisjoint(out)


def test_a_pipe_gets_lines_and_silence_has_the_same_methods():
    stream = io.StringIO()
    lines = progress_for(stream, "choosing")
    assert isinstance(lines, Lines)
    for progress in (lines, Silent()):
        progress.start(10, 4)
        progress.advance(6, 120, 1)
        progress.note("a word")
        progress.close()
    said = stream.getvalue().splitlines()
    assert said[:2] == ["choosing 10 rows, 4 of them are done already", "a word"]
    assert said[2].startswith("10/10 rows, ")
    assert said[2].endswith(", 1 rejected in this run")
    assert len(said) == 3


def test_a_run_that_was_done_before_says_so():
    stream = io.StringIO()
    lines = Lines(stream)
    lines.start(10, 10)
    lines.close()
    assert stream.getvalue().splitlines()[-1] == "10/10 rows, nothing is left to do"
    # Rows are left, or were done now.
    for done, fresh in ((9, 0), (9, 1)):
        lines.start(10, done)
        lines.advance(fresh, 0, 0)
        assert "nothing is left" not in lines.counts.rates()


def test_threads_that_report_together_lose_no_row():
    stream = io.StringIO()
    lines = Lines(stream)
    lines.start(4000, 0)
    with ThreadPoolExecutor(4) as pool:
        for result in [pool.submit(lines.advance, 1, 2, 1) for _ in range(4000)]:
            result.result(HANG_S)
    assert (lines.counts.rows, lines.counts.tokens, lines.counts.rejected) == (4000, 8000, 4000)
