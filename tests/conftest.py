"""Fixtures shared by all rooms' tests."""

import gc
import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path

import hangs
import numpy as np
import pytest
import torch

# A shell that starts the tests in the background has them, and all that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Kernels are set to compile or to be interpreted when they are first imported, so every test file shares one choice.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config) -> None:
    """Limits of processor time; and interpreted kernels may loop over `range` of a run-time argument.

    Triton's interpreter makes an int of a 1-element array, which NumPy refuses from 2.4 on. Its products of float32 are
    those of NumPy's BLAS, which on some CPUs differ in their last bits with the place in the matrix; a GPU's do not,
    and neither do products of doubles once they are rounded.
    """
    config.pluginmanager.register(hangs.Plugin(), "hangs")
    if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor

    def patched(tensor, scope) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    dot = interpreter.InterpreterBuilder.create_dot

    def dot_of_doubles(self, a, b, d, *precision):
        if d.data.dtype != np.float32 or a.data.dtype not in (np.float16, np.float32):
            return dot(self, a, b, d, *precision)
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(np.float32)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot_of_doubles


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """What is imported and collected stays to the end: looking through it for garbage took a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with the real text sets and the small trained model; not part of the repository."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the shared data folder beside the repository, which a plain clone does not have")
    return SHARED / "data"


@pytest.fixture
def one_thread():
    """One thread for sums, which are the same everywhere then; a forked process lacks the others, and would wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def loopback(monkeypatch, one_thread):
    """No proxy before a server of this machine, and one thread."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def gvendi(monkeypatch, capsys):
    """Run the command; returns (exit code, stdout, stderr)."""
    from gvendi_fast.cli import app

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["gvendi", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        out = capsys.readouterr()
        return stop.value.code or 0, out.out, out.err

    return run


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium in an empty profile."""
    api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is on PATH")
    quiet = ("background-networking", "component-update", "sync", "quic", "gpu")
    args = ["--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=path, headless=True, args=args
        )
        yield context
        context.close()
