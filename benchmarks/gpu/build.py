"""What a machine is, and what a bare one lacks: the compiled modules and the Triton builds, made side by side.

    python -m benchmarks.gpu.build SHARE OF     (what the processes of the "build" section run)

Triton compiles where a kernel is first launched, one after the other; here every process launches its share of the
checks once and leaves the builds in Triton's cache, while CMake and nvcc run beside them.
"""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.environment import ROOT, describe_machine
from benchmarks.gpu.checks import DTYPES, SIZES, SMOKE_SIZE, cases
from benchmarks.gpu.model import DTYPE
from benchmarks.gpu.timing import Bench, Figure, NotMeasuredError
from benchmarks.shapes import QWEN_05B
from gvendi_fast import GradientSketcher, SketchSpec
from gvendi_fast.kernels.backends import backend, use_backend

TOOLS = ("nvcc", "cmake", "ninja", "g++")
PACKAGES = ("triton", "pybind11", "liger-kernel", "bergson", "accelerate", "flash-attn")
BUILD = ROOT / "build" / "gpu"
FAILED = "launch failed:"
TARGETS = ("_cpu", "_cuda")
# Processes that compile for Triton; nvcc needs some cores too.
MOST_PROCESSES = 12


def figures(section: str, bench: Bench) -> list[Figure]:
    """Of "versions" the machine and its limits; of "build" the modules and the Triton builds."""
    if section == "versions":
        return [
            Figure("machine", lambda: machine(bench)),
            Figure("limits", lambda: {"limits": bench.limits()}),
        ]
    return [
        Figure("extensions", lambda: finish_extensions(start_builds(bench)), seconds=150),
        Figure("triton builds", lambda: finish_triton(start_builds(bench)), seconds=150),
    ]


@dataclass(frozen=True)
class Builds:
    """CMake and the processes that launch Triton kernels, side by side, or why there are none; None: all is built."""

    cmake: subprocess.Popen | str | None
    triton: list[subprocess.Popen] | str


@functools.cache
def start_builds(bench: Bench) -> Builds:
    """Start everything that takes the CPUs' time at once."""
    folder = Path(tempfile.mkdtemp())
    return Builds(start_extensions(bench, folder), start_triton(bench, folder))


def start(command: list[str], said: Path) -> subprocess.Popen:
    """A process whose words go to a file: nobody reads them before it is done."""
    process = subprocess.Popen(command, stdout=said.open("wb"), stderr=subprocess.STDOUT)
    process.said = said
    return process


