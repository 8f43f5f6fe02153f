"""A meter's content as a `state_dict` and back: tensors on the CPU, numbers, strings, lists and dicts of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.integrations.meter_snapshot import Counts
from gvendi_fast.integrations.meter_stream import UNLABELLED, Stream

VERSION = 1


def saved(
    stream: Stream | None, settings: dict[str, Any], names: list[str], counts: Counts
) -> dict[str, Any]:
    """The content as copies; the window's rows are in the order of their age."""
    state: dict[str, Any] = {
        "version": VERSION,
        "settings": dict(settings),
        "names": names,
        "counts": [counts.seen, counts.zero, counts.non_finite],
    }
    if stream is None:
        return state
    tensors = {
        "rows": stream.aged(0, stream.n),
        "codes": torch.from_numpy(stream.codes[stream.places(0, stream.n)]),
        "left": stream.left,
        "batch": stream.batch,
        "batch_codes": torch.from_numpy(stream.batch_codes),
        "norms": torch.from_numpy(stream.norms),
    }
    if (average := stream.average) is not None:
        tensors |= {"average": average.matrix, "average_tail": average.tail}
        state["average_weights"] = [average.weight, average.squared]
    return state | {"tensors": {name: tensor.cpu().clone() for name, tensor in tensors.items()}}


def restored(
    state: Mapping[str, Any], window: int, decay: float | None, device: torch.device
) -> tuple[Stream | None, list[str], Counts]:
    """The stream, the names of sources and the counts; settings are taken to agree."""
    names, counts = list(state["names"]), Counts(*map(int, state["counts"]))
    if "tensors" not in state:
        return None, names, counts
    dim = state["settings"]["dim"]
    tensors = {name: tensor.to(device, copy=True) for name, tensor in state["tensors"].items()}
    stream = Stream(dim, window, decay, device)
    stream.n = len(tensors["rows"])
    stream.ring[: stream.n] = tensors["rows"]
    stream.codes[: stream.n] = tensors["codes"].cpu().numpy()
    stream.left, stream.batch = tensors["left"], tensors["batch"]
    stream.batch_codes, stream.norms = _array(tensors["batch_codes"]), _array(tensors["norms"])
    if stream.average is not None:
        stream.average.matrix, stream.average.tail = tensors["average"], tensors["average_tail"]
        stream.average.weight, stream.average.squared = map(float, state["average_weights"])
    return stream, names, counts


def check_saved(state: Any) -> None:
    """GvendiError for what `saved` has not written."""
    wanted = f"wanted what DiversityMeter.state_dict returned (version {VERSION})"
    if not isinstance(state, Mapping) or not {"version", "settings", "names", "counts"} <= set(state):
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise GvendiError(f"state is {found}; {wanted}")
    if state["version"] != VERSION:
        raise GvendiError(f"state is of version {state['version']!r}; {wanted}")
    settings, why = state["settings"], None
    if not {"dim", "window", "decay", "spec"} <= set(settings):
        why = f"settings holds {', '.join(sorted(settings))}"
    elif "tensors" in state:
        why = _fault(state["tensors"], settings, len(state["names"]))
    if why is not None:
        raise GvendiError(f"state is damaged ({why}); {wanted}")


def _fault(tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any], names: int) -> str | None:
    """What tensors have that a meter's cannot have. names: how many sources there are."""
    dim, window = settings["dim"], settings["window"]
    wanted = {"rows", "codes", "left", "batch", "batch_codes", "norms"}
    if settings["decay"] is not None:
        wanted |= {"average", "average_tail"}
    if wanted != set(tensors):
        return f"tensors holds {', '.join(sorted(tensors))}"
    n, batch = len(tensors["rows"]), len(tensors["batch"])
    shapes = {
        "rows": (n, dim), "codes": (n,), "left": (len(tensors["left"]), dim), "batch": (batch, dim),
        "batch_codes": (batch,), "norms": (batch,),
    }  # fmt: skip
    if settings["decay"] is not None:
        shapes |= {"average": (dim, dim), "average_tail": (len(tensors["average_tail"]), dim)}
    if n > window:
        return f"rows has {n} rows for a window of {window}"
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            return f"{name} has shape {tuple(tensors[name].shape)}, not {shape}"
    for name in ("codes", "batch_codes"):
        codes = tensors[name]
        if codes.dtype != torch.int64 or bool(((codes < UNLABELLED) | (codes >= names)).any()):
            return f"{name} has numbers of other than {names} sources"
    return None


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy().copy()
