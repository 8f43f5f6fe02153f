"""Tensors with a few words beside them in one safetensors file, which is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from gvendi_fast.atomic import atomic_write
from gvendi_fast.errors import GvendiError

VERSION = "1"


def save_tensors(
    path: str | os.PathLike, kind: str, tensors: dict[str, torch.Tensor], words: dict[str, str]
) -> None:
    """Write the tensors and the words; `kind` says what the file is."""
    words = {"format": kind, "version": VERSION, **words}
    with atomic_write(Path(path)) as stream:
        stream.write(save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, words))


def load_tensors(
    path: str | os.PathLike, kind: str, writer: str, device: str | torch.device
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What `save_tensors` wrote for `writer`. Another kind of file, or another version, raises GvendiError."""
    wanted = f"wanted a file written by {writer} ({kind} version {VERSION})"
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            words = file.metadata() or {}
            found = words.get("format"), words.get("version")
            if found != (kind, VERSION):
                raise GvendiError(f"{path} holds {found[0]} version {found[1]}; {wanted}")
            return {name: file.get_tensor(name).to(device) for name in file.keys()}, words  # noqa: SIM118
    except SafetensorError as error:
        raise GvendiError(f"{path} is not a safetensors file ({error}); {wanted}") from None