def machine(bench: Bench) -> dict[str, object]:
    """The machine with its tools and the packages that some figures need."""
    on_gpu = bench.device.type == "cuda"
    installed = {name: _version(name) for name in PACKAGES}
    found = {tool: shutil.which(tool) is not None for tool in TOOLS}
    return {
        "gpu": "none",
        **describe_machine(),
        **{name: version for name, version in installed.items() if version},
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(0)) if on_gpu else None,
        "tools": found,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def are_built() -> bool:
    """Whether this Python's modules are there, none of them older than a file of their source."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    modules = [ROOT / "gvendi_fast" / f"{name}{suffix}" for name in TARGETS]
    sources = [ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.*")]
    return all(module.exists() for module in modules) and min(
        module.stat().st_mtime for module in modules
    ) >= max(source.stat().st_mtime for source in sources)


def start_extensions(bench: Bench, folder: Path) -> subprocess.Popen | str | None:
    """CMake on both modules, for the GPU that is there alone; None where they are built.

    A rehearsal leaves the tree as it is.
    """
    if bench.device.type != "cuda" or bench.dry:
        return "a rehearsal builds nothing"
    if are_built():
        return None
    if shutil.which("cmake") is None:
        return "there is no cmake"
    cuda = shutil.which("nvcc") is not None
    major, minor = torch.cuda.get_device_capability(0)
    BUILD.mkdir(parents=True, exist_ok=True)
    configure = [
        "cmake",
        *("-S", str(ROOT), "-B", str(BUILD)),
        *(["-GNinja"] if shutil.which("ninja") else []),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={ROOT / 'gvendi_fast'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DGVENDI_CUDA={'ON' if cuda else 'OFF'}",
        f"-DGVENDI_CUDA_ARCHITECTURES={major}{minor}-real",
    ]
    targets = TARGETS if cuda else TARGETS[:1]
    # One module that fails does not keep the other from being made.
    go_on = ["-k", "0"] if shutil.which("ninja") else ["-k"]
    build = ["cmake", "--build", str(BUILD), "--parallel", "--target", *targets, "--", *go_on]
    # A cache of another Python would point into that one.
    (BUILD / "CMakeCache.txt").unlink(missing_ok=True)
    script = " && ".join(shlex.join(command) for command in (configure, build))
    return start(["sh", "-c", script], folder / "cmake")


def finish_extensions(builds: Builds) -> dict[str, object]:
    """Wait for CMake, and ask a new process whether the modules load."""
    began = time.monotonic()
    if isinstance(builds.cmake, str):
        raise NotMeasuredError(builds.cmake)
    if builds.cmake is not None and builds.cmake.wait():
        lines = builds.cmake.said.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "error" in line.lower()][:4] or lines[-4:]
        raise RuntimeError(f"CMake ended with code {builds.cmake.returncode}: {' | '.join(errors)}")
    ask = "from gvendi_fast.kernels.backends import explain; print(explain()['cpu'], explain()['cuda'], sep='\\n')"
    said = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    cpu, cuda = said.stdout.strip().splitlines()
    return {"waited seconds": round(time.monotonic() - began, 1), "cpu": cpu, "cuda": cuda}


def start_triton(bench: Bench, folder: Path) -> list[subprocess.Popen] | str:
    """Processes that launch every case's kernels once, as many as there are cores for."""
    if bench.device.type != "cuda":
        return "no GPU"
    if reason := backend("triton").why_not("linear_sketch", torch.empty(1, 64, device=bench.device)):
        return reason
    count = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2))
    return [
        start([sys.executable, "-m", "benchmarks.gpu.build", str(i), str(count)], folder / f"triton-{i}")
        for i in range(count)
    ]


def finish_triton(builds: Builds) -> dict[str, object]:
    """Wait until all have launched theirs; a launch that fails is seen again where it is checked."""
    if isinstance(builds.triton, str):
        raise NotMeasuredError(builds.triton)
    began, crashed, errors = time.monotonic(), [], []
    for number, process in enumerate(builds.triton):
        code = process.wait()
        lines = process.said.read_text(errors="replace").strip().splitlines()
        errors += [line[:200] for line in lines if line.startswith(FAILED)]
        if code:
            crashed.append(f"process {number}, code {code}: {lines[-1] if lines else ''}"[:200])
    return {
        "waited seconds": round(time.monotonic() - began, 1),
        "processes": len(builds.triton),
        "processes that crashed": crashed,
        "launches that failed": errors,
    }


def warm(share: int, of: int) -> None:
    """Launch this process's share of what the other sections will launch; what fails there says so there."""
    device = torch.device("cuda")
    jobs = [lambda: one_layer(device)]
    for size in (SMOKE_SIZE, *SIZES):
        for label in DTYPES if size != SMOKE_SIZE else ("bf16",):
            for case in cases(device, label, *size):
                if case.why_not("triton") is None:
                    jobs.append(case.run)
    with use_backend("triton"):
        for job in jobs[share::of]:
            try:
                job()
                torch.cuda.synchronize()
            except Exception as error:
                print(FAILED, f"{type(error).__name__}: {error}".splitlines()[0])
                # Raises where the device is lost, which ends this process.
                torch.cuda.synchronize()


def one_layer(device: torch.device) -> None:
    """A few tokens through one layer of the model that is measured, at its widths."""
    import transformers

    with device:
        config = transformers.Qwen2Config(
            **{**QWEN_05B.config, "num_hidden_layers": 1}, tie_word_embeddings=True
        )
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    ids = torch.randint(0, config.vocab_size, (8, 128))
    sketcher = GradientSketcher(model, SketchSpec())
    # Counts of rows that 16 divides compile to other code than those it does not, which the head's chunks may have.
    for some in (ids, ids[:4]):
        sketcher(some, some)


if __name__ == "__main__":
    warm(*map(int, sys.argv[1:]))
