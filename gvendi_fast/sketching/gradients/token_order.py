"""Whether layers see a sample's tokens in the batch's order, told by where the gradient of a text's beginning goes.

A causal model's first n tokens have no gradient at later tokens, so a pass leaves the rows behind a sample's last
target out. Where a model lets tokens change places before a layer and back behind it (a flip, even tokens before odd
ones, a product with a permutation, an autograd function of its own), a row at place p is not that of token p. The
loss of the first n tokens of a trial then has a gradient at a place from n on, for some n: of T tokens in another
order one of the first n, for some n < T, is not at the first n places.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# A Fourier transform along the tokens leaves rounding at places that have no gradient; relative to the largest entry.
_ROUNDING = 1e-6


class TokenOrder:
    """A trial of one sample of `length` tokens."""

    def __init__(self, length: int) -> None:
        self.length = length
        self._starts: list[Tensor] = []
        self._gradients: list[Tensor] = []

    def begin(self, embedded: Tensor) -> Tensor:
        """What an embedding looked up, from which on gradients are."""
        start = embedded.detach().requires_grad_()
        self._starts.append(start)
        return start.clone()

    def watch(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        """The forward hook of a layer with one row for each token."""
        if output.requires_grad and output.numel() == self.length * output.shape[-1]:
            # Of the output as it is now, whatever is written over it later.
            output.register_hook(self._gradients.append)

    def is_kept(self, logits: Tensor) -> bool:
        """Whether no row of a watched layer is that of a token behind its place; logits [1, T, V] of the trial.

        False too where that is not seen, for then whole samples are sketched.
        """
        if logits.device.type == "meta":
            return True
        if not self._starts or not logits.requires_grad:
            return False
        # Unlike for each entry, so that they do not cancel behind a norm.
        weights = torch.arange(logits.shape[-1], device=logits.device, dtype=torch.float32).cos()
        for n in range(1, self.length):
            self._gradients.clear()
            loss = (logits[:, :n].float() * weights).sum()
            found = torch.autograd.grad(loss, self._starts, retain_graph=True, allow_unused=True)
            if any(self._is_behind(g, n) for g in (*found, *self._gradients) if g is not None):
                return False
        self._gradients.clear()
        return True

    def _is_behind(self, gradient: Tensor, n: int) -> bool:
        rows = gradient.reshape(self.length, -1).abs().float()
        return bool(rows[n:].max() > _ROUNDING * rows.max())
