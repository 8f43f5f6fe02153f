"""What a user hands to a meter, checked: sketches, labels of sources, settings that have to be alike."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gvendi_fast.base.differences import same_spec
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.integrations.meter_stream import UNLABELLED

Label = str | int
Labels = Label | Sequence[Label] | np.ndarray | torch.Tensor


def sketch_rows(sketches: Any, dim: int | None) -> torch.Tensor:
    """The matrix [S, K] of `Sketches`, a tensor or an array, without its graph; GvendiError if it is none."""
    rows = getattr(sketches, "z", sketches)
    if isinstance(rows, torch.Tensor) and rows.is_meta:
        raise GvendiError("sketches is on the meta device; wanted a tensor [S, K] with values")
    if isinstance(rows, np.ndarray) and np.issubdtype(rows.dtype, np.floating):
        rows = torch.from_numpy(np.array(rows, np.float64 if rows.dtype.itemsize >= 8 else np.float32))
    if not isinstance(rows, torch.Tensor):
        what = f"an array of {rows.dtype}" if isinstance(rows, np.ndarray) else f"a {type(rows).__name__}"
        raise GvendiError(f"sketches is {what}; wanted Sketches, or a float tensor or array [S, K]")
    if rows.dim() != 2 or rows.shape[1] == 0 or not rows.is_floating_point() or rows.layout != torch.strided:
        raise GvendiError(
            f"sketches is {rows.dtype} of shape {tuple(rows.shape)}, {rows.layout}; wanted a dense float tensor "
            "[S, K], one sketch a row: a single sketch z is z[None]"
        )
    if dim is not None and rows.shape[1] != dim:
        raise GvendiError(
            f"sketches has K = {rows.shape[1]}, and this meter holds sketches of K = {dim}; sketch with one "
            "SketchSpec(dim=...), use a meter for each K, or call reset() first"
        )
    return rows.detach()


def label_of(label: Any, argument: str = "group") -> str:
    """A source's name by one label of the argument; GvendiError for anything but str and int."""
    if isinstance(label, str):
        return str(label)
    if not isinstance(label, bool) and hasattr(label, "__index__"):
        return str(operator.index(label))
    raise GvendiError(
        f"{argument} holds {label!r}, a {type(label).__name__}; wanted str or int labels of sources"
        + (", or group=None for none" if argument == "group" else "")
    )


def plain_labels(labels: Labels, argument: str) -> Any:
    """Labels of an argument as Python's values: a list or tuple of one a sample, or one for all."""
    if isinstance(labels, torch.Tensor) and labels.is_meta:
        raise GvendiError(f"{argument} is on the meta device; wanted labels with values")
    return labels.tolist() if isinstance(labels, np.ndarray | torch.Tensor) else labels


def check_decay(decay: Any) -> float | None:
    """The decay as a float."""
    if decay is None:
        return None
    if isinstance(decay, bool) or not isinstance(decay, numbers.Real) or not 0 < float(decay) < 1:
        raise GvendiError(
            f"decay is {decay!r}; wanted a number between 0 and 1, such as 0.999, by which a sample's weight falls "
            "with each sample that follows, or None for no average"
        )
    return float(decay)


class Sources:
    """The numbers of sources by name.

    names: {label: name} of sources that come by number; other labels are names themselves. Two labels of one name are
        one source.
    """

    def __init__(self, names: Mapping[Label, str] | None) -> None:
        if names is not None and not isinstance(names, Mapping):
            raise GvendiError(
                f"names is {names!r}; wanted a mapping from labels to names, such as dict(enumerate(names))"
            )
        self.given = {label_of(label, "names"): str(name) for label, name in (names or {}).items()}
        self._codes: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def names(self) -> list[str]:
        """By number."""
        return list(self._codes)

    def codes(self, group: Labels | None, samples: int) -> np.ndarray:
        """The number of each sample's source, int64 [S]; GvendiError, and nothing changed, for what are no labels."""
        if group is None:
            return np.full(samples, UNLABELLED, np.int64)
        plain = plain_labels(group, "group")
        if isinstance(plain, list | tuple):
            if len(plain) != samples:
                raise GvendiError(
                    f"group has {len(plain)} labels for {samples} samples; give one for each, or one label for all"
                )
            labels = [label_of(label) for label in plain]
        else:
            labels = [label_of(plain)] * samples
        found = (self.given.get(label, label) for label in labels)
        return np.array([self._codes.setdefault(name, len(self._codes)) for name in found], np.int64)

    def number(self, names: Sequence[str]) -> None:
        """Number these, and forget others."""
        self._codes = {name: code for code, name in enumerate(names)}

    def forget(self, used: set[int]) -> np.ndarray:
        """Keep these numbers' names alone; the new number of each old one, and of UNLABELLED at the end."""
        kept, names = sorted(used - {UNLABELLED}), self.names
        table = np.full(len(names) + 1, UNLABELLED, np.int64)
        table[kept] = np.arange(len(kept))
        self.number([names[code] for code in kept])
        return table


def check_alike(settings: Sequence[Mapping[str, Any]], what: str, remedy: str) -> None:
    """GvendiError unless what meters say of each setting agrees; None fits every dim and spec."""
    for name in settings[0]:
        said = [(i, one[name]) for i, one in enumerate(settings)]
        if name in ("dim", "spec"):
            said = [(i, value) for i, value in said if value is not None]
        for i, value in said[1:]:
            first, wanted = said[0]
            if not (same_spec(value, wanted) if name == "spec" else value == wanted):
                raise GvendiError(
                    f"{what} differ in {name}: {wanted!r} in {first} and {value!r} in {i}, counted from 0; {remedy}"
                )
