"""What a run directory says by kind of layer: the sketch of a preset afterwards, and shares of the squared norm."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np

from gvendi_fast.base.differences import PARAMETERS
from gvendi_fast.base.engine import Engine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.passes import over_run
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.data.sketched_parameters import read_parameters
from gvendi_fast.sketching.gradients.layers import FIRST, KINDS, LAST, Cell, check_preset, choose_groups


def choose_layers(run: RunDirectory | str | os.PathLike, layers: str) -> RunDirectory:
    """The directory, read as if it had been sketched with this preset of layers.

    It must have been, or keep its sketches by group (`--sketch-groups`) so that groups add up to the preset's layers:
    the sketch is linear. The sums have the rounding of another order of addition. Raises GvendiError where it cannot.
    """
    check_preset(layers)
    run = run if isinstance(run, RunDirectory) else RunDirectory.load(run)
    recorded, groups = run.spec.get("layers", "all"), run.spec.get("groups")
    if layers == recorded:
        return run
    if groups is None:
        raise GvendiError(
            f"'{run.path}' was sketched with --layers {recorded} and keeps no sketches by group, so --layers {layers} "
            f"cannot be told from it; sketch the corpus again with --layers {layers}, or with --sketch-groups "
            "kind-and-half, which allows every choice, into another --out"
        )
    if recorded != "all":
        raise GvendiError(
            f"'{run.path}' was sketched with --layers {recorded} alone; sketch the corpus again with --layers {layers} "
            "into another --out"
        )
    cells = [[Cell(*cell) for cell in group] for group in groups["cells"]]
    return _ChosenLayers(run, layers, choose_groups(layers, cells, groups["names"]))


class _ChosenLayers(RunDirectory):
    """A run directory whose sketch of a row is the sum of some of its groups' sketches."""

    def __init__(self, run: RunDirectory, layers: str, chosen: Sequence[int]) -> None:
        super().__init__(run.path, run.spec, run.manifest)
        self._dim, self._chosen = run.dim, list(chosen)
        groups = run.spec["groups"]
        sketched = sum(groups["sketched"][i] for i in chosen)
        self._names = [groups["names"][i] for i in chosen]
        spec = run.sketch_spec
        # As a run of the preset would have recorded it.
        self.spec = {**spec, "layers": layers, "coverage": {**spec["coverage"], "sketched": sketched}}
        parameters = read_parameters(run.path, spec)
        if parameters is not None:
            self.spec[PARAMETERS] = parameters.of_groups(chosen).digest

    def iterate(
        self, columns: Sequence[str] | None = None, units: Sequence[int] | None = None
    ) -> Iterator[Part]:
        read = None if columns is None else [_READ.get(name, name) for name in columns]
        for part in super().iterate(read and list(dict.fromkeys(read)), units):
            if columns is None:
                (groups,) = super().iterate(["group_sketches"], [part.unit])
                part.group_sketches = groups.group_sketches
            if part.group_sketches is not None:
                rows, width = part.group_sketches.shape
                by_group = part.group_sketches.reshape(rows, width // self._dim, self._dim)
                z = by_group[:, self._chosen].sum(axis=1)
                norm = np.linalg.norm(z.astype(np.float64), axis=1).astype(np.float32)
                part.sketches = z if columns is None or "sketch" in columns else None
                part.gradient_norm = norm if columns is None or "gradient_norm" in columns else None
                part.group_sketches = None
            if part.norm_shares is not None:
                kept = {name: part.norm_shares[name] for name in self._names}
                whole = sum(kept.values())
                part.norm_shares = {name: share / whole for name, share in kept.items()}
            yield part


# {name of a group by kind and half: its kind}
_KINDS = {Cell(kind, half).name: kind for kind in KINDS for half in ("", FIRST, LAST)}
_READ = {"sketch": "group_sketches", "gradient_norm": "group_sketches"}


def norm_shares(
    run: RunDirectory | str | os.PathLike, engine: Engine | None = None
) -> dict[str, float] | None:
    """{kind of layer: its share of the squared gradient norm}, the mean over rows; the shares add up to 1.

    A row's share of a kind is ||z_kind||^2 over the sum over kinds, whose expectation over sketches is
    ||g_kind||^2 / ||g||^2 to first order. Groups by kind and half add up to their kind; other groups stand under their
    own names. None for a run directory whose parts hold no shares: it is of an earlier version, or has no rows.
    engine: which processes read it; None is this one.
    """
    run = run if isinstance(run, RunDirectory) else RunDirectory.load(run)
    sums: dict[str, float] = {}
    rows = 0
    for found in over_run(engine, run, ["norm_share"], _share_sums):
        if found is None:
            return None
        for name, total in found[0].items():
            sums[name] = sums[name] + total if name in sums else total
        rows += found[1]
    if not rows:
        return None
    shares: dict[str, float] = {}
    for name, total in sums.items():
        kind = _KINDS.get(name, name)
        shares[kind] = shares.get(kind, 0.0) + total / rows
    return shares


def _share_sums(parts: Iterator[Part]) -> tuple[dict[str, float], int] | None:
    """({group of layers: sum of its shares}, rows) of parts; None where one holds none."""
    sums: dict[str, float] = {}
    rows = 0
    for part in parts:
        if part.norm_shares is None:
            return None
        for name, shares in part.norm_shares.items():
            sums[name] = sums.get(name, 0.0) + float(shares.sum(dtype=np.float64))
        rows += len(next(iter(part.norm_shares.values()), ()))
    return sums, rows
