"""Where sketching makes the CPU wait for the GPU, and whether its bits repeat, for the 0.5 B shape in bfloat16.

    python benchmarks/gpu_waiting.py

Two readings: PyTorch's sync debug mode as "warn" lists every place, and as "error" it ends the run at the first one,
with the one read that transformers itself makes once a forward pass (are the position ids those of packed
sequences?) taken out. Exits with 1 where anything outside transformers waits.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from shapes import SHAPES

from gvendi_fast import GradientSketcher, SketchSpec
from gvendi_fast.transfer import fetch

SLICE = SHAPES["qwen2.5-0.5b-slice"].config
QWEN_05B = {**SLICE, "num_hidden_layers": 24}
TINY = {
    **SLICE,
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


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


def waiting(device: torch.device, shape: dict, batch: int, length: int) -> dict[str, object]:
    """{"waits": {file:line: times}, "own waits": how many lie outside transformers, "same bits", "largest error"}.

    The bits are not the package's alone: the backward pass of PyTorch's fused attention may add in any order.
    """
    import transformers

    torch.manual_seed(0)
    with device:
        config = transformers.Qwen2Config(**shape, tie_word_embeddings=True)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    # On the CPU, as the corpus gives batches.
    ids = torch.randint(0, shape["vocab_size"], (batch, length))
    sketcher = GradientSketcher(model, SketchSpec())
    # The first batch compiles kernels and copies tables.
    first = sketcher(ids, ids)
    found: dict[str, object] = {}
    if device.type == "cuda":
        places = waits(lambda: fetch(sketcher(ids, ids)))
        found["waits"] = places
        found["own waits"] = sum(n for place, n in places.items() if "/transformers/" not in place)
        if not found["own waits"]:
            with no_packed_sequences(), sync_debug("error"):
                fetch(sketcher(ids, ids))
    again = sketcher(ids, ids)
    found["same bits"] = bool(torch.equal(first, again))
    found["largest error"] = float((again - first).abs().max() / first.abs().max())
    return found


def main() -> None:
    """Look and print; without a GPU a small model is sketched on the CPU, where nothing can wait."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    found = waiting(device, QWEN_05B, 32, 512) if on_gpu else waiting(device, TINY, 2, 16)
    print(json.dumps({"device": str(device), **found}, indent=1))
    sys.exit(1 if found.get("own waits") else 0)


if __name__ == "__main__":
    main()
