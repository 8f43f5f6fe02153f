"""Digests of what the package computes, taken before and after a change that must change nothing.

    python benchmarks/unchanged.py record before.json
    python benchmarks/unchanged.py record after.json --checkout ../the-other-tree
    python benchmarks/unchanged.py compare before.json after.json

Only public names and the command line are used, so that the script runs unchanged on trees whose files lie elsewhere.
Sections (`--only` takes some of them):

    sketches   six architectures with random weights, both kinds of sketch, padded on the right and on the left
    scores     states, intervals, groups, gains, similarity scores of a matrix
    clusters   spherical k-means: fitted, in batches, updated, saved
    selection  every method with every objective it takes, quotas, rows that are given, little memory
    commands   run directories byte for byte, and what every command prints of them and writes beside them
    synthesis  four runs against a writer on loopback: all tasks, all rules of acceptance
    messages   --help of every command, the keys of a configuration, errors

The record holds a SHA-256 a result with a few words of it to look at, and says what was left out and why. It is made
by one thread on the CPU; two records of one tree on one machine are equal. A machine with other instructions or
another PyTorch rounds otherwise: `compare` says so where the two were made on different ones.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import random
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FORMAT = 1
# Set before torch is loaded: one order of sums, no colours, one width of the terminal, no network.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "COLUMNS": "100",
    "TERM": "dumb",
    "NO_COLOR": "1",
    "NO_PROXY": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "agg",
}
# What is not compared, and why. Names are those of files or of keys of JSON output.
TIMES = ("seconds", "tokens_per_second")
UNDER_WAY = ("queued", "requests", "tokens", "cost", "why")
LEFT_OUT = {
    ", ".join(TIMES): "times",
    f"{', '.join(UNDER_WAY)} of a synthesis": "count what was under way at the end",
    "order of tensors in .safetensors": "its writer takes any; tensors and words are compared",
    "report.html and report.json of a synthesis": "hold times; the rows are compared in accepted.jsonl and "
    "rejected.jsonl",
    "events.jsonl": "holds times; of its lines the kinds and the numbers of rows are compared",
    "requests.sqlite": "holds times, and requests that were under way at the end",
    "gvendi info, --version": "of the machine",
    "the working folder and the port of the writer": "replaced by FOLDER and URL wherever they are printed or stored",
}
FAMILIES = ("sum", "list", "day", "story")
SOURCES = ("web", "book", "forum")
LABELS = ("entailment", "neutral", "contradiction")


class Record:
    """Entries by name, "section/what": the digest of a value and the beginning of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.entries = folder, {}
        self.names = {str(folder): "FOLDER"}

    def add(self, name: str, value: Any, whole: bool = False) -> None:
        """Add a value: bytes, text, arrays, dataclasses and JSON values within one another."""
        if name in self.entries:
            raise SystemExit(f"two results are named {name!r}; give each its own name")
        kept = _plain(value)
        if isinstance(kept, bytes):
            data, shown = kept, f"{len(kept)} bytes"
        else:
            data = json.dumps(kept, ensure_ascii=False, sort_keys=True)
            for text, word in self.names.items():
                data = data.replace(text, word)
            shown = data if whole else data[:160]
            data = data.encode("utf-8", "surrogatepass")
        self.entries[name] = {"sha256": hashlib.sha256(data).hexdigest(), "shows": shown}

    def files(self, name: str, folder: Path, leave: tuple[str, ...] = ()) -> None:
        """The bytes of every file below a folder; text with the names of this run replaced."""
        for path in sorted(folder.rglob("*")):
            at = path.relative_to(folder).as_posix()
            if not path.is_file() or at in leave:
                continue
            self.add(f"{name}/{at}", _content(path))


def _content(path: Path) -> Any:
    """What is compared of a file: text, bytes, or of safetensors, whose order varies, its tensors and words."""
    if path.suffix in (".json", ".jsonl", ".yaml"):
        return path.read_text(encoding="utf-8")
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    words = header.pop("__metadata__", {})
    tensors = {
        name: [
            kept["dtype"],
            kept["shape"],
            hashlib.sha256(data[start:][slice(*kept["data_offsets"])]).hexdigest(),
        ]
        for name, kept in header.items()
    }
    return {"words": words, "tensors": tensors}


