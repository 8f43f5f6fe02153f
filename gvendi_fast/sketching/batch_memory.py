"""Batches that fit: a token budget from a GPU's free memory, and halves where a batch runs out of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.proxy.encode import Sample, collate
from gvendi_fast.sketching.proxy.text_config import positions_of

if TYPE_CHECKING:
    from gvendi_fast.sketching.gradients.sketcher import GradientSketcher, Sketches

CPU_BATCH_TOKENS = 2048
# Tokens of the trial batches and of each of their rows, of which there are at least two: one alone is not compiled. The
# last two say what a token takes: from 4096 on the head's chunk of logits (`head_chunk_rows`) grows no more.
TRIALS = (1024, 4096, 8192)
TRIAL_LENGTH = 512
# Share of the free memory that batches may take: padding, attention and the allocator's fragments grow with the batch
# in ways that two trials do not show.
MEMORY_SHARE = 0.6
MOST_BATCH_TOKENS = 1 << 17
_warned = False


class GpuMemory:
    """Reads a CUDA device's memory, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def peak_of(self, run: Callable[[], object]) -> int:
        """The most that `run` has allocated at once, above what was allocated before it."""
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        return torch.cuda.max_memory_allocated(self.device) - before

    def free(self) -> int:
        """What the device has free, and what PyTorch holds of it without using it."""
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + held


def choose_batch_tokens(
    sketcher: GradientSketcher, asked: int | None, memory: GpuMemory | None = None
) -> int:
    """The token budget of a batch: the one given, else 2048 on a CPU, or what fits into a GPU's free memory.

    On a GPU trial batches of 4096 and 8192 tokens measure the memory of a token and of every batch (the head's chunk
    of logits, workspaces); see `fitting_tokens`. If they do not fit, the largest batch that did is the budget, from
    1024 tokens on. memory: read in place of the GPU's own. Raises GvendiError if 1024 tokens do not fit.
    """
    device = next(sketcher.model.parameters()).device
    if asked is not None:
        return asked
    if memory is None:
        if device.type != "cuda":
            return CPU_BATCH_TOKENS
        memory = GpuMemory(device)
    positions = positions_of(sketcher.model.config) or TRIAL_LENGTH
    length = min(TRIAL_LENGTH, positions)
    found: list[tuple[int, int]] = []
    for tokens in TRIALS:
        batch = torch.ones(-(-tokens // length), length, dtype=torch.int64)
        try:
            if not found:
                # The first batch compiles kernels and copies tables, whose memory is not that of a batch.
                sketcher(batch, batch)
            found.append((batch.numel(), memory.peak_of(lambda batch=batch: sketcher(batch, batch))))
        except torch.OutOfMemoryError as error:
            if not found:
                raise GvendiError(
                    f"a batch of {batch.numel()} tokens does not fit into the GPU's memory; give a smaller "
                    "--batch-tokens and --max-tokens, or a smaller proxy"
                ) from error
            break
    if len(found) == len(TRIALS):
        return fitting_tokens(found[-2:], memory.free())
    # Outside the except clause, so that the failed batch's tensors are free.
    torch.cuda.empty_cache()
    return found[-1][0]


def fitting_tokens(trials: Sequence[tuple[int, int]], free: int) -> int:
    """The largest power of two of tokens whose batch takes at most 60 % of `free` bytes, from 1024 to 131,072.

    trials: (tokens, bytes) of a small and a large batch. A batch of t tokens takes fixed + slope t, the line through
    both; a fixed part below zero counts as none, and where the large batch took no more than the small one, its
    bytes a token are the slope. A power of two does not change with small differences.
    """
    (few, less), (many, more) = trials
    slope = (more - less) / (many - few)
    fixed = max(less - slope * few, 0)
    if slope <= 0:
        slope, fixed = max(more, 1) / many, 0
    fitting = int((MEMORY_SHARE * free - fixed) / slope)
    return max(TRIALS[0], min(MOST_BATCH_TOKENS, 1 << (max(fitting, 1).bit_length() - 1)))


def sketch_batch(sketcher: GradientSketcher, batch: Sequence[Sample], pad_id: int) -> Sketches:
    """Sketch samples as one batch, or in halves if a GPU has too little memory for it (with one note).

    Raises GvendiError when a single sample does not fit.
    """
    global _warned
    try:
        return sketcher.sketch(*collate(batch, pad_id))
    except torch.OutOfMemoryError as error:
        if len(batch) == 1:
            raise GvendiError(
                f"a sample of {batch[0].length} tokens ({batch[0].file}:{batch[0].line}) does not fit into the "
                "GPU's memory; give a smaller --max-tokens"
            ) from error
    # Outside the except clause, so that the failed batch's tensors are free.
    torch.cuda.empty_cache()
    if not _warned:
        _warned = True
        warnings.warn(
            f"a batch of {len(batch)} samples ran out of GPU memory and is halved; a smaller --batch-tokens "
            "avoids this",
            RuntimeWarning,
            stacklevel=2,
        )
    middle = len(batch) // 2
    halves = [sketch_batch(sketcher, part, pad_id) for part in (batch[:middle], batch[middle:])]
    parts = {field.name: [getattr(half, field.name) for half in halves] for field in fields(halves[0])}
    joined = {name: torch.cat(values) for name, values in parts.items() if values[0] is not None}
    return replace(halves[0], **joined)
