"""What a tap reads of a training batch: its tokens, the tags of its samples, and what the head is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.gradients.boundaries import Samples


def tokens_of(arguments: Mapping[str, Any]) -> Tensor:
    """input_ids [B, T], or inputs_embeds [B, T, d]."""
    for name, axes in (("input_ids", 2), ("inputs_embeds", 3)):
        given = arguments.get(name)
        if isinstance(given, Tensor):
            if given.dim() == axes and given.numel():
                return given
            raise GvendiError(
                f"{name} of shape {tuple(given.shape)} cannot be told apart by sample; wanted {axes} axes, [B, T"
                f"{', d' if axes == 3 else ''}], with at least one token"
            )
    raise GvendiError(
        "the tapped model was called without input_ids and inputs_embeds, so its samples are not known; pass one "
        "of them"
    )


def checked_tags(name: str, tags: Any, samples: Samples) -> Tensor:
    """The tag of every sample, int64 [S] on the CPU, of what the batch has under this name."""
    rows, length = samples.shape
    if (
        not isinstance(tags, Tensor)
        or tags.is_floating_point()
        or tuple(tags.shape) not in ((rows,), (rows, length))
    ):
        what = f"{tags.dtype} {tuple(tags.shape)}" if isinstance(tags, Tensor) else type(tags).__name__
        raise GvendiError(
            f"{name!r}, the tag of the batch, is {what}; wanted whole numbers, [{rows}] of the rows or [{rows}, "
            f"{length}] of the tokens"
        )
    return samples.at_first_tokens(tags).to(torch.int64)


def kept_positions(arguments: Mapping[str, Any], length: int, samples: Samples) -> Tensor | None:
    """Positions of a row, int64 in order on the CPU, that the head is asked for; None for all, or if rows are whole."""
    given = next(
        (arguments[name] for name in ("logits_to_keep", "num_logits_to_keep") if name in arguments), None
    )
    if given is None or not samples.is_packed:
        return None
    if not isinstance(given, Tensor):
        return torch.arange(length)[-int(given) :] if given else None
    kept = torch.arange(length)[given.detach().cpu()]
    if kept.dim() != 1 or bool((kept[1:] <= kept[:-1]).any()):
        raise GvendiError(
            "logits_to_keep picks positions out of order, or one twice, in rows of packed samples, so whose tokens the "
            "head sees is not known; give them in order"
        )
    return kept
