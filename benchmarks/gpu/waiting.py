"""Where sketching makes the CPU wait for the GPU, and whether its bits repeat, for the 0.5 B shape in bfloat16.

Two readings: PyTorch's sync debug mode as "warn" lists every place, and as "error" it ends the run at the first one,
with the one read that transformers itself makes once a forward pass (are the position ids those of packed
sequences?) taken out. What waits in other packages is counted; a line of this one that waits fails the check.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import gvendi_fast
from benchmarks.gpu.model import make_sketcher, random_ids, random_model
from benchmarks.gpu.timing import Bench, Figure
from gvendi_fast.base.transfer import fetch

PACKAGE = str(Path(gvendi_fast.__file__).parent)


def figures(section: str, bench: Bench) -> list[Figure]:
    """A batch of 16 k tokens, eager and compiled."""
    return [
        Figure(kind, lambda c=kind == "compiled": waiting(bench, c), seconds=120)
        for kind in ("eager", "compiled")
    ]


@contextlib.contextmanager
def sync_debug(mode: str) -> Iterator[None]:
    """PyTorch's sync debug mode inside the block, with nothing under way when it begins."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits(run: Callable[[], object]) -> dict[str, int]:
    """{file:line: times} of where `run` waits; what autograd's thread does counts for the line that called backward."""
    with sync_debug("warn"), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run()
    return dict(Counter(f"{w.filename}:{w.lineno}" for w in seen if "synchronizing" in str(w.message)))


@contextlib.contextmanager
def no_packed_sequences() -> Iterator[None]:
    """transformers without its look at position ids, where it has one: those of a batch are never packed."""
    from transformers import masking_utils

    plain = getattr(masking_utils, "find_packed_sequence_indices", None)
    if plain is None:
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = plain


def waiting(bench: Bench, compiled: bool) -> dict[str, object]:
    """{"waits": {file:line: times}, "own waits", "waits elsewhere", "same bits", "largest error", "check"}.

    The bits are not the package's alone: the backward pass of PyTorch's fused attention may add in any order.
    """
    model = random_model(bench)
    # On the CPU, as the corpus gives batches.
    ids = random_ids(bench, "16k")
    sketcher = make_sketcher(model, compiled)
    # The first batch compiles kernels and copies tables.
    first = sketcher(ids, ids)
    found: dict[str, object] = {"tokens": ids.numel()}
    if bench.device.type == "cuda":
        places = waits(lambda: fetch(sketcher(ids, ids)))
        own = sum(n for place, n in places.items() if place.startswith(PACKAGE))
        found |= {
            "waits": places,
            "own waits": own,
            "waits elsewhere": sum(places.values()) - own,
            "check": f"failed: {own} own waits" if own else "passed",
        }
        try:
            with no_packed_sequences(), sync_debug("error"):
                fetch(sketcher(ids, ids))
        except RuntimeError as error:
            found["first wait"] = str(error).splitlines()[0][:200]
    again = sketcher(ids, ids)
    found["same bits"] = bool(torch.equal(first, again))
    found["largest error"] = float((again - first).abs().max() / first.abs().max())
    return found
