"""Batches that fit: a token budget from a GPU's free memory, and halves where a batch runs out of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from gvendi_fast.errors import GvendiError
from gvendi_fast.gradients import GradientSketcher, Sketches
from gvendi_fast.text import Sample, collate

CPU_BATCH_TOKENS = 2048
# Tokens of the trial batch, and the share of the free memory that batches may take: attention and the allocator's
# fragments grow with the batch in ways that one trial does not show.
TRIAL_TOKENS = 1024
MEMORY_SHARE = 0.6
MOST_BATCH_TOKENS = 1 << 17
_warned = False


def choose_batch_tokens(sketcher: GradientSketcher, asked: int | None) -> int:
    """The token budget of a batch: what was asked for, 2048 on a CPU, or what fits into a GPU's free memory.

    On a GPU one trial batch says how many bytes a token takes; the budget is 60 % of the free memory over that,
    at most 131,072, rounded down to a power of two so that it does not change with small differences.
    """
    device = next(sketcher.model.parameters()).device
    if asked is not None:
        return asked
    if device.type != "cuda":
        return CPU_BATCH_TOKENS
    ids = torch.ones(1, TRIAL_TOKENS, dtype=torch.int64)
    positions = getattr(sketcher.model.config, "max_position_embeddings", TRIAL_TOKENS)
    if positions < TRIAL_TOKENS:
        ids = ids.view(TRIAL_TOKENS // (positions // 2), -1)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    sketcher(ids, ids)
    taken = torch.cuda.max_memory_allocated(device) - before
    free, _ = torch.cuda.mem_get_info(device)
    fitting = int(MEMORY_SHARE * free / max(taken / ids.numel(), 1))
    return max(TRIAL_TOKENS, min(MOST_BATCH_TOKENS, 1 << (max(fitting, 1).bit_length() - 1)))


def sketch_batch(sketcher: GradientSketcher, batch: Sequence[Sample], pad_id: int) -> Sketches:
    """Sketch samples as one batch, or, where a GPU has too little memory for it, as halves (said once).

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
    return Sketches(*(torch.cat([getattr(h, name) for h in halves]) for name in ("z", "loss", "tokens")))