def _plain(value: Any) -> Any:
    """A value as JSON has it; of arrays the digest of their bytes, their type, shape and first numbers."""
    if value is None or isinstance(value, bytes | str | bool | int):
        return value
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if is_dataclass(value):
        return _plain({name: getattr(value, name) for name in value.__dataclass_fields__})
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):
        first = [repr(number) for number in value.reshape(-1)[:4].tolist()]
        kind = f"{value.dtype}{list(value.shape)}"
        return {"kind": kind, "first": first, "bytes": hashlib.sha256(value.tobytes()).hexdigest()}
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    raise SystemExit(f"a result of type {type(value).__name__} cannot be recorded; teach _plain about it")


def _rows(name: str, n: int, dim: int, families: int = 5):
    """Rows float32 [n, dim] in families of near directions: numbers that come from the name alone."""
    import numpy as np
    import torch

    digest = hashlib.sha256(name.encode()).digest()
    words = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    uniform = (words.random_raw(12 * (n + families) * dim) >> np.uint64(11)) * 2.0**-53
    # The sum of twelve uniform numbers is as good as a normal one here, and the same in every release of NumPy.
    normal = uniform.reshape(-1, 12).sum(axis=1).reshape(n + families, dim) - 6
    centres, noise = normal[:families], normal[families:]
    return torch.from_numpy((noise + 2 * centres[np.arange(n) % families]).astype(np.float32))


def sketches(record: Record) -> None:
    """Six architectures, both kinds, both sides of padding; one of them by the definitions in float64."""
    import torch

    from gvendi_fast import GradientSketcher, SketchSpec, use_backend

    specs = {
        "hadamard": SketchSpec(dim=256, kind="hadamard", seed=3),
        "rademacher": SketchSpec(dim=192, kind="rademacher", seed=3),
    }
    lengths = (11, 7, 4, 9)
    for name, model in _models():
        for side in ("right", "left"):
            batch = _batch(lengths, side)
            for kind, spec in specs.items():
                found = GradientSketcher(model, spec).sketch(*batch)
                record.add(f"sketches/{name}/{kind}/{side}", found)
        if name == "qwen2":
            batch, small = _batch(lengths, "right"), SketchSpec(dim=64)
            with use_backend("reference"):
                record.add(f"sketches/{name}/reference", GradientSketcher(model, small).sketch(*batch))
            sketcher = GradientSketcher(model, small, exclude=["*embed*", "*bias"])
            record.add(f"sketches/{name}/excluded", [sketcher.sketch(*batch), sketcher.coverage])
            model.to(torch.bfloat16)
            record.add(f"sketches/{name}/bfloat16", GradientSketcher(model, small).sketch(*batch))


