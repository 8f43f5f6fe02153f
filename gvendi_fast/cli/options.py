"""Options that the commands share: their types, names and help, and the bundles that commands take."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from inspect import Parameter
from pathlib import Path
from typing import Annotated, get_type_hints

import typer

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.places import is_url, local_name, place
from gvendi_fast.base.printing import note, warn
from gvendi_fast.cli.wording import values
from gvendi_fast.data.shapes import FORMATS


class EngineName(str, Enum):
    """Which processes do the work."""

    auto = "auto"
    local = "local"
    ranks = "ranks"
    ray = "ray"


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


class Compile(str, Enum):
    """Whether the proxy's pass is compiled."""

    auto = "auto"
    on = "on"
    off = "off"


class Sketch(str, Enum):
    """Kinds of sketch."""

    hadamard = "hadamard"
    rademacher = "rademacher"


class Store(str, Enum):
    """How sketches are stored."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"


class ControlTokens(str, Enum):
    """What control tokens are that a content spells out."""

    text = "text"
    tokens = "tokens"


class UrlText(str):
    """A URL where a path may stand."""


def path_or_url(text: str) -> Path | UrlText:
    """What a command is given for a path: `Path` would make one slash of a URL's two. `at_home` makes a place of it."""
    return UrlText(text) if is_url(text) else Path(local_name(text))


class Mask(str, Enum):
    """Which tokens are supervised."""

    completion = "completion"
    released = "released"


# What --format takes.
RowFormat = Enum("RowFormat", [(name, name) for name in FORMATS], type=str)

