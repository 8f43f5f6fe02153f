"""Long texts: cut where no token changes, refused before tokenising where they cannot fit, and bounded in memory."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from gvendi_fast.data.index import Rejected, Row
from gvendi_fast.sketching.proxy import encode, pieces
from gvendi_fast.sketching.proxy.encode import Encoder

TINY = Path(encode.__file__).parents[2] / "assets" / "tiny"
WORDS = "the quick brown fox jumps over the lazy dog "
ATOMS = [
    *("a", "Z", "é", "e\u0301", "\u0300", "漢字", "한국", "и", "ſ", "ﬁ", "🎉", "\u00a0", "\u2581", "_", "<"),
    *(
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "1",
        "23",
        "'s",
        "'LL",
        "!",
        "...",
        "word ",
        "it's ",
        "x\u0301 y",
    ),
]


def tokenizer_at(folder):
    if not Path(folder).is_dir():
        pytest.skip(f"needs the proxy in {folder}")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "folder", [TINY, "/tmp/smollm2", pytest.param("/tmp/models/gemma3", marks=pytest.mark.soak)]
)
def test_pieces_have_the_tokens_of_the_whole(folder, monkeypatch):
    tokenizer = tokenizer_at(folder)
    encoder, rng = Encoder(tokenizer), random.Random(1)
    assert encoder._pieces.can_cut
    atoms, cuts = ATOMS + sorted(tokenizer.get_added_vocab())[:8], 0
    for trial in range(120):
        text = "".join(rng.choice(atoms) for _ in range(rng.randrange(20, 400)))
        edges = sorted(rng.sample(range(len(text)), 4))
        piece = encode._Piece(text, [(edges[0], edges[1]), (edges[2], edges[3])])
        found = []
        for size in (10**9, (1, 5, 20)[trial % 3]):
            monkeypatch.setattr(encode, "PIECE", size)
            monkeypatch.setattr(pieces, "PIECE", size)
            found.append(next(encoder._tokens([piece])))
        cuts += len(encoder._parts(piece)) - 1
        for whole, cut in zip(*found, strict=True):
            assert np.array_equal(whole, cut), text
    assert cuts > 500


def test_a_tokenizer_that_could_see_a_cut_is_left_whole():
    tokenizer = tokenizer_at(TINY)
    tokenizer.add_tokens(["two words"])
    assert not pieces.pieces_of(tokenizer).can_cut
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert pieces.pieces_of(PreTrainedTokenizerFast(tokenizer_object=words)) == pieces.Pieces(False, None)


def test_the_tail_of_a_long_prompt_is_that_of_the_whole(monkeypatch):
    tokenizer = tokenizer_at(TINY)
    row = Row(0, "i", "", "f", 1, prompt=WORDS * 9000, completion="yes indeed")
    (cut,) = Encoder(tokenizer, 100).encode([row])
    monkeypatch.setattr(encode, "PIECE", 10**9)
    (whole,) = Encoder(tokenizer, 100).encode([row])
    assert np.array_equal(cut.input_ids, whole.input_ids)
    assert np.array_equal(cut.labels, whole.labels)


@pytest.mark.parametrize("word", ["the ", "é", "e\u0301 ", "漢", "🎉"])
def test_no_row_that_fits_is_refused_by_its_length(word, monkeypatch):
    tokenizer = tokenizer_at(TINY)
    for module in (encode, pieces):
        monkeypatch.setattr(module, "PIECE", 50)
    row = Row(0, "i", "", "f", 1, prompt="q", completion=word * 400)
    (sample,) = Encoder(tokenizer).encode([row])
    (fits,) = Encoder(tokenizer, sample.length).encode([row])
    assert np.array_equal(fits.input_ids, sample.input_ids)
    (refused,) = Encoder(tokenizer, 3).encode([row])
    assert refused.reason.startswith("too long: completion needs at least ")


def test_a_stream_holds_little_text_and_passes_rejected_rows(monkeypatch):
    tokenizer, taken = tokenizer_at(TINY), []

    def rows():
        for number in range(40):
            taken.append(number)
            if number % 10 == 9:
                yield Rejected("f", number, "broken")
            else:
                yield Row(number, str(number), "", "f", number, prompt=WORDS * 20, completion="yes")

    monkeypatch.setattr(encode, "_CHUNK_CHARACTERS", 4000)
    stream = Encoder(tokenizer, 64).stream(rows())
    next(stream)
    assert len(taken) < 10
    assert sum(isinstance(item, Rejected) for item in stream) == 4


CODE = """
import sys
from transformers import AutoTokenizer
from gvendi_fast.data.index import UnitReader, index_corpus
from gvendi_fast.sketching.proxy.encode import Encoder

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) >> 10

encoder = Encoder(AutoTokenizer.from_pretrained(sys.argv[1]), 256)
before = peak()
manifest = index_corpus(sys.argv[2], rows_per_unit=512)
with UnitReader(manifest) as reader:
    count = sum(1 for unit in manifest.units for _ in encoder.stream(reader.read(unit)))
print(count, peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
@pytest.mark.parametrize("rows", [3, pytest.param(300, marks=pytest.mark.soak)])
def test_memory_does_not_grow_with_rows_of_a_megabyte(tmp_path, rows):
    path = tmp_path / "a.jsonl"
    with path.open("w") as stream:
        for number in range(rows):
            prompt = WORDS * (1_000_000 // len(WORDS))
            stream.write(json.dumps({"prompt": prompt, "completion": f"yes {number}"}) + "\n")
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(TINY), str(path)], capture_output=True, text=True, check=True
    )
    count, grown = map(int, done.stdout.split())
    assert count == rows
    # docs/limits.md: 300 bytes a character that is tokenised at once, 20 a byte of the longest row.
    assert grown < (300 * ((1 << 20) + pieces.PIECE + 1_000_000) + 20 * 1_000_000) >> 20
