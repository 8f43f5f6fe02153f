"""The rates that `gvendi plan` computes with, from benchmarks/results: gvendi_fast/analysis/rates.json."""

from __future__ import annotations

from typing import Any

from benchmarks.shapes import QWEN_05B, SHAPES, Shape
from gvendi_fast.selection.problem import MAX_PASSES

# Bytes of 8 parts of 512 rows, K = 1024, in float32.
PARTS_BYTES = 8 * 512 * 1024 * 4


def parameters_of(shape: Shape) -> int:
    """Parameters of a Qwen2 shape that a token is multiplied with: all matrices, the tied head once."""
    config = shape.config
    width, heads = config["hidden_size"], config["num_attention_heads"]
    key_width = width // heads * config["num_key_value_heads"]
    block = 2 * width * width + 2 * width * key_width + 3 * width * config["intermediate_size"]
    return config["vocab_size"] * width + config["num_hidden_layers"] * block


def planning_rates(
    cpu: dict,
    gpus: list[dict],
    tiny: dict,
    threads: dict,
    reading: dict,
    changed: dict,
    scale: dict,
    pool: dict,
) -> dict[str, Any]:
    """The content of rates.json, from the results of cpu.json, of GPUs, and of tiny, threads, reading, before_after,
    scale and large_pool.json; what was not measured is left out.
    """
    found: dict[str, Any] = {"sketching": _sketching(cpu, gpus, tiny, threads)}
    entry = cpu.get("test_sketching_against_training[qwen2.5-0.5b-slice-fp32]")
    if entry:
        shape = SHAPES[entry["shape"]]
        flops = 4 * parameters_of(shape) * entry["batch"] * entry["length"] / entry["seconds"]["p50"]
        found["products"] = {
            "value": flops / entry["threads"],
            "unit": "FLOP/s",
            "what": f"float32 products of a sketching pass, {shape.name}, one thread's share of {entry['threads']}",
            **_where(entry["machine"], "cpu.json"),
        }
    if changed:
        found["reading parts"] = {
            "value": PARTS_BYTES / changed["work"]["reading parts"]["seconds"]["after"]["p50"],
            "unit": "bytes/s",
            "what": "parts of 512 rows, K = 1024, float32, read and verified by one process",
            **_where(changed["machine"], "before_after.json"),
        }
    if reading:
        rows = reading["corpora"]["long rows with ids"]
        found["indexing"] = {
            "value": rows["bytes a row"] / (rows["microseconds a row"]["index"]["p50"] * 1e-6),
            "unit": "bytes/s",
            "what": f"JSON lines of {rows['bytes a row']:,.0f} bytes with ids, by one process",
            **_where(reading["machine"], "reading.json"),
        }
    found["relaxed"] = {"most passes": MAX_PASSES}
    if passes := _passes(pool):
        found["passes"] = passes
    if scale:
        where = _where(scale["machine"], "scale.json")
        found["bytes"] = {name: {**item, **where} for name, item in scale["bytes"].items()}
    return found


def _passes(pool: dict) -> dict[str, Any]:
    """Seconds a row of one reading of a large pool, by one thread of a core that others may use too."""
    found = {}
    for key in ("score", "clusters", "relaxed"):
        entry = pool.get("results", {}).get(f"{key}, local")
        if entry:
            rows, dim, clusters = pool["options"]["rows"], pool["dim"], pool["options"]["clusters"]
            # Of `relaxed` the plan counts how often it weighs the pool, each time with some readings and its steps.
            times = pool["options"]["max_passes"] if key == "relaxed" else entry["passes"]
            found[key] = {
                "value": entry["processor_seconds_of_this_process"] / times / rows,
                "unit": "s",
                "flops": 2 * dim * (clusters if key == "clusters" else dim),
                "what": f"{times} times over {rows:,} {pool['options']['store']} rows, K = {dim:,}, a core",
                **_where(entry.get("machine", pool["machine"]), "large_pool.json"),
            }
    return found


def _sketching(cpu: dict, gpus: list[dict], tiny: dict, threads: dict) -> list[dict[str, Any]]:
    entries = []
    for key, shape in SHAPES.items():
        for dtype, name in (("fp32", "float32"), ("bf16", "bfloat16")):
            entry = cpu.get(f"test_sketching_against_training[{key}-{dtype}]")
            if entry:
                rate = entry["batch"] * entry["length"] / entry["seconds"]["p50"]
                entries.append(
                    {
                        **_rate("cpu", shape.name, parameters_of(shape), name, rate),
                        "threads": entry["threads"],
                        **_where(entry["machine"], "cpu.json"),
                    }
                )
    if tiny and threads:
        quiet = threads["quiet"]
        rate = quiet["settings"]["1 thread"]["median"]
        entries.append(
            {
                **_rate("cpu", "tiny", tiny["proxies"]["tiny"]["parameters"], "float32", rate),
                **_where(quiet["machine"], "threads.json"),
            }
        )
    for gpu in gpus:
        figures = gpu.get("sections", {}).get("end to end", {}).get("figures", {})
        own = [
            (name, one) for name, one in figures.items() if "compiled" in name and "tokens per second" in one
        ]
        if not own:
            continue
        name, best = max(own, key=lambda item: item[1]["tokens per second"]["sketch"]["p50"])
        device = gpu["gpu"].lower().split()[-1]
        rate = best["tokens per second"]["sketch"]["p50"]
        machine = gpu["machines"][best["machine"]]
        entries.append(
            {
                **_rate(device, f"Qwen2.5-0.5B ({name})", parameters_of(QWEN_05B), "bfloat16", rate),
                **_where({**machine, "cpu": gpu["gpu"]}, f"{gpu['gpu'].lower().replace(' ', '-')}.json"),
            }
        )
    return entries


def _rate(device: str, model: str, parameters: int, dtype: str, rate: float) -> dict[str, Any]:
    return {
        "device": device,
        "model": model,
        "parameters": parameters,
        "dtype": dtype,
        "tokens_per_second": rate,
    }


def _where(machine: dict, source: str) -> dict[str, str]:
    return {
        "machine": machine["cpu"],
        "source": f"benchmarks/results/{source}",
        "commit": machine["commit"],
        "date": machine["date"],
    }
