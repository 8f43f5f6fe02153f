"""Train several models for `tiny` at once on one GPU, for benchmarks/studies/choose_tiny.py to choose from.

    python -m benchmarks.corpora.tiny_candidates TEXT_FOLDER SMOLLM2_FOLDER OUT_FOLDER --seconds 140 --gsm8k FILE

A small model leaves most of a GPU idle, so each has a process of its own. All end after the same seconds, so a wider
one sees fewer tokens. OUT_FOLDER gets a folder each, and with --pack a few .tar files of them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

# Every one has at most 2 M parameters: 4 MB in bfloat16.
WIDE = ["--width", "192", "--heads", "6", "--inner", "480"]
CANDIDATES: dict[str, list[str]] = {
    "small": ["--keep", "0.1", "0.4"],
    "deep": ["--layers", "8", "--inner", "384"],
    "wide": [*WIDE, "--keep", "0.1", "0.4"],
    "wide-slow": [*WIDE, "--lr", "1e-3"],
    "words": ["--vocabulary", "4096", "--layers", "5"],
    "untied": ["--no-tie"],
    "with-gsm8k": ["--gsm8k-rows", "7100"],
    "with-made-up": ["--made-up", "18000"],
}
# What decides the prepared text.
OF_TEXT = ("--vocabulary", "--gsm8k-rows", "--made-up")
PACK_BYTES = 15_500_000


def run_all(commands: dict[str, list[str]], threads: int) -> None:
    """Run all at once and wait; SystemExit that names those which failed."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.corpora.train_tiny", *command], env=environment
        )
        for name, command in commands.items()
    }
    failed = [name for name, process in started.items() if process.wait()]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def pack(folders: list[Path], out: Path) -> None:
    """The folders in tar files of at most PACK_BYTES each."""
    groups: list[list[Path]] = []
    size = PACK_BYTES
    for folder in folders:
        own = sum(file.stat().st_size for file in folder.iterdir())
        if size + own > PACK_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(folder)
        size += own
    for i, group in enumerate(groups):
        with tarfile.open(out / f"candidates-{i}.tar", "w") as archive:
            for folder in group:
                archive.add(folder, arcname=folder.name)


def main() -> None:
    """Prepare the texts, then train all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("writer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=140, help="of training (default 140)")
    parser.add_argument("--steps", type=int, default=100_000, help="at most")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K's training set; without it no candidate with it")
    parser.add_argument("--only", nargs="*", help="names of candidates (default: all)")
    parser.add_argument("--pack", type=Path, help="folder for the .tar files")
    args = parser.parse_args()
    start = time.perf_counter()
    chosen = {
        name: [*settings, *(["--gsm8k", str(args.gsm8k)] if "--gsm8k-rows" in settings else [])]
        for name, settings in CANDIDATES.items()
        if (not args.only or name in args.only) and (args.gsm8k or "--gsm8k-rows" not in settings)
    }
    shared = [
        "--text",
        str(args.text),
        "--writer",
        str(args.writer),
        "--prepared",
        str(args.out / "prepared"),
    ]
    texts: dict[tuple[str, ...], list[str]] = {}
    for settings in chosen.values():
        places = [settings.index(word) for word in (*OF_TEXT, "--gsm8k") if word in settings]
        of_text = [word for at in places for word in settings[at : at + 2]]
        texts.setdefault(tuple(of_text), of_text)
    threads = max(1, (os.cpu_count() or 1) // len(texts))
    run_all({" ".join(k): [*shared, *v, "--only-prepare"] for k, v in texts.items()}, threads)
    print(f"prepared after {time.perf_counter() - start:.0f} s", flush=True)
    run_all(
        {
            name: [
                *shared,
                *settings,
                *("--out", str(args.out / name), "--seconds", str(args.seconds), "--steps", str(args.steps)),
                *("--threads", "1"),
            ]
            for name, settings in chosen.items()
        },
        1,
    )
    print(f"trained after {time.perf_counter() - start:.0f} s", flush=True)
    if args.pack:
        folders = sorted(path.parent for path in args.out.glob("*/model.safetensors"))
        pack(folders, args.pack)


if __name__ == "__main__":
    main()
