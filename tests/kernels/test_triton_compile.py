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
from collections.abc import Iterator, Sequence
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
# expert_sketch of 8192 (sm_100): 255 registers, which the two transforms of a row fill.
# linear_sketch of 4096 (sm_100) and 8192 (sm_80), assign (sm_90) and covariance-64 (3.9 alone): 128 registers, at which
# two blocks of 8 warps share a multiprocessor.
STACK_BYTES = {
    "linear_sketch-bf16-4096-parts1": 16,
    "linear_sketch-bf16-8192-parts1": 40,
    "assign": 16,
    "expert_sketch-bf16-8192-weights": 16,
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


def usage_of(name: str, capability: int) -> dict[str, int]:
    """Registers, and stack, local and shared bytes, of a thread or block of a build for one target."""
    from triton_ahead import compile_build, tool
    from triton_builds import builds

    kernel = compile_build(builds()[name], capability)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        said = subprocess.run(
            [tool("cuobjdump"), "-res-usage", cubin], capture_output=True, text=True, check=True
        )
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said.stdout + said.stderr)
    found = dict(zip(("registers", "stack", "local"), map(int, match.groups()), strict=True))
    return found | {"shared": kernel.metadata.shared}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(usage_of(line.strip(), int(sys.argv[1]))), flush=True)
    sys.exit()

pytest.importorskip("triton", reason="needs Triton's compiler: pip install triton")

from triton_builds import builds  # noqa: E402


class Compiler:
    """A process that compiles for one target what it was told of, in that order, while the tests before wait.

    errors: where it writes what nobody reads unless it fails; a pipe would fill.
    """

    def __init__(self, capability: int, names: Sequence[str], errors: Path) -> None:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        self._errors = errors
        with errors.open("w") as stream:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(capability)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                env=env,
            )
        self._process.stdin.write("".join(f"{name}\n" for name in names))
        self._process.stdin.close()
        self._waiting, self._found = list(names), {}

    def usage(self, name: str) -> dict[str, int]:
        while name not in self._found:
            line = self._process.stdout.readline()
            if not line:
                pytest.fail(f"the compiler ended at {self._waiting[0]}:\n{self._errors.read_text()}")
            self._found[self._waiting.pop(0)] = json.loads(line)
        return self._found[name]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def compilers(request, tmp_path_factory) -> Iterator[dict[int, Compiler]]:
    """{capability: its compiler}, side by side, each with the builds of the tests that are run.

    A test waits for its own build: all of them in the fixture took minutes that counted as the first test's.
    """
    asked: dict[int, list[str]] = {}
    for item in request.session.items:
        if item.path == request.path and hasattr(item, "callspec"):
            asked.setdefault(item.callspec.params["capability"], []).append(item.callspec.params["name"])
    folder = tmp_path_factory.mktemp("compilers")
    started = {
        capability: Compiler(capability, names, folder / str(capability))
        for capability, names in asked.items()
    }
    yield started
    for compiler in started.values():
        compiler.stop()


# On the targets beside sm_90: of a kernel's builds those between its smallest and its largest size, its second and
# third part, other 16-bit floats and rows that are not aligned are in soak, unless they are known to need a stack.
BETWEEN = re.compile(r"-(128|256|512|2048)(-|$)|-parts[23]|-fp16-|unaligned$")


def is_daily(name: str, capability: int) -> bool:
    return capability == 90 or name in STACK_BYTES or BETWEEN.search(name) is None


# The targets of a kernel one after the other, as the processes come to it.
@pytest.mark.parametrize(
    ("capability", "name"),
    [
        pytest.param(capability, name, marks=() if is_daily(name, capability) else pytest.mark.soak)
        for name in builds()
        for capability in CAPABILITIES
    ],
)
def test_no_register_is_spilled(compilers, name, capability):
    found = compilers[capability].usage(name)
    # Spilled registers live on a thread's stack.
    assert found["stack"] <= STACK_BYTES.get(name, 0)
    assert found["local"] == 0
    assert 0 < found["registers"] <= 255
    assert found["shared"] <= SHARED_BYTES
