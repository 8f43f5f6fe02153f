"""The CUDA module builds without a GPU, its kernels keep to registers, and it loads where there is no driver."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from kept_builds import kept
from places import ROOT

from gvendi_fast.base.files import atomic_write
from gvendi_fast.kernels.backends import cuda

# Kernel -> registers it may use so that its __launch_bounds__ blocks fit a multiprocessor (65,536 registers).
REGISTERS = {
    "fold_hadamard_rows": 128,
    "linear_sketch_chunk": 128,
    "linear_sketch_reduce": 255,
    "dense_sketch_slab": 255,
    "dense_token_slab": 255,
    "dense_reduce_slabs": 255,
}
# Bytes that ptxas (13.0) stores and loads beside the registers: loop invariants at the cap, on these alone.
SPILLED = {
    ("linear_sketch_chunk", "sm_80"): 16,
    ("linear_sketch_chunk", "sm_90"): 16,
    ("linear_sketch_chunk", "sm_100"): 16,
    ("dense_sketch_slab", "sm_100"): 88,
}


# As GVENDI_CUDA_ARCHITECTURES: one of them every day, where each takes a dozen seconds, and all that are supported.
EVERY_DAY, ALL = "90", ""
COMPILERS = (os.environ.get("CUDACXX", "nvcc"), os.environ.get("CXX", "c++"), "cmake")
# The kernels are optimised alike in both; "None" spares the host's code that, when compiled and when linked.
BUILD_TYPES = {EVERY_DAY: "None", ALL: "Release"}


@cache
def built(folder: Path, architectures: str) -> tuple[Path, str]:
    """The folder with the module, and what the compiler said: made there, unless it was made of the same before."""
    if shutil.which(COMPILERS[0]) is None:
        pytest.skip("needs nvcc, which is not on the PATH")
    log = folder / "log.txt"
    if log.exists():
        return folder, log.read_text()
    configure = ["cmake", str(ROOT), "-DGVENDI_CUDA=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [
        f"-DGVENDI_CUDA_ARCHITECTURES={architectures}",
        f"-DCMAKE_BUILD_TYPE={BUILD_TYPES[architectures]}",
    ]
    configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'gvendi_fast'}"]
    with tempfile.TemporaryDirectory() as work:
        subprocess.run(configure, cwd=work, check=True, capture_output=True)
        build = ["cmake", "--build", ".", "--target", "_cuda", "--verbose"]
        done = subprocess.run(build, cwd=work, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with atomic_write(log) as stream:
        stream.write((done.stdout + done.stderr).encode())
    return folder, log.read_text()


def compiled(log: str) -> list[tuple[str, str, int, int]]:
    """(kernel, architecture, bytes spilled, registers) of every kernel that ptxas made."""
    pattern = (
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    return [
        (next(k for k in REGISTERS if k in name), arch, int(stores) + int(loads), int(registers))
        for name, arch, stores, loads, registers in re.findall(pattern, log, re.DOTALL)
    ]


# A parametrized fixture would be made again for each test, and the build is what takes long.
@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Where each build goes: that of every day stays until one of its ingredients changes."""
    found = {EVERY_DAY: kept("cuda-build", *COMPILERS, extra=Path(__file__).read_text())}
    found[ALL] = tmp_path_factory.mktemp("cuda-build")
    return found


@pytest.mark.parametrize(
    ("architectures", "wanted"),
    [
        pytest.param(EVERY_DAY, {"sm_90"}, id="sm_90"),
        pytest.param(ALL, {"sm_80", "sm_90"}, id="every architecture", marks=pytest.mark.soak),
    ],
)
def test_kernels_keep_to_registers(folders, architectures, wanted):
    found = compiled(built(folders[architectures], architectures)[1])
    # 8 values of K for three kernels, 3 dtypes for two, and one more.
    per_architecture = 3 * 8 + 2 * 3 + 1
    made = {arch for _, arch, _, _ in found}
    assert wanted <= made
    assert len(found) == per_architecture * len(made)
    assert [entry for entry in found if entry[2] > SPILLED.get(entry[:2], 0)] == [], "kernels that spill"
    assert [entry for entry in found if entry[3] > REGISTERS[entry[0]]] == [], (
        "kernels with too many registers"
    )


@pytest.mark.parametrize(
    ("architectures", "names"),
    [
        pytest.param(EVERY_DAY, "sm_90", id="sm_90"),
        pytest.param(ALL, "sm_80, sm_90", id="every architecture", marks=pytest.mark.soak),
    ],
)
def test_module_loads_without_a_driver_and_says_so(folders, architectures, names, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    shutil.copytree(
        ROOT / "gvendi_fast",
        tmp_path / "gvendi_fast",
        ignore=shutil.ignore_patterns("_cu*", "*.so", "__pycache__"),
    )
    for module in (built(folders[architectures], architectures)[0] / "gvendi_fast").glob("_cuda*"):
        shutil.copy(module, tmp_path / "gvendi_fast")
    code = "from gvendi_fast.kernels.backends import cuda; print(cuda.why_not('linear_sketch')); print(cuda.status())"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert out[0] == "None"
    assert re.match(rf"built for {names}.*, but there is no device: \S+", out[1])


def test_says_how_to_get_the_module_and_which_kernels_there_are(monkeypatch):
    monkeypatch.setattr(cuda, "_missing", None)
    assert "there is no CUDA C++ kernel for covariance" in cuda.why_not("covariance")
    assert "need it on a CUDA device" in cuda.why_not("linear_sketch", torch.zeros(1))
    ids = torch.zeros(1, dtype=torch.int64)
    assert "need it on a CUDA device" in cuda.why_not("dense_sketch", ids, torch.zeros(1))
    monkeypatch.setattr(cuda, "_missing", "reason")
    assert cuda.why_not("linear_sketch") == cuda.status() == "reason"
