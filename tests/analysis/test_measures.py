"""Measures beside G-Vendi: their definitions by hand, the command, and what is refused."""

import importlib.util
import json
import math
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gvendi_fast.analysis.measures import (
    embed,
    load_encoder,
    mean_pairwise_cosine,
    measure,
    ngram_entropy,
    perplexity,
)
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.pool import as_pool
from gvendi_fast.data.run_directory import Part, RunDirectory
from gvendi_fast.vendi import gvendi as gvendi_of


class Trigrams:
    """Texts to counts of hashed character trigrams."""

    def encode(self, sentences):
        rows = np.zeros((len(sentences), 64), np.float32)
        for row, text in zip(rows, sentences, strict=True):
            for i in range(len(text) - 2):
                row[zlib.crc32(text[i : i + 3].encode()) % 64] += 1
        return rows


def texts_of(source, count):
    return [f"{source} counts to {i * i}: {' '.join(map(str, range(i % 7)))}." for i in range(count)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """40 rows of "x", 36 of "y" and 3 of "few", in turns."""
    from gvendi_fast.data.index import Fields
    from gvendi_fast.kernels.sketch_matrix import SketchSpec
    from gvendi_fast.sketching.corpus import Settings, sketch_corpus
    from gvendi_fast.sketching.proxy.load import load_proxy

    root = tmp_path_factory.mktemp("measures")
    rows = [
        {"prompt": "Go on.", "completion": text, "source": source}
        for source, count in (("x", 40), ("y", 36), ("few", 3))
        for text in texts_of(source, count)
    ]
    order = np.random.default_rng(0).permutation(len(rows))
    (root / "data.jsonl").write_text("".join(json.dumps(rows[i]) + "\n" for i in order))
    settings = Settings(spec=SketchSpec(dim=64), fields=Fields(by="source"), unit_rows=20)
    return sketch_corpus(
        [str(root / "data.jsonl")], root / "run", load_proxy("tiny", dtype="float32"), settings
    )


def test_mean_pairwise_cosine_is_that_of_the_whole_matrix():
    rows = np.random.default_rng(0).standard_normal((700, 9)) + 0.3
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosine = unit @ unit.T
    assert mean_pairwise_cosine(rows) == pytest.approx(cosine[~np.eye(700, dtype=bool)].mean(), rel=1e-12)
    assert mean_pairwise_cosine(np.eye(4)) == pytest.approx(0, abs=1e-15)
    assert mean_pairwise_cosine(np.ones((5, 3))) == pytest.approx(1)
    with pytest.raises(GvendiError, match="wanted at least 2"):
        mean_pairwise_cosine(np.ones((1, 3)))


def test_ngram_entropy_by_hand():
    # the cat . | The cat sat -> (the cat) 2, (cat .) 1, (cat sat) 1
    assert ngram_entropy(["the cat.", "The  cat\nsat"]) == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(4)
    )
    assert ngram_entropy(["a b c d"], order=1) == pytest.approx(math.log(4))
    assert ngram_entropy(["3+4=7"], order=4) == pytest.approx(math.log(2))
    assert ngram_entropy(["one", ""]) == 0
    with pytest.raises(GvendiError, match="order is 0"):
        ngram_entropy(["a"], order=0)


def test_perplexity_is_of_the_tokens_and_not_of_the_rows():
    loss, tokens = np.array([2.0, 12.0], np.float32), np.array([1, 9], np.int32)
    assert perplexity(loss, tokens) == pytest.approx(math.exp(1.4))


def test_the_whole_run_is_measured_on_all_rows(run):
    found = measure(run, embedding=Trigrams())
    pool = as_pool(run)
    texts = [
        f"Go on.\n{text}" for s, count in (("x", 40), ("y", 36), ("few", 3)) for text in texts_of(s, count)
    ]
    sketches, embedded = pool.take(range(79)), Trigrams().encode(texts)
    assert found.n == found.whole.n == found.whole.rows == 79
    assert found.embedding == "Trigrams"
    assert found.by == {}
    assert found.whole.gvendi == pytest.approx(gvendi_of(sketches), rel=1e-6)
    assert found.whole.mean_cosine == pytest.approx(mean_pairwise_cosine(sketches), rel=1e-6)
    assert found.whole.embedding_vendi == pytest.approx(gvendi_of(embedded), rel=1e-6)
    assert found.whole.embedding_mean_cosine == pytest.approx(mean_pairwise_cosine(embedded), rel=1e-6)
    bigrams = Counter()
    for text in texts:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        bigrams.update(map(tuple, np.lib.stride_tricks.sliding_window_view(words, 2).tolist()))
    share = np.array(list(bigrams.values())) / bigrams.total()
    assert found.whole.bigram_entropy == pytest.approx(-(share * np.log(share)).sum())
    loss, tokens = pool.numbers("loss"), pool.numbers("tokens")
    assert found.whole.perplexity == pytest.approx(math.exp(loss.sum() / tokens.sum()), rel=1e-5)


