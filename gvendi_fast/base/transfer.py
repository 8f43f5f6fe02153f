"""Copies between the CPU and a model's device that do not block: pinned memory, in the order of the stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Fetched:
    """Tensors on their way to the CPU; they hold the values once `wait` has returned."""

    tensors: tuple[torch.Tensor, ...]
    arrived: torch.cuda.Event | None

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The tensors on the CPU, in the order they were given; waits for the work queued before `fetch` only."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensors


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on `device`; a copy to a GPU is queued on its stream, and the CPU does not wait for it."""
    if device.type == "cuda" and x.device.type == "cpu":
        # The allocator of pinned memory keeps the block until the copy is done.
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def fetch(*tensors: torch.Tensor) -> Fetched:
    """Start copying tensors of one device to the CPU; tensors that are on the CPU already are returned as they are."""
    device = tensors[0].device
    if device.type != "cuda":
        return Fetched(tuple(x.cpu() for x in tensors), None)
    with torch.cuda.device(device):
        copies = tuple(torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in tensors)
        for copy, x in zip(copies, tensors, strict=True):
            copy.copy_(x, non_blocking=True)
        # A blocking event lets this thread sleep, which frees the core for the tokenizer's thread.
        arrived = torch.cuda.Event(blocking=True)
        arrived.record()
    return Fetched(copies, arrived)
