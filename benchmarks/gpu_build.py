"""What a machine is, and what a bare one lacks: the compiled modules and the Triton builds, made side by side.

    python benchmarks/gpu_build.py SHARE OF     (what the processes of the "build" section run)

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
import time
from importlib import metadata

import torch
from environment import ROOT, describe_machine
from gpu_checks import DTYPES, SIZES, SMOKE_SIZE, cases
from gpu_model import DTYPE
from gpu_timing import Bench, Figure, NotMeasuredError
from shapes import QWEN_05B

from gvendi_fast import GradientSketcher, SketchSpec
from gvendi_fast.backends import backend, use_backend

TOOLS = ("nvcc", "cmake", "ninja", "g++")
PACKAGES = ("triton", "pybind11", "liger-kernel", "bergson", "accelerate", "flash-attn")
FOLDER = ROOT / "build" / "gpu"
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
    extensions = functools.cache(lambda: start_extensions(bench))
    return [
        Figure("triton builds", lambda: triton_builds(bench, extensions)),
        Figure("extensions", lambda: finish_extensions(extensions)),
    ]


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


def start_extensions(bench: Bench) -> subprocess.Popen | None:
    """CMake on both modules, for the GPU that is there alone; None in a rehearsal, which leaves the tree as it is."""
    if bench.dry:
        return None
    if bench.device.type != "cuda":
        raise NotMeasuredError("no GPU")
    if shutil.which("cmake") is None:
        raise NotMeasuredError("there is no cmake")
    cuda = shutil.which("nvcc") is not None
    major, minor = torch.cuda.get_device_capability(0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    configure = [
        "cmake",
        *("-S", str(ROOT), "-B", str(FOLDER)),
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
    build = ["cmake", "--build", str(FOLDER), "--parallel", "--target", *targets, "--", *go_on]
    # A cache of another Python would point into that one.
    (FOLDER / "CMakeCache.txt").unlink(missing_ok=True)
    script = " && ".join(shlex.join(command) for command in (configure, build))
    return subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish_extensions(extensions: functools._lru_cache_wrapper) -> dict[str, object]:
    """Wait for CMake, and ask a new process whether the modules load."""
    began, process = time.monotonic(), extensions()
    if process is not None:
        said, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(
                f"CMake ended with code {process.returncode}: {' | '.join(said.splitlines()[-4:])}"
            )
    ask = "from gvendi_fast.backends import explain; print(explain()['cpu'], explain()['cuda'], sep='\\n')"
    said = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=True)
    cpu, cuda = said.stdout.strip().splitlines()
    return {"waited seconds": round(time.monotonic() - began, 1), "cpu": cpu, "cuda": cuda}


def triton_builds(bench: Bench, extensions: functools._lru_cache_wrapper) -> dict[str, object]:
    """Launch every case's kernels once, in as many processes as there are cores for."""
    extensions()
    if bench.device.type != "cuda":
        raise NotMeasuredError("no GPU")
    if reason := backend("triton").why_not("linear_sketch", torch.empty(1, 64, device=bench.device)):
        raise NotMeasuredError(reason)
    count = max(1, min(MOST_PROCESSES, (os.cpu_count() or 1) - 2))
    command = [sys.executable, __file__]
    running = [
        subprocess.Popen(
            [*command, str(i), str(count)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(count)
    ]
    said = [process.communicate() for process in running]
    failed = [
        f"process {i}: {(error.strip().splitlines() or ['no word'])[-1]}"[:200]
        for i, (process, (_, error)) in enumerate(zip(running, said, strict=True))
        if process.returncode
    ]
    errors = [line[:200] for out, _ in said for line in out.splitlines()]
    return {"processes": count, "processes that crashed": failed, "launches that failed": errors}


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
                print(f"{type(error).__name__}: {error}".splitlines()[0])
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
