"""A batch before it goes to the model: what follows from its labels and its mask, computed on the CPU.

Reading a value from a tensor on a GPU waits for all work queued there. What the package needs to know of a batch (which
positions predict a supervised token, how many, where a sample begins and ends, on which side the padding is) follows
from its input alone, so it is computed here, before anything is queued.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.checks import check_tensor
from gvendi_fast.sketching.proxy.encode import IGNORED


@dataclass(frozen=True)
class Batch:
    """B samples of T positions, every tensor on the CPU.

    ids: int64 [B, T].
    targets: int64 [B, T], the supervised token that a position predicts, -100 if there is none.
    mask: [B, T], or None if all padding is on the right, where a causal model cannot look.
    positions: int64 [B, T].
    segments: int64 [B, 2], each sample's positions from its first token to its last target, in the flattened batch.
    rows: int64 [R], the positions in the flattened batch that have a target, in order.
    labels: int64 [R], those targets.
    tokens: int64 [B], how many of the R are each sample's.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor | None
    positions: torch.Tensor
    segments: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor
    tokens: torch.Tensor

    @property
    def target_segments(self) -> torch.Tensor:
        """int64 [B, 2]: each sample's entries of `rows`."""
        ends = self.tokens.cumsum(0)
        return torch.stack([ends - self.tokens, ends], dim=1)


def on_cpu(
    input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """These tensors on the CPU, contiguous; GvendiError for what is no ordinary tensor."""
    given = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
    for name, x in given.items():
        if x is not None or name != "attention_mask":
            check_tensor(name, x)
    # A batch that is cut out of a wider one would be compiled anew for its stride.
    return [None if x is None else x.cpu().contiguous() for x in given.values()]


def prepare(ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None, vocabulary: int) -> Batch:
    """The batch of ids, labels (not shifted) and mask [B, T] on the CPU; raises GvendiError as `sketch` says."""
    mask = torch.ones_like(ids) if mask is None else mask
    _check(ids, labels, mask, vocabulary)
    # Position t predicts token t + 1, both real: left padding must not predict a sample's first token.
    targets = torch.full_like(labels, IGNORED)
    targets[:, :-1] = labels[:, 1:].where((mask[:, 1:] != 0) & (mask[:, :-1] != 0), IGNORED)
    flat = targets.reshape(-1)
    rows = (flat != IGNORED).nonzero()[:, 0]
    tokens = (targets != IGNORED).sum(dim=1)
    if bool((tokens == 0).any()):
        raise GvendiError(
            f"labels[{int((tokens == 0).nonzero()[0])}] has no supervised token that a causal LM predicts "
            "(labels other than -100 after the first position); drop the sample"
        )
    right_padded = bool((mask[:, 1:] <= mask[:, :-1]).all())
    return Batch(
        ids=ids,
        targets=targets,
        mask=None if right_padded else mask,
        positions=(mask.long().cumsum(dim=1) - 1).clamp(min=0),
        segments=_live_rows(mask, targets),
        rows=rows,
        labels=flat[rows],
        tokens=tokens,
    )


def _check(ids: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, vocabulary: int) -> None:
    for name, x in (("input_ids", ids), ("labels", labels), ("attention_mask", mask)):
        if x.dim() != 2 or x.shape != ids.shape:
            raise GvendiError(f"{name} must have shape [B, T] = {tuple(ids.shape)}, got {tuple(x.shape)}")
        if x.numel() == 0:
            raise GvendiError(f"{name} is empty, {tuple(x.shape)}; wanted at least one sample and one token")
        if name != "attention_mask" and x.dtype != torch.int64:
            raise GvendiError(f"{name} must be int64, got {x.dtype}; call .long()")
    for name, x in (("input_ids", ids), ("labels", labels[labels != IGNORED])):
        if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < vocabulary:
            raise GvendiError(
                f"{name} must lie in 0..{vocabulary - 1}, got {int(x.min())}..{int(x.max())}; "
                "use the tokenizer that belongs to the model"
            )


def _live_rows(mask: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    length = mask.shape[1]
    place = torch.arange(length)
    first = torch.where(mask != 0, place, length).amin(dim=1)
    last = torch.where(targets != IGNORED, place + 1, 0).amax(dim=1)
    starts = torch.arange(mask.shape[0]) * length
    return torch.stack([starts + torch.minimum(first, last), starts + last], dim=1)
