"""Child processes that can be killed: forked from a server that has imported what the tests of this house need.

A session has one such server, and the first preload stays, so all tests use this list.
"""

import multiprocessing
from functools import cache

# What a synthesis imports.
SYNTHESIS = (
    "gvendi_fast.synthesis.run",
    "gvendi_fast.synthesis.tasks.generic",
    "gvendi_fast.synthesis.generators.openai",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.convert_slow_tokenizer",
    "openai.resources.chat",
    "openai.lib.streaming",
    "anyio._backends._asyncio",
    "pyarrow.parquet",
    "pyarrow.compute",
    "jinja2.sandbox",
    "yaml",
)
PRELOAD = ["pytest", *SYNTHESIS]


@cache
def children() -> multiprocessing.context.ForkServerContext:
    """The context to make processes with; its server has done its imports when this returns."""
    context = multiprocessing.get_context("forkserver")
    # A module that is not installed is passed over.
    context.set_forkserver_preload(PRELOAD)
    first = context.Process(target=_nothing)
    first.start()
    first.join()
    return context


def _nothing() -> None:
    """Whoever measures how long a child takes is spared the server's start."""


def grow(config: dict) -> None:
    """A synthesis run, for a process of its own."""
    import torch

    from gvendi_fast.synthesis.config.config import config_from
    from gvendi_fast.synthesis.run import synthesize

    torch.set_num_threads(1)
    synthesize(config_from(config))
