"""Where the samples of a training batch begin and end, read from the arguments of the model's forward.

A row of a batch is one sample, or holds several: packed into it, or a whole batch flattened into one row without
padding. Trainers say so by positions that begin anew, by cumulative lengths, by numbers of samples in a mask or by an
index. Values are read on the CPU: on a GPU a packed batch waits for what was queued before it, once a forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gvendi_fast.base.errors import GvendiError

# What trainers call the cumulative lengths [S + 1] of the samples of a flattened batch.
CUMULATIVE = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens_q", "cu_seqlens")
# The number of each token's sample in its row, [B, T], as state-space models take it.
INDEX = "seq_idx"


@dataclass(frozen=True)
class Samples:
    """The S samples of a batch of B rows of T positions.

    segments: int64 [S, 2] on the CPU, each sample's positions (begin, end) in the flattened batch.
    shape: (B, T).
    is_packed: whether a row may hold several; otherwise sample i is row i, whole.
    """

    segments: Tensor
    shape: tuple[int, int]
    is_packed: bool

    def __len__(self) -> int:
        return len(self.segments)

    def owners(self) -> Tensor:
        """int64 [B, T] on the CPU: the number of each token's sample, S for a token of none."""
        marks = torch.full((math.prod(self.shape),), len(self))
        lengths = self.segments[:, 1] - self.segments[:, 0]
        places = torch.cat([torch.arange(*segment) for segment in self.segments.tolist()])
        marks[places] = torch.arange(len(self)).repeat_interleave(lengths)
        return marks.view(self.shape)

    def at_first_tokens(self, values: Tensor) -> Tensor:
        """What values [B] or [B, T] hold for each sample, [S] on the CPU: of its row, or at its first token."""
        values = values.detach().cpu()
        begins = self.segments[:, 0]
        return values.reshape(-1)[begins] if values.dim() > 1 else values[begins // self.shape[1]]

    def targets(self, labels: Tensor) -> Tensor:
        """int64 [S] on the device of labels [B, T] (not shifted): supervised tokens that a sample's own predict."""
        is_target = labels.reshape(-1) != -100
        before = torch.cat([is_target.new_zeros(1, dtype=torch.int64), is_target.cumsum(0)])
        begins, ends = self.segments.to(labels.device).unbind(1)
        # The first token of a sample is nobody's target.
        return before[ends] - before[torch.minimum(begins + 1, ends)]


def whole_rows(rows: int, length: int) -> Samples:
    """A batch in which every row is one sample."""
    begins = torch.arange(rows) * length
    return Samples(torch.stack([begins, begins + length], dim=1), (rows, length), False)


def given_samples(segments: Any, rows: int, length: int) -> Samples:
    """Samples as a user's own function gives them: [S, 2] of positions in the flattened batch.

    Raises GvendiError for what is no such list: out of range, empty, or with samples that overlap or are unordered.
    """
    try:
        given = torch.as_tensor(segments).detach().cpu()
    except (RuntimeError, TypeError, ValueError):
        given = torch.empty(0)
    found = given.to(torch.int64).contiguous()
    ok = not given.is_floating_point() and given.dim() == 2 and given.shape[1] == 2 and len(given) > 0
    if ok:
        begins, ends = found.unbind(1)
        ok = bool((begins < ends).all() and begins[0] >= 0 and ends[-1] <= rows * length)
        ok = ok and bool((begins[1:] >= ends[:-1]).all())
    if not ok:
        raise GvendiError(
            f"samples= gave {type(segments).__name__} {tuple(found.shape)} for a batch of {rows} x {length} tokens; "
            "wanted (begin, end) of every sample, [S, 2], in order and apart, each 0 <= begin < end <= "
            f"{rows * length} in the flattened batch"
        )
    begins = torch.arange(rows) * length
    is_whole = torch.equal(found, torch.stack([begins, begins + length], dim=1))
    return Samples(found, (rows, length), not is_whole)


def find_samples(arguments: Mapping[str, Any], rows: int, length: int) -> Samples:
    """The samples of a batch of `rows` x `length` tokens by the arguments of the model's forward."""
    for name in CUMULATIVE:
        given = arguments.get(name)
        if isinstance(given, Tensor) and given.dim() == 1 and len(given) > 1:
            return _by_lengths(name, given, rows, length)
    mask, index = arguments.get("attention_mask"), arguments.get(INDEX)
    real = None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == (rows, length):
        mask = mask.detach().cpu()
        real = mask != 0
        if not mask.dtype.is_floating_point and bool((mask > 1).any()):
            return _by_starts(_changes(mask) & real, real, rows, length)
    if isinstance(index, Tensor) and index.shape == (rows, length):
        return _by_starts(_changes(index.detach().cpu()), real, rows, length)
    positions = _text_positions(arguments.get("position_ids"), length)
    if positions is None:
        return whole_rows(rows, length)
    return _by_starts(_resets(positions, real), real, rows, length, True)


def _text_positions(given: Any, length: int) -> Tensor | None:
    """Positions int64 [1 or B, T] of the text on the CPU; None where there are none."""
    if not isinstance(given, Tensor) or not 1 <= given.dim() <= 3 or given.shape[-1] != length:
        return None
    # Multimodal models have several kinds of positions, [3 or 4, B, T]: the first one is of text or of time.
    positions = given[0] if given.dim() == 3 else given
    return positions.detach().cpu().reshape(-1, length)


def _resets(positions: Tensor, real: Tensor | None) -> Tensor:
    """Whether a sample begins at a token inside its row, bool [1 or B, T]: where positions begin anew."""
    begins = torch.zeros_like(positions, dtype=torch.bool)
    begins[:, 1:] = (positions[:, 1:] < positions[:, :-1]) | (positions[:, 1:] == 0)
    if real is None:
        return begins
    # Padding on the left has positions of its own, of no meaning.
    between = torch.zeros_like(real)
    between[:, 1:] = real[:, 1:] & real[:, :-1]
    return begins & between


def _changes(numbers: Tensor) -> Tensor:
    begins = torch.zeros_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    return begins


def _by_starts(
    begins: Tensor, real: Tensor | None, rows: int, length: int, positions: bool = False
) -> Samples:
    """Samples that begin at the first token of every row and where `begins` says so.

    positions: by positions that begin anew. Padding on the left of several rows has positions 0, 0, ..., too.
    """
    begins = begins.expand(rows, length).clone()
    if not bool(begins.any()):
        return whole_rows(rows, length)
    begins[:, 0] = True
    first = begins.reshape(-1).nonzero()[:, 0]
    ends = torch.cat([first[1:], torch.tensor([rows * length])])
    segments = torch.stack([first, ends], dim=1)
    if positions and rows > 1:
        segments = segments[~_leading(segments, length)]
        lone = segments[:, 0] // length
        is_one_a_row = len(segments) == rows and torch.equal(lone, torch.arange(rows))
        if is_one_a_row and bool((segments[:, 1] % length == 0).all()):
            return whole_rows(rows, length)
    return _without_padding(segments, real, rows, length)


def _leading(segments: Tensor, length: int) -> Tensor:
    """Which samples are of one token and at the begin of a row, after none but such: padding on the left."""
    found, at = [], 0
    for begin, end in segments.tolist():
        at = begin if begin % length == 0 else at
        found.append(begin == at and end == begin + 1 and end % length != 0)
        at = end if found[-1] else -1
    return torch.tensor(found, dtype=torch.bool)


def _by_lengths(name: str, given: Tensor, rows: int, length: int) -> Samples:
    ends = given.detach().cpu().to(torch.int64)
    if int(ends[0]) != 0 or bool((ends[1:] < ends[:-1]).any()) or int(ends[-1]) > rows * length:
        raise GvendiError(
            f"{name} is no list of cumulative lengths of a batch of {rows} x {length} tokens: it must begin with 0, "
            f"not fall, and end at {rows * length} or before; it ends at {int(ends[-1])}"
        )
    segments = torch.stack([ends[:-1], ends[1:]], dim=1)
    return _without_padding(segments[segments[:, 0] < segments[:, 1]], None, rows, length)


def _without_padding(segments: Tensor, real: Tensor | None, rows: int, length: int) -> Samples:
    """Samples without those that are padding.

    That is a sample of masked tokens alone, and at the end of a row a sample of one token, as a collator makes of every
    token by which it pads a row to a multiple of something: a token by itself predicts nothing.
    """
    begins, ends = segments.unbind(1)
    if real is not None:
        flat = torch.cat([torch.zeros(1, dtype=torch.int64), real.reshape(-1).cumsum(0)])
        segments = segments[flat[ends] > flat[begins]]
    else:
        is_one = ((ends - begins) == 1).tolist()
        is_last = (ends % length == 0).tolist()
        kept, in_tail = [], False
        for i in range(len(segments) - 1, -1, -1):
            in_tail = is_one[i] and (in_tail or is_last[i])
            if not in_tail:
                kept.append(i)
        segments = segments[kept[::-1]] if kept else segments
    return Samples(segments.contiguous(), (rows, length), True)
