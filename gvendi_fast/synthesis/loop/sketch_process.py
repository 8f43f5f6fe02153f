"""Candidates sketched in a process of their own, beside the one that talks to the endpoint.

Both spend their time in short calls that hold Python's lock: in one process each waits for the other, and sketching
takes twice as long (benchmarks/speed/bench_synthesis_rate.py).
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.checks.channel import Channel
from gvendi_fast.synthesis.checks.child import Child
from gvendi_fast.synthesis.checks.environment import HUB

if TYPE_CHECKING:
    from gvendi_fast.synthesis.config.config import ProxyConfig

_MODULE = "gvendi_fast.synthesis.loop.sketch_process"


class SketchProcess:
    """A `CandidateSketcher` in another process, as a context manager; arguments as there, and the proxy's section.

    It starts to load the proxy at once, and the first block waits for it. One thread is left to this process.
    """

    def __init__(self, proxy: ProxyConfig, max_tokens: int, batch_tokens: int) -> None:
        self.batch_tokens, self._dim = batch_tokens, proxy.dim
        self._child = Child(_MODULE, {}, sys.path, keep=HUB)
        threads = max(1, torch.get_num_threads() - 1)
        self._send(
            {
                "proxy": proxy.model_dump(),
                "max_tokens": max_tokens,
                "batch_tokens": batch_tokens,
                "threads": threads,
            }
        )

    def __enter__(self) -> SketchProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.stop()

    def sketch(self, rows: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, list[str | None]]:
        """As `CandidateSketcher.sketch`. Raises GvendiError where the process has ended, or with what it raised."""
        self._send(list(rows))
        try:
            found = pickle.loads(self._child.receive(any_number=True))
        except (EOFError, ConnectionError) as error:
            raise self._ended() from error
        if isinstance(found, str):
            raise GvendiError(found)
        raw, reasons = found
        return torch.from_numpy(
            np.frombuffer(bytearray(raw), np.float32).reshape(len(rows), self._dim)
        ), reasons

    def _send(self, content: Any) -> None:
        try:
            self._child.send(pickle.dumps(content))
        except ConnectionError as error:
            raise self._ended() from error

    def _last_words(self) -> str | None:
        """What the process said before it ended, which nobody has read."""
        try:
            found = self._child.receive(0.0, any_number=True)
        except EOFError:
            return None
        said = None if found is None else pickle.loads(found)
        return said if isinstance(said, str) else None

    def _ended(self) -> GvendiError:
        if (said := self._last_words()) is not None:
            return GvendiError(said)
        return GvendiError(
            f"the sketching process ended: {self._child.ending()}. What is decided is kept, and the same run goes on "
            "from there; if memory ran out, set a smaller proxy.batch_tokens, or proxy.process=false, which loads the "
            "proxy once"
        )


def main() -> None:
    """Serve blocks of rows until the other end of the pipe is closed; argv: as `Child` gives it."""
    # What loads a model is for this process alone.
    from gvendi_fast.synthesis.config.config import ProxyConfig
    from gvendi_fast.synthesis.config.schema import validated
    from gvendi_fast.synthesis.loop.candidate_sketcher import CandidateSketcher, load_sketcher

    channel = Channel.of_child(int(sys.argv[-2]), int(sys.argv[-1]))
    settings = pickle.loads(channel.receive(any_number=True))
    torch.set_num_threads(settings["threads"])
    try:
        given = validated(ProxyConfig, settings["proxy"])
        proxy, sketcher = load_sketcher(given)
        candidates = CandidateSketcher(
            proxy, sketcher, settings["max_tokens"], given.mask, settings["batch_tokens"]
        )
        while True:
            sketches, reasons = candidates.sketch(pickle.loads(channel.receive(any_number=True)))
            channel.send(pickle.dumps((sketches.numpy().tobytes(), reasons)))
    except GvendiError as error:
        channel.send(pickle.dumps(str(error)))
    # The parent has ended or wants no more.
    except (EOFError, ConnectionError):
        return
