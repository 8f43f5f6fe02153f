"""The sketch of a layer, or of layers that share an input, as an operator that a compiler takes as one node.

Operators of `torch.library` take tensors, numbers and text, so a spec comes as `spec_text`. A layer's parameters come
as its `layer_key`, a tensor: text would be part of a compiled graph, and every layer of a model a graph of its own.
Each returns a sketch [B, K] of its own, float32 on the device of the gradients; what `sketches` does with them is
unchanged.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.gradients.layer_sketch import HadamardSketch, RademacherSketch, layer_sketch


def _operator(schema: str) -> Callable:
    """Makes an operator of a function. No gradient passes through one: nodes of `probe` call them."""

    def register(function: Callable) -> Callable:
        name = f"gvendi::{function.__name__}"
        torch.library.define(name, schema)
        # `torch.library.custom_op` would check and wrap every call, for longer than a small layer takes.
        torch.library.impl(name, "default", function)
        return function

    return register


def spec_text(spec: SketchSpec) -> str:
    """A spec as an operator's argument."""
    return f"{spec.kind} {spec.dim} {spec.seed}"


# (weight, bias) by number, and the key of each: one entry for every pair of names that a process has met.
_names: list[tuple[str, str]] = []
_keys: dict[tuple[str, str], Tensor] = {}
_numbering = threading.Lock()


def layer_key(weight: str | None, bias: str | None) -> Tensor:
    """int64 [] on the CPU that represents a layer's parameters, None for one that is left out."""
    names = weight or "", bias or ""
    if names not in _keys:
        # Two threads that append at once would both take the number of the later one.
        with _numbering:
            if names not in _keys:
                _names.append(names)
                _keys[names] = torch.tensor(len(_names) - 1)
    return _keys[names]


def names_of(key: Tensor) -> tuple[str, str]:
    """(weight, bias) of a `layer_key`, empty where left out."""
    return _names[int(key)]


@functools.lru_cache(maxsize=64)
def _sketch(text: str) -> HadamardSketch | RademacherSketch:
    kind, dim, seed = text.split()
    return layer_sketch(SketchSpec(dim=int(dim), kind=kind, seed=int(seed)))