def _models() -> Iterator[tuple[str, Any]]:
    import torch
    import transformers

    wide = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    wide |= {"intermediate_size": 48, "max_position_embeddings": 64}
    grouped = {**wide, "num_key_value_heads": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    opt = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt |= {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
    kinds = {
        "qwen2": ("Qwen2Config", {**grouped, "tie_word_embeddings": True}),
        "llama": ("LlamaConfig", {**grouped, "tie_word_embeddings": False}),
        "gemma2": ("Gemma2Config", {**grouped, "head_dim": 8, "sliding_window": 6}),
        "gpt2": (
            "GPT2Config",
            {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        ),
        "gpt_neox": ("GPTNeoXConfig", wide),
        "opt": ("OPTConfig", opt),
    }
    for name, (config, settings) in kinds.items():
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, config)(**settings, **tokens)
        )
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                size = parameter.numel()
                drawn = _rows(f"{name}|{parameter_name}", size, 1, 1)[:, 0].reshape(parameter.shape)
                # A norm's weight stays near one, as in a model that was trained.
                parameter.copy_(
                    0.05 * drawn + (1.0 if parameter.dim() == 1 and "bias" not in parameter_name else 0.0)
                )
        yield name, model.float().eval()


def _batch(lengths: tuple[int, ...], side: str):
    """ids, labels and mask [B, T]: the first third of a sample's tokens is unsupervised."""
    import torch

    longest, words = max(lengths), random.Random("batch")
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        first = 0 if side == "right" else longest - length
        sample = torch.tensor([3 + int(94 * words.random()) for _ in range(length)])
        ids[row, first : first + length], mask[row, first : first + length] = sample, 1
        labels[row, first + length // 3 : first + length] = sample[length // 3 :]
    return ids, labels, mask


def scores(record: Record) -> None:
    """What `gvendi_fast` and `gvendi_fast.vendi` say of matrices of rows."""
    import torch

    from gvendi_fast import VendiState, group_gvendi, gvendi, vendi

    wide, tall = _rows("wide", 40, 128), _rows("tall", 900, 64)
    for name, rows in (("wide", wide), ("tall", tall), ("double", tall.double())):
        record.add(f"scores/{name}/orders", [gvendi(rows, q) for q in (0.5, 1.0, 2.0, float("inf"))])
        state = VendiState(rows.shape[1], {"made": "here"}).update(rows)
        record.add(f"scores/{name}/matrix", state.matrix)
        record.add(f"scores/{name}/spectrum", state.spectrum())
        record.add(
            f"scores/{name}/jackknife", [vendi.jackknife(state, rows), vendi.jackknife(state, rows, 0.8)]
        )
        record.add(f"scores/{name}/interval", state.gvendi(ci="jackknife", rows=rows))
        record.add(f"scores/{name}/leave one out", vendi.leave_one_out(state, rows))
        record.add(f"scores/{name}/gain", [state.gain(rows[:30]), state.gain(rows[:30], remove=True)])
        record.add(f"scores/{name}/block gain", state.block_gain(rows[:30], torch.tensor([0, 5, 6, 30])))
        kinds = [state.contributions(rows, kind) for kind in ("surprisal",)]
        record.add(f"scores/{name}/contributions", [*kinds, state.effective_spectrum()])
        merged = VendiState(rows.shape[1], {"made": "here"}).update(rows[::3]).merge(state)
        merged.save(record.folder / "state.safetensors")
        record.add(f"scores/{name}/saved", _content(record.folder / "state.safetensors"))
        record.add(f"scores/{name}/loaded", VendiState.load(record.folder / "state.safetensors").gvendi())
    labels = [SOURCES[i % 3] if i % 7 else "rare" for i in range(len(tall))]
    record.add("scores/groups/labels", group_gvendi(tall, labels).to_dict())
    record.add("scores/groups/boundaries", group_gvendi(tall, boundaries=[0, 1, 300, 900]).to_dict())
    parts = {name: VendiState(64).update(tall[i * 300 : (i + 1) * 300]) for i, name in enumerate(SOURCES)}
    record.add("scores/between sources", vendi.between_source(parts))
    small, weights = wide[:12].double().numpy(), [1 / 24] * 6 + [3 / 24] * 6
    unit = wide[:12].double() / wide[:12].double().norm(dim=1, keepdim=True)
    kernel = (unit @ unit.T).numpy()
    for q in (1, 2, "inf"):
        record.add(
            f"scores/similarity/{q}",
            [
                vendi.score(list(small), lambda a, b: float((a @ b) / ((a @ a) * (b @ b)) ** 0.5), q=q),
                vendi.score_K(kernel, q=q),
                vendi.score_K(kernel, q=q, p=weights),
                vendi.score_X(small, q=q),
                vendi.score_dual(small, q=q),
            ],
        )


def clusters(record: Record) -> None:
    """Spherical k-means in every way it is used."""
    import torch

    from gvendi_fast.clusters.kmeans import SphericalKMeans, sparse_clusters

    rows = _rows("clusters", 1200, 64, 9)
    for seed in (0, 7):
        for number in (None, 9, 40):
            fitted = SphericalKMeans(number, seed=seed).fit(rows)
            name = f"clusters/fit/{number} of seed {seed}"
            record.add(name, [fitted.centroids, fitted.counts, fitted.objective, fitted.iterations])
            record.add(f"{name}/assigned", fitted.assign(rows))
    order = torch.arange(len(rows)).flip(0)
    record.add("clusters/other order", SphericalKMeans(9).fit(rows[order]).centroids)
    again = SphericalKMeans(12, seed=2)
    for first in range(0, 1200, 400):
        again.partial_fit(rows[first : first + 400])
    record.add("clusters/in batches", [again.centroids, again.counts, again.objective])
    record.add("clusters/updated", [again.update(_rows("more", 50, 64, 9)), again.centroids])
    record.add("clusters/sparse", sparse_clusters(again.counts))
    again.save(record.folder / "means.safetensors")
    record.add("clusters/saved", _content(record.folder / "means.safetensors"))


def selection(record: Record) -> None:
    """Every method with every objective that it takes, and with what may be asked beside."""
    from gvendi_fast import VendiState, select
    from gvendi_fast.selection import METHODS, equal_quotas

    rows = _rows("selection", 700, 64, 9)
    quality = [1.0 + (i * 7 % 13) / 13 for i in range(len(rows))]
    groups = [SOURCES[i * i % 3] for i in range(len(rows))]
    given = VendiState(64).update(_rows("given", 20, 64, 2))
    for method in METHODS:
        objectives = (
            ("vendi", "quality") if method == "relaxed" else ("vendi", "logdet", "facility", "quality")
        )
        for objective in objectives:
            extra = {"quality": quality} if objective == "quality" else {}
            plain = {"objective": objective, "method": method, "seed": 5, **extra}
            _chosen(record, f"{method}/{objective}", select(rows, 40, **plain))
            quotas = equal_quotas(groups, 30)
            _chosen(
                record,
                f"{method}/{objective}/quotas",
                select(rows, 30, groups=groups, quotas=quotas, **plain),
            )
            others = _rows("given", 20, 64, 2) if objective == "facility" else given
            labels = [i % 9 for i in range(len(rows))]
            found = select(rows, 25, must_include=others, clusters=labels, **plain)
            _chosen(record, f"{method}/{objective}/given", found)
    _chosen(record, "little memory", select(rows, 30, method="two-round", memory=14_000_000))
    _chosen(record, "represent", select(rows, 20, "facility", represent=100, seed=2, draws=5))
    _chosen(record, "eps", select(rows, 20, "logdet", eps=0.01, draws=0))


def _chosen(record: Record, name: str, found: Any) -> None:
    details = {key: value for key, value in found.to_dict().items() if key not in ("seconds",)}
    record.add(
        f"selection/{name}", [found.ids, found.rows, found.gain, found.surprisal, found.cluster, details]
    )


def commands(record: Record) -> None:
    """Run directories and what the commands make of them, in the working folder with relative paths."""
    _corpus(record.folder)
    proxy = ("--proxy", "tiny", "--dtype", "float32")
    made = {
        "run": ("corpus.jsonl", "--dim", 64, "--unit-rows", 50, "--by", "source"),
        "whole": ("corpus.jsonl", "more.parquet", "--dim", 256, "--by", "meta.family", "--max-tokens", 48),
        "other": ("more.parquet", "--dim", 64, "--by", "source", "--batch-tokens", 512),
        "dense": ("corpus.jsonl", "--dim", 64, "--sketch", "rademacher", "--seed", 9, "--limit", 60),
        "released": ("corpus.jsonl", "--dim", 64, "--mask", "released", "--limit", 60, "--exclude", "*norm*"),
    }
    for name, options in made.items():
        _command(record, f"sketch/{name}", "sketch", *options, *proxy, "--out", name)
        record.files(f"commands/{name}", record.folder / name)
    _command(record, "score/resumed", "score", *made["run"], *proxy, "--out", "run", "--json")
    _command(record, "score/corpus", "score", "corpus.jsonl", *proxy, "--dim", 64, "--json")
    orders = ("--order", 2, "--order", "inf")
    told: dict[str, tuple[Any, ...]] = {
        "score/plain": ("score", "run", *orders),
        "score/source": ("score", "run", "--by", "source", "--seed", 4),
        "score/source, json": ("score", "run", "--by", "source", *orders, "--json"),
        "score/family": ("score", "whole", "--by", "meta.family", "--json"),
        "cluster": ("cluster", "run", "--clusters", 7, "--out", "clusters.parquet"),
        "cluster/json": ("cluster", "whole", "--seed", 3, "--out", "whole.parquet", "--json"),
        "compare": ("compare", "run", "other", "--pairs", 4),
        "compare/json": ("compare", "run", "other", "--n", 70, "--seed", 2, "--threshold", 0.8, "--json"),
        "measures": ("measures", "run", "--by", "source", "--seed", 3),
        "measures/json": ("measures", "run", "--n", 60, "--json"),
        "weights": ("weights", "run", "--by", "source"),
        "weights/json": ("weights", "run", "--by", "source", "--cap", 0.5, "--floor", 0.1, "--json"),
        "report": ("report", "run", "--out", "page.html"),
        "report/clusters": (
            "report",
            "run",
            "--clusters",
            "clusters.parquet",
            "--seed",
            8,
            "--out",
            "second.html",
        ),
        "report/whole": ("report", "whole", "--out", "third.html", "--title", "all"),
        "select/lazy": ("select", "run", "--size", 20, "--out", "lazy.jsonl"),
        "select/stochastic": (
            "select",
            "whole",
            "--size",
            20,
            "--method",
            "stochastic",
            "--out",
            "random.jsonl",
        ),
        "select/two-round": (
            "select",
            "run",
            "--size",
            20,
            "--method",
            "two-round",
            "--out",
            "two.jsonl",
            "--json",
        ),
        "select/relaxed": ("select", "run", "--size", 20, "--method", "relaxed", "--out", "relaxed.jsonl"),
        "select/per": ("select", "run", "--size", 21, "--per", "source", "--out", "per.jsonl", "--json"),
        "select/include": (
            "select",
            "run",
            "--size",
            9,
            "--include",
            "other",
            "--out",
            "add.jsonl",
            "--seed",
            2,
        ),
        "select/quality": ("select", "run", "--size", 9, "--quality", "worth", "--out", "worth.jsonl"),
        "select/facility": ("select", "run", "--size", 9, "--objective", "facility", "--out", "near.jsonl"),
        "select/logdet": ("select", "run", "--size", 9, "--objective", "logdet", "--out", "det.jsonl"),
    }
    for name, arguments in told.items():
        _command(record, name, *arguments)
    for path in sorted(record.folder.glob("*.*")):
        if path.suffix in (".parquet", ".safetensors", ".json", ".jsonl", ".html"):
            record.add(f"commands/written/{path.name}", _content(path))


def _corpus(folder: Path) -> None:
    """JSON lines with every form of row and some that are no rows, and a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    rows = [_sample(i, "corpus") for i in range(150)]
    lines = [json.dumps(row) for row in rows]
    lines[20] = "{not json"
    lines[21] = json.dumps({"id": "empty", "prompt": "", "completion": ""})
    lines[22] = lines[10]
    lines[23] = json.dumps({**rows[11], "id": "the same words"})
    for place in range(30, 36):
        row = rows[place]
        turns = [("system", "Be short."), ("user", row["prompt"]), ("assistant", row["completion"])]
        messages = [{"role": role, "content": text} for role, text in turns]
        kept = {key: row[key] for key in ("id", "source", "worth", "meta")}
        lines[place] = json.dumps({**kept, "messages": messages})
    for place in range(40, 44):
        row = rows[place]
        kept = {key: row[key] for key in ("id", "source", "worth", "meta")}
        lines[place] = json.dumps(
            {**kept, "text": f"{row['prompt']} {row['completion']}"}, ensure_ascii=False
        )
    (folder / "corpus.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    table = pyarrow.Table.from_pylist([_sample(i, "more") for i in range(100)])
    pyarrow.parquet.write_table(table, folder / "more.parquet", row_group_size=32)


def _sample(number: int, name: str) -> dict[str, Any]:
    words = random.Random(f"{name}|{number}")

    def some(*things: str) -> str:
        return things[int(len(things) * words.random())]

    a, b = int(90 * words.random()), 2 + int(40 * words.random())
    who, what = some("Ada", "Ben", "Chloé", "Dai", "Eun"), some("pens", "books", "shells", "keys", "coins")
    family = FAMILIES[int(4 * words.random() ** 2)]
    prompt, completion = {
        "sum": (f"{who} has {a} {what} and gets {b} more. How many {what} is that?", f"{a} + {b} = {a + b}"),
        "list": (f"Sort: {b}, {a}, {a * b % 97}", str(sorted([a, b, a * b % 97]))),
        "day": (
            f"Which weekday comes {a} days after {some('Monday', 'Friday')}?",
            f"Count {a} mod 7 = {a % 7} on.",
        ),
        "story": (
            f"Tell of {who} and the {what}.",
            f"{who} lost {a} {what} by the river; {b} came back in spring.",
        ),
    }[family]
    source = SOURCES[int(3 * words.random() ** 2)]
    meta = {"family": family}
    return {
        "id": f"{name}-{number}",
        "prompt": prompt,
        "completion": completion,
        "source": source,
        "worth": 1 + a / 90,
        "meta": meta,
    }


def _command(record: Record, name: str, *arguments: Any) -> None:
    """Run the command in this process, and record what it printed; of JSON all but times."""
    code, out, err = _gvendi(*arguments)
    if code:
        raise SystemExit(f"gvendi {' '.join(map(str, arguments))} ended with {code}:\n{err}{out}")
    record.add(f"commands/{name}", _without_times(json.loads(out)) if "--json" in arguments else out)


def _without_times(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_times(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMES}
    return value


def _gvendi(*arguments: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the console script that pyproject.toml names."""
    found = re.search(r'^gvendi = "([\w.]+):(\w+)"$', _project().read_text(encoding="utf-8"), re.MULTILINE)
    main = getattr(import_module(found.group(1)), found.group(2))
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["gvendi", *map(str, arguments)]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def _project() -> Path:
    import gvendi_fast

    return Path(gvendi_fast.__file__).resolve().parents[1] / "pyproject.toml"


def synthesis(record: Record) -> None:
    """Runs of `gvendi synthesize` with every task and every rule, against a writer on loopback."""
    folder = record.folder
    seeds = [_sample(i, "seed") for i in range(48)]
    numbers = [{**row, "completion": f"{row['completion']} \\boxed{{{i}}}"} for i, row in enumerate(seeds)]
    pairs = [_nli_row(i) for i in range(48)]
    files = {
        "seeds": seeds,
        "numbers": numbers,
        "pairs": pairs,
        "tests": [_sample(i, "test") for i in range(6)],
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "short_rows.py").write_text(
        "def check(row):\n    return len(row['prompt']) < 70 or 'too long'\n"
    )
    runs: dict[str, dict[str, Any]] = {
        "cluster": {"pool": {"data": "seeds.jsonl"}, "task": {"name": "generic"}},
        "gain": {
            "pool": {"data": "seeds.jsonl"},
            "task": {"name": "generic", "settings": {"verifier": "short_rows:check", "shots": 3}},
            "accept": {"rule": "gain", "quantile": 0.3},
            "filter": {"tests": "tests.jsonl", "paraphrase": 2, "ngram": 6, "near": 0.95},
        },
        "math": {
            "pool": {"data": "numbers.jsonl"},
            "task": {"name": "math"},
            "accept": {"rule": "all"},
            "proxy": {"process": True},
        },
        "nli": {
            "pool": {"data": "pairs.jsonl"},
            "task": {"name": "nli"},
            "accept": {"frozen": True, "from_sparse": True},
        },
    }
    with _writer() as url:
        record.names[url] = "URL"
        for name, sections in runs.items():
            config = _config(url, f"grown-{name}", sections)
            (folder / f"{name}.yaml").write_text(json.dumps(config), encoding="utf-8")
            code, out, err = _gvendi("synthesize", f"{name}.yaml", "--preview", 2)
            if code:
                raise SystemExit(f"the preview of {name} ended with {code}:\n{err}")
            record.add(f"synthesis/{name}/preview", out)
            code, out, err = _gvendi("synthesize", f"{name}.yaml", "--json")
            if code:
                raise SystemExit(f"the synthesis {name} ended with {code}:\n{err}")
            status = {key: value for key, value in json.loads(out).items() if key not in (*TIMES, *UNDER_WAY)}
            record.add(f"synthesis/{name}/status", status)
            grown = folder / f"grown-{name}"
            leave = {path.name for path in grown.iterdir() if path.name.startswith("requests.sqlite")}
            leave |= {"events.jsonl", "report.html", "report.json"}
            record.files(f"synthesis/{name}", grown, tuple(leave))
            lines = (grown / "events.jsonl").read_text(encoding="utf-8").splitlines()
            events = [json.loads(line) for line in lines]
            kept = [{k: e[k] for k in ("event", "block", "decided", "round") if k in e} for e in events]
            record.add(f"synthesis/{name}/events", kept)


def _config(url: str, out: str, sections: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, Any] = {
        "out": out,
        "seed": 4,
        "block": 8,
        "ahead": 2,
        "generator": {"model": "m", "base_url": url, "key_variable": None, "send_seed": True},
        "proxy": {"name": "tiny", "dim": 64, "dtype": "float32", "process": False},
        "accept": {"clusters": 12, "round": 0.2},
        "stop": {"target": 68},
    }
    for name, value in sections.items():
        base[name] = {**base.get(name, {}), **value}
    return base


def _pair(words: random.Random) -> dict[str, str]:
    animals, places = ("dog", "cat", "hen", "fox", "owl"), ("yard", "barn", "wood", "road", "hall")
    one, other = animals[int(5 * words.random())], animals[int(5 * words.random())]
    where, count = places[int(5 * words.random())], 2 + int(60 * words.random())
    return {
        "premise": f"{count} {one}s sleep in the {where}.",
        "hypothesis": f"No {other} is in the {where}.",
    }


def _nli_row(number: int) -> dict[str, str]:
    """A row that can be sketched (prompt and completion) and shown (premise, hypothesis and label)."""
    pair, label = _pair(random.Random(f"pair|{number}")), LABELS[number % 3]
    prompt = f"Premise: {pair['premise']}\nHypothesis: {pair['hypothesis']}"
    return {"id": f"pair-{number}", "prompt": prompt, "completion": f"Label: {label}", **pair, "label": label}


@contextlib.contextmanager
def _writer() -> Iterator[str]:
    """A chat endpoint on loopback whose answers come from the messages and the seed of a request; gives its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """A line a request helps nobody."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"]
        text = _answer(asked, random.Random(json.dumps([body["messages"], body.get("seed")])))
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        reply = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
        }
        reply["usage"] = {"prompt_tokens": 9, "completion_tokens": len(text.split()), "total_tokens": 0}
        raw = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


