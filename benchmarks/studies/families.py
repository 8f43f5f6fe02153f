"""Which families of causal LMs are sketched exactly: a tiny random model of each against autograd, as docs/families.md.

    python -m benchmarks.studies.families [--only KIND ...] [--out FILE.json] [--page docs/families.md]

Families are those that AutoModelForCausalLM of the installed transformers knows; results of another version of it in
the same file are kept, so one run a version makes the table. `exact` is an error of at most 1e-5 in float32, relative
and by sample, alone, padded and batched, against autograd over all parameters.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.environment import ROOT, describe_machine

sys.path.insert(0, str(ROOT / "tests"))

from exactness import judge
from small_models import FP32_RELATIVE, samples
from tiny_families import NotBuiltError, families, tiny_model

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "families.json", ROOT / "docs" / "families.md"
NOT_BUILT, NOT_RUN = "not built", "does not run"
SECONDS = 120


def finding(kind: str) -> dict[str, Any]:
    """What becomes of one family."""
    rows = samples()[:3]
    try:
        model = tiny_model(kind)
    except NotBuiltError as error:
        return {"status": NOT_BUILT, "detail": str(error)}
    try:
        model(input_ids=rows[0][0][None], use_cache=False)
    except Exception as error:
        return {"status": NOT_RUN, "detail": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    found = judge(model, rows=rows)
    count = sum(p.numel() for p in model.parameters())
    return {
        "status": found.status, "detail": found.detail, "share": found.share, "errors": found.errors, "size": count,
        "class": type(model).__name__,
    }  # fmt: skip


def run(kinds: list[str], out: Path) -> dict[str, Any]:
    """Judge families and write the file after each."""
    whole = json.loads(out.read_text()) if out.exists() else {"versions": {}}
    whole |= {"machine": describe_machine(), "most": FP32_RELATIVE}
    table = whole["versions"].setdefault(transformers.__version__, {})

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    for kind in kinds:
        signal.alarm(SECONDS)
        try:
            table[kind] = finding(kind)
        except Exception as error:
            table[kind] = {
                "status": "raises",
                "detail": f"{type(error).__name__}: {' '.join(str(error).split())}",
            }
        finally:
            signal.alarm(0)
        print(f"{kind:28s} {table[kind]['status']:12s} {table[kind]['detail'][:200]}", flush=True)
        out.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    return whole


def page(whole: dict[str, Any]) -> str:
    """docs/families.md."""
    versions = sorted(whole["versions"], key=lambda v: [int(n) for n in v.split(".")[:2]], reverse=True)
    lines = [
        "# Which models work",
        "",
        "A tiny random model of every causal-LM family that transformers can build, its sketches against autograd over "
        f"all parameters in float32: *exact* is an error of at most {whole['most']:g}, relative and of every sample, "
        "alone, padded on either side, and in batches. The table is made by",
        "",
        "    python -m benchmarks.studies.families",
        "",
        "once with each version of transformers. What is refused gets an error that says why. A family that raises or "
        "does not run does so in transformers' own code on text alone, without a cache; of one that is not built no "
        "tiny model could be made.",
        "",
    ]
    for version in versions:
        counts = Counter(found["status"] for found in whole["versions"][version].values())
        lines.append(f"- transformers {version}: " + ", ".join(f"{n} {s}" for s, n in counts.most_common()))
    lines += ["", f"| family | {' | '.join(f'transformers {v}' for v in versions)} | largest error | note |"]
    lines.append("|---" * (len(versions) + 3) + "|")
    for kind in sorted(set().union(*whole["versions"].values())):
        found = [whole["versions"][v].get(kind) for v in versions]
        errors = [e for f in found if f and f["status"] == "exact" for e in f["errors"].values()]
        notes = dict.fromkeys(f["detail"] for f in found if f and f["detail"])
        note = "; ".join(_short(text) for text in notes)
        largest = f"{max(errors):.1e}" if errors else ""
        cells = [kind, *(f["status"] if f else "not there" for f in found), largest, note]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _short(text: str) -> str:
    text = text.split("; leave ")[0].replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= 220 else text[:217] + "..."


def main() -> None:
    """Run the study and write its page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="families; all that transformers knows, if left out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    whole = run(families() if given.only is None else given.only, given.out)
    given.page.write_text(page(whole))


if __name__ == "__main__":
    main()
