"""Other measures of diversity beside G-Vendi, of the same n rows: the ones it is compared with in arXiv 2505.20161.

z_i unit rows [n, K], x_i unit embeddings of the texts [n, D]
    mean pairwise cosine   mean over i != j of <z_i, z_j> = (|sum_i z_i|^2 - n) / (n (n - 1)); small is diverse
    2-gram entropy         -sum_g p_g ln p_g over the word 2-grams g of all texts, p_g their shares; nats
    perplexity             exp(summed loss / supervised tokens) under the proxy
    embedding Vendi        exp of the entropy of the embeddings' covariance (1/n) sum_i x_i x_i^T (arXiv 2210.02410)
All but the cosine grow, or may grow, with n: they compare at equal n only.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from gvendi_fast.analysis.asked_groups import check_by
from gvendi_fast.analysis.compare import MOST_ROWS
from gvendi_fast.analysis.equal_n import GROUP_BYTES, with_others
from gvendi_fast.base.draws import places_by_id
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.os_errors import sentence
from gvendi_fast.base.unit_length import Rows, check_matrix, unit_blocks
from gvendi_fast.data.pool import Pool, as_pool
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.texts import locate_corpus, row_texts
from gvendi_fast.vendi.of_rows import gvendi

_WORD = re.compile(r"\w+|[^\w\s]")


class SentenceEncoder(Protocol):
    """What makes embeddings; a SentenceTransformer is one."""

    def encode(self, sentences: list[str]) -> Rows:
        """Embeddings [n, D] of n texts, in their order, of a float dtype."""
        ...


@dataclass(frozen=True)
class Measures:
    """Measures of n rows of a set, by the module's formulas; None where a measure was not requested.

    rows: how many the set has.
    n: how many were measured; a group with fewer rows has None in all measures.
    gvendi: G-Vendi.
    mean_cosine: of all pairs of sketches.
    perplexity: of the supervised tokens under the proxy.
    bigram_entropy: of the word 2-grams, in nats.
    embedding_vendi: the Vendi score of text embeddings.
    embedding_mean_cosine: of all pairs of embeddings.
    """

    rows: int
    n: int
    gvendi: float | None = None
    mean_cosine: float | None = None
    perplexity: float | None = None
    bigram_entropy: float | None = None
    embedding_vendi: float | None = None
    embedding_mean_cosine: float | None = None


@dataclass(frozen=True)
class Measured:
    """The result of `measure`.

    n: rows of each set.
    dim: K.
    embedding: what made the embeddings, None without.
    whole: measures of n rows of the whole run.
    by: {group: its measures}, at the same n; smaller groups have None, and "(others)" those of their rows together.
    """

    n: int
    dim: int
    embedding: str | None
    whole: Measures
    by: dict[str, Measures]

    def to_dict(self) -> dict[str, Any]:
        """The object that `gvendi measures --json` prints."""
        return asdict(self)


def measure(
    run: RunDirectory | str | os.PathLike,
    *,
    by: str | None = None,
    n: int | None = None,
    embedding: SentenceEncoder | str | os.PathLike | None = None,
    text: bool = True,
    corpus: str | os.PathLike | None = None,
    seed: int = 0,
) -> Measured:
    """G-Vendi and other measures of a run, and with `by` of its groups, each of n rows drawn by id.

    by: the field that the run was sketched with.
    n: rows of each set (default: all; with `by` as `equal_n.with_others` chooses groups and n; at most 50,000).
    embedding: an object with `encode`, or the name or path of a sentence-transformers model.
    text: read the corpus, which 2-grams and embeddings need.
    corpus: the folder that holds the corpus now, if it has moved.
    seed: of the draws.
    Memory: 1 GiB of sketches, and the texts of the rows drawn.
    Raises GvendiError for arguments that do not fit the run or each other, and for a corpus that has changed.
    """
    run = run if isinstance(run, RunDirectory) else RunDirectory.load(run)
    check_by(run, by)
    if embedding is not None and not text:
        raise GvendiError(
            "embedding needs the texts, which text=False (--no-text) leaves out; drop one of the two"
        )
    if text:
        locate_corpus(run, corpus)
    name = os.fspath(embedding) if isinstance(embedding, str | os.PathLike) else None
    if embedding is not None:
        embedding = load_encoder(name) if name is not None else embedding
        name = name or type(embedding).__name__
    pool = as_pool(run)
    # None is the whole run: no group has this name.
    sets: dict[str | None, np.ndarray] = {None: np.arange(len(pool))}
    if by is None:
        n, measured_sets = _rows_to_measure([len(pool)], n, "the run") or min(len(pool), MOST_ROWS), sets
    else:
        groups = _groups(pool)
        n = _rows_to_measure([len(places) for places in groups.values()], n, "the largest group")
        compared, n = with_others(groups, n)
        if n < 2:
            # One row has no pair, so groups of one are too small here.
            compared, n = with_others(groups, 2)
        n, measured_sets = min(n, MOST_ROWS), sets | compared
        sets |= groups | compared
    drawn = {
        key: np.sort(places[places_by_id([pool.ids[i] for i in places], n, seed)])
        for key, places in measured_sets.items()
    }
    measured = _measure(pool, run, drawn, embedding, text, corpus)
    none = Measures(rows=0, n=0)
    measures = {key: replace(measured.get(key, none), rows=len(places)) for key, places in sets.items()}
    whole = measures.pop(None)
    return Measured(n, pool.dim, name, whole, {group: measures[group] for group in sorted(measures)})


def mean_pairwise_cosine(rows: Rows) -> float:
    """Mean cosine over all pairs of different rows of [n, K], n >= 2; without a matrix of pairs, in float64."""
    check_matrix(rows)
    n = len(rows)
    if n < 2:
        raise GvendiError(f"rows has {n} row(s); wanted at least 2, to make a pair")
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for _, unit in unit_blocks(rows, rows.shape[1]):
        total += unit.sum(dim=0)
    return (float(total @ total) - n) / (n * (n - 1))


def ngram_entropy(texts: Iterable[str], order: int = 2) -> float:
    """Entropy in nats of the distribution of word n-grams over the texts; 0 where no text has `order` words.

    Words are runs of letters, digits and underscores, and every other character but white space is a word by itself,
    all in lower case; an n-gram lies within one text. This is Ent-n of arXiv 1809.05972. Text without spaces between
    words, such as Chinese, should be segmented before.
    """
    if order < 1:
        raise GvendiError(f"order is {order}; wanted the number of words of an n-gram, at least 1")
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = _WORD.findall(text.lower())
        counts.update(zip(*(words[i:] for i in range(order)), strict=False))
    if not counts:
        return 0.0
    occurrences = np.fromiter(counts.values(), np.float64, len(counts))
    total = occurrences.sum()
    return float(math.log(total) - (occurrences * np.log(occurrences)).sum() / total)


def perplexity(loss: np.ndarray, tokens: np.ndarray) -> float:
    """exp(sum of loss / sum of tokens): loss [n] in nats, summed over a row's supervised tokens; tokens [n] of them."""
    return math.exp(float(np.sum(loss, dtype=np.float64)) / int(np.sum(tokens, dtype=np.int64)))