Data = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...",
        help="Files, folders or globs: JSON lines or JSON (.jsonl, .json), CSV (.csv, .tsv), each also packed (.gz, "
        ".zst), Parquet or Arrow (.parquet, .arrow, .feather); - for standard input (JSON lines); or a data set of "
        "the Hugging Face hub, owner/name:configuration:split@revision (the last three may be left out). A row has a "
        "prompt and a completion, or messages, or a text, or another shape (--format; docs/guide.md). 'score' also "
        "takes a run directory.",
    ),
]
RunDir = Annotated[
    Path,
    typer.Argument(
        parser=path_or_url,
        metavar="DIR",
        help="A run directory that 'gvendi sketch' or 'score --out' made.",
    ),
]
Corpus = Annotated[
    Path | None,
    typer.Option(
        "--corpus",
        parser=path_or_url,
        metavar="DIR",
        help="Folder that holds the corpus' files now, if they have moved since they were sketched.",
    ),
]
ProxyName = Annotated[
    str,
    typer.Option(
        "--proxy",
        metavar="P",
        autocompletion=values("tiny"),
        help="The model whose gradients are sketched: a name on the Hugging Face hub (fetched once), a local folder "
        "of a model or a PEFT adapter, a GGUF file, or 'tiny', the small model inside the package, for trying things "
        "out: it ranks data otherwise than real models (docs/results.md, Proxies).",
    ),
]
Dim = Annotated[
    str,
    typer.Option(
        "--dim",
        metavar="K|auto",
        autocompletion=values("auto", "512", "1024", "2048", "4096"),
        help="K, the numbers of a sketch, from 64 to 8192: a power of two, or a multiple of 64 for rademacher. More "
        "lower G-Vendi less, and take 4 K bytes a row. auto: that of --out if it holds sketches, else the smallest "
        "from 512 on predicted to lower G-Vendi by less than 5 %, judged by up to 512 rows.",
    ),
]
SketchKind = Annotated[
    Sketch,
    typer.Option(
        "--sketch",
        help="Kind of random projection; rademacher is dense, slower, and there to verify hadamard.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        metavar="S",
        help="Seed of the random projection and of draws from groups. Only sketches of one seed can be compared.",
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        help="Number format of the proxy's weights; auto: bfloat16 where the hardware has it ('gvendi info' says), "
        "else float32.",
    ),
]
AttentionOption = Annotated[
    Attention,
    typer.Option(
        "--attention",
        help="Attention of the proxy; auto: flash-attn if 'gvendi info' lists it as usable, else PyTorch's sdpa.",
    ),
]
CompileOption = Annotated[
    Compile,
    typer.Option(
        "--compile",
        help="Compile the proxy's blocks with torch.compile: takes seconds at the start, then less time per token. "
        "auto: on a GPU, if the corpus is long enough to gain. Sketches are the same up to rounding.",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        metavar="N",
        help="Longest row, in the proxy's tokens. A longer prompt is cut on the left; a row whose completion does not "
        "fit is rejected. (Default: the longest that the proxy reads, at most 4096.)",
    ),
]
BatchTokens = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens",
        metavar="N",
        help="Tokens that go through the proxy at once, padding included: fewer take less memory. (Default: 2048 on a "
        "CPU, what fits in a GPU's free memory.)",
    ),
]
By = Annotated[
    str | None,
    typer.Option(
        "--by",
        metavar="FIELD",
        help="Also score the groups of rows that have the same value in this field, all at the same number of rows; a "
        "dotted path such as meta.task works. Of a run directory: the --by that it was sketched with.",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", metavar="N", help="Read the first N rows only, in the order of the files. (Default: all.)"
    ),
]
MaxRejected = Annotated[
    str | None,
    typer.Option(
        "--max-rejected",
        metavar="N|P%",
        help="Stop with an error when more rows than this (25), or a larger share of all (2%), cannot be used. "
        "(Default: never; they are counted and listed in rejected.jsonl.)",
    ),
]
UnitRows = Annotated[
    int | None,
    typer.Option(
        "--unit-rows",
        metavar="N",
        help="Rows that are computed, stored and resumed as a whole: an interrupted run loses those of one at most. "
        "(Default: about a minute of work, by the proxy's rate on a few rows; 512 where all take a few minutes.)",
    ),
]
UnitBytes = Annotated[
    int | None,
    typer.Option(
        "--unit-bytes",
        metavar="N",
        help="Bytes of the text of a work unit's rows, at most, in place of their number or beside it. "
        "(Default: as --unit-rows says.)",
    ),
]
MaxRowBytes = Annotated[
    int,
    typer.Option(
        "--max-row-bytes",
        metavar="N",
        help="Longest row, in bytes of its JSON line, or of its Parquet columns; a longer one is rejected unread. A "
        "row may take 300 times its bytes of memory. (Default: 8 MiB.)",
        show_default=False,
    ),
]
SkipUnreadable = Annotated[
    bool,
    typer.Option(
        "--skip-unreadable",
        "--skip-damaged",
        help="Go on without files and folders of the corpus that cannot be read, or are damaged, and list them at the "
        "end. (Default: the first one ends the run, before a row is sketched. Archives that are cut short give their "
        "rows in any case.)",
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="End with an error, before the work, where the look at 64 rows gives a warning ('gvendi inspect').",
    ),
]
MaskOption = Annotated[
    Mask,
    typer.Option(
        "--mask",
        help="Which tokens' loss counts. completion: those of the completion, of the assistant's messages, or of the "
        "whole text; released: those that the code released with the paper takes.",
    ),
]
ControlTokensOption = Annotated[
    ControlTokens,
    typer.Option(
        "--control-tokens",
        help="What a control token of the tokenizer is when a user, system or tool message spells it out, as in a "
        "question about <|im_end|>. text: the letters it is written with. tokens: the control token itself, as if the "
        "chat template had written it. The assistant's own words and plain texts may hold control tokens either way.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="PATTERN",
        help="Leave out the proxy's parameters whose name matches this shell pattern, such as '*.mlp.*'; may be "
        "repeated.",
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="PRESET",
        autocompletion=values(
            *("all", "no-embedding", "no-head", "no-embedding-or-head", "no-norm", "attention", "mlp"),
            *("expert", "no-expert", "no-router", "first-half", "last-half"),
        ),
        help="Which kinds of layers are sketched: all (the default), no-embedding, no-head, no-embedding-or-head, "
        "no-norm, attention, mlp (experts and routers with it), expert, no-expert, no-router, first-half, last-half "
        "(of the blocks) or last-N (the last N blocks alone, as last-4). A run directory has what it was sketched "
        "with: others can be chosen later only from --sketch-groups.",
    ),
]
Parameters = Annotated[
    str,
    typer.Option(
        "--parameters",
        metavar="NAME",
        autocompletion=values("trainable", "adapters", "base"),
        help="Which parameters' gradients are sketched, of a proxy with an adapter: adapters (which trainable, the "
        "default, means too), or base for those of the model that it is on.",
    ),
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="BITS",
        autocompletion=values("4bit", "8bit"),
        help="Load the proxy's linear layers in 4bit (nf4) or 8bit, by bitsandbytes: less memory, at other gradients. "
        "Weights that are stored in fewer bits already need no option. (Default: as they are stored.)",
    ),
]
SketchGroups = Annotated[
    str | None,
    typer.Option(
        "--sketch-groups",
        metavar="KINDS",
        autocompletion=values("embedding", "kind", "kind-and-half"),
        help="Also keep the sketches of groups of layers, so that --layers can be chosen afterwards: embedding (with "
        "the head, and the rest), kind, or kind-and-half (every choice). Takes 4 K bytes more a row and group.",
    ),
]
StoreOption = Annotated[
    Store | None,
    typer.Option(
        "--store",
        help="Numbers that sketches are stored in: float16 takes half the bytes of float32, int8 a quarter, each with "
        "a scale a row; docs/sketch.md says what that changes. (Default: as --out was begun, float32 in a new one.)",
    ),
]
PromptField = Annotated[
    str,
    typer.Option(
        "--prompt-field", metavar="NAME", help="Field of a row with the prompt, read with the completion."
    ),
]
CompletionField = Annotated[
    str, typer.Option("--completion-field", metavar="NAME", help="Field of a row with the completion.")
]
MessagesField = Annotated[
    str,
    typer.Option(
        "--messages-field",
        metavar="NAME",
        help="Field with a conversation, read where a row has no such pair.",
    ),
]
TextField = Annotated[
    str,
    typer.Option(
        "--text-field",
        metavar="NAME",
        help="Field with a text, read where a row has neither pair nor conversation.",
    ),
]
FormatOption = Annotated[
    RowFormat,
    typer.Option(
        "--format",
        case_sensitive=False,
        metavar="NAME",
        help="Shape of the rows: auto (recognised from the first ones, and said), fields (a prompt and a completion, "
        f"messages or a text, by the names below), or {', '.join(FORMATS[2:-1])} or {FORMATS[-1]}; docs/guide.md, "
        "Rows, says what each reads.",
    ),
]
IdField = Annotated[
    str,
    typer.Option(
        "--id-field",
        metavar="NAME",
        help="Field with a row's id; of rows with the same id the first counts. Rows without one are called FILE:LINE.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout, in place of text.")]