def test_groups_are_measured_at_equal_n(run):
    found = measure(run, by="source", embedding=Trigrams())
    assert found.n == 36
    assert list(found.by) == ["few", "x", "y"]
    assert (found.by["x"].rows, found.by["x"].n) == (40, 36)
    assert (found.by["few"].rows, found.by["few"].n, found.by["few"].gvendi) == (3, 0, None)
    assert (found.whole.rows, found.whole.n) == (79, 36)
    y = [f"Go on.\n{text}" for text in texts_of("y", 36)]
    assert found.by["y"].bigram_entropy == pytest.approx(ngram_entropy(y))
    assert found.by["y"].embedding_vendi == pytest.approx(gvendi_of(Trigrams().encode(y)), rel=1e-6)
    assert measure(run, by="source", n=10, seed=1) == measure(run, by="source", n=10, seed=1)
    assert measure(run, by="source", n=10, seed=1) != measure(run, by="source", n=10, seed=2)


def test_without_text_the_corpus_is_not_read(run, tmp_path):
    corpus = Path(run.manifest["files"][0]["path"])
    moved = corpus.rename(tmp_path / "moved.jsonl")
    try:
        with pytest.raises(GvendiError, match="--corpus"):
            measure(run.path)
        found = measure(run.path, text=False)
    finally:
        moved.rename(corpus)
    assert found.whole.bigram_entropy is None
    assert found.whole.gvendi == pytest.approx(measure(run).whole.gvendi)


class Wrong:
    def __init__(self, rows):
        self.rows = rows

    def encode(self, sentences):
        return self.rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "topic"}, "was sketched with --by source"),
        ({"n": 80}, "n is 80; wanted 2 to 79"),
        ({"n": 1}, "n is 1"),
        ({"n": 41, "by": "source"}, "n is 41; wanted 2 to 40, the rows of the largest group"),
        ({"embedding": Trigrams(), "text": False}, "embedding needs the texts"),
        ({"embedding": Wrong(np.ones((3, 4)))}, "returned 3 rows for 79 texts"),
        ({"embedding": Wrong([[1.0]])}, "wanted a torch tensor or a numpy array"),
        ({"embedding": Wrong(np.zeros((79, 4)))}, "row 0 of rows has norm 0"),
    ],
)
def test_what_is_refused(run, options, message):
    with pytest.raises(GvendiError, match=message):
        measure(run, **options)


def test_a_model_by_name_needs_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GvendiError, match=r"pip install 'gvendi-fast\[embeddings\]'"):
        load_encoder("some/model")


def test_embeddings_come_in_the_order_of_the_texts():
    texts = ["alpha beta", "gamma delta", "alpha beta"]
    rows = embed(Trigrams(), texts)
    assert np.array_equal(rows[0], rows[2])
    assert not np.array_equal(rows[0], rows[1])


def test_the_command(gvendi, run):
    code, out, err = gvendi("measures", run.path, "--by", "source", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["n"] == 36
    assert found["by"]["x"]["embedding_vendi"] is None
    assert found == measure(run, by="source").to_dict()
    code, out, _ = gvendi("measures", run.path, "--by", "source")
    assert code == 0
    assert "too few" in out
    assert "(all rows)" in out
    assert f"{found['by']['x']['bigram_entropy']:.3f}" in out
    code, out, _ = gvendi("measures", run.path, "--no-text")
    assert code == 0
    assert "2-gram" not in out
    assert "perplexity" in out
    text = gvendi("measures", "--help")[1]
    assert "[embeddings]" in text


def test_groups_of_one_row_are_too_small_and_hinder_no_others(tmp_path):
    # Half the largest group's rows, from which groups are compared, would be one row here.
    made = RunDirectory.open(
        tmp_path / "run",
        {"sketch": {"dim": 8}},
        {"units_total": 1, "fields": {"by": "source"}, "files": []},
    )
    ones = {name: np.ones(4) for name in ("tokens", "length", "loss", "gradient_norm")}
    groups, sketches = ["a", "b", "a", "a"], np.eye(8, dtype=np.float32)[:4]
    made.write_part(Part(0, ids=list("wxyz"), groups=groups, rows=np.arange(4), sketches=sketches, **ones))
    found = measure(made, by="source", text=False)
    assert (found.n, found.by["a"].n, found.by["b"].n) == (2, 2, 0)
    assert found.by["a"].mean_cosine == pytest.approx(0)
    assert found.by["b"].gvendi is None
