"""`gvendi inspect`: how rows are read, what of them would be lost in silence, and whether a model is a fit proxy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.printable import printable
from gvendi_fast.base.printing import console, note, put, put_json
from gvendi_fast.cli.options import (
    Attention,
    AttentionOption,
    CompletionField,
    ControlTokens,
    ControlTokensOption,
    Dim,
    Dtype,
    DtypeOption,
    Exclude,
    FormatOption,
    IdField,
    Json,
    Layers,
    Limit,
    Mask,
    MaskOption,
    MaxRowBytes,
    MaxTokens,
    MessagesField,
    PromptField,
    ProxyName,
    RowFormat,
    SkipUnreadable,
    TextField,
    home,
    parse_dim,
)
from gvendi_fast.cli.wording import values
from gvendi_fast.data.hub_names import hub_name

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from gvendi_fast.data.hub_data import HubRows
    from gvendi_fast.data.index import Fields, Manifest
    from gvendi_fast.sketching.inspection import Example, Inspection, Part, Range

EXIT_WARNINGS = 1
DEFAULT_PROXY = "Qwen/Qwen2.5-0.5B-Instruct"
ROWS, SHOWN = 64, 5
# Of a data set of the hub no more rows are fetched for a look, unless it is to look at more.
HUB_ROWS = 2000
# Where a stream has no colours, what is supervised stands between these; the second pair is for ASCII.
MARKS, PLAIN_MARKS = ("⟦", "⟧"), ("[[", "]]")
SUPERVISED = "bold green"


def inspect(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA]...",
            help="What 'gvendi score' takes: files, folders, globs, - or a data set of the hub. With --model, where "
            "the rows that it is measured with are from. (Default with --model: a few built-in ones.)",
        ),
    ] = None,
    proxy: ProxyName = DEFAULT_PROXY,
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", help="How many rows to look at, spread over the corpus.")
    ] = ROWS,
    show: Annotated[int, typer.Option("--show", metavar="N", help="How many of them to print.")] = SHOWN,
    max_tokens: MaxTokens = None,
    mask: MaskOption = Mask.completion,
    control_tokens: ControlTokensOption = ControlTokens.text,
    limit: Limit = None,
    format: FormatOption = RowFormat.auto,
    prompt_field: PromptField = "prompt",
    completion_field: CompletionField = "completion",
    messages_field: MessagesField = "messages",
    text_field: TextField = "text",
    id_field: IdField = "id",
    max_row_bytes: MaxRowBytes = 1 << 23,
    skip_unreadable: SkipUnreadable = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 where there is a warning.")] = False,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="P",
            autocompletion=values("tiny"),
            help="Measure whether this model is fit to be a proxy, in place of looking at rows: a folder, a name on "
            "the hub, or 'tiny'. Exits with 1 where a check fails. (Default: none; rows are looked at.)",
        ),
    ] = None,
    dim: Dim = "1024",
    dtype: DtypeOption = Dtype.auto,
    device: Annotated[
        str,
        typer.Option(
            "--device", metavar="D", help="Where --model runs: auto (a GPU if there is one), cpu, cuda:1."
        ),
    ] = "auto",
    attention: AttentionOption = Attention.auto,
    compile: Annotated[bool, typer.Option("--compile", help="Check --model as it runs compiled.")] = False,
    exclude: Exclude = None,
    layers: Layers = None,
    as_json: Json = False,
) -> None:
    """Look at rows before a run: how they are read, and which of their tokens are supervised.

    Prints a few rows as the proxy's tokenizer gets them, what is supervised in
    colour (without colours: in brackets), lengths and shares, and a warning for
    what a run would get wrong without an error: content that the chat template
    drops, rows with the same tokens, a text that all answers share, answers
    without an end, two BOS tokens, prompts that are cut, tokens outside the
    embedding. The model's weights are not loaded. Of a data set of the Hugging
    Face hub the first 2,000 rows are fetched. 'score' and 'sketch' begin
    with the same look.

    With --model P nothing is said of rows: the model is loaded, and measured on
    this machine. A row's sketch must be the same alone, in a batch, with padding
    on either side, and twice in a row, and be that of autograd's own gradient:
    each check says the cosine, what passes, and what to do. Then what a BOS
    token changes, which kinds of layers are covered, what no text reaches, and
    what a batch costs.

    Example: gvendi inspect data.jsonl --proxy tiny
    Example: gvendi inspect --model tiny
    """
    from gvendi_fast.data.index import Fields

    fields = Fields(
        prompt=prompt_field,
        completion=completion_field,
        messages=messages_field,
        text=text_field,
        id=id_field,
        format=format.value,
    )
    reading = {"limit": limit, "max_row_bytes": max_row_bytes, "skip_unreadable": skip_unreadable}
    if model is not None:
        _refuse(
            "--model",
            {
                "--proxy": proxy != DEFAULT_PROXY,
                "--rows": rows != ROWS,
                "--show": show != SHOWN,
                "--max-tokens": max_tokens is not None,
                "--mask": mask is not Mask.completion,
                "--control-tokens": control_tokens is not ControlTokens.text,
                "--strict": strict,
            },
            "it measures a model, not rows",
        )
        given = None
        if data:
            paths = [home(item) for item in data]
            given = _index(paths, fields, _hub(paths, HUB_ROWS, skip_unreadable), reading)
        _inspect_model(
            model, given, dim, dtype, device, attention, compile, exclude or (), layers or "all", as_json
        )
        return
    _refuse(
        "a look at rows",
        {
            "--dim": dim != "1024",
            "--dtype": dtype is not Dtype.auto,
            "--device": device != "auto",
            "--attention": attention is not Attention.auto,
            "--compile": compile,
            "--exclude": bool(exclude),
            "--layers": layers is not None,
        },
        "which loads no model; name one with --model",
    )
    if not data:
        raise GvendiError("there is nothing to look at; give DATA, or the model to measure with --model")
    _inspect_rows(
        [home(item) for item in data], proxy, fields, rows, show, max_tokens, mask, control_tokens, reading, strict,
        as_json,
    )  # fmt: skip


def _refuse(what: str, given: dict[str, bool], why: str) -> None:
    """GvendiError for the first of these options that was given."""
    for option, is_given in given.items():
        if is_given:
            raise GvendiError(f"{option} does not go with {what}: {why}; leave it out")


def _hub(paths: list[str], most: int, skip_unreadable: bool) -> HubRows:
    """What fetches data sets of the hub; a wrong path, or name on the hub, is reported before all else is fetched."""
    from gvendi_fast.base.progress import progress_for
    from gvendi_fast.data.hub_data import HubRows
    from gvendi_fast.data.listing import list_files

    hub = HubRows(progress=progress_for(), most=most)
    for name in list_files(paths, skip_unreadable, with_hub=True).hub:
        hub.recorded(name)
    return hub


def _index(paths: list[str], fields: Fields, hub: HubRows, reading: dict[str, Any]) -> Manifest:
    """The corpus."""
    from gvendi_fast.data.index import index_corpus
    from gvendi_fast.data.named_fields import check_named_fields

    manifest = index_corpus(paths, fields, hub=hub, **reading)
    for said in manifest.remarks():
        note(said)
    check_named_fields(manifest)
    return manifest


def _inspect_model(
    name: str, data: Manifest | None, dim: str, dtype: Dtype, device: str, attention: Attention, compiles: bool,
    exclude: Sequence[str], layers: str, as_json: bool,
) -> None:  # fmt: skip
    from gvendi_fast.cli.self_check import print_self_check
    from gvendi_fast.kernels.sketch_matrix import SketchSpec
    from gvendi_fast.sketching.inspection import some_rows
    from gvendi_fast.sketching.proxy.load import load_proxy
    from gvendi_fast.sketching.self_check import ROWS as MEASURED
    from gvendi_fast.sketching.self_check import self_check

    kind = None if attention is Attention.auto else attention.value
    spec = SketchSpec(**parse_dim(dim))
    proxy = load_proxy(home(name), dtype=dtype.value, device=device, attention=kind)
    rows = [] if data is None else some_rows(data, MEASURED)
    if data is not None and not rows:
        raise GvendiError(
            "none of the rows of DATA can be read; leave DATA out to measure with built-in ones"
        )
    found = self_check(proxy, rows, spec=spec, exclude=exclude, layers=layers, compile=compiles)
    if as_json:
        put_json(found.to_dict())
    else:
        print_self_check(console(), found)
    if not found.passed:
        raise typer.Exit(EXIT_WARNINGS)


def _inspect_rows(
    paths: list[str], proxy: str, fields: Fields, rows: int, show: int, max_tokens: int | None, mask: Mask,
    control_tokens: ControlTokens, reading: dict[str, Any], strict: bool, as_json: bool,
) -> None:  # fmt: skip
    from gvendi_fast.sketching.corpus import longest
    from gvendi_fast.sketching.inspection import THOROUGH, look
    from gvendi_fast.sketching.proxy.encode import Encoder
    from gvendi_fast.sketching.proxy.load import load_tokenizer

    hub = _hub(paths, max(HUB_ROWS, rows), reading["skip_unreadable"])
    of = load_tokenizer(home(proxy))
    bound = longest(of.name, of.positions, max_tokens)
    encoder = Encoder(of.tokenizer, bound, mask.value, of.vocabulary, control_tokens.value)
    manifest = _index(paths, fields, hub, reading)
    found = look(manifest, encoder, rows, show, THOROUGH)
    if as_json:
        put_json(found.to_dict())
    else:
        _print(console(), found, [file.path for file in manifest.files])
    if strict and found.faults:
        raise typer.Exit(EXIT_WARNINGS)


def _print(out: Console, found: Inspection, files: Sequence[str]) -> None:
    from gvendi_fast.cli.tables import headline, say

    more = f" and {len(files) - 1:,} more files" if len(files) > 1 else ""
    headline(
        out,
        f"{found.looked_at:,} of {found.rows:,} rows  looked at, from '{_short(files[0])}'{more}",
    )
    for name, value in _lines(found).items():
        say(out, f"  {name:<12}{value}", 14)
    for example in found.examples:
        put("", out.file)
        _print_row(out, example)
    put("", out.file)
    for fault in found.faults:
        say(out, f"warning: {fault}", 2)
    if not found.faults:
        say(out, "nothing to warn of")


def _lines(found: Inspection) -> dict[str, str]:
    from gvendi_fast.sketching.inspection import FORMS

    forms = [f"{FORMS[form]} ({count:,})" for form, count in found.forms.items()]
    rendered = ["rendered by the tokenizer's chat template" if found.has_template else "no chat template"]
    # No template is applied to a text.
    rendered = rendered if set(found.forms) - {"text"} else []
    rendered += ["texts are taken as they are"] if "text" in found.forms else []
    lines = {"rows are": "; ".join([", ".join(forms) or "none that can be read", *rendered])}
    if found.refused:
        refused = sum(found.refused.values())
        kinds = "; ".join(f"{reason}: {count:,}" for reason, count in found.refused.items())
        lines["refused"] = f"{refused:,} ({kinds})"
    if found.spelt:
        lines["spelt out"] = (
            f"{found.spelt:,} rows have control tokens in a content, which are read as text; '--control-tokens tokens' "
            "reads them as tokens"
        )
    if found.passed_over:
        lines["not shown"] = f"{found.passed_over:,} rows that are too long for a look"
    if found.tokens is None or found.supervised is None or found.share is None:
        return lines
    bound = "no limit" if found.max_tokens is None else f"--max-tokens is {found.max_tokens:,}"
    cut = f"prompts that are cut: {found.cut:,}" if found.cut else "no prompt is cut"
    fits = f"rows that do not fit: {found.too_long:,}" if found.too_long else "every row fits"
    lines["tokens"] = f"{_range(found.tokens)} a row; {bound}: {cut}, {fits}"
    share = found.share
    lines["supervised"] = (
        f"{_range(found.supervised)} a row; {100 * (found.share_of_all or 0):.1f} % of all tokens, of a row "
        f"{100 * share.least:.0f} to {100 * share.most:.0f} %, median {100 * share.median:.0f} %"
    )
    return lines


def _range(of: Range) -> str:
    return f"{of.least:,.0f} to {of.most:,.0f}, median {of.median:,.0f}"


def _print_row(out: Console, row: Example) -> None:
    from rich.text import Text

    from gvendi_fast.cli.tables import print_text

    said = f" ({printable(row.note)})" if row.note else ""
    place = printable(f"{_short(row.file)}:{row.line}")
    put(
        f"{place}: {row.tokens:,} tokens{said}, {row.supervised:,} supervised, the last of them is {row.last}",
        out.file,
    )
    line = Text("")
    for number, part in enumerate(row.parts):
        if row.skipped and number == row.after:
            line.append(f" … {row.skipped:,} parts … ")
        _append(line, part, _marks(out))
    for piece in line.split("\n"):
        print_text(out, Text("  ") + piece)


def _short(path: str) -> str:
    """A file's own name; a data set of the hub without its commit."""
    name = hub_name(path)
    return os.path.basename(path) if name is None or not name.is_recorded else name.unpinned


def _append(line: Text, part: Part, marks: tuple[str, str] | None) -> None:
    text, tail = printable(part.text, "\n\t"), printable(part.tail, "\n\t")
    if part.skipped:
        text += f" … {part.skipped:,} characters … {tail}"
    if not part.is_supervised:
        line.append(text)
    elif marks is None:
        line.append(text, style=SUPERVISED)
    else:
        line.append(f"{marks[0]}{text}{marks[1]}")


def _marks(out: Console) -> tuple[str, str] | None:
    """What stands around the supervised part; None where colour tells it."""
    if out.is_terminal and out.color_system is not None and not out.no_color:
        return None
    return MARKS if out.encoding.lower().startswith("utf") else PLAIN_MARKS