Order = Annotated[
    list[float] | None,
    typer.Option(
        "--order",
        metavar="Q",
        help="Also compute G-Vendi of this Rényi order, above 0: 2 counts the large directions more, inf the largest "
        "alone; may be repeated. (Order 1 is always computed.)",
    ),
]


EngineOption = Annotated[
    EngineName,
    typer.Option(
        "--engine",
        help="Which processes do the work. local: this one; ranks: those that torchrun, accelerate launch, srun or a "
        "Slurm array has started with the same command; ray: workers of a Ray cluster (docs/cluster.md). auto: ranks "
        "where the environment says that there are several, else local.",
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        "--workers",
        metavar="N|LOW:HIGH",
        help="Workers of Ray: so many, or from LOW to HIGH, as the cluster has room. (Default: 1:64.)",
    ),
]
GpusPerWorker = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-worker",
        metavar="N",
        min=0,
        help="GPUs of a worker of Ray; below 1, workers share one. (Default: 0, the CPU.)",
    ),
]
CpusPerWorker = Annotated[
    float | None,
    typer.Option(
        "--cpus-per-worker",
        metavar="N",
        min=0,
        help="CPU cores of a worker of Ray, and its threads. (Default: 1.)",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray-address",
        metavar="ADDRESS",
        help="The Ray cluster, as ray.init takes it. (Default: RAY_ADDRESS, else one of this machine for the run.)",
    ),
]
MaxAttempts = Annotated[
    int,
    typer.Option(
        "--max-attempts",
        metavar="N",
        min=1,
        help="How often a work unit may fail before it is left out: the run goes on without it, lists it at the end "
        "and exits with code 3.",
    ),
]
HangAfter = Annotated[
    float,
    typer.Option(
        "--hang-after",
        metavar="SECONDS",
        min=0,
        help="Without progress for so long a work unit counts as failed, and its process ends, with code 75 where it "
        "is the command's own. 0: never.",
    ),
]
LeaseSeconds = Annotated[
    float,
    typer.Option(
        "--lease",
        metavar="SECONDS",
        min=1,
        help="Seconds after which the work units of a process that gives no sign of life are taken by others.",
    ),
]
RetryFailed = Annotated[
    bool,
    typer.Option("--retry-failed", help="Try work units again that an earlier command has left out."),
]


