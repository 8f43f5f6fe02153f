"""What the callbacks of all trainers share: sketches of some steps' samples into a meter and a run directory.

begin(model) ┐  every N-th step:  open(), the trainer's own forward and backward passes, close(step)
figures()    ┘  when the trainer logs: merged over ranks, once for all the steps since the last time
"""

from __future__ import annotations

import functools
import math
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import atomic_write, exists, make_folder
from gvendi_fast.integrations.kept_sketches import KeptSketches, training_spec
from gvendi_fast.integrations.meter import DiversityMeter
from gvendi_fast.integrations.proxy_batches import ProxyBatches
from gvendi_fast.integrations.sources import TAG, SourceNames, keep_tags_from, without_sources
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.gradients.names import plain_model
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher, Sketches
from gvendi_fast.sketching.proxy.load import Proxy, load_proxy

DIM, WINDOW = 1024, 4096
# A log has other gains and samples too, and these are of measured steps alone.
PREFIX = "diversity/"


class _Held:
    """What a run has put on a model: its tap, and the hooks that keep tags from it."""

    def __init__(self) -> None:
        self.tap: Any = None
        self.handles: list[Any] = []

    def release(self) -> None:
        """Leave the model as it was, in the middle of a step too."""
        if self.tap is not None and self.tap.is_attached:
            self.tap.detach()
        for handle in self.handles:
            handle.remove()
        self.handles = []


class UnmeasuredWarning(UserWarning):
    """A training run of which nothing, or less than before, was measured."""


