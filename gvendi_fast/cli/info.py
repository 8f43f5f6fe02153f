"""`gvendi info`: versions, backends with their reasons, devices."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

from gvendi_fast.base._version import __version__
from gvendi_fast.base.printing import put, put_json
from gvendi_fast.cli.options import Json

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "pyarrow", "triton")


def info(as_json: Json = False) -> None:
    """Show backends, instruction set, number formats and versions, and why anything is missing.

    A report of a fault begins with what this prints.
    """
    found = describe()
    if as_json:
        put_json(found)
        return
    for name, value in found.items():
        put(f"{name:<24}{value}")


def describe() -> dict[str, str]:
    """{what: value or why it is missing}, in the order to print."""
    # With its e-mail parser it would be a tenth of every command's start.
    from importlib import metadata

    import torch

    from gvendi_fast.kernels.backends import explain, requested
    from gvendi_fast.sketching.gradients.compiled import why_no_compiler
    from gvendi_fast.sketching.proxy.attention import resolve_attention
    from gvendi_fast.sketching.proxy.load import resolve_dtype

    installed = {
        d.metadata["Name"].lower(): d.version for d in metadata.distributions() if d.metadata["Name"]
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, reason = resolve_dtype("auto", device)
    lines = {"gvendi-fast": __version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    lines |= {name: installed.get(name, "not installed") for name in PACKAGES}
    lines["device"] = torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu (torch sees no GPU)"
    lines["threads"] = _threads()
    lines["--dtype auto"] = f"{str(dtype).removeprefix('torch.')} ({reason})"
    attention, why = resolve_attention(None, device, dtype)
    lines["--attention auto"] = f"{attention} ({why})"
    missing = why_no_compiler(device)
    lines["--compile auto"] = f"never ({missing})" if missing else _compiles(device)
    lines |= {f"backend {name}": status for name, status in explain().items()}
    lines |= operation_lines(device, dtype)
    if requested():
        lines["backend requested"] = str(requested())
    return lines


def _threads() -> str:
    """How many a run would take now, why, and how they wait."""
    import torch

    from gvendi_fast.base.threads import WAITING, choose
    from gvendi_fast.cli.threads import LOAD

    chosen = choose(None, os.environ, LOAD.cores())
    wait = ", ".join(f"{name}={os.environ[name]}" for name in WAITING if name in os.environ)
    return f"{chosen.count or torch.get_num_threads()} ({chosen.why}); {wait or 'they wait as OpenMP does'}"


def _compiles(device: torch.device) -> str:
    """When a run on this device compiles its pass, in one clause."""
    from gvendi_fast.sketching.gradients.compiled import LEAST_TOKENS, choose_compile

    is_compiled, why = choose_compile("auto", device, LEAST_TOKENS)
    return f"from about {LEAST_TOKENS:,} tokens on" if is_compiled else f"never ({why})"


# Sketches are float32, whatever the proxy's weights are.
ON_SKETCHES = ("assign", "covariance", "entropy", "gain")


def operation_lines(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """{operation: its backend on a GPU and why}; on a CPU {backend: its operations}."""
    import torch

    from gvendi_fast.kernels.backends import choose, operations

    found = {op: choose(op, device, torch.float32 if op in ON_SKETCHES else dtype) for op in operations()}
    if device.type == "cuda":
        return {
            op: f"{one.name} ({one.why})" if one.runs else f"{one.name} cannot run it: {one.why}"
            for op, one in found.items()
        }
    lines: dict[str, str] = {}
    for op, one in found.items():
        title = f"{'runs' if one.runs else 'cannot run'} on {one.name}"
        lines[title] = f"{lines[title]}, {op}" if title in lines else op
    return lines
