"""How many tokens a second a proxy sketches on this machine: some batches, timed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from gvendi_fast.analysis.planning import CPU, MEASURED, Figure, Worker
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.batch_memory import choose_batch_tokens, sketch_batch
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.proxy.encode import Sample, batches
from gvendi_fast.sketching.proxy.load import Proxy, load_proxy
from gvendi_fast.sketching.proxy.text_config import positions_of

# The first batch compiles kernels; then batches are timed until so much time has passed.
TIMED_S = 5.0
MADE_UP = 64


def measure_rate(proxy: str, dim: int, tokens: int, samples: Sequence[Sample] | None = None) -> Worker:
    """The rate of one worker on this machine's GPU, or on as many of its cores as PyTorch has threads.

    proxy: as `load_proxy` takes it. dim: K. samples: rows to sketch; None for made-up ones of `tokens` tokens.
    Reading, tokenising and writing are left out: a run does them beside. The pass is not
    compiled, as a run on a GPU does with a large corpus.
    """
    loaded = load_proxy(proxy)
    sketcher = GradientSketcher(loaded.model, SketchSpec(dim))
    samples = _made_up(loaded, tokens) if samples is None else samples
    budget = choose_batch_tokens(sketcher, None)
    pad = loaded.tokenizer.pad_token_id
    done, spent, rows, first = 0, 0.0, 0, True
    for batch in _again(samples, budget):
        began = time.perf_counter()
        # What is fetched is computed.
        sketch_batch(sketcher, batch, 0 if pad is None else pad).z.cpu()
        if not first:
            spent += time.perf_counter() - began
            done, rows = done + sum(sample.length for sample in batch), rows + len(batch)
            if spent >= TIMED_S:
                break
        first = False
    is_gpu = loaded.device.type == "cuda"
    cores = 1 if is_gpu else torch.get_num_threads()
    where = (
        torch.cuda.get_device_name(loaded.device)
        if is_gpu
        else f"{cores} thread{'s' * (cores != 1)} of this CPU"
    )
    said = f"{rows:,} rows of {done:,} tokens with '{proxy}' on {where}, now"
    return Worker(CPU if not is_gpu else where, Figure(done / spent, "tokens/s", MEASURED, said), cores)


def _again(samples: Sequence[Sample], budget: int) -> Iterator[list[Sample]]:
    """The batches of the samples, again and again."""
    while True:
        yield from batches(samples, budget)


def _made_up(proxy: Proxy, tokens: int) -> list[Sample]:
    length = max(2, min(tokens, positions_of(proxy.model.config) or tokens))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(proxy.vocabulary, (MADE_UP, length), generator=generator, dtype=torch.int32)
    labels = ids.clone()
    labels[:, 0] = -100
    return [Sample(i, f"{i}", "", "", i + 1, ids[i].numpy(), labels[i].numpy()) for i in range(MADE_UP)]
