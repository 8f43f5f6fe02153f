"""Proxies in one GGUF file, as llama.cpp and its kin read them: weights, numbers of the model, and tokenizer.

transformers reads such a file into the model that it was made of; quantised weights become matrices of the dtype that
is asked for. So the gradients are those of that model at the weights as the file has them.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.sketching.proxy.hub import PICKLED, SAFETENSORS

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
# What reading one takes.
NEEDED = ("gguf", "accelerate")


def find_gguf(path: Path, name: str) -> Path | None:
    """The GGUF file that a proxy's path means: itself, or the only one of a folder without other weights; else None.

    Raises GvendiError for a folder with several, and for what cannot be read as one model.
    """
    if path.is_dir():
        if any(next(path.glob(pattern), None) for pattern in (SAFETENSORS[0], PICKLED[0])):
            return None
        # Next to a model that also sees lies its tower.
        found = sorted(p for p in path.glob(f"*{SUFFIX}") if not p.name.startswith("mmproj"))
        if not found:
            return None
        parts = [p for p in found if _SPLIT.search(p.name)]
        if len(found) > 1 and parts != found:
            raise GvendiError(
                f"The proxy {name!r} is a folder with {len(found)} GGUF files ({', '.join(p.name for p in found[:4])}"
                + ", ..." * (len(found) > 4)
                + "); give the path of one of them"
            )
        path = found[0]
    elif path.suffix != SUFFIX:
        return None
    _check(path, name)
    return path


def _check(path: Path, name: str) -> None:
    if split := _SPLIT.search(path.name):
        raise GvendiError(
            f"The proxy {name!r} cannot be loaded: {path} is one of {int(split[2])} parts of a model, and transformers "
            f"reads one file; join them (llama-gguf-split --merge {path.name} whole{SUFFIX}) and give that file"
        )
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != _MAGIC:
        raise GvendiError(
            f"The proxy {name!r} cannot be loaded: {path} is no GGUF file (it begins with {magic!r}); download it "
            "again, or use proxy 'tiny'"
        )
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        raise GvendiError(
            f"The proxy {name!r} is a GGUF file, for which transformers needs {' and '.join(missing)}: "
            'pip install "gvendi-fast[gguf]"'
        )


def loading_options(path: Path) -> dict[str, Any]:
    """What `from_pretrained` takes beside the file's folder, for weights as matrices."""
    import transformers

    options: dict[str, Any] = {"gguf_file": path.name}
    # Later releases keep the code where they have a kernel for it, which has no backward pass.
    config = getattr(transformers, "GgufConfig", None)
    if config is not None:
        options["quantization_config"] = config(gguf_file=path.name, dequantize=True)
    return options


def stored_as(path: Path) -> str:
    """How a GGUF file has most of its weights, such as "GGUF Q4_K": the type with most numbers in matrices."""
    from gguf import GGUFReader

    counts: dict[str, int] = {}
    for tensor in GGUFReader(str(path)).tensors:
        if len(tensor.shape) > 1:
            counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return "GGUF " + max(counts, key=counts.__getitem__) if counts else "GGUF"
