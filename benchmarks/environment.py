"""What machine, versions and commit a result was measured with: it travels with every number."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from gvendi_fast.backends import explain

ROOT = Path(__file__).resolve().parents[1]


def describe_machine() -> dict[str, object]:
    """CPU, cores, threads, versions, backends, commit (with "+" if files differ from it) and date."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "numpy", "transformers")},
        "backends": explain(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in info.read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the working tree."""

    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    # Results themselves do not make the code differ.
    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!README.md"
    )
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