class TrainingDiversity:
    """The diversity of what a model is trained on, measured on every N-th step. Options are those of the callbacks.

    every: measure the steps N, 2 N, ...; the others run as if nothing were there.
    layers, dim: of the sketches, as `GradientSketcher` and `SketchSpec` take them.
    window: samples that the meter's window holds.
    source: column of the data set that names each sample's source; sources: the names, where they are not to be found
        in the data set before it is read.
    save_to: a run directory for the sketches.
    sketcher: a GradientSketcher of the model that is trained, in place of layers and dim.
    proxy: "tiny", a folder, a hub name or a Proxy: a frozen model that scores the batches in place of the tap.
    prefix: of the names of the figures.
    meter: a DiversityMeter, in place of dim and window.
    """

    def __init__(
        self,
        *,
        every: int = 10,
        layers: str = "all",
        dim: int | None = None,
        window: int | None = None,
        source: str | None = None,
        sources: Sequence[str] | None = None,
        save_to: str | os.PathLike | None = None,
        sketcher: GradientSketcher | None = None,
        proxy: str | Proxy | None = None,
        prefix: str = PREFIX,
        meter: DiversityMeter | None = None,
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise GvendiError(f"every is {every!r}; wanted a number of steps, at least 1")
        if sources is not None and source is None:
            raise GvendiError(
                "sources names the values of a column, but source does not say of which; give both"
            )
        if sources is not None and not list(sources):
            raise GvendiError("sources is empty; wanted the names in the column, or None")
        if sketcher is not None and proxy is not None:
            raise GvendiError(
                "sketcher is of the trained model and proxy is another one; give one of the two"
            )
        if sketcher is not None and (layers != "all" or dim is not None):
            raise GvendiError("a sketcher has layers and dim of its own; give it alone")
        if meter is not None and window is not None:
            raise GvendiError("a meter has a window of its own; give it alone")
        if sketcher is not None:
            dim = sketcher.spec.dim
        wanted = None if meter is None else meter.dim
        if dim is None:
            dim = DIM if wanted is None else wanted
        # A width that no sketch has is refused here.
        SketchSpec(dim=dim)
        if wanted not in (None, dim):
            raise GvendiError(
                f"the meter is of sketches of {wanted} numbers, but these have dim {dim}; give one width to both"
            )
        self.every, self.layers, self.prefix = every, layers, prefix
        self.names = None if source is None else SourceNames(source, sources)
        self.save_to, self.proxy, self._given = save_to, proxy, sketcher
        self._dim = dim
        if meter is None:
            meter = DiversityMeter(dim=dim, window=WINDOW if window is None else window)
        self.meter = meter
        # Two callbacks of one trainer differ in their prefixes.
        self.tag = f"{TAG} {prefix}"
        self.measured = 0
        self.sketcher: GradientSketcher | None = None
        self.kept: KeptSketches | None = None
        self.is_fresh = False
        self._held = _Held()
        self._model: nn.Module | None = None
        self._run: weakref.ref[Any] | None = None
        self._restored: dict[str, Any] | None = None
        _ALL.add(self)
        # A callback that nobody has any more leaves nothing behind on a model that somebody has.
        weakref.finalize(self, self._held.release).atexit = False

    def begin(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        others: Sequence[nn.Module] = (),
        rank: int = 0,
        ranks: int = 1,
        is_resumed: bool = False,
        training: dict[str, Any] | None = None,
        run: Any = None,
        steps: int | None = None,
    ) -> None:
        """Get ready for a training run of this model.

        tokenizer: the model's; a proxy needs it. others: models that are given the same batches, and so the tags.
        is_resumed: whether the run goes on from a checkpoint. training: what spec.json says of the run.
        run: the trainer; another one than before, or another model, begins with an empty meter. steps: how many it has.
        """
        self.stop()
        self.clear(model, run)
        self._check_alone(run, steps)
        is_another = model is not self._model or not self.is_of(run)
        if (is_another or is_resumed) and self._restored is None and self.measured:
            self.meter.reset()
            self.measured, self.kept, self.is_fresh = 0, None, False
        if model is not self._model:
            with _same_random_numbers():
                self._held.tap = self._tapped(model) if self.proxy is None else self._scored(model, tokenizer)
            self._model = model
        self._run = None if run is None else weakref.ref(run)
        # A checkpoint is read on the CPU.
        if self._restored is not None:
            self.meter.to(next(model.parameters()).device)
        if self.names is not None:
            # Held by the model, so without a reference to what is to go when nobody else has it.
            takes = functools.partial(_takes_tags, weakref.ref(self))
            self._held.handles = [keep_tags_from(model, self.tag, takes)]
            self._held.handles += [keep_tags_from(other, self.tag, lambda: False) for other in others]
        if self.save_to is not None:
            kept = (self._restored or {}).get("kept")
            if is_resumed and kept is not None and kept["ranks"] != ranks:
                raise GvendiError(
                    f"save_to is '{self.save_to}', which {kept['ranks']} processes wrote, but {ranks} go on; give "
                    "another folder, or as many processes"
                )
            if is_resumed:
                done = 0 if kept is None else kept["done"]
            else:
                # A trainer that trains once more goes on in its own folder.
                done = None if self.kept is None else self.kept.done
            spec = training_spec(self.sketcher, self.layers, _name(model, self.proxy), self._how(training))
            self.kept = KeptSketches(self.save_to, spec, self.sketcher, rank, ranks, done)
        self._restored = None

    def clear(self, model: nn.Module, run: Any = None) -> None:
        """Take from a model what others have left on it whose runs are over, as one does that was interrupted."""
        parts = {id(part) for part in model.modules()}
        for other in list(_ALL):
            if other is self or other._model is None:
                continue
            if parts.isdisjoint(id(part) for part in other._model.modules()):
                continue
            if run is None or not other.is_of(run):
                other.stop()
            # Of this run's last call, where that failed in a step.
            elif other._held.tap.is_attached:
                other._held.tap.detach()

    def is_of(self, run: Any) -> bool:
        """Whether this trainer's run was the last that it began."""
        return run is (None if self._run is None else self._run())

    def is_due(self, step: int) -> bool:
        """Whether this step, counted from 1, is measured."""
        return step % self.every == 0

    def open(self) -> None:
        """Before the first forward of a step that is measured."""
        self._held.tap.attach()

    def close(self, step: int) -> None:
        """Behind the last backward of the step, before or after its weights change."""
        tap = self._held.tap
        if not tap.is_attached:
            return
        try:
            sketches = tap.take()
        finally:
            tap.detach()
        self.measured += 1
        if not len(sketches.z):
            return
        groups = self._groups(sketches)
        self.meter.update(sketches, groups)
        if self.kept is not None:
            self.kept.add(sketches, step, groups)
        self.is_fresh = True

    def figures(self, is_distributed: bool = False) -> dict[str, float]:
        """The meter's figures, of all ranks where there are several, which all have to ask then."""
        meter = self.meter.sync() if is_distributed else self.meter
        self.is_fresh = False
        return {f"{self.prefix}{name}": value for name, value in meter.compute().items()}

    def stop(self) -> None:
        """Leave the model as it was, in the middle of a step too."""
        self._held.release()

    def end(self) -> None:
        """The run is over: what waits is written."""
        self.stop()
        if self.kept is not None:
            self.kept.flush()
        if self.measured == 0:
            warnings.warn(
                f"no step was measured: every is {self.every}, and training was over before; give a smaller every",
                UnmeasuredWarning,
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """Meter, and what is written so far; a part is closed first, so that a resumed run goes on behind it."""
        kept = None
        if self.kept is not None:
            self.kept.flush()
            kept = {"done": self.kept.done, "ranks": self.kept.ranks}
        return {"meter": self.meter.state_dict(), "measured": self.measured, "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; before `begin`."""
        self.meter.load_state_dict(state["meter"])
        self.measured, self._restored = state["measured"], state

    def save(self, folder: str | os.PathLike, rank: int = 0) -> None:
        """Write the state of this rank into the folder of a checkpoint."""
        make_folder(Path(folder))
        with atomic_write(_state_file(folder, rank)) as stream:
            torch.save(self.state_dict(), stream)

    def load(self, folder: str | os.PathLike, rank: int = 0) -> None:
        """Read the state of this rank from the folder of a checkpoint; one without starts anew, with a warning."""
        path = _state_file(folder, rank)
        if not exists(path):
            warnings.warn(
                f"the checkpoint '{folder}' has no {path.name}, so the meter begins anew",
                UnmeasuredWarning,
                stacklevel=3,
            )
            return
        self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def _tapped(self, model: nn.Module) -> Any:
        if self._given is not None and self._given.model is not plain_model(model):
            raise GvendiError(
                f"the sketcher's model is a {type(self._given.model).__name__} of its own, not the one that is "
                "trained; make it of the trainer's model, or leave sketcher out"
            )
        self.sketcher = self._given or GradientSketcher(model, SketchSpec(dim=self._dim), layers=self.layers)
        return self.sketcher.tap(model, tag=None if self.names is None else self.tag)

    def _scored(self, model: nn.Module, tokenizer: Any) -> ProxyBatches:
        device = next(model.parameters()).device
        proxy = (
            load_proxy(self.proxy, device=device) if isinstance(self.proxy, str | os.PathLike) else self.proxy
        )
        self.sketcher = GradientSketcher(proxy.model, SketchSpec(dim=self._dim), layers=self.layers)
        return ProxyBatches(model, self.sketcher, proxy.tokenizer, tokenizer, self.tag)

    def _check_alone(self, run: Any, steps: int | None) -> None:
        """GvendiError where another of this run taps the model at the same step."""
        for other in list(_ALL):
            if other is self or run is None or not other.is_of(run):
                continue
            first = math.lcm(self.every, other.every)
            if self.proxy is None and other.proxy is None and (steps is None or first <= steps):
                raise GvendiError(
                    f"two callbacks tap the model, every {other.every} and every {self.every} steps, and both step "
                    f"{first}; a step has one tap: leave one out, or let it score by a frozen model (proxy=)"
                )

    def _groups(self, sketches: Sketches) -> list[str] | None:
        if self.names is None:
            return None
        if sketches.tags is None:
            raise without_sources()
        return [self.names.name_of(number) for number in sketches.tags.tolist()]

    def _how(self, training: dict[str, Any] | None) -> dict[str, Any]:
        by = "tap" if self.proxy is None else "proxy"
        source = {} if self.names is None else {"source": self.names.column}
        return {"by": by, "every": self.every, **source, **(training or {})}


# Those that may have something on a model.
_ALL: weakref.WeakSet[TrainingDiversity] = weakref.WeakSet()


def _takes_tags(of: weakref.ref[TrainingDiversity]) -> bool:
    """Whether the tap takes the tags out of this forward."""
    diversity = of()
    if diversity is None or diversity.proxy is not None:
        return False
    return diversity._held.tap.is_attached and torch.is_grad_enabled()


def _name(model: nn.Module, proxy: str | Proxy | None) -> str:
    """What spec.json calls the model whose gradients are sketched."""
    if proxy is not None:
        return Path(proxy if isinstance(proxy, str | os.PathLike) else proxy.name).name
    plain = plain_model(model)
    path = getattr(getattr(plain, "config", None), "name_or_path", "") or ""
    return f"{Path(path).name or type(plain).__name__} (in training)"


def _state_file(folder: str | os.PathLike, rank: int) -> Path:
    return Path(folder) / f"gvendi-rank-{rank}.pt"


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Training goes on with the random numbers that it would have had."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
