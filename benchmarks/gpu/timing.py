"""What a figure is, and times on a device: quantiles of CUDA events, and the limits they are compared with.

A short operation is timed behind a pass over FLUSH_BYTES, which takes its inputs out of the L2 cache and keeps the
device busy while the host prepares the launches: the figure is the device's time, not the host's. The host's own
time of a call stands beside it; where that is the longer one, launches hold the device up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

FLUSH_BYTES = 1 << 30
WARM_UP = 3
# A figure that takes longer is taken to hang: its process ends, and the next one goes on behind it.
FIGURE_SECONDS = 90
Quantiles = dict[str, float]


class NotMeasuredError(Exception):
    """What a figure needs is not there: no failure, and the reason stands in its place."""


@dataclass(frozen=True)
class Figure:
    """Something to measure: `call` gives what was found, as JSON has it."""

    name: str
    call: Callable[[], dict]
    seconds: float = FIGURE_SECONDS


def quantiles(values: list[float]) -> Quantiles:
    """{"p20", "p50", "p80"} of what was measured."""
    found = torch.tensor(values, dtype=torch.float64)
    return {f"p{p}": float(found.quantile(p / 100)) for p in (20, 50, 80)}


def over(amount: float, milliseconds: Quantiles) -> Quantiles:
    """`amount` a second for each time; the slowest time gives the lowest rate."""
    return {f"p{p}": 1e3 * amount / milliseconds[f"p{100 - p}"] for p in (20, 50, 80)}


class Span:
    """Start and end of one piece of work on a device; `milliseconds` waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._start = self._end = None

    def __enter__(self) -> Span:
        self._start = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self._end = self._now()

    def milliseconds(self) -> float:
        if not self.cuda:
            return 1e3 * (self._end - self._start)
        self._end.synchronize()
        return self._start.elapsed_time(self._end)

    def _now(self) -> torch.cuda.Event | float:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Bench:
    """The device, what was asked for, and the limits that figures are compared with.

    request: what the section's starter asks for. `option` reads it; "results" in it is the file of everything measured
        so far.
    """

    def __init__(self, device: torch.device, dry: bool, request: dict | None = None) -> None:
        self.device, self.dry, self._request = device, dry, request or {}
        self._flush: torch.Tensor | None = None
        self._limits: dict[str, Quantiles] | None = None

    def option(self, name: str) -> str | None:
        """What was asked for by this name; None if nothing was."""
        return self._request.get(name)

    def measured(self, section: str, figure: str) -> dict | None:
        """What an earlier section of this source found; None where it found nothing."""
        if not self.option("results"):
            return None
        sections = json.loads(Path(self.option("results")).read_text())["sections"]
        found = sections.get(section, {"figures": {}})["figures"].get(figure)
        known = found is not None and found["machine"] == self.option("machine")
        return found if known and "not measured" not in found else None

    def time(self, call: Callable[[], object], rounds: int = 30) -> dict[str, Quantiles]:
        """{"milliseconds", "host milliseconds"} of a short operation on inputs that are not in the cache."""
        for _ in range(WARM_UP):
            call()
        spans, host = [], []
        for _ in range(3 if self.dry else rounds):
            self._leave_cache()
            began = time.perf_counter()
            with Span(self.device) as span:
                call()
            host.append(1e3 * (time.perf_counter() - began))
            spans.append(span)
        return {
            "milliseconds": quantiles([span.milliseconds() for span in spans]),
            "host milliseconds": quantiles(host),
        }

    def take_turns(
        self, calls: dict[str, Callable[[], object]], rounds: int, warm_up: int = 1
    ) -> dict[str, list[float]]:
        """Milliseconds of long calls by name, one of each in every round, after `warm_up` rounds that do not count."""
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(-1 if self.dry else -warm_up, 2 if self.dry else rounds):
            for name, call in calls.items():
                self.wait()
                with Span(self.device) as span:
                    call()
                if turn >= 0:
                    taken[name].append(span.milliseconds())
        return taken

    def limits(self) -> dict[str, Quantiles]:
        """Bytes read and written a second by a copy, and FLOP a second of square matrix products; measured once."""
        if self._limits is None and (known := self.measured("versions", "limits")):
            self._limits = known["limits"]
        if self._limits is None:
            elements, side = (1 << 16, 128) if self.dry else (1 << 30, 8192)
            # Random numbers: zeros take less power, and a device may run faster on them than on data.
            source = torch.empty(elements, dtype=torch.bfloat16, device=self.device).normal_()
            target = torch.empty_like(source)
            copied = self.time(lambda: target.copy_(source))["milliseconds"]
            self._limits = {"copy bytes per second": over(4 * elements, copied)}
            del source, target
            for label, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
                a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
                product = self.time(lambda a=a, b=b: a @ b)["milliseconds"]
                self._limits[f"{label} FLOP per second"] = over(2 * side**3, product)
        return self._limits

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _leave_cache(self) -> None:
        if self.device.type != "cuda":
            return
        if self._flush is None:
            self._flush = torch.zeros(FLUSH_BYTES // 4, device=self.device)
        # Read, not written: what was written would go back to memory while the next call runs.
        self._flush.sum()
