"""What real models say of GSM8K, BBH by task and e-SNLI: G-Vendi plain, centred and for unlimited K.

    python -m benchmarks.studies.real_models --data ../shared/data --runs FOLDER \\
        --proxy smollm2=PATH --proxy gemma3=PATH --proxy tiny=tiny --rows 128 --each 12 --out FILE.json

Rows are drawn by their places with a seed: `--rows` of GSM8K's test set and of e-SNLI, `--each` of every task of BBH;
0 takes all. They are scored as `gvendi score ROWS.jsonl --proxy PATH --dim 4096 --out RUN` scores them, BBH with
`--by meta.task`, so a study that was interrupted goes on from its run directories.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import defaultdict
from pathlib import Path

from benchmarks.environment import describe_machine
from benchmarks.studies.proxies import REAL
from gvendi_fast import SketchSpec, load_proxy, score
from gvendi_fast.base.draws import places_by_id
from gvendi_fast.sketching.corpus import Settings

CORPORA = {
    "GSM8K": "gsm8k/test.jsonl",
    "e-SNLI": "esnli/dev.jsonl.gz",
    "BBH": "bbh_cot/bbh_cot.jsonl.gz",
}
# The corpus whose rows have a task.
BY_TASK, TASK = "BBH", "meta.task"


def draw_rows(path: Path, by_task: bool, count: int) -> list[str]:
    """`count` lines of a corpus, or of each of its tasks (0: all), in the corpus' order."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as stream:
        lines = stream.read().splitlines()
    groups = defaultdict(list)
    for i, line in enumerate(lines):
        groups[json.loads(line)["meta"]["task"] if by_task else ""].append(i)
    kept: list[int] = []
    for places in groups.values():
        kept += [places[j] for j in places_by_id(map(str, places), count or len(places), seed=0)]
    return [lines[i] for i in sorted(kept)]


def figures(scored) -> dict[str, object]:
    """What the study keeps of a score."""
    found = scored.to_dict()
    names = ("n", "gvendi", "low", "high", "unlimited_k", "centered", "tokens", "norm_shares", "by")
    return {name: found[name] for name in names}


def main() -> None:
    """Draw, score, and write the figures after every corpus."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k, esnli, bbh_cot")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run directories")
    parser.add_argument("--proxy", action="append", required=True, metavar="NAME=WHERE")
    parser.add_argument("--rows", type=int, default=128, help="of GSM8K and of e-SNLI (0: all)")
    parser.add_argument("--each", type=int, default=12, help="rows of every task of BBH (0: all)")
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--out", type=Path, required=True, help="write the figures here as JSON")
    args = parser.parse_args()
    result: dict = {
        "machine": describe_machine(),
        "dim": args.dim,
        "rows": {name: args.each if name == BY_TASK else args.rows for name in CORPORA},
        "proxies": {},
    }
    args.runs.mkdir(parents=True, exist_ok=True)
    for given in args.proxy:
        name, where = given.split("=", 1)
        dtype = "bfloat16" if name in REAL else "float32"
        proxy = load_proxy(where, dtype=dtype)
        found = result["proxies"].setdefault(
            name, {"revision": proxy.revision, "dtype": dtype, "corpora": {}}
        )
        for corpus, path in CORPORA.items():
            by_task = corpus == BY_TASK
            lines = draw_rows(args.data / path, by_task, args.each if by_task else args.rows)
            stem = f"{corpus.lower()}-{len(lines)}"
            rows = args.runs / f"{stem}.jsonl"
            rows.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            scored = score(
                str(rows),
                proxy=proxy,
                out=args.runs / f"{stem}-{name}",
                settings=Settings(spec=SketchSpec(args.dim), unit_rows=64),
                by=TASK if by_task else None,
            )
            found["corpora"][corpus] = figures(scored)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}, {corpus}: n {scored.n}, G-Vendi {scored.gvendi:.2f}", flush=True)


if __name__ == "__main__":
    main()
