"""Every Triton kernel and shipped tile size compiles for each target GPU, without one, and spills no register.

The compiler runs in a process of its own: in this one Triton may be set to interpret kernels.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

CAPABILITIES = (80, 90, 100)
TRITON = metadata.version("triton") if importlib.util.find_spec("triton") else "0.0"
# What a block may use without asking for more.
SHARED_BYTES = 48 << 10
# Bytes of a thread's stack, the most of all targets and of Triton 3.6 and 3.9; none elsewhere. The assembler stops at
# 128 or 255 registers, and keeps the rest there:
# dense (3.9 alone): rather than half the columns of a program and every gradient formed twice as often.
# linear_sketch of 4096 (sm_100) and 8192 (sm_80), assign (sm_90) and covariance-64 (3.9 alone): 128 registers, at which
# two blocks of 8 warps share a multiprocessor.
STACK_BYTES = {
    "linear_sketch-bf16-4096-parts1": 16,
    "linear_sketch-bf16-8192-parts1": 40,
    "assign": 16,
}
if tuple(map(int, TRITON.split(".")[:2])) >= (3, 7):
    STACK_BYTES |= {
        "covariance-64": 88,
        "dense_linear-bf16-64": 8,
        "dense_linear-bf16-64-aligned": 16,
        "dense_token-bf16-64": 8,
        "dense_linear-bf16-512": 16,
        "dense_linear-fp16-512": 8,
        "dense_linear-fp32-512": 8,
        "dense_linear-bf16-512-aligned": 24,
        "dense_linear-fp16-512-aligned": 24,
        "dense_linear-fp32-512-aligned": 32,
    }


def compile_all(capability: int) -> dict[str, dict[str, int]]:
    """{"name sm_80": registers, stack, local and shared bytes of a thread or block} of every build for one target."""
    from triton_ahead import compile_build, tool
    from triton_builds import builds

    found, cubins = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for build in builds().values():
            kernel = compile_build(build, capability)
            key = f"{build.name} sm_{capability}"
            cubins[key] = Path(folder) / f"{len(cubins)}.cubin"
            cubins[key].write_bytes(kernel.asm["cubin"])
            found[key] = {"shared": kernel.metadata.shared}
        for key, cubin in cubins.items():
            usage = subprocess.run(
                [tool("cuobjdump"), "-res-usage", cubin], capture_output=True, text=True, check=True
            )
            match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout + usage.stderr)
            found[key] |= dict(zip(("registers", "stack", "local"), map(int, match.groups()), strict=True))
    return found


if __name__ == "__main__":
    print(json.dumps(compile_all(int(sys.argv[1]))))
    sys.exit()

pytest.importorskip("triton", reason="needs Triton's compiler: pip install triton")

from triton_builds import builds  # noqa: E402


@pytest.fixture(scope="module")
def usage() -> dict[str, dict[str, int]]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    # One process for each target, side by side.
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(capability)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for capability in CAPABILITIES
    ]
    found: dict[str, dict[str, int]] = {}
    for process in running:
        out, error = process.communicate()
        assert process.returncode == 0, error
        found |= json.loads(out)
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", list(builds()))
def test_no_register_is_spilled(usage, name, capability):
    found = usage[f"{name} sm_{capability}"]
    # Spilled registers live on a thread's stack.
    assert found["stack"] <= STACK_BYTES.get(name, 0)
    assert found["local"] == 0
    assert 0 < found["registers"] <= 255
    assert found["shared"] <= SHARED_BYTES
