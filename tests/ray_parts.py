"""What the tests of Ray hand to its workers: corpora, an engine whose work units fail, and a driver to be killed."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gvendi_fast.base.engine import Worker
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.leases import Terms
from gvendi_fast.engines.ray import RayEngine
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.corpus import Settings
from gvendi_fast.sketching.unit_worker import UnitJob

WORDS = "alpha beta gamma delta seven nine red blue sum of and minus the a".split()
UNIT_ROWS = 4
# On a machine that others keep busy, Ray's workers, which it puts behind everything else, would get nothing.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
RAY = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 << 20, "log_to_driver": False}


def write_corpus(path: Path, units: int, marks: dict[int, str] | None = None) -> Path:
    """Rows of so many work units, every 17th of them no JSON. marks: {work unit: what one of its rows begins with}."""
    marks = marks or {}
    with path.open("w") as stream:
        for row in range(units * UNIT_ROWS):
            words = [WORDS[(row * 7 + i * (1 + row % 5)) % len(WORDS)] for i in range(6 + row % 13)]
            unit, place = divmod(row, UNIT_ROWS)
            if place == 1 and unit in marks:
                words.insert(0, marks[unit])
            content = json.dumps(
                {"id": f"r{row}", "prompt": " ".join(words[:4]), "completion": " ".join(words[4:])}
            )
            stream.write("no row\n" if row % 17 == 5 and unit not in marks else content + "\n")
    return path


def settings(terms: Terms | None = None) -> Settings:
    return Settings(
        spec=SketchSpec(dim=64), unit_rows=UNIT_ROWS, batch_tokens=256, terms=terms or Terms(lease_s=20)
    )


def _raise() -> None:
    raise RuntimeError("this row is poison")


def _refuse() -> None:
    raise GvendiError("this row is refused")


def _hang() -> None:
    threading.Event().wait()


def _crash() -> None:
    ctypes.string_at(0)


def _exit() -> None:
    os._exit(7)


POISONS: dict[str, Callable[[], None]] = {
    "POISON": _raise,
    "REFUSED": _refuse,
    "HANG": _hang,
    "CRASH": _crash,
    "EXIT": _exit,
}


class _Encoder:
    """Encodes rows until one comes whose prompt begins with the name of a poison."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder

    def stream(self, rows: Any) -> Iterator[Any]:
        return self.encoder.stream(map(self._tasted, rows))

    def _tasted(self, row: Any) -> Any:
        first = str(getattr(row, "prompt", "")).partition(" ")[0]
        if first in POISONS:
            POISONS[first]()
        return row


@dataclass(frozen=True)
class PoisonedJob:
    """Opens workers to whom some rows are poison."""

    job: UnitJob

    def __call__(self) -> Worker:
        worker = self.job()
        worker.encoder = _Encoder(worker.encoder)
        return worker


class PoisonedRay(RayEngine):
    """Hands out work units of which some fail."""

    def work(self, open_worker: Callable[[], Worker], items: Sequence[int]) -> Iterator[Any]:
        return super().work(PoisonedJob(open_worker), items)


class Multiply:
    """For `map`: what it makes multiplies by a number, and fails or ends its process where that is asked for."""

    def __init__(self, factor: int, mark: str | None = None) -> None:
        self.factor, self.mark = factor, mark

    def __call__(self) -> Callable[[Any], Any]:
        return self.times

    def times(self, item: Any) -> Any:
        if not isinstance(item, str | int):
            return item * self.factor
        if item == "refused":
            raise GvendiError("the item is refused")
        if item == "strange":
            raise Strange("one", "two")
        if item == "threads":
            import torch

            return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.getcwd()
        # A process that is lost at its first try.
        if self.mark is not None and item == 3:
            try:
                os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return item * self.factor
            os._exit(1)
        if item == "crash":
            os._exit(1)
        return item * self.factor


class Strange(Exception):  # noqa: N818
    """One that pickle cannot make again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def main(corpus: str, out: str, address: str) -> None:
    """A driver: sketches, and is killed or not."""
    import gvendi_fast

    with RayEngine(2, address=address, init=RAY if address == "local" else None) as engine:
        gvendi_fast.sketch(corpus, out=out, proxy="tiny", settings=settings(), engine=engine)


if __name__ == "__main__":
    main(*sys.argv[1:])
