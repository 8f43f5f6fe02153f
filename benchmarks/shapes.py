"""The models and batches that the speed benchmarks run: real architectures with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Shape:
    """A Qwen2 configuration and the batch it is measured with."""

    name: str
    config: dict
    batch: int
    length: int


SHAPES = {
    "qwen2-15m": Shape(
        "15 M-parameter Qwen2",
        {
            "vocab_size": 32000,
            "hidden_size": 288,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
        },
        batch=8,
        length=256,
    ),
    "qwen2.5-0.5b-slice": Shape(
        "2 of 24 layers of Qwen2.5-0.5B",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 2,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
        batch=4,
        length=256,
    ),
}

# What a GPU is measured with: Qwen2.5-0.5B, and one layer of it by itself.
QWEN_05B = Shape(
    "Qwen2.5-0.5B",
    {**SHAPES["qwen2.5-0.5b-slice"].config, "num_hidden_layers": 24},
    batch=128,
    length=512,
)
# Batches of a GPU by their tokens: (samples, length). The last is what a corpus of short rows gives in one batch.
BATCHES = {"64k": (128, 512), "16k": (32, 512), "8k": (16, 512), "10k": (64, 160)}
TIMED_ROWS, TIMED_LENGTH, TIMED_DIM = 65536, 512, 1024
TIMED_WIDTHS = ((896, 4864), (896, 896))
DENSE_SAMPLES = 16


def build(name: str, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model in eval mode and a full batch of random token ids int64 [B, T], all of them supervised."""
    import torch
    import transformers

    from gvendi_fast.base.errors import GvendiError

    if name not in SHAPES:
        raise GvendiError(f"shape must be one of {', '.join(SHAPES)}, got {name!r}")
    shape = SHAPES[name]
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**shape.config, tie_word_embeddings=True, max_position_embeddings=2048)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    return model, torch.randint(0, config.vocab_size, (shape.batch, shape.length))
