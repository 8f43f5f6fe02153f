"""Which implementation runs an operation: the order table, the choice, and its reasons.

A backend is a module with one function per operation and `why_not(op, *tensors) -> str | None`, the reason why it
cannot run this call. A backend that the user names runs or raises with that reason; the automatic choice goes on to
the next one in order and warns once. On a GPU where both compiled backends were measured, the faster one comes first
(`measured.py`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels.backends import measured

# The order where nothing was measured, first choice first. The reference runs everywhere, so it ends every list.
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
NAMES = ("cpu", "cuda", "triton", "reference")
# (thread, name) of every `use_backend` block that is open; the names of different threads are one and the same.
_forced: list[tuple[int, str]] = []
_door = threading.Lock()
_warned: set[tuple[str, str]] = set()


def backend(name: str) -> ModuleType:
    """The backend module called `name`; GvendiError if there is none."""
    if name not in NAMES:
        raise GvendiError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    return importlib.import_module(f"gvendi_fast.kernels.backends.{name}")


def requested() -> str | None:
    """The backend named by `use_backend` or GVENDI_BACKEND; None if the choice is automatic.

    Raises GvendiError for a variable that names no backend.
    """
    if _forced:
        return _forced[-1][1]
    named = os.environ.get("GVENDI_BACKEND") or None
    if named is not None and named not in NAMES:
        raise GvendiError(
            f"the environment variable GVENDI_BACKEND is {named!r}; wanted one of {', '.join(NAMES)}, or none"
        )
    return named


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation inside the `with` block on this backend, or raise with the reason it cannot.

    It holds for the whole process, as backward passes on a GPU run in autograd's threads. Raises GvendiError where
    another thread is in such a block with another name.
    """
    backend(name)
    one = threading.get_ident(), name
    with _door:
        other = next((held for thread, held in _forced if thread != one[0] and held != name), None)
        if other is not None:
            raise GvendiError(
                f"backend {name!r} was requested while another thread runs on {other!r}; use_backend holds for the "
                "whole process: open one block around both threads, or use two processes"
            )
        _forced.append(one)
    try:
        yield
    finally:
        with _door:
            # The last one that is equal: a thread leaves its blocks in order.
            del _forced[max(i for i, held in enumerate(_forced) if held == one)]


@functools.cache
def order(op: str, device: torch.device) -> measured.Ranking:
    """The backends that may run `op` on this device, first choice first."""
    built_in = ORDER.get(device.type, ("reference",))
    if device.type != "cuda":
        return measured.Ranking(built_in)
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return measured.order(op, built_in, name, f"{major}.{minor}", measured.load())


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
            raise GvendiError(f"backend {name!r} was requested but cannot run {op}: {reason}")
        return chosen
    reasons: list[str] = []
    for candidate in order(op, tensors[0].device).names:
        chosen = backend(candidate)
        reason = chosen.why_not(op, *tensors)
        if reason is None:
            # A step from one compiled backend to another costs too little to warn of.
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


def operations() -> tuple[str, ...]:
    """Names of all operations; the reference has every one."""
    reference = backend("reference")
    own = {n for n, f in vars(reference).items() if getattr(f, "__module__", None) == reference.__name__}
    return tuple(sorted(n for n in own - {"status", "why_not"} if not n.startswith("_")))


@dataclass(frozen=True)
class Choice:
    """The backend that an operation gets, whether that can run it, and why it was chosen or cannot."""

    name: str
    runs: bool
    why: str


def choose(op: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """What `resolve` does with tensors of this kind, for `gvendi info`."""
    probe = torch.empty(1, 64, dtype=dtype, device=device)

    def reason(name: str) -> str | None:
        return backend(name).why_not(op, probe)

    if name := requested():
        return Choice(name, reason(name) is None, reason(name) or "requested")
    ranked = order(op, device)
    # An operation that torch leaves to LAPACK has no function in the CPU backend.
    able = [name for name in ranked.names if hasattr(backend(name), op) and reason(name) is None]
    if able[0] == "reference":
        why = "there is no compiled kernel"
    elif ranked.ratio and able[0] == ranked.names[0]:
        why = ranked.ratio.removeprefix(f"{able[0]} ")
    elif able[1:] == ["reference"]:
        why = "the only compiled kernel here" + (f"; {ranked.ratio}" if ranked.ratio else "")
    else:
        why = "built-in order, not measured on this GPU"
    return Choice(able[0], True, why)


def explain() -> dict[str, str]:
    """{backend: "ready ..." or the reason why it cannot be used}, for `gvendi info`."""
    return {name: backend(name).status() for name in NAMES}