def _answer(asked: str, words: random.Random) -> str:
    """What the writer says, by the kind of request; now and then nothing of use."""
    if words.random() < 0.05:
        return "I would rather not."
    row = _sample(int(4000 * words.random()), "written")
    if "<verdict>" in asked:
        return f"<verdict>{'yes' if words.random() < 0.1 else 'no'}</verdict>"
    if "<problem>" in asked:
        return f"<problem>{row['prompt']}</problem>"
    if "\\boxed" in asked:
        return f"Thus \\boxed{{{len(asked) % 7 if words.random() < 0.8 else 8}}}"
    if "<hypothesis>" in asked:
        pair = _pair(words)
        tags = "".join(f"<{name}>{text}</{name}>\n" for name, text in pair.items())
        return f"{tags}<label>{LABELS[sum(map(len, pair.values())) % 3]}</label>"
    if "<label>" in asked:
        found = re.search(r"Premise: (.*)\nHypothesis: (.*)\n", asked)
        right = LABELS[sum(map(len, found.groups())) % 3]
        return f"<label>{right if words.random() < 0.95 else LABELS[0]}</label>"
    return f"<prompt>{row['prompt']}</prompt>\n<completion>{row['completion']}</completion>"


def messages(record: Record) -> None:
    """Help texts in whole, and errors that a user meets first."""
    _, out, _ = _gvendi("--help")
    record.add("messages/help", out, whole=True)
    # Every command that the first page names.
    names = re.findall(r"^│ ([a-z][a-z-]*) ", out.partition("Commands")[2], re.MULTILINE)
    for name in names:
        record.add(f"messages/help/{name}", _gvendi(name, "--help")[1], whole=True)
    record.add("messages/keys", _gvendi("synthesize", "--keys")[1], whole=True)
    (record.folder / "one.jsonl").write_text(json.dumps({"prompt": "1 + 1?", "completion": "2"}) + "\n")
    wrong = {
        "no file": ("score", "nowhere.jsonl", "--proxy", "tiny"),
        "dim": ("score", "one.jsonl", "--proxy", "tiny", "--dim", 1000),
        "proxy": ("score", "one.jsonl", "--proxy", "./no/model"),
        "exclude": ("score", "one.jsonl", "--proxy", "tiny", "--dtype", "float32", "--exclude", "nothing*"),
        "max rejected": ("score", "one.jsonl", "--max-rejected", "some"),
        "no run": ("select", "nowhere", "--size", 3, "--out", "x.jsonl"),
        "no configuration": ("synthesize",),
        "no such option": ("score", "one.jsonl", "--no-such-option"),
    }
    for name, arguments in wrong.items():
        record.add(f"messages/error/{name}", _gvendi(*arguments), whole=True)


