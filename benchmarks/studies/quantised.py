"""What coding a proxy's weights in fewer bits does to its sketches, to their ranking of data, and to its memory.

    python -m benchmarks.studies.quantised --data ../shared/data --proxy FOLDER [--gguf FILE ...]

The rows: of each of BBH, GSM8K, e-SNLI and AQuA as many of at most 500 characters, by a seeded draw. The reference is
the same model with its weights as stored, computed in float32. Every other way of holding the weights is compared by
the cosine of each row's sketch with the reference's, by the rank correlation of the cosines between pairs of rows, and
by that of G-Vendi over 200 mixtures of a third of the rows (drawn as in benchmarks.studies.proxies).
--gguf adds files that were made of the same model. bitsandbytes is needed; results are added to those that are there.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.environment import ROOT, describe_machine
from benchmarks.studies.proxies import SOURCES, choose_rows, draw_keys, scores, spearman
from gvendi_fast import GradientSketcher, SketchSpec, load_proxy
from gvendi_fast.sketching.gradients.quantised import quantised_layers, stored_tensors
from gvendi_fast.sketching.proxy.encode import Encoder, Sample, batches, collate

OUT = ROOT / "benchmarks" / "results" / "quantised.json"
DIM, SEED, BATCH_TOKENS, MIXTURES = 1024, 0, 2048, 200
REFERENCE = "float32"
# Options of load_proxy.
WAYS = {
    REFERENCE: {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "8-bit (bitsandbytes)": {"dtype": "float32", "quantize": "8bit"},
    "4-bit nf4 (bitsandbytes)": {"dtype": "float32", "quantize": "4bit"},
    "4-bit nf4, bfloat16": {"dtype": "bfloat16", "quantize": "4bit"},
}


def weight_bytes(model: torch.nn.Module) -> dict[str, int]:
    """Bytes of the linear layers of the blocks, and of everything, with the scales that codes have beside them."""
    coded = {id(layer.module) for layer in quantised_layers(model)}
    head = model.get_output_embeddings()
    linear = whole = 0
    seen: set[int] = set()
    for module in model.modules():
        own = [*stored_tensors(module).values(), *filter(torch.is_tensor, [module._parameters.get("bias")])]
        size = sum(t.numel() * t.element_size() for t in own if id(t) not in seen)
        seen |= {id(t) for t in own}
        for state in (
            getattr(getattr(module, "weight", None), "quant_state", None),
            getattr(module, "state", None),
        ):
            size += sum(t.numel() * t.element_size() for t in _scales(state))
        whole += size
        if module is not head and (id(module) in coded or isinstance(module, torch.nn.Linear)):
            linear += size
    return {"linear": linear, "whole": whole}


def _scales(state: object) -> list[torch.Tensor]:
    # Of a 4-bit weight, of a weight whose scales are coded too, and of an 8-bit one.
    names = ("absmax", "code", "offset", "SCB")
    found = [t for name in names if torch.is_tensor(t := getattr(state, name, None))]
    inner = getattr(state, "state2", None)
    return found + (_scales(inner) if inner is not None else [])


def sketches(proxy, rows: list) -> torch.Tensor:
    """float32 [N, K] of the rows under a proxy."""
    sketcher = GradientSketcher(proxy.model, SketchSpec(DIM, seed=SEED))
    samples = Encoder(proxy.tokenizer, proxy.model.config.max_position_embeddings).encode(rows)
    refused = [s for s in samples if not isinstance(s, Sample)]
    if refused:
        raise SystemExit(f"{proxy.name} cannot score row {refused[0].id}: {refused[0].reason}")
    place = {id(sample): i for i, sample in enumerate(samples)}
    out = torch.empty(len(samples), DIM)
    pad = proxy.tokenizer.pad_token_id or 0
    for batch in batches(samples, BATCH_TOKENS):
        out[[place[id(s)] for s in batch]] = sketcher(*collate(batch, pad))
    return out


def compare(z: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """A way's sketches beside the reference's."""
    unit, wanted = (torch.nn.functional.normalize(x.double()) for x in (z, reference))
    cosines = (unit * wanted).sum(1)
    above = torch.triu_indices(len(unit), len(unit), 1)
    pairs = [(x @ x.T)[above[0], above[1]].numpy() for x in (unit, wanted)]
    keys = draw_keys(MIXTURES, len(unit) // len(SOURCES))
    size = len(unit) // 3
    everything = np.zeros((1, len(unit)))
    of_all = [float(scores(x, everything, len(x))[0]) for x in (unit, wanted)]
    mixtures = [scores(x, keys, size) for x in (unit, wanted)]
    return {
        "mean cosine": float(cosines.mean()),
        "least cosine": float(cosines.min()),
        "pairs": float(spearman(*pairs)),
        "gvendi": of_all[0],
        "gvendi of reference": of_all[1],
        "mixtures": float(spearman(*mixtures)),
    }


def main() -> None:
    """Run the study and add to its file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--proxy", required=True)
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    parser.add_argument("--each", type=int, default=16, help="rows of each of the four sources")
    parser.add_argument("--only", nargs="*", help="ways to run, beside the reference")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    rows = choose_rows(options.data, options.each)
    ways = {**WAYS, **{f"GGUF {file.stem.rpartition('-')[2]}": {"dtype": "float32"} for file in options.gguf}}
    where = {f"GGUF {file.stem.rpartition('-')[2]}": str(file) for file in options.gguf}
    found: dict = {"ways": {}, "rows": len(rows), "dim": DIM, "seed": SEED, "mixtures": MIXTURES}
    reference = None
    for name, load in ways.items():
        if options.only is not None and name != REFERENCE and name not in options.only:
            continue
        proxy = load_proxy(where.get(name, options.proxy), device="cpu", **load)
        size = weight_bytes(proxy.model)
        z = sketches(proxy, rows)
        if reference is None:
            reference = z
            found["proxy"] = {"revision": proxy.revision, "parameters": proxy.parameters}
        found["ways"][name] = {**compare(z, reference), **size, "weights": proxy.weights}
        print(name, found["ways"][name], flush=True)
        del proxy
        gc.collect()
    found["machine"] = describe_machine()
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
