"""The sketches of what a model was trained on, kept as parts of a run directory.

Every rank writes parts of its own, whole or not at all, whenever enough rows have come together and before each
checkpoint. A checkpoint says how many parts there were, so that a run which goes on from it drops the parts of the
steps that it repeats. Rows without a direction are listed as rejected.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gvendi_fast.base.differences import PARAMETERS
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.unit_length import has_direction, refused_gradient
from gvendi_fast.data.rows import Rejected
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.data.sketched_parameters import SketchedParameters
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher, Sketches

# Rows of a part: 8 MB at K = 1024 is what waits in memory.
ROWS = 2048
# A part's rows are numbered from its work unit times this, so that no count of the rows of others is needed.
_APART = 1 << 20


def training_spec(
    sketcher: GradientSketcher, layers: str, name: str, training: Mapping[str, Any]
) -> dict[str, Any]:
    """The spec.json of sketches that a training run made, which none of a corpus's is equal to.

    name: of the model whose gradients they are. training: how they came about, above all `by`: "tap" (gradients of the
    model that is trained, at the weights of each step) or "proxy" (of a frozen one).
    """
    # All that reads a corpus comes with it, and nothing else of that is needed.
    from gvendi_fast.sketching.corpus import FORMAT

    return {
        **({} if layers == "all" else {"layers": layers}),
        "format": FORMAT,
        "proxy": {"name": name, "revision": "in training"},
        "training": dict(training),
        "sketch": sketcher.spec.as_dict(),
        "dtype": str(next(sketcher.model.parameters()).dtype).removeprefix("torch."),
        "mask": "labels",
        "template": None,
        "max_tokens": None,
        "exclude": [],
        "coverage": sketcher.coverage.as_dict(),
        PARAMETERS: SketchedParameters(sketcher.shapes).digest,
    }


class KeptSketches:
    """Writes a run directory while training goes on; one object a rank.

    path: of the run directory. spec: as `training_spec` gives it. sketcher: whose sketches they are.
    rank, ranks: of this process, and how many there are.
    done: how many parts of this rank a checkpoint has, None where training begins anew.
    Raises GvendiError where the directory has sketches of another run.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        spec: dict[str, Any],
        sketcher: GradientSketcher,
        rank: int = 0,
        ranks: int = 1,
        done: int | None = None,
    ) -> None:
        self.run = RunDirectory.open(path, spec, None, SketchedParameters(sketcher.shapes))
        self.rank, self.ranks, self.done = rank, ranks, done or 0
        units = [unit for unit in self.run.done() if unit % ranks == rank]
        if units and done is None:
            raise GvendiError(
                f"save_to is '{path}', which has the sketches of {len(units)} parts already, but this training begins "
                "anew; give another folder, or resume from a checkpoint that was written with it"
            )
        if len([unit for unit in units if unit < self._unit]) != self.done:
            raise GvendiError(
                f"save_to is '{path}', where the checkpoint knows of {self.done} parts of this process, but it has "
                f"{len(units)}; give the folder of that run, or another one and training from the beginning"
            )
        # Of steps after the checkpoint, which come again.
        for unit in units[self.done :]:
            self.run.remove_part(unit)
        self._parts: list[Part] = []
        self._rejected: list[Rejected] = []

    @property
    def _unit(self) -> int:
        return self.done * self.ranks + self.rank

    def add(self, sketches: Sketches, step: int, groups: Sequence[str] | None = None) -> None:
        """Take in the samples of one step; groups: a source a sample."""
        z = sketches.z.detach().float().cpu().numpy()
        norms = np.linalg.norm(z.astype(np.float64), axis=1)
        of_rank = f"-rank-{self.rank}" if self.ranks > 1 else ""
        ids = [f"step-{step}{of_rank}-sample-{sample}" for sample in range(len(z))]
        whole = has_direction(norms)
        for sample in np.flatnonzero(~whole):
            reason = refused_gradient(float(norms[sample]))
            self._rejected.append(Rejected("training", step, reason, ids[sample]))
        kept = np.flatnonzero(whole)
        tokens = np.zeros(len(z)) if sketches.tokens is None else sketches.tokens.cpu().numpy()
        loss = np.full(len(z), np.nan) if sketches.loss is None else sketches.loss.float().cpu().numpy()
        names = [""] * len(z) if groups is None else list(groups)
        self._parts.append(
            Part(
                self._unit, [ids[i] for i in kept], [names[i] for i in kept], None, z[kept], tokens[kept], tokens[kept],
                loss[kept], norms[kept],
            )
        )  # fmt: skip
        if self.waiting >= ROWS:
            self.flush()

    @property
    def waiting(self) -> int:
        """How many rows are in memory alone."""
        return sum(len(part.ids or ()) for part in self._parts) + len(self._rejected)

    def flush(self) -> None:
        """Write what waits as a part, if anything does."""
        if not self.waiting:
            return
        count = sum(len(part.ids or ()) for part in self._parts)
        columns = {
            name: np.concatenate([getattr(part, name) for part in self._parts])
            for name in ("sketches", "tokens", "length", "loss", "gradient_norm")
        }
        ids = [i for part in self._parts for i in part.ids or ()]
        groups = [g for part in self._parts for g in part.groups or ()]
        rows = self._unit * _APART + np.arange(count, dtype=np.int64)
        self.run.write_part(Part(self._unit, ids, groups, rows, **columns), self._rejected)
        self._parts, self._rejected, self.done = [], [], self.done + 1
