"""Whether the samples of a packed row attend to one another, found by a small forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from gvendi_fast.base.undoing import undoing
from gvendi_fast.sketching.gradients.boundaries import CUMULATIVE, INDEX, Samples

# Tokens of each of the two samples that the trial reads, at most.
TOKENS = 8
_LONGEST = ("max_length_q", "max_length_k")


def attends_across(
    model: nn.Module, core: nn.Module, arguments: Mapping[str, Any], samples: Samples
) -> bool | None:
    """Whether a sample's hidden states change with the tokens of the sample before it in its row.

    The first two samples of a row, cut to 8 tokens each, are read twice, with other tokens in the first, in eval mode
    without gradients and without the hooks of others; arguments as the step gave them. No random number is drawn, and
    the model is as it was.
    None where it is not tried: weights are sharded, so that every rank would have to read along, or no row holds two.
    """
    ids = arguments.get("input_ids")
    pair = _pair(samples)
    if pair is None or not isinstance(ids, Tensor) or _is_sharded(model):
        return None
    segments = [(begin, min(end, begin + TOKENS)) for begin, end in pair]
    lengths = [end - begin for begin, end in segments]
    taken = torch.cat([torch.arange(begin, end) for begin, end in segments]).to(ids.device)
    call = _cut(arguments, taken, lengths, samples.shape)
    other = dict(call)
    other["input_ids"] = call["input_ids"].clone()
    vocabulary = model.get_input_embeddings().weight.shape[0]
    other["input_ids"][:, : lengths[0]] = (other["input_ids"][:, : lengths[0]] + 1) % vocabulary
    with undoing() as undo, torch.no_grad():
        for module in core.modules():
            own = module.__dict__
            for name, value in (("training", False), ("_forward_hooks", {}), ("_forward_pre_hooks", {})):
                undo.append(partial(own.__setitem__, name, own[name]))
                own[name] = value
        before, after = (core(**given)[0][:, lengths[0] :] for given in (call, other))
    return not torch.equal(before, after)


def _pair(samples: Samples) -> list[tuple[int, int]] | None:
    """The first two samples that lie in one row, one after the other."""
    length = samples.shape[1]
    all_of = [tuple(segment) for segment in samples.segments.tolist()]
    for first, second in pairwise(all_of):
        if first[0] // length == second[0] // length:
            return [first, second]
    return None


def _is_sharded(model: nn.Module) -> bool:
    return any(type(p) is not nn.Parameter and hasattr(p, "full_tensor") for p in model.parameters())


def _cut(
    arguments: Mapping[str, Any], taken: Tensor, lengths: list[int], shape: tuple[int, int]
) -> dict[str, Any]:
    """The arguments of a forward pass over some tokens of the flattened batch, which become one row."""
    ends = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=taken.device)
    # With a cache some models keep samples apart, without one others do.
    cut: dict[str, Any] = {name: arguments[name] for name in ("use_cache",) if name in arguments}
    for name in ("input_ids", "position_ids", "attention_mask", INDEX):
        given = arguments.get(name)
        if not isinstance(given, Tensor) or given.shape[-1] != shape[1]:
            continue
        if given.dim() == 3:
            cut[name] = given.expand(len(given), *shape).flatten(1)[:, taken][:, None]
        elif given.dim() <= 2:
            cut[name] = given.expand(shape).flatten()[taken][None]
    cut |= {name: ends for name in arguments if name in (*CUMULATIVE, "cu_seq_lens_k", "cu_seqlens_k")}
    return cut | {name: max(lengths) for name in _LONGEST if name in arguments}