SECTIONS: dict[str, Callable[[Record], None]] = {
    function.__name__: function
    for function in (sketches, scores, clusters, selection, commands, synthesis, messages)
}


def record_all(checkout: Path, only: list[str]) -> dict[str, Any]:
    """The record of the package in `checkout`: entries of the sections, in a folder of their own that is removed."""
    os.environ.update(ENVIRONMENT)
    os.environ.pop("GVENDI_BACKEND", None)
    sys.path.insert(0, str(checkout))
    # Processes that the package starts import it, too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    import gvendi_fast

    if Path(gvendi_fast.__file__).resolve().parents[1] != checkout:
        raise SystemExit(f"gvendi_fast was imported from {gvendi_fast.__file__}; wanted that of {checkout}")
    import torch

    torch.set_num_threads(1)
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="unchanged-") as name:
        record = Record(Path(name).resolve())
        os.chdir(record.folder)
        try:
            for section in only:
                print(f"{section} ...", file=sys.stderr, flush=True)
                SECTIONS[section](record)
        finally:
            os.chdir(before)
    return {"format": FORMAT, "made with": _made_with(), "left out": LEFT_OUT, "entries": record.entries}


def _made_with() -> dict[str, str]:
    """What decides how numbers round and how help is laid out."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    digest = hashlib.sha256(flags.group(1).encode()).hexdigest()[:12] if flags else "unknown"
    versions = {
        name: metadata.version(name)
        for name in ("torch", "numpy", "transformers", "pyarrow", "typer", "rich", "matplotlib")
    }
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu flags": digest,
        **versions,
    }


def differences(old: dict[str, Any], new: dict[str, Any], ignore: list[str]) -> list[str]:
    """One text an entry that differs, is missing or is new; ignore: beginnings of names that are not looked at."""
    found = []
    names = [*old["entries"], *(name for name in new["entries"] if name not in old["entries"])]
    for name in names:
        if any(name.startswith(beginning) for beginning in ignore):
            continue
        one, other = old["entries"].get(name), new["entries"].get(name)
        if one is None or other is None:
            found.append(f"{name}: only in the {'new' if one is None else 'old'} record")
        elif one["sha256"] != other["sha256"]:
            found.append(f"{name}:\n{_first_difference(one['shows'], other['shows'])}")
    return found


def _first_difference(old: str, new: str) -> str:
    """Two lines: both texts from a little before the place where they part."""
    if old == new:
        return f"  behind what the record shows: {old[:80]}"
    same = next(
        (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new))
    )
    first = max(0, same - 40)
    return f"  old: ...{old[first : first + 120]}\n  new: ...{new[first : first + 120]}"


def main() -> None:
    """Record, or compare two records: exit code 1 where they differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_subparsers(dest="mode", required=True)
    recording = modes.add_parser("record", help="write the record of a checkout")
    recording.add_argument("out", type=Path, metavar="OUT.json")
    recording.add_argument("--only", help=f"sections, with commas between them: {', '.join(SECTIONS)}")
    recording.add_argument(
        "--checkout", type=Path, default=ROOT, help="the tree to record (default: this one)"
    )
    comparing = modes.add_parser(
        "compare", help="say what differs between two records; exit code 1 if anything does"
    )
    comparing.add_argument("old", type=Path, metavar="OLD.json")
    comparing.add_argument("new", type=Path, metavar="NEW.json")
    comparing.add_argument(
        "--ignore",
        default="",
        help="beginnings of names that may differ, with commas between them: messages/",
    )
    options = parser.parse_args()
    if options.mode == "record":
        only = options.only.split(",") if options.only else list(SECTIONS)
        if unknown := [name for name in only if name not in SECTIONS]:
            parser.error(f"--only: no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
        out = options.out.resolve()
        result = record_all(options.checkout.resolve(), only)
        out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{len(result['entries'])} results in {options.out}")
        return
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (options.old, options.new))
    for name, value in old["made with"].items():
        if new["made with"].get(name) != value:
            print(
                f"note: made with other {name}: {value} and {new['made with'].get(name)}; numbers may round otherwise"
            )
    ignore = [beginning for beginning in options.ignore.split(",") if beginning]
    found = differences(old, new, ignore)
    print("\n".join(found) if found else f"{len(old['entries'])} results, all the same")
    if found:
        print(f"{len(found)} of {len(old['entries'])} results differ")
        sys.exit(1)


if __name__ == "__main__":
    main()
