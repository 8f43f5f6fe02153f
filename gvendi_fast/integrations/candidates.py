"""Where a sampler's sketches come from: a matrix, a pool, a run directory, or a proxy that is asked when needed.

A data set's row i has the sketch i. A run directory holds what it accepted alone, each with its ordinal in the corpus;
the rows that it rejected have none, which counts like a gradient of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gvendi_fast.base.arguments import whole
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.unit_length import Rows, check_matrix
from gvendi_fast.data.pool import Pool, PoolLike, RunPool, as_pool

if TYPE_CHECKING:
    from gvendi_fast.sketching.gradients.sketcher import GradientSketcher

# float [n, K] of the rows with the given numbers, one sketch a row in their order.
Sketching = Callable[[Sequence[int]], torch.Tensor]


class ProxySketches:
    """Sketches of a data set's rows by a frozen proxy, made when they are asked for.

    sketcher: of the proxy; it may be on a GPU.
    data: what `data[i]` gives a row of, and `len(data)` their number.
    encode: from a list of rows to the arguments of `sketcher.sketch`: input_ids, labels and, or not, attention_mask.
    at_once: rows of a pass.
    keep: remember every sketch, 4 K bytes a row, so that a candidate that comes again costs no pass. A row's sketch
        depends in its last bits on the rows beside it, so that a resumed run, which remembers nothing, repeats the
        choices to the bit without it only.
    Cost: one pass of the proxy (4 of a training step's 6 operations a parameter and token) over m batches for each
    batch trained on.
    """

    def __init__(
        self,
        sketcher: GradientSketcher,
        data: Sequence[Any],
        encode: Callable[[list[Any]], Mapping[str, torch.Tensor]],
        *,
        at_once: int = 32,
        keep: bool = False,
    ) -> None:
        if not callable(encode):
            raise GvendiError(
                f"encode is {encode!r}; wanted a function from a list of rows to input_ids, labels and attention_mask"
            )
        self.sketcher, self.data, self.encode = sketcher, data, encode
        self.at_once = whole(at_once, "at_once", "the number of rows of a pass, at least 1", 1)
        self._kept: dict[int, torch.Tensor] | None = {} if keep else None

    def __len__(self) -> int:
        return len(self.data)

    def __call__(self, numbers: Sequence[int]) -> torch.Tensor:
        """float32 [n, K] on the CPU; a row without a supervised token gets zeros."""
        kept = self._kept or {}
        missing = [number for number in numbers if number not in kept]
        made: dict[int, torch.Tensor] = {}
        for first in range(0, len(missing), self.at_once):
            here = missing[first : first + self.at_once]
            made.update(zip(here, self._pass(here), strict=True))
        if self._kept is not None:
            self._kept.update(made)
        found = {**kept, **made} if len(made) < len(numbers) else made
        return torch.stack([found[number] for number in numbers])

    def _pass(self, numbers: Sequence[int]) -> torch.Tensor:
        batch = self.encode([self.data[number] for number in numbers])
        if "input_ids" not in batch or "labels" not in batch:
            raise GvendiError(
                f"encode gave {sorted(batch)}; wanted input_ids, labels and, or not, attention_mask"
            )
        labels = batch["labels"]
        if len(labels) != len(numbers):
            raise GvendiError(
                f"encode gave {len(labels)} rows of {len(numbers)}; wanted one for each, in order"
            )
        out = torch.zeros(len(numbers), self.sketcher.spec.dim, dtype=torch.float32)
        # The first token is predicted from nothing.
        told = (labels[:, 1:] != -100).any(dim=1).cpu()
        if bool(told.any()):
            mask = batch.get("attention_mask")
            out[told] = self.sketcher(
                batch["input_ids"][told], labels[told], None if mask is None else mask[told]
            ).cpu()
        return out


class Candidates:
    """A data set of `rows` rows by number; `take` gives their sketches."""

    def __init__(
        self, sketches: PoolLike | Sketching, rows: int | None = None, dim: int | None = None
    ) -> None:
        if rows is not None:
            rows = whole(rows, "rows", "the number of rows of the data set, at least 1", 1)
        if dim is not None:
            dim = whole(dim, "dim", "how many coordinates of a sketch to use, at least 1", 1)
        self._call: Sketching | None = None
        self._matrix: Rows | None = None
        # Where in the matrix a row's sketch is, -1 where it has none; None where they are in one order.
        self._place: np.ndarray | None = None
        if callable(sketches) and not isinstance(sketches, torch.Tensor | np.ndarray | Pool):
            self._call = sketches
            known: int | None = len(sketches) if hasattr(sketches, "__len__") else None
        elif isinstance(sketches, torch.Tensor | np.ndarray):
            check_matrix(sketches)
            self._matrix, known = sketches, len(sketches)
        else:
            pool = as_pool(sketches)
            self._matrix = _held(pool, dim)
            known = len(pool)
            if isinstance(pool, RunPool):
                rows = self._number(pool, rows)
                known = rows
        count = known if rows is None else rows
        if count is None:
            raise GvendiError(
                "rows is None, and a function does not say how many rows it knows; give rows=len(data)"
            )
        if known is not None and rows is not None and known != rows:
            raise GvendiError(
                f"rows is {rows:,}, but there are {known:,} sketches; sketch the data set that is trained on, all of it"
            )
        self.rows = count
        width = None if self._matrix is None else self._matrix.shape[1]
        if dim is not None and width is not None and dim > width:
            raise GvendiError(f"dim is {dim}; wanted at most {width}, the width of the sketches")
        # None until the first sketches of a function.
        self.dim: int | None = dim if width is None or dim is not None else width

    def take(self, numbers: np.ndarray) -> torch.Tensor:
        """Sketches float64 [n, K] of the rows with these numbers, as they are; zeros where a row has none."""
        if self._call is not None:
            rows = self._call(numbers.tolist())
            check_matrix(rows)
            if len(rows) != len(numbers):
                raise GvendiError(
                    f"sketches gave {len(rows)} rows for {len(numbers)} numbers; wanted one for each, in their order"
                )
            out = torch.as_tensor(rows).detach().to("cpu", torch.float64)
            if self.dim is None:
                self.dim = out.shape[1]
            if out.shape[1] < self.dim:
                raise GvendiError(f"sketches gave a width of {out.shape[1]}; wanted {self.dim}")
            return out[:, : self.dim].contiguous()
        # What is no function is a matrix.
        assert self._matrix is not None
        place = numbers if self._place is None else self._place[numbers]
        there = np.maximum(place, 0)
        if isinstance(self._matrix, torch.Tensor):
            out = self._matrix.detach()[torch.from_numpy(there).to(self._matrix.device), : self.dim]
            out = out.to("cpu", torch.float64)
        else:
            # The copy also makes big-endian and memory-mapped arrays torch's own.
            out = torch.from_numpy(np.array(self._matrix[there, : self.dim], dtype=np.float64))
        out[torch.from_numpy(place < 0)] = 0
        return out

    def _number(self, pool: RunPool, rows: int | None) -> int:
        """Give every row of the corpus the place of its sketch; returns their number."""
        if rows is None:
            raise GvendiError(
                "rows is None, and a run directory does not hold the rows that it rejected; give rows=len(data), where "
                "data is what was sketched, in the same order"
            )
        if "training" in pool.run.spec:
            raise GvendiError(
                f"sketches is '{pool.run.path}', which has the sketches of a training run: its rows are samples of its "
                "steps, not rows of a data set; sketch the data set with 'gvendi sketch' and give that directory"
            )
        ordinals = pool.numbers("row")
        if len(ordinals) and int(ordinals.max()) >= rows:
            raise GvendiError(
                f"rows is {rows:,}, but the run directory has a sketch of row {int(ordinals.max()):,} of its corpus; "
                "give the data set that was sketched, in the same order"
            )
        self._place = np.full(rows, -1, np.int64)
        self._place[ordinals] = np.arange(len(ordinals))
        return rows


def _held(pool: Pool, dim: int | None) -> torch.Tensor:
    """The sketches of a pool in memory, float32 [N, dim]: a batch would read every part of a run directory."""
    width = pool.dim if dim is None else min(dim, pool.dim)
    out = torch.empty(len(pool), width, dtype=torch.float32)
    for first, block in pool.blocks():
        out[first : first + len(block)] = block[:, :width]
    return out
