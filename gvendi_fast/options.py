"""Options that the commands share: their types, names and help."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class Dtype(str, Enum):
    """Number formats of the proxy's weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Attention(str, Enum):
    """How the proxy computes attention."""

    auto = "auto"
    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


class Sketch(str, Enum):
    """Kinds of sketch."""

    hadamard = "hadamard"
    rademacher = "rademacher"


class Mask(str, Enum):
    """Which tokens are supervised."""

    completion = "completion"
    released = "released"


Data = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...",
        help="JSON lines (.jsonl, .jsonl.gz, .jsonl.zst) or Parquet: files, folders or globs. "
        "A row has prompt and completion, or messages, or text.",
    ),
]
ProxyName = Annotated[
    str,
    typer.Option(
        "--proxy",
        metavar="P",
        help="The model whose gradients are sketched: a hub name, a local folder, or 'tiny', the small model inside "
        "the package, for trying things out.",
    ),
]
Dim = Annotated[
    int,
    typer.Option(
        "--dim",
        metavar="K",
        help="Sketch dimension from 64 to 8192: a power of two, or a multiple of 64 for rademacher.",
    ),
]
Kind = Annotated[
    Sketch,
    typer.Option(
        "--sketch", help="Kind of sketch; rademacher is dense, slower, and there to verify hadamard."
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", metavar="S", help="Seed of the sketch and of draws from groups.")
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype", help="Weights of the proxy; auto: bfloat16 where the hardware has it, else float32."
    ),
]
AttentionOption = Annotated[
    Attention,
    typer.Option(
        "--attention",
        help="Attention of the proxy; auto: flash-attn where 'gvendi info' says it can be used, else PyTorch's sdpa.",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        metavar="N",
        help="Longest sequence. A longer prompt is cut on the left; a completion that does not fit is rejected. "
        "(Default: what the proxy reads, at most 4096.)",
    ),
]
BatchTokens = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens",
        metavar="N",
        help="Tokens of one batch, padding included. (Default: 2048 on a CPU, what fits into a GPU's free memory.)",
    ),
]
By = Annotated[
    str | None,
    typer.Option(
        "--by", metavar="FIELD", help="Compare groups by this field (dotted paths work: meta.task)."
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", help="Take the first N rows only.")]
MaxRejected = Annotated[
    str | None,
    typer.Option(
        "--max-rejected",
        metavar="N|P%",
        help="End with an error when more rows (or this share) are rejected.",
    ),
]
UnitRows = Annotated[
    int, typer.Option("--unit-rows", metavar="N", help="Rows stored, and resumed, as a whole.")
]
MaskOption = Annotated[
    Mask,
    typer.Option("--mask", help="Supervised tokens; 'released' masks as the released G-Vendi code does."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="PATTERN", help="Leave out parameters whose name matches; may be repeated."
    ),
]
PromptField = Annotated[str, typer.Option("--prompt-field", metavar="NAME", help="Name of the prompt field.")]
CompletionField = Annotated[
    str, typer.Option("--completion-field", metavar="NAME", help="Name of the completion field.")
]
MessagesField = Annotated[
    str, typer.Option("--messages-field", metavar="NAME", help="Name of the messages field.")
]
TextField = Annotated[str, typer.Option("--text-field", metavar="NAME", help="Name of the text field.")]
IdField = Annotated[str, typer.Option("--id-field", metavar="NAME", help="Name of the id field.")]