@dataclass(frozen=True)
class EngineOptions:
    """Which processes do the work of a command."""

    engine: EngineOption = EngineName.auto
    workers: Workers = None
    gpus_per_worker: GpusPerWorker = None
    cpus_per_worker: CpusPerWorker = None
    ray_address: RayAddress = None

    def over(self, directory: Path):
        """The `Engine` of a command that reads a run directory. Jobs of an array, of which each may have its own
        directory, work together only where the engine is named.
        """
        engine = self.open(with_arrays=False)
        engine.folder = directory
        return engine

    def open(self, is_shared: bool = True, with_arrays: bool = True):
        """The `Engine`; is_shared: whether several ranks could work together, which "auto" depends on.

        with_arrays: whether jobs of an array do so too for "auto".
        Raises GvendiError for options that do not go together, as the engine does, and for ranks that cannot.
        """
        from gvendi_fast.engines.choice import engine_of, parse_workers
        from gvendi_fast.engines.ranks import RanksEngine

        of_ray = {
            "workers": parse_workers(self.workers),
            "gpus_per_worker": self.gpus_per_worker,
            "cpus_per_worker": self.cpus_per_worker,
            "address": self.ray_address,
        }
        if self.engine is not EngineName.ray:
            for name, value in of_ray.items():
                if value is not None:
                    option = "ray-address" if name == "address" else name.replace("_", "-")
                    raise GvendiError(
                        f"--{option} goes with --engine ray, not with {self.engine.value}; leave it "
                        "out, or give that engine"
                    )
        name = self.engine.value
        if not is_shared and name == "auto":
            name = "local"
        engine = engine_of(name, with_arrays=with_arrays, **of_ray)
        if not is_shared and engine.world > 1:
            raise GvendiError(
                f"--engine is {name}, and {engine.world} ranks work together in one run directory; name it: --out DIR"
            )
        # Jobs of an array have a log each, and some arrays have a corpus each.
        if isinstance(engine, RanksEngine) and engine.is_array and not engine.is_first:
            note(
                f"rank {engine.rank} of {engine.world} by {engine.said}: rank 0 reports; where each job of the array "
                "has its own --out, give --engine local"
            )
        return engine


@dataclass(frozen=True)
class UnitOptions:
    """When work units are given up or taken from others."""

    max_attempts: MaxAttempts = 3
    hang_after: HangAfter = 1800.0
    lease: LeaseSeconds = 60.0
    retry_failed: RetryFailed = False

    def added_to(self, settings):
        """`Settings` with these."""
        from gvendi_fast.data.leases import Terms

        terms = Terms(self.lease, self.max_attempts, hang_after_s=self.hang_after or None)
        return replace(settings, terms=terms, retry_failed=self.retry_failed)


@dataclass(frozen=True)
class CorpusOptions:
    """What 'score' and 'sketch' read and how they sketch it."""

    proxy: ProxyName = "Qwen/Qwen2.5-0.5B-Instruct"
    dim: Dim = "1024"
    sketch: SketchKind = Sketch.hadamard
    seed: Seed = 0
    dtype: DtypeOption = Dtype.auto
    attention: AttentionOption = Attention.auto
    compile: CompileOption = Compile.auto
    max_tokens: MaxTokens = None
    batch_tokens: BatchTokens = None
    by: By = None
    limit: Limit = None
    max_rejected: MaxRejected = None
    unit_rows: UnitRows = None
    unit_bytes: UnitBytes = None
    mask: MaskOption = Mask.completion
    control_tokens: ControlTokensOption = ControlTokens.text
    exclude: Exclude = None
    layers: Layers = None
    sketch_groups: SketchGroups = None
    store: StoreOption = None
    parameters: Parameters = "trainable"
    quantize: QuantizeOption = None
    format: FormatOption = RowFormat.auto
    prompt_field: PromptField = "prompt"
    completion_field: CompletionField = "completion"
    messages_field: MessagesField = "messages"
    text_field: TextField = "text"
    id_field: IdField = "id"
    max_row_bytes: MaxRowBytes = 1 << 23
    skip_unreadable: SkipUnreadable = False
    strict: Strict = False

    def only(self, *names: str, command: str) -> None:
        """GvendiError if an option other than `names` was given, because the `command` does not use it."""
        for field in fields(self):
            if field.name not in names and getattr(self, field.name) != field.default:
                raise GvendiError(
                    f"--{field.name.replace('_', '-')} does not go with the {command}, whose sketches exist already; "
                    "leave it out, or sketch the corpus again into another --out"
                )

    def load_proxy(self, engine):
        """The proxy model with its tokenizer, where and as this engine needs it."""
        from gvendi_fast.sketching.proxy.load import load_proxy

        attention = None if self.attention is Attention.auto else self.attention.value
        return load_proxy(
            home(self.proxy),
            dtype=engine.dtype(self.dtype.value),
            device=engine.device,
            attention=attention,
            quantize=self.quantize,
        )

    def settings(self):
        """The `Settings` that `sketch_corpus` takes."""
        from gvendi_fast.data.index import Fields
        from gvendi_fast.kernels.sketch_matrix import SketchSpec
        from gvendi_fast.sketching.corpus import Settings

        return Settings(
            spec=SketchSpec(**parse_dim(self.dim), kind=self.sketch.value, seed=self.seed),
            auto_dim=self.dim == "auto",
            fields=Fields(
                prompt=self.prompt_field,
                completion=self.completion_field,
                messages=self.messages_field,
                text=self.text_field,
                id=self.id_field,
                by=self.by,
                format=self.format.value,
            ),
            max_tokens=self.max_tokens,
            batch_tokens=self.batch_tokens,
            compile=self.compile.value,
            mask=self.mask.value,
            control_tokens=self.control_tokens.value,
            limit=self.limit,
            unit_rows=self.unit_rows,
            unit_bytes=self.unit_bytes,
            max_rejected=parse_max_rejected(self.max_rejected),
            exclude=tuple(self.exclude or ()),
            layers=self.layers or "all",
            groups=self.sketch_groups,
            store=self.store and self.store.value,
            parameters=self.parameters,
            max_row_bytes=self.max_row_bytes,
            skip_unreadable=self.skip_unreadable,
            strict=self.strict,
        )


