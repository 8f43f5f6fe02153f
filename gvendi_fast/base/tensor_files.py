"""Tensors with metadata in one safetensors file, which carries a digest: what is read is what was written.

A mean or a state of other content than its writer's changes every number that is made with it, so what a loader wants
of its content is said here and checked, also in files of earlier versions, which carry no digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import atomic_write
from gvendi_fast.base.places import is_url, open_file, place
from gvendi_fast.base.stand_ins import stand_in_at

if TYPE_CHECKING:
    import torch

TENSORS_VERSION = "1"
# Unit rows of float32 and their sums have their lengths to this share.
LENGTH = 1e-4
_PIECE = 1 << 20


def save_tensors(
    path: str | os.PathLike, kind: str, tensors: dict[str, torch.Tensor], words: dict[str, Any]
) -> None:
    """Write tensors and metadata (`words`, values of JSON) to one file; `kind` says what the file is."""
    from safetensors.torch import save

    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    texts = {name: json.dumps(value) for name, value in words.items()}
    texts = {"format": kind, "version": TENSORS_VERSION, **texts, "digest": _digest(tensors, texts)}
    with atomic_write(place(path)) as stream:
        stream.write(save(tensors, texts))


def load_tensors(
    path: str | os.PathLike,
    kind: str,
    writer: str,
    layout: Mapping[str, tuple[torch.dtype, int]],
    words: tuple[str, ...],
    fault: Callable[..., str | None],
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and metadata that `writer` saved.

    layout: the type and the number of dimensions of each tensor.
    words: the names of the metadata.
    fault: given all tensors and metadata by name, what is wrong with them, or None.
    A file that is missing, of another kind or version, or of other content raises GvendiError; one that cannot be read,
    OSError.
    """
    from safetensors import SafetensorError, safe_open

    wanted = f"wanted a file written by {writer} ({kind} version {TENSORS_VERSION})"
    try:
        # safetensors calls every failure a broken file.
        with open_file(path, 0) as stream:
            stream.read(1)
    except FileNotFoundError:
        raise GvendiError(f"{os.fspath(path)!r} does not exist; {wanted}") from None
    except IsADirectoryError:
        raise GvendiError(f"{os.fspath(path)!r} is a folder; {wanted}") from None
    try:
        with _here(path) as here, safe_open(here, framework="pt") as file:
            texts = file.metadata() or {}
            written = texts.get("format"), texts.get("version")
            if written != (kind, TENSORS_VERSION):
                raise GvendiError(f"{path} holds {written[0]} version {written[1]}; {wanted}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        what = stand_in_at(path) or f"not a safetensors file ({error})"
        raise GvendiError(f"{path} is {what}; {wanted}") from None
    values, why = _values(tensors, texts, layout, words)
    why = why or fault(**tensors, **values)
    if why is not None:
        raise GvendiError(f"{path} is damaged or was edited ({why}); {wanted}")
    return tensors, values


@contextmanager
def _here(path: str | os.PathLike) -> Iterator[str]:
    """A file of this machine with the bytes of a file or URL."""
    if not is_url(path):
        yield os.fspath(path)
        return
    with NamedTemporaryFile(suffix=".safetensors") as file:
        with open_file(path) as stream:
            shutil.copyfileobj(stream, file, _PIECE)
        file.flush()
        yield file.name


def _values(
    tensors: Mapping[str, torch.Tensor],
    texts: Mapping[str, str],
    layout: Mapping[str, tuple[torch.dtype, int]],
    words: tuple[str, ...],
) -> tuple[dict[str, Any], str | None]:
    """The metadata, and what is wrong with digest, names, types or dimensions, or None."""
    own = {name: text for name, text in texts.items() if name not in ("format", "version", "digest")}
    if texts.get("digest", digest := _digest(tensors, own)) != digest:
        return {}, "its digest does not agree"
    if set(tensors) != set(layout) or set(own) != set(words):
        return {}, f"it holds {', '.join(sorted({*tensors, *own})) or 'nothing'}"
    for name, (dtype, dims) in layout.items():
        if (tensors[name].dtype, tensors[name].dim()) != (dtype, dims):
            return {}, f"{name} is {tensors[name].dtype} {tuple(tensors[name].shape)}"
    try:
        return {name: json.loads(own[name]) for name in words}, None
    except (ValueError, RecursionError):
        return {}, "its metadata is not JSON"


def _digest(tensors: Mapping[str, torch.Tensor], texts: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(json.dumps(sorted(texts.items())).encode(), digest_size=8)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # No copy: a state of K = 8192 has half a gigabyte.
        digest.update(tensor.reshape(-1).numpy())
    return digest.hexdigest()
