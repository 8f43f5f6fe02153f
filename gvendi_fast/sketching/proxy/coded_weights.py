"""Weights that a folder holds in a code, or that are to be put into one while they are loaded.

Where the code's library hands gradients on, the layers stay as they are (`gradients.quantised` says which do); where
there is only a kernel for inference, transformers is asked for matrices.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gvendi_fast.base.errors import GvendiError

# What `load_proxy` puts weights into while it loads them, and how many bits that has.
QUANTIZE = {"4bit": 4, "8bit": 8}
# Methods whose layers run kernels without a backward pass, or become matrices when they are first run.
_AS_MATRICES = ("fp8", "mxfp4", "compressed-tensors")


def check_quantize(quantize: str | None) -> None:
    """GvendiError for a word that is none of QUANTIZE, and where the package for it is not there."""
    if quantize is None:
        return
    if quantize not in QUANTIZE:
        raise GvendiError(
            f"quantize is {quantize!r}; wanted one of {', '.join(QUANTIZE)}; leave it out for weights as they are"
        )
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise GvendiError(
            f'quantize={quantize!r} needs {" and ".join(missing)}: pip install "gvendi-fast[quantised]"'
        )


def quantize_options(quantize: str, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` takes for weights that are coded while they are loaded."""
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    coded = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": coded}


def check_coded(model: nn.Module, folder: Path, name: str) -> None:
    """GvendiError where a config says that weights are coded by bitsandbytes, and they are not."""
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt") and weight.is_floating_point():
            raise GvendiError(
                f"The weights of the proxy {name!r} are not coded, though the quantization_config in "
                f"{folder / 'config.json'} says so (bitsandbytes; first: {path}.weight); take that entry out, and give "
                "--quantize 4bit or 8bit (load_proxy(quantize='4bit')) to have them coded while they are loaded"
            )


def as_matrices(quantization: dict[str, Any]) -> None:
    """Ask, in a config's `quantization_config`, for matrices where the code has no backward pass."""
    if quantization.get("quant_method") in _AS_MATRICES:
        quantization["dequantize"] = True
        # The same for compressed-tensors in transformers 4.
        if quantization["quant_method"] == "compressed-tensors":
            quantization["run_compressed"] = False


def described(quantization: dict[str, Any]) -> str:
    """A config's `quantization_config` in a few words, such as "bitsandbytes 4-bit nf4", for a run's spec."""
    method = str(quantization.get("quant_method", "bitsandbytes"))
    words = [method]
    if quantization.get("load_in_4bit") or quantization.get("_load_in_4bit"):
        words = ["bitsandbytes 4-bit", str(quantization.get("bnb_4bit_quant_type", "fp4"))]
        words += ["double"] * bool(quantization.get("bnb_4bit_use_double_quant"))
    elif quantization.get("load_in_8bit") or quantization.get("_load_in_8bit"):
        words = ["bitsandbytes 8-bit"]
    elif isinstance(quantization.get("bits"), int):
        words.append(f"{quantization['bits']}-bit")
    elif isinstance(quantization.get("format"), str):
        words.append(quantization["format"])
    elif isinstance(quantization.get("quant_type"), (str, dict)):
        kind = quantization["quant_type"]
        words.append(kind if isinstance(kind, str) else str(_name_of(kind)))
    elif isinstance(quantization.get("weights"), str):
        words.append(quantization["weights"])
    return " ".join(words)


def _name_of(kind: dict[str, Any]) -> Any:
    inner = kind.get("default", kind)
    return inner.get("_type", "") if isinstance(inner, dict) else inner
