"""Rows that candidates have become -> unit sketches, in batches that depend on the rows of the block alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gvendi_fast.base.unit_length import has_direction, refused_gradient
from gvendi_fast.data.rows import Fields, Rejected, parse_row
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.batch_memory import sketch_batch
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.proxy.encode import Encoder, Sample, batches
from gvendi_fast.sketching.proxy.load import Proxy, load_proxy
from gvendi_fast.synthesis.config.config import ProxyConfig


def load_sketcher(given: ProxyConfig) -> tuple[Proxy, GradientSketcher]:
    """The proxy and its sketcher."""
    attention = None if given.attention == "auto" else given.attention
    proxy = load_proxy(given.name, dtype=given.dtype, attention=attention)
    spec = SketchSpec(dim=given.dim, kind=given.sketch, seed=given.seed)
    return proxy, GradientSketcher(proxy.model, spec, exclude=tuple(given.exclude))


class CandidateSketcher:
    """max_tokens, mask: as the pool was read with. batch_tokens: of one batch, padding included."""

    def __init__(
        self, proxy: Proxy, sketcher: GradientSketcher, max_tokens: int, mask: str, batch_tokens: int
    ) -> None:
        self.sketcher, self.batch_tokens = sketcher, batch_tokens
        self._encoder = Encoder(proxy.tokenizer, max_tokens, mask, proxy.vocabulary)
        pad = proxy.tokenizer.pad_token_id
        self._pad = 0 if pad is None else pad

    def sketch(self, rows: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, list[str | None]]:
        """Unit sketches float32 [m, K] on the CPU, and for each row why it has none (its sketch is 0), or None."""
        out = torch.zeros(len(rows), self.sketcher.spec.dim)
        reasons: list[str | None] = [None] * len(rows)
        parsed = [parse_row(dict(row), Fields(), i, "candidate", i + 1) for i, row in enumerate(rows)]
        encoded = self._encoder.encode([row for row in parsed if not isinstance(row, Rejected)])
        for found in (*parsed, *encoded):
            if isinstance(found, Rejected):
                reasons[found.line - 1] = found.reason
        samples = [sample for sample in encoded if isinstance(sample, Sample)]
        for batch in batches(samples, self.batch_tokens):
            places = [sample.row for sample in batch]
            out[places] = sketch_batch(self.sketcher, batch, self._pad).z.float().cpu()
        norm = torch.linalg.vector_norm(out.double(), dim=1)
        usable = has_direction(norm)
        for place in torch.nonzero(~usable)[:, 0].tolist():
            reasons[place] = reasons[place] or refused_gradient(float(norm[place]))
        out[usable] = (out[usable].double() / norm[usable, None]).float()
        out[~usable] = 0
        return out, reasons
