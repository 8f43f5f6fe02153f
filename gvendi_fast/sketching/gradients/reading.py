"""How a model reads a batch of two samples: what it looks up, whether it looks ahead, and positions and padding.

The two samples differ in their last token alone. What a causal model says at earlier positions is then the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.undoing import undoing
from gvendi_fast.sketching.gradients.taps import EMBEDDING, Layout, Tap

SAMPLES, LENGTH, PADDING = 2, 5, 2
# Of the largest logit: two evaluations in a number format differ by a few of its roundings, two texts by far more.
SAME = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Reading:
    """What a small batch showed.

    shared: names of embeddings that are not looked up once for every token of the batch, as positions that all samples
        share, or that are read in another way.
    numbers_positions: positions are numbered in a way of the model's own, so that none may be given.
    takes_positions: positions may be given at all.
    reads_padding: a sample that is padded on the left is read as another one.
    """

    shared: frozenset[str]
    numbers_positions: bool
    takes_positions: bool
    reads_padding: bool


class _Lookups(TorchFunctionMode):
    """Sees how the weights of embeddings are used. names: {id of a weight: name}.

    start: of the input's own embedding, None where it is not sketched; ids: of the batch, which it looks up in order.
    """

    def __init__(self, names: Mapping[int, str], start: Tap | None, ids: Tensor) -> None:
        super().__init__()
        self.names: Mapping[int, str] = names
        self.shared: set[str] = set()
        self.start, self.ids, self._is_inside = start, ids, False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a forward pass, whose gradient is not taken."""

        def enter(*_: Any) -> None:
            self._is_inside = True

        def leave(*_: Any) -> None:
            self._is_inside = False

        with undoing() as undo, torch.no_grad(), self:
            if self.start is not None:
                undo.append(self.start.module.register_forward_pre_hook(enter).remove)
                undo.append(self.start.module.register_forward_hook(leave).remove)
            yield

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is nn.functional.embedding and self._is_inside:
            self._check_order(*args[:2], **{n: x for n, x in kwargs.items() if n in ("input", "weight")})
        for x in (*args, *kwargs.values()):
            name = self.names.get(id(x))
            if name is None or not isinstance(out, Tensor) or func is nn.functional.linear:
                continue
            is_lookup = func is nn.functional.embedding
            ids = (args[0] if args else kwargs["input"]) if is_lookup else None
            is_batch = ids is not None and ids.numel() == SAMPLES * LENGTH
            if not is_batch or (ids.dim() > 1 and len(ids) != SAMPLES):
                self.shared.add(name)
        return out

    def _check_order(self, input: Tensor, weight: Tensor) -> None:
        """GvendiError where the input's own embedding looks up other ids than the batch's, or in another order."""
        own = self.start.module.weight
        if weight is own and not torch.equal(input.reshape(-1).to(self.ids), self.ids.reshape(-1)):
            raise GvendiError(
                f"the input's embedding {self.start.weight!r} is looked up by other ids than the batch's, or in "
                "another order, so its gradient cannot be split by sample; leave it out with "
                f"exclude=[{self.start.weight!r}]"
            )


def other_embeddings(model: nn.Module, layout: Layout) -> dict[str, nn.Parameter]:
    """{name: weight} of the embeddings that a layout taps, without that of the input."""
    own = model.get_input_embeddings().weight
    taps = [tap for tap in layout.taps if tap.kind == EMBEDDING and tap.weight]
    return {tap.weight: tap.module.weight for tap in taps if tap.module.weight is not own}


def start_of(model: nn.Module, layout: Layout) -> Tap | None:
    """The tap of the input's embedding, None where it is not sketched."""
    own = model.get_input_embeddings()
    return next((t for t in layout.taps if t.module is own and t.kind == EMBEDDING and t.weight), None)


def read(
    model: nn.Module, core: nn.Module, embeddings: Mapping[str, nn.Parameter], start: Tap | None = None
) -> Reading:
    """Let a model read; `core` is the part that a pass runs, `embeddings` {name: weight}, without the input's.

    start: of the input's embedding, as `start_of` gives it. Raises GvendiError where that looks up in another order.
    Raises GvendiError for a model whose output at a position depends on later tokens.
    """
    weight = model.get_input_embeddings().weight
    vocabulary = weight.shape[0]
    ids = (torch.arange(1, 1 + LENGTH, device=weight.device) % vocabulary).repeat(SAMPLES, 1)
    ids[1, -1] = (ids[1, -1] + 1) % vocabulary
    takes = inspect.signature(core.forward).parameters
    takes_positions = "position_ids" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
    positions = torch.arange(LENGTH, device=ids.device).repeat(SAMPLES, 1)
    names = {id(p): name for name, p in embeddings.items()}
    mode = _Lookups(names, start, ids)
    with mode.watching():
        plain = _output(core(input_ids=ids, use_cache=False))
    looks_ahead = vocabulary > 1 and not _same(plain[0, :-1], plain[1, :-1])
    if looks_ahead:
        # A model that differs from run to run says nothing of its tokens; the self-check finds it.
        with torch.no_grad():
            looks_ahead = _same(_output(core(input_ids=ids, use_cache=False)), plain)
    if looks_ahead:
        raise GvendiError(
            f"{type(model).__name__} is no causal language model as it is configured: what it says at a position "
            "depends on later tokens, so the loss of a text is not that of predicting it; give a causal model "
            "(is_decoder=True for an encoder's architecture)"
        )
    numbers_positions = False
    if "position_ids" in takes:
        with_positions = _Lookups(names, start, ids)
        with with_positions.watching():
            numbers_positions = not _same(
                _output(core(input_ids=ids, position_ids=positions, use_cache=False)), plain
            )
        # A pass gives them where that is the same, for then every sample looks up its own.
        mode = mode if numbers_positions else with_positions
    if "attention_mask" not in takes or numbers_positions:
        return Reading(frozenset(mode.shared), numbers_positions, takes_positions, True)
    padded, mask = (torch.cat([x.new_zeros(SAMPLES, PADDING), x], dim=1) for x in (ids, torch.ones_like(ids)))
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    # Some read a sample by itself without its mask (Mamba 2 of transformers 4).
    same = True
    with torch.no_grad():
        for count in (SAMPLES, 1):
            inputs = {"input_ids": padded, "attention_mask": mask}
            if takes_positions:
                inputs["position_ids"] = places
            left = _output(core(**{name: x[:count] for name, x in inputs.items()}, use_cache=False))
            same = same and _same(left[:, PADDING:], plain[:count])
    return Reading(frozenset(mode.shared), False, takes_positions, not same)


def _output(result: Any) -> Tensor:
    logits = getattr(result, "logits", None)
    return logits if logits is not None else result.last_hidden_state


def _same(x: Tensor, y: Tensor) -> bool:
    return float((x - y).abs().max()) <= SAME[x.dtype] * float(y.abs().max())
