"""One section of the GPU benchmark in a process of its own: `python -m benchmarks.gpu` starts it, and outlives it.

    python -m benchmarks.gpu.section REQUEST

REQUEST is a JSON file that it writes: which section, which figures to skip, how many seconds, where to write.
The answer is written again after every figure, whole or not at all, and names the figure under way, so that whatever
ends this process costs that one figure. An exception marks its figure and the next one begins, unless the device is
lost with it: then the process ends, and another is started for the figures that remain.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

import torch

from benchmarks.gpu.results import write_whole
from benchmarks.gpu.timing import Bench, Figure, NotMeasuredError

# {section: module}; the module's `figures(section, bench)` lists what it measures without doing any of it.
MODULES = {
    "versions": "build",
    "build": "build",
    "smoke": "checks",
    "end to end": "model",
    "experts": "experts",
    "yardsticks": "yardsticks",
    "checks": "checks",
    "kernel times": "kernels",
    "cpu and gpu": "model",
    "spectral": "spectral",
    "waiting": "waiting",
    "other checks": "checks",
}
# How long after the section's end a figure under way may go on.
GRACE = 3
LOST_DEVICE = 3
COLLECT_SECONDS = 1.0


class Answer:
    """The file that is read outside: the plan, the figures so far, the one under way and whether that was all."""

    def __init__(self, path: Path, planned: list[str]) -> None:
        self._path = path
        self._content = {"planned": planned, "figures": {}, "under way": None, "complete": False}

    def begin(self, figure: str) -> None:
        """A figure is under way."""
        self._write({"under way": figure})

    def keep(self, figure: str, found: dict) -> None:
        """A figure is done, well or not."""
        self._content["figures"][figure] = found
        self._write({"under way": None})

    def close(self, complete: bool) -> None:
        """Nothing more comes; `complete` unless the time ran out."""
        self._write({"complete": complete, "out of time": not complete})

    def _write(self, change: dict) -> None:
        self._content |= change
        write_whole(self._path, self._content)


def measure(figure: Figure, bench: Bench, limit: float) -> tuple[dict, bool]:
    """What was found, or why nothing was, and whether the device still answers."""
    began, lost = time.monotonic(), False
    # Ends the process from a thread of its own, also where the main one waits for a device that hangs.
    faulthandler.dump_traceback_later(limit, exit=True)
    try:
        found = figure.call()
        # What was launched last may have failed since.
        bench.wait()
    except NotMeasuredError as reason:
        found = {"not measured": str(reason), "absent": True}
    # The one place where any error is taken: it is written down in place of the figure that it ended.
    except Exception as error:
        last = "".join(traceback.format_exception(error)).splitlines()[-8:]
        said = (str(error) or "no message").strip().splitlines()[0]
        found = {"not measured": f"{type(error).__name__}: {said}"[:300], "traceback": last}
        lost = not answers(bench)
    finally:
        faulthandler.cancel_dump_traceback_later()
    seconds = time.monotonic() - began
    # What a figure held may be a model, whose parts point at each other; a walk over all objects is slow for the rest.
    if "not measured" in found or seconds > COLLECT_SECONDS:
        gc.collect()
    if bench.device.type == "cuda" and not lost:
        torch.cuda.empty_cache()
    return {"seconds": round(seconds, 2), **found}, lost


def answers(bench: Bench) -> bool:
    """Whether the device still works; after an illegal access every call of its process fails."""
    try:
        bench.wait()
        torch.zeros(1, device=bench.device).sum().item()
    except RuntimeError:
        return False
    return True


def planted(kind: str, bench: Bench) -> Figure:
    """A figure of a rehearsal that goes wrong the given way."""

    def out_of_memory() -> dict:
        raise torch.OutOfMemoryError("planted")

    def error() -> dict:
        raise RuntimeError("planted")

    def ends() -> dict:
        os._exit(7)

    def hangs() -> dict:
        time.sleep(600)
        return {}

    def ignores_everything() -> dict:
        # What a driver that hangs looks like: nothing inside the process ends it.
        faulthandler.cancel_dump_traceback_later()
        time.sleep(600)
        return {}

    kinds = {
        "none": lambda: {"found": 1},
        "exception": error,
        "memory": out_of_memory,
        "check": lambda: {"found": 1, "check": "failed: planted"},
        "exit": ends,
        "segfault": lambda: {"found": ctypes.string_at(0)},
        "hang": hangs,
        "deaf": ignores_everything,
    }
    return Figure("planted", kinds[kind], seconds=1)


def compile_quickly() -> None:
    """In a rehearsal, trace what is compiled and generate no code: C++ takes a minute on a CPU."""
    whole = torch.compile

    def compile(model=None, *, mode=None, options=None, backend=None, **rest):
        return whole(model, backend="eager", **rest)

    torch.compile = compile


def line(name: str, found: dict) -> str:
    """A figure on the screen, in one line."""
    said = {k: v for k, v in found.items() if k not in ("seconds", "traceback", "profile")}
    return f"  {name} [{found['seconds']:.1f} s]: {json.dumps(said)}"[:170]


def main() -> None:
    """Measure the section's figures in order."""
    request = json.loads(Path(sys.argv[1]).read_text())
    # One clock for all processes.
    parent, ends = os.getppid(), request["ends"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, request["dry run"], request)
    if bench.dry and device.type == "cpu":
        compile_quickly()
    section = request["section"]
    figures = list(importlib.import_module(f"benchmarks.gpu.{MODULES[section]}").figures(section, bench))
    if kind := request["plant"]:
        # Between the first and the rest, so that there is something to lose and something to go on with.
        figures.insert(1, planted(kind, bench))
    answer = Answer(Path(request["answer"]), [figure.name for figure in figures])
    for figure in figures:
        if figure.name in request["skip"]:
            continue
        left = ends - time.monotonic()
        if left <= 0:
            answer.close(complete=False)
            return
        if os.getppid() != parent:
            sys.exit("what started this section is gone")
        answer.begin(figure.name)
        found, lost = measure(figure, bench, min(figure.seconds, left + GRACE))
        answer.keep(figure.name, found)
        print(line(figure.name, found), flush=True)
        if lost:
            sys.exit(LOST_DEVICE)
    answer.close(complete=True)


if __name__ == "__main__":
    main()