def warn_unfinished(run) -> None:
    """Say on stderr that work units of a run directory are missing, if any are."""
    if said := run.missing():
        warn(said)


def saved_mean(path: Path | None):
    """The `RowMean` that --mean names, None without one."""
    from gvendi_fast.vendi.centered import RowMean

    if path is not None and not path.is_file():
        raise GvendiError(
            f"--mean: '{path}' is not a file; give one that 'gvendi score --save-mean FILE' wrote"
        )
    if path is None:
        return None
    try:
        return RowMean.load(path)
    except GvendiError as error:
        raise GvendiError(f"--mean: {error}; 'gvendi score --save-mean FILE' writes one") from error


def home(path: str) -> str:
    """The path with a leading ~ replaced by the home folder: a shell does not do so in --out=~/runs."""
    return os.path.expanduser(path)


def at_home(command: Callable) -> Callable:
    """The command with `home` applied to every argument that is a path; GvendiError for one that is no UTF-8."""

    def expanded(value):
        if isinstance(value, UrlText):
            return place(value)
        if isinstance(value, Path):
            path = home(str(value))
            # Names are stored as text, and Arrow takes no others.
            if any("\ud800" <= c <= "\udfff" for c in path):
                raise GvendiError(f"the path '{path}' is not UTF-8; rename it, or give another")
            return Path(path)
        return [expanded(item) for item in value] if isinstance(value, list) else value

    @functools.wraps(command)
    def run(**given) -> None:
        command(**{name: expanded(value) for name, value in given.items()})

    run.__signature__ = inspect.signature(command, eval_str=True)
    return run


def unbundled(command: Callable) -> Callable:
    """The command as typer reads it: a parameter that is a dataclass of options is replaced by its fields."""
    signature = inspect.signature(command, eval_str=True)
    bundles = {p.name: p.annotation for p in signature.parameters.values() if is_dataclass(p.annotation)}
    options: list[Parameter] = []
    for p in signature.parameters.values():
        if p.name not in bundles:
            options.append(p.replace(kind=Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(p.annotation, include_extras=True)
        for field in fields(p.annotation):
            options.append(
                Parameter(
                    field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
                )
            )

    @functools.wraps(command)
    def run(**given) -> None:
        for name, bundle in bundles.items():
            given[name] = bundle(**{field.name: given.pop(field.name) for field in fields(bundle)})
        command(**given)

    run.__signature__ = signature.replace(parameters=options)
    run.__annotations__ = {p.name: p.annotation for p in options}
    return run


def parse_dim(text: str) -> dict[str, int]:
    """The `dim` of a SketchSpec: "512" -> {"dim": 512}, "auto" -> {}, whose default is then replaced."""
    if text == "auto":
        return {}
    if not text.removeprefix("-").isdecimal():
        raise GvendiError(f"--dim must be a whole number such as 1024, or auto, got {text!r}")
    return {"dim": int(text)}


def parse_max_rejected(text: str | None) -> int | float | None:
    """ "25" -> 25 rows, "2%" -> 0.02 of all rows."""
    if text is None:
        return None
    number = text.removesuffix("%")
    plain = number.replace(".", "", 1) if text.endswith("%") else number
    if not plain.isdecimal() or (text.endswith("%") and float(number) >= 100):
        raise GvendiError(
            f"--max-rejected must be a count such as 25 or a share below 100%, such as 2%, got {text!r}"
        )
    return float(number) / 100 if text.endswith("%") else int(number)
