"""Environment -> CMake, nothing else; everything that is true about the build stands in CMakeLists.txt.

GVENDI_REQUIRE_EXT=1 makes a failed build of the compiled kernels fatal. Otherwise the package installs
without them, says so on stderr, and runs on its slow PyTorch definitions. GVENDI_CUDA=1 builds the CUDA kernels
as well; they were asked for, so a failure is fatal.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
REQUIRED = {
    "gvendi_fast._cpu": os.environ.get("GVENDI_REQUIRE_EXT") == "1",
    **({"gvendi_fast._cuda": True} if os.environ.get("GVENDI_CUDA") == "1" else {}),
}


class CMakeBuild(build_ext):
    """Builds the target of an extension into the place that setuptools asks for."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        try:
            self._cmake(ext.name.rpartition(".")[2], target)
        except (OSError, subprocess.CalledProcessError) as error:
            if REQUIRED[ext.name]:
                raise
            print(
                f"gvendi_fast: the compiled kernels were NOT built ({error}); the package installs without"
                " them and runs on its slow PyTorch definitions. A C++17 compiler is needed;"
                " GVENDI_REQUIRE_EXT=1 makes this an error.",
                file=sys.stderr,
            )
            # What an earlier build left would be taken for this one.
            target.unlink(missing_ok=True)

    def _cmake(self, name: str, target: Path) -> None:
        build = Path(self.build_temp).resolve() / f"cmake{name}"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            str(ROOT),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DGVENDI_CUDA={'ON' if name == '_cuda' else 'OFF'}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        # An isolated build has another Python environment every time; a cache would point into the last one.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        subprocess.run(configure, cwd=build, check=True)
        subprocess.run(["cmake", "--build", ".", "--target", name, "--parallel"], cwd=build, check=True)

    def get_outputs(self) -> list:
        return [path for path in super().get_outputs() if Path(path).exists()]


# `optional` lets setuptools go on where the file is absent because the build failed softly.
setup(
    ext_modules=[Extension(name, sources=[], optional=not required) for name, required in REQUIRED.items()],
    cmdclass={"build_ext": CMakeBuild},
)