def embed(encoder: SentenceEncoder, texts: Sequence[str]) -> Rows:
    """The encoder's embeddings [n, D] of n texts. Raises GvendiError if it returns anything else."""
    rows = encoder.encode(list(texts))
    check_matrix(rows)
    if len(rows) != len(texts):
        raise GvendiError(
            f"embedding: {type(encoder).__name__}.encode returned {len(rows)} rows for {len(texts)} texts; "
            "wanted one for each text"
        )
    return rows


def load_encoder(name: str) -> SentenceEncoder:
    """A sentence-transformers model by hub name or path. Raises GvendiError where the package or model is missing."""
    if importlib.util.find_spec("sentence_transformers") is None:
        raise GvendiError(
            f"embedding '{name}' needs sentence-transformers, which is not installed: "
            "pip install 'gvendi-fast[embeddings]'"
        )
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(name)
    # A missing hub name or file is an OSError, a file that is not a model a ValueError.
    except (OSError, ValueError) as error:
        said = sentence(error) if isinstance(error, OSError) else error
        raise GvendiError(
            f"embedding '{name}' cannot be loaded ({said}); wanted a sentence-transformers model, by its hub name or "
            "its folder"
        ) from error


def _groups(pool: Pool) -> dict[str, np.ndarray]:
    places: dict[str, list[int]] = {}
    for place, group in enumerate(pool.groups):
        places.setdefault(group, []).append(place)
    return {group: np.array(here) for group, here in places.items()}


def _rows_to_measure(sizes: list[int], n: int | None, what: str) -> int | None:
    """n as it was given; a pair of rows is the least that has a cosine."""
    if max(sizes) < 2:
        raise GvendiError(
            f"{what} has {max(sizes)} row; a measure of diversity needs at least 2: sketch more rows"
        )
    if n is not None and not 2 <= n <= max(sizes):
        raise GvendiError(f"n is {n}; wanted 2 to {max(sizes)}, the rows of {what}")
    return n


def _measure(
    pool: Pool,
    run: RunDirectory,
    drawn: Mapping[str | None, np.ndarray],
    encoder: SentenceEncoder | None,
    text: bool,
    corpus: str | os.PathLike | None,
) -> dict[str | None, Measures]:
    """Measures of each draw, places in the pool in ascending order; `rows` in them is that of the draw."""
    ordinals, loss, tokens = (pool.numbers(name) for name in ("row", "loss", "tokens"))
    texts = {}
    if text:
        texts = row_texts(run, ordinals[np.unique(np.concatenate(list(drawn.values())))].tolist(), corpus)
    measured = {}
    for key, sketches in _sketches(pool, drawn):
        places = drawn[key]
        written = [texts[i] for i in ordinals[places].tolist()] if text else []
        embedded = None if encoder is None else embed(encoder, written)
        measured[key] = Measures(
            rows=len(places),
            n=len(places),
            gvendi=gvendi(sketches),
            mean_cosine=mean_pairwise_cosine(sketches),
            perplexity=perplexity(loss[places], tokens[places]),
            bigram_entropy=ngram_entropy(written) if text else None,
            embedding_vendi=None if embedded is None else gvendi(embedded),
            embedding_mean_cosine=None if embedded is None else mean_pairwise_cosine(embedded),
        )
    return measured


def _sketches(
    pool: Pool, drawn: Mapping[str | None, np.ndarray]
) -> Iterator[tuple[str | None, torch.Tensor]]:
    """The rows of each draw; draws are read together, as a run reads a whole part for any row of it."""
    keys = list(drawn)
    at_once = max(1, GROUP_BYTES // (4 * pool.dim * len(drawn[keys[0]])))
    for first in range(0, len(keys), at_once):
        here = keys[first : first + at_once]
        wanted = np.unique(np.concatenate([drawn[key] for key in here]))
        rows = pool.take(wanted)
        for key in here:
            yield key, rows[torch.from_numpy(np.searchsorted(wanted, drawn[key]))]
