"""Which implementation runs an operation: the order table, the choice, and its reasons.

A backend is a module with one function per operation and `why_not(op, *tensors) -> str | None`, the reason
for which it cannot run this call. A backend asked for by name runs or raises with that reason; the automatic
choice steps down in order and warns once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from types import ModuleType

import torch

from gvendi_fast.errors import GvendiError

# First choice first. The reference runs everywhere and ends every list.
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
NAMES = ("cpu", "cuda", "triton", "reference")
_forced: str | None = None
_warned: set[tuple[str, str]] = set()


def backend(name: str) -> ModuleType:
    """The backend module called `name`; GvendiError if there is none."""
    if name not in NAMES:
        raise GvendiError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    return importlib.import_module(f"gvendi_fast.backends.{name}")


def requested() -> str | None:
    """The backend asked for by `use_backend` or GVENDI_BACKEND; None if the choice is automatic."""
    return _forced or os.environ.get("GVENDI_BACKEND") or None


@contextlib.contextmanager
def use_backend(name: str):
    """Run every operation inside the `with` block on this backend, or raise with the reason it cannot."""
    global _forced
    backend(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def resolve(op: str, *tensors: torch.Tensor) -> ModuleType:
    """The backend that runs `op` on these tensors (all on one device)."""
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) != 1:
        raise GvendiError(
            f"{op}: all tensors must be on one device, got {', '.join(devices)}; move them with .to()"
        )
    name = requested()
    if name is not None:
        chosen = backend(name)
        reason = chosen.why_not(op, *tensors)
        if reason:
            raise GvendiError(f"backend {name!r} was asked for but cannot run {op}: {reason}")
        return chosen
    reasons = []
    for candidate in ORDER.get(tensors[0].device.type, ("reference",)):
        chosen = backend(candidate)
        reason = chosen.why_not(op, *tensors)
        if reason is None:
            # From one compiled backend to the next is no loss that a user should hear of.
            if candidate == "reference" and reasons and (op, candidate) not in _warned:
                _warned.add((op, candidate))
                warnings.warn(
                    f"{op} runs on the slow {candidate} backend: {'; '.join(reasons)}",
                    RuntimeWarning,
                    stacklevel=3,
                )
            return chosen
        reasons.append(f"{candidate}: {reason}")
    raise GvendiError(f"no backend can run {op}: {'; '.join(reasons)}")


def explain() -> dict[str, str]:
    """{backend: "ready ..." or the reason it is not there}, for `gvendi info`."""
    return {name: backend(name).status() for name in NAMES}
