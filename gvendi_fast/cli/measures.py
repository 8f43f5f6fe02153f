"""`gvendi measures`: G-Vendi and other measures of diversity, of the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gvendi_fast.base.printing import console, put, put_json
from gvendi_fast.base.shown import shown
from gvendi_fast.cli.options import By, Json, RunDir, path_or_url, warn_unfinished
from gvendi_fast.cli.tables import headline, print_table, say, short_names

if TYPE_CHECKING:
    from gvendi_fast.analysis.measures import Measured

# Field of Measures -> heading and number format.
COLUMNS = {
    "gvendi": ("G-Vendi", ".2f"),
    "mean_cosine": ("mean cosine", ".4f"),
    "bigram_entropy": ("2-gram entropy", ".3f"),
    "perplexity": ("perplexity", ".2f"),
    "embedding_vendi": ("embedding Vendi", ".2f"),
    "embedding_mean_cosine": ("embedding cosine", ".4f"),
}


def measures(
    directory: RunDir,
    by: By = None,
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            metavar="N",
            help="Rows to measure of each set. (Default: all; with --by those of the smallest group of at least 32; "
            "smaller groups are measured together, as (others).)",
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            "--embedding",
            metavar="MODEL",
            help="Sentence-transformers model, by hub name or folder: adds the Vendi score of text embeddings. "
            "Needs pip install 'gvendi-fast\\[embeddings]'.",
        ),
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            "--corpus",
            parser=path_or_url,
            metavar="DIR",
            help="Folder that holds the files of the corpus now, if they have moved.",
        ),
    ] = None,
    no_text: Annotated[
        bool,
        typer.Option("--no-text", help="Do not read the corpus: leaves out 2-gram entropy and embeddings."),
    ] = False,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Seed of the draw of rows.")] = 0,
    as_json: Json = False,
) -> None:
    """Show G-Vendi and other measures of diversity, all of the same rows.

    mean cosine: over all pairs of sketches; smaller is more diverse.
    2-gram entropy: of the word 2-grams of the texts, in nats.
    perplexity: of the supervised tokens under the proxy, exp of the mean loss.
    embedding Vendi: the Vendi score of text embeddings, with their mean cosine.

    Every set is measured on n rows, drawn by id, and with --by so is the whole
    run, because most measures grow with n.

    Example: gvendi measures runs/mine --by source
    """
    from gvendi_fast.analysis.measures import measure
    from gvendi_fast.data.run_directory import RunDirectory

    run = RunDirectory.load(directory)
    warn_unfinished(run)
    measured = measure(run, by=by, n=n, embedding=embedding, text=not no_text, corpus=corpus, seed=seed)
    if as_json:
        put_json(measured.to_dict())
    else:
        _print(measured, by)


def _print(measured: Measured, by: str | None) -> None:
    from gvendi_fast.analysis.equal_n import pooled_sentence, saturation_sentence

    out = console()
    columns = {name: kind for name, kind in COLUMNS.items() if getattr(measured.whole, name) is not None}
    if by is None:
        headline(out, f"G-Vendi {measured.whole.gvendi:.2f}  (n = {measured.n:,}, K = {measured.dim:,})")
        for name, (heading, form) in columns.items():
            if name != "gvendi":
                put(f"  {heading:<18}{shown(getattr(measured.whole, name), form)}")
        return
    put(f"by {by}, one draw of n = {measured.n:,} rows of each (K = {measured.dim:,})")
    scored = {name: found for name, found in measured.by.items() if found.gvendi is not None}
    ranked = sorted(scored.items(), key=lambda item: (-item[1].gvendi, item[0]))
    sets = [*zip(short_names([name for name, _ in ranked]), (found for _, found in ranked), strict=True)]
    rows = []
    for name, found in [*sets, ("(all rows)", measured.whole)]:
        values = [getattr(found, column) for column in columns]
        cells = ["" if v is None else shown(v, f) for v, (_, f) in zip(values, columns.values(), strict=True)]
        rows.append((name, f"{found.rows:,}", *cells))
    print_table(out, (by, "rows", *(heading for heading, _ in columns.values())), rows, apart=1)
    values = [found.gvendi for found in scored.values()]
    for sentence in (pooled_sentence(measured.by), saturation_sentence(values, measured.n, measured.dim)):
        if sentence:
            say(out, sentence)
