"""The batches of a training run under a small frozen model, so that figures are comparable over time and between runs.

A hook reads what the trained model is given; nothing of its forward or backward is touched. Samples are told apart as
the model tells them (rows, or position_ids that begin again), and where the two models' tokenizers differ, a sample's
supervised and unsupervised stretches are written out and read again, each by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import nn

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.batch_memory import sketch_batch
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher, Sketches
from gvendi_fast.sketching.proxy.encode import IGNORED, Sample, batches

# Padded tokens of a pass of the proxy, and the longest sample, cut behind; a training batch is about as large.
TOKENS_AT_ONCE, LONGEST = 4096, 4096


@dataclass
class _Text:
    """One sample of a training batch: token ids, which are supervised, and its tag."""

    ids: list[int]
    supervised: list[bool]
    tag: int | None


@dataclass(eq=False)
class ProxyBatches:
    """Reads a model's batches and sketches them by a frozen proxy; attach, take and detach as a tap does.

    model: the one that is trained. sketcher: of the frozen one.
    proxy_tokenizer, tokenizer: of the frozen and of the trained model; with one of them None, or with one vocabulary,
        the proxy gets the ids as they are.
    tag: the argument of the model's forward that holds the samples' sources, None where there is none.
    """

    model: nn.Module
    sketcher: GradientSketcher
    proxy_tokenizer: Any = None
    tokenizer: Any = None
    tag: str | None = None
    is_attached: bool = field(default=False, init=False)
    _texts: list[_Text] = field(default_factory=list, init=False)
    _handle: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        given = (self.proxy_tokenizer, self.tokenizer)
        self._reads_again = None not in given and given[0].get_vocab() != given[1].get_vocab()
        self._vocabulary = self.sketcher.model.get_input_embeddings().weight.shape[0]

    def attach(self) -> None:
        """Read every batch that the model is given with gradients on, from now on."""
        self.detach()
        # Before the hook that takes the tags out.
        self._handle = self.model.register_forward_pre_hook(self._read, prepend=True, with_kwargs=True)
        self.is_attached = True

    def detach(self) -> None:
        """Leave the model alone, and forget what was read."""
        if self._handle is not None:
            self._handle.remove()
        self._handle, self._texts, self.is_attached = None, [], False

    def take(self) -> Sketches:
        """The sketches of what was read since the last take, in its order; samples without a target have z = 0."""
        texts, self._texts = self._texts, []
        samples = [self._sample(place, text) for place, text in enumerate(texts)]
        scored = [sample for sample in samples if sample.supervised]
        z = torch.zeros(len(texts), self.sketcher.spec.dim, dtype=torch.float32)
        loss, tokens = (
            torch.zeros(len(texts), dtype=torch.float32),
            torch.zeros(len(texts), dtype=torch.int64),
        )
        # A tokenizer without a padding token pads with any id: the mask says where.
        for batch in batches(scored, TOKENS_AT_ONCE):
            found = sketch_batch(self.sketcher, batch, 0)
            places = torch.tensor([sample.row for sample in batch])
            z[places], loss[places], tokens[places] = found.z.cpu(), found.loss.cpu(), found.tokens.cpu()
        tags = None if any(text.tag is None for text in texts) else torch.tensor([text.tag for text in texts])
        return _with_tags(Sketches(z, loss, tokens), tags)

    def _read(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not isinstance(ids, torch.Tensor):
            raise GvendiError(
                "proxy: the model's forward has no input_ids, from which the proxy would read the batch; give it "
                "input_ids, or leave proxy out to tap the model itself"
            )
        labels, mask, positions, tags = (
            value.cpu() if isinstance(value := kwargs.get(name), torch.Tensor) else None
            for name in ("labels", "attention_mask", "position_ids", self.tag)
        )
        ids = ids.detach().cpu()
        labels = ids if labels is None else labels
        for row in range(len(ids)):
            real = np.arange(ids.shape[1]) if mask is None else np.flatnonzero(mask[row].numpy())
            at = None if positions is None else positions[row % len(positions)].numpy()[real]
            starts = [0] if at is None else [0, *(np.flatnonzero(at[1:] <= at[:-1]) + 1)]
            for start, end in zip(starts, [*starts[1:], len(real)], strict=True):
                places = torch.from_numpy(real[start:end])
                if len(places):
                    self._texts.append(
                        _text(ids[row, places], labels[row, places], tags, row, int(places[0]))
                    )

    def _sample(self, place: int, text: _Text) -> Sample:
        ids, supervised = self._read_again(text) if self._reads_again else (text.ids, text.supervised)
        if ids and max(ids) >= self._vocabulary:
            raise GvendiError(
                f"proxy: the batch has token {max(ids)}, but the proxy's vocabulary has {self._vocabulary}; give "
                "processing_class (the trained model's tokenizer) to the trainer, and the proxy with its own"
            )
        ids, supervised = ids[:LONGEST], [False, *supervised[1:LONGEST]]
        labels = np.where(supervised[: len(ids)], ids, IGNORED).astype(np.int32)
        return Sample(place, str(place), "", "batch", place, np.asarray(ids, np.int32), labels)

    def _read_again(self, text: _Text) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        supervised: list[bool] = []
        for is_target, run in groupby(zip(text.ids, text.supervised, strict=True), key=lambda pair: pair[1]):
            words = self.tokenizer.decode([token for token, _ in run], skip_special_tokens=True)
            new = self.proxy_tokenizer(words, add_special_tokens=False)["input_ids"]
            ids += new
            supervised += [is_target] * len(new)
        return ids, supervised


def _text(ids: torch.Tensor, labels: torch.Tensor, tags: torch.Tensor | None, row: int, first: int) -> _Text:
    tag = None if tags is None else int(tags[row] if tags.dim() == 1 else tags[row, first])
    return _Text(ids.tolist(), (labels != IGNORED).tolist(), tag)


def _with_tags(sketches: Sketches, tags: torch.Tensor | None) -> Sketches:
    return sketches if tags is None else Sketches(sketches.z, sketches.loss, sketches.tokens, None, tags)