def rows(x: Tensor) -> Tensor:
    """[..., d] -> [T, d], contiguous, of a number format that the kernels read."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return flat.float() if flat.dtype == torch.float16 else flat


def _empty(segments: Tensor, spec: str, like: Tensor) -> Tensor:
    """What an operator returns, without values: float32 [B, K]."""
    return like.new_empty((segments.shape[0], _sketch(spec).spec.dim), dtype=torch.float32)


def _zeros(segments: Tensor, spec: str, like: Tensor) -> Tensor:
    return _empty(segments, spec, like).zero_()


@_operator("(Tensor a, Tensor key, str spec) -> Tensor")
def transformed_input(a: Tensor, key: Tensor, spec: str) -> Tensor:
    """H S_i a, float32 [T, K]: what is kept of an input [..., I] that is wider than K; `key` of any of its layers."""
    return _sketch(spec).transform(names_of(key)[0], rows(a))


@torch.library.register_fake("gvendi::transformed_input")
def _(a: Tensor, key: Tensor, spec: str) -> Tensor:
    count = a.numel() // a.shape[-1]
    return a.new_empty((count, _sketch(spec).spec.dim), dtype=torch.float32)


@_operator(
    "(Tensor a, bool transformed, Tensor[] gradients, Tensor segments, Tensor[] keys, str spec) -> Tensor"
)
def linear_layers(
    a: Tensor,
    transformed: bool,
    gradients: list[Tensor],
    segments: Tensor,
    keys: list[Tensor],
    spec: str,
) -> Tensor:
    """Sketch of linear layers that read one input: a `layer_key` for each, in the order of their gradients.

    a [..., I], or, if `transformed`, float32 [T, K] from `transformed_input`; gradients [..., O] of the layers'
    outputs; segments int64 [B, 2] on the CPU.
    """
    sketch, out = _sketch(spec), _zeros(segments, spec, gradients[0])
    parts = []
    for e, (weight, bias) in zip(map(rows, gradients), map(names_of, keys), strict=True):
        if bias:
            sketch.vector(bias, None, e, segments, out)
        if weight:
            parts.append((weight, e))
    if parts:
        sketch.linear(rows(a), parts, segments, out, transformed)
    return out


@torch.library.register_fake("gvendi::linear_layers")
def _(a, transformed, gradients, segments, keys, spec) -> Tensor:
    return _empty(segments, spec, gradients[0])


@_operator(
    "(Tensor x, Tensor gradient, Tensor segments, Tensor key, int tokens, str norm, float eps, str spec) -> Tensor"
)
def norm_layer(
    x: Tensor,
    gradient: Tensor,
    segments: Tensor,
    key: Tensor,
    tokens: int,
    norm: str,
    eps: float,
    spec: str,
) -> Tensor:
    """Sketch of a norm from its input and the gradient of its output, both [..., d].

    norm "rms" or "layer": the formula of x_hat. "given": x is x_hat already. A norm may run once a head, before or
    after heads and positions change places, so a sample is all of its rows, an equal part; padding has no gradient.
    tokens: not 0 where x and gradient hold the rows of each token of the flattened batch together; then it is their
    number, and samples are `segments` of them.
    """
    sketch, out, (weight, bias) = _sketch(spec), _zeros(segments, spec, gradient), names_of(key)
    e, samples = rows(gradient), len(segments)
    if tokens:
        whole = segments * (len(e) // tokens)
    else:
        starts = torch.arange(samples, dtype=torch.int64) * (len(e) // samples)
        whole = torch.stack([starts, starts + len(e) // samples], dim=1)
    if bias:
        sketch.vector(bias, None, e, whole, out)
    if weight and norm == "given":
        sketch.vector(weight, None, e * rows(x), whole, out)
    elif weight:
        sketch.vector(weight, rows(x), e, whole, out, norm, eps)
    return out


@torch.library.register_fake("gvendi::norm_layer")
def _(x, gradient, segments, key, tokens, norm, eps, spec) -> Tensor:
    return _empty(segments, spec, gradient)


@_operator(
    "(Tensor ids, Tensor gradient, Tensor segments, Tensor key, int vocabulary, int padding_idx, str spec) -> Tensor"
)
def embedding_layer(
    ids: Tensor,
    gradient: Tensor,
    segments: Tensor,
    key: Tensor,
    vocabulary: int,
    padding_idx: int,
    spec: str,
) -> Tensor:
    """Sketch of an embedding: ids int64 [...], gradient [..., d] of what was looked up; padding_idx -1 for none."""
    flat, e = ids.reshape(-1).long().contiguous(), rows(gradient)
    if padding_idx >= 0:
        # The row of padding_idx gets no gradient, even where it is used as a real token.
        e = e.masked_fill((flat == padding_idx)[:, None], 0)
    out = _zeros(segments, spec, e)
    _sketch(spec).token(names_of(key)[0], vocabulary, flat, e, segments, out)
    return out


@torch.library.register_fake("gvendi::embedding_layer")
def _(ids, gradient, segments, key, vocabulary, padding_idx, spec) -> Tensor:
    return _empty(segments, spec, gradient)


@_operator(
    "(Tensor hidden, Tensor weight, Tensor labels, Tensor segments, str parameter, float? softcap, float scale, "
    "str spec) -> (Tensor, Tensor, Tensor)"
)
def output_head(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    segments: Tensor,
    parameter: str,
    softcap: float | None,
    scale: float,
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss float32 [R], gradient of hidden [R, d] and sketch of the head [V, d] for the R rows that have a target."""
    out = _zeros(segments, spec, hidden)
    loss, gradient = _sketch(spec).head(parameter, hidden, weight, labels, segments, out, softcap, scale)
    return loss, gradient, out


@torch.library.register_fake("gvendi::output_head")
def _(hidden, weight, labels, segments, parameter, softcap, scale, spec):
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    return loss, torch.empty_like(hidden), _empty(segments, spec, hidden)
