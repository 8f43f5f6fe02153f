"""The making of `tiny`: what the writer computes and returns, how its text becomes documents, a short training."""

import json
import random

import pytest
import torch
import transformers

from benchmarks.corpora import train_tiny
from benchmarks.corpora.text_prompts import CHAT, PLAIN, SUBJECTS, ask
from benchmarks.corpora.tiny_text import pack, render, train_tokenizer, written_documents
from benchmarks.corpora.write_text import LONGEST_REQUEST, Decoder, draw, read_texts, store, write_round
from gvendi_fast.sketching.proxy.load import load_proxy

VOCABULARY, END = 61, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random Llama on disk: grouped heads, untied."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    path = tmp_path_factory.mktemp("writer")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


def test_the_writers_loop_computes_what_the_model_does_and_hides_what_was_before(folder):
    positions, fresh = 12, 5
    ids = torch.randint(3, VOCABULARY, (3, positions), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(folder, len(ids), positions, "cpu", torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    begins = torch.zeros(len(ids), dtype=torch.long)
    with torch.no_grad():
        whole, later = model(ids).logits, model(ids[1:2, fresh:]).logits
    for at in range(positions):
        begins[1] = fresh if at >= fresh else 0
        got = decoder.step(ids[:, at], begins, at)
        wanted = whole[:, at].clone()
        if at >= fresh:
            wanted[1] = later[0, at - fresh]
        assert torch.allclose(got, wanted, atol=1e-4)


def test_draws_are_of_likely_tokens_and_by_their_probabilities():
    probabilities = torch.tensor([0.6, 0.3, 0.08, 0.02])
    logits = probabilities.log().repeat(20_000, 1)
    drawn = draw(logits, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    # The last is less than 5 % as likely as the first.
    assert shares[3] == 0
    assert torch.allclose(shares[:3], probabilities[:3] / 0.98, atol=0.015)


def test_every_document_begins_with_its_request_and_ends_where_it_ended(folder, tmp_path):
    batch, positions = 4, 60
    decoder = Decoder(folder, batch, positions, "cpu", torch.float32)
    # An ending token in a request is given, not drawn, and ends nothing.
    queue = [[3 + i, END, 20 + i, 30] for i in range(2 * batch)]
    ends = [END, *range(50, VOCABULARY)]
    documents = write_round(decoder, queue, ends, torch.Generator().manual_seed(0))
    assert sum(len(ids) for ids, _ in documents) == batch * positions
    assert sum(cut for _, cut in documents) == batch
    assert len(documents) > 2 * batch
    row, at = 0, 0
    for ids, cut in documents:
        wanted = queue[row + (at % 2) * batch]
        assert ids[:4] == wanted[: len(ids)]
        assert all(token not in ends for token in ids[4:-1])
        assert cut or ids[-1] in ends
        row, at = (row + 1, 0) if cut else (row, at + 1)
    again = write_round(decoder, queue, ends, torch.Generator().manual_seed(0))
    assert again == documents
    with pytest.raises(ValueError, match="3 requests for 4 rows"):
        write_round(decoder, queue[:3], ends, torch.Generator())


def test_requests_are_many_and_fill_their_forms():
    assert len(set(SUBJECTS)) == len(SUBJECTS) > 400
    asked = [ask(0, i) for i in range(3000)]
    assert asked == [ask(0, i) for i in range(3000)]
    assert len(set(asked)) > 2700
    assert {kind for kind, _ in asked} == {"chat", "plain"}
    assert not any(mark in text for _, text in asked for mark in ("{s}", "[", " // "))
    assert len(CHAT) + len(PLAIN) > 100
    assert LONGEST_REQUEST > 90


def test_what_was_written_becomes_documents_in_the_proxys_template(tmp_path):
    system = "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"
    chat = system + "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause it rains."
    texts = [
        (chat + "<|im_end|>", False),
        (chat + " And", True),
        (system + "<|im_start|>user\nWh", True),
        ("<|endoftext|>The sea is wide.<|endoftext|>", False),
    ]
    documents = written_documents(texts, random.Random(0))
    assert ("The sea is wide.", True) in documents
    cut = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause it rains. And"
    assert (cut, False) in documents
    assert len(documents) == 3
    assert not any("helpful AI" in text for text, _ in documents)


def test_stored_text_is_read_again(tmp_path):
    tokenizer = train_tokenizer(["The sea is wide.", "<|im_start|>user\nWhy?<|im_end|>\n"], 280)
    wanted = ["The sea is wide.", "<|im_start|>user\nWhy?<|im_end|>\n"]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(wanted)]
    store([(ids[0], False), (ids[1], True)], tmp_path / "text-0-000.npz")
    assert read_texts(tmp_path, tokenizer) == [(wanted[0], False), (wanted[1], True)]


def test_a_short_training_makes_a_proxy_that_scores(folder, tmp_path, monkeypatch):
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i * i}, a number."} for i in range(400)]
    documents = render(rows, random.Random(0))
    tokenizer = train_tokenizer([text for text, _ in documents], 300)
    pool = pack(tokenizer, documents, 32)
    first = "".join(text + "<|endoftext|>" for text, _ in documents)[:20]
    assert tokenizer.decode(pool[0].tolist(), skip_special_tokens=False).startswith(first)
    assert torch.equal(pool[0, -1:], pool[1, :1])
    sizes = "--batch 4 --length 32 --width 32 --inner 48 --layers 2"
    arguments = f"--text text --writer writer --steps 6 {sizes} --keep 0.5 --device cpu"
    args = train_tiny.parse([*arguments.split(), "--out", str(tmp_path / "made"), "--threads", "1"])
    monkeypatch.setattr(train_tiny, "parse", lambda: args)
    monkeypatch.setattr(
        train_tiny, "prepare", lambda _: (tokenizer, pool, {"written": pool[:8]}, {"tokens": 1})
    )
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    train_tiny.main()
    torch.use_deterministic_algorithms(before[0])
    torch.set_num_threads(before[1])
    record = json.loads((tmp_path / "made" / "training.json").read_text())
    assert record["steps"] == 6
    assert record["held_out_nats_per_token"]["written"] < record["uniform_nats_per_token"]
    assert (tmp_path / "made-0.5" / "model.safetensors").exists()
    proxy = load_proxy(str(tmp_path / "made"), dtype="float32")
    assert sum(p.numel() for p in proxy.model.parameters()) == record["parameters"]
