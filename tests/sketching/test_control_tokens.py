"""A control token that a content spells out stays text; a template's own markers, and the assistant's words, do not."""

from pathlib import Path

import numpy as np
import pytest
from places import PACKAGE
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Rejected, Row
from gvendi_fast.sketching.proxy.control_tokens import ControlTokens
from gvendi_fast.sketching.proxy.encode import Encoder, _copy

TYPED = "What does <|im_end|> do, and\n<|im_start|>assistant\n?"


@pytest.fixture(scope="module")
def tiny():
    return AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny")


def pair(prompt, completion="It ends a turn."):
    return Row(0, "id", "", "f", 1, prompt=prompt, completion=completion)


def talk(*messages, tools=None):
    return Row(0, "id", "", "f", 1, messages=list(messages), tools=tools)


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def plain(tokenizer, text):
    """The tokens of a text in which nothing is a control token."""
    backend = _copy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True
    return backend.encode(text, add_special_tokens=False).ids


def chatml(tokenizer, *turns):
    """ChatML of (role, content), each piece between two markers by itself."""
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    newline = plain(tokenizer, "\n")
    return [
        token
        for role, content in turns
        for token in (start, *plain(tokenizer, f"{role}\n{content}"), end, *newline)
    ]


def test_what_a_user_types_is_text(tiny):
    found = Encoder(tiny).preview(pair(TYPED))
    assert found.text == tiny.apply_chat_template(
        [said("user", TYPED), said("assistant", "It ends a turn.")], tokenize=False
    )
    assert found.ids.tolist() == chatml(tiny, ("user", TYPED), ("assistant", "It ends a turn."))
    assert tiny.decode(found.ids[found.labels != -100]) == "It ends a turn.<|im_end|>"
    assert found.notes == ("control tokens in a content read as text",)
    # Both turns have one marker at each of their ends, whatever is typed.
    assert np.count_nonzero(found.ids == tiny.convert_tokens_to_ids("<|im_end|>")) == 2


def test_the_same_as_tokens(tiny):
    encoder = Encoder(tiny, control_tokens="tokens")
    found = encoder.preview(pair(TYPED))
    assert found.ids.tolist() == tiny(found.text, add_special_tokens=False).input_ids
    assert np.count_nonzero(found.ids == tiny.convert_tokens_to_ids("<|im_end|>")) == 3
    assert found.notes == ()


@pytest.mark.parametrize(
    "message",
    [
        said("system", "Never write <|im_end|>."),
        said("tool", "<|im_end|> <|endoftext|>", name="f"),
        said("developer", "<|im_end|>"),
    ],
    ids=["system", "tool", "developer"],
)
def test_whoever_speaks_to_the_model_types_text(message, tiny):
    found = Encoder(tiny).preview(talk(said("user", "a"), message, said("assistant", "b")))
    turns = [("user", "a"), (message["role"], message["content"]), ("assistant", "b")]
    assert found.ids.tolist() == chatml(tiny, *turns)


def test_what_the_assistant_says_is_read_as_a_trainer_reads_it(tiny):
    row = pair("a", "b<|im_end|>c")
    text, tokens = Encoder(tiny).preview(row), Encoder(tiny, control_tokens="tokens").preview(row)
    assert text.ids.tolist() == tokens.ids.tolist()
    assert text.notes == ()


def test_rendered_texts_and_rows_without_a_template_keep_their_control_tokens(tiny):
    rendered = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    row = Row(0, "id", "", "f", 1, text=rendered)
    assert Encoder(tiny).preview(row).ids.tolist() == tiny(rendered).input_ids
    bare = AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny")
    bare.chat_template = None
    found = Encoder(bare).preview(pair(rendered, "c"))
    assert found.ids.tolist()[:1] == [bare.convert_tokens_to_ids("<|im_start|>")]


TOOLS_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
)


def test_descriptions_of_tools_are_text(tiny):
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny")
    tokenizer.chat_template = TOOLS_TEMPLATE + tiny.chat_template
    tools = [{"function": {"name": "f", "description": "Ends with <|im_end|>."}}]
    found = Encoder(tokenizer).preview(talk(said("user", "a"), said("assistant", "b"), tools=tools))
    schema = '{"function": {"name": "f", "description": "Ends with <|im_end|>."}}'
    assert found.ids.tolist() == chatml(tokenizer, ("tools", schema), ("user", "a"), ("assistant", "b"))


def test_a_template_that_changes_what_is_typed_refuses_the_row(tiny):
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.replace('<', '&lt;') if "
    )
    tokenizer.chat_template += "m.role == 'user' else m.content }}<|im_end|>\n{% endfor %}"
    refused, fine = Encoder(tokenizer).encode([pair(TYPED), pair("a < b")])
    assert refused.reason == "chat template changes a content that spells out a control token"
    assert not isinstance(fine, Rejected)


def test_a_row_that_holds_the_hidden_character_already(tiny):
    typed = "\U000f0000 <|im_end|> \U000f0001"
    found = Encoder(tiny).preview(pair(typed))
    assert found.ids.tolist() == chatml(tiny, ("user", typed), ("assistant", "It ends a turn."))


def test_other_rows_of_the_batch_are_as_before_and_in_order(tiny):
    rows = [pair(f"question {n}" + (TYPED if n % 3 == 0 else ""), f"answer {n}") for n in range(300)]
    alone = [Encoder(tiny).encode([row])[0].input_ids.tolist() for row in rows[:30]]
    together = [sample.input_ids.tolist() for sample in Encoder(tiny).encode(rows)]
    assert together[:30] == alone
    tokens = [x.input_ids.tolist() for x in Encoder(tiny, control_tokens="tokens").encode(rows)]
    assert [a == b for a, b in zip(together, tokens, strict=True)] == [bool(n % 3) for n in range(300)]


def test_a_long_text_is_cut_where_nothing_changes(tiny, monkeypatch):
    row = pair("word after word " * 40 + TYPED + " again and again" * 60)
    whole = Encoder(tiny).preview(row).ids.tolist()
    monkeypatch.setattr("gvendi_fast.sketching.proxy.pieces.PIECE", 64)
    monkeypatch.setattr("gvendi_fast.sketching.proxy.encode.PIECE", 64)
    assert Encoder(tiny).preview(row).ids.tolist() == whole


def test_the_setting_is_refused_by_name(tiny):
    with pytest.raises(GvendiError, match="control_tokens is 'both'; wanted one of text, tokens"):
        Encoder(tiny, control_tokens="both")


def spaced(name):
    """A tokenizer that marks beginnings with a space: that of a text alone, or of each piece between two markers."""
    letters = ["<unk>", "<s>", "</s>", "▁", *map(chr, range(33, 127))]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    if name == "of a text":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


FOLDERS = {"tiny": PACKAGE / "assets" / "tiny", "SmolLM2": Path("/tmp/smollm2")}


@pytest.mark.parametrize("name", ["of a text", "of each piece", *FOLDERS])
def test_a_piece_between_two_markers_has_the_tokens_that_it_has_in_the_whole(name):
    if name in FOLDERS and not FOLDERS[name].is_dir():
        pytest.skip(f"the tokenizer of {name} is not here")
    marker = "<|im_end|>" if name in FOLDERS else "</s>"
    backend = Tokenizer.from_file(str(FOLDERS[name] / "tokenizer.json")) if name in FOLDERS else spaced(name)
    control = ControlTokens(backend, _copy)
    text = f"Häuser, two  words{marker} then  more{marker}\n\nlast {marker}"
    whole = backend.encode(text, add_special_tokens=False)
    # None of these letters is in a marker.
    places = [place for place, letter in enumerate(text) if letter in "wrl"]
    assert len(places) == 6
    for place in places:
        # As if this letter were of a control token: what stands around it is tokenised by itself.
        found = control.encode(text, f"{text[:place]}\U000f0000{text[place + 1 :]}")
        assert found.ids.tolist() == whole.ids
        assert [tuple(pair) for pair in found.offsets.tolist()] == whole.offsets


def test_many_control_tokens_and_many_of_their_beginnings():
    backend = spaced("of a text")
    backend.add_special_tokens([*(f"<|reserved_{n}|>" for n in range(300)), "<|", "<" + "a" * 3000])
    control = ControlTokens(backend, _copy)
    assert control.hidden("<|reserved_299|> <|reserved_300|> </s> <aaa", "#") == (
        "#|reserved_299|> #|reserved_300|> #/s> <aaa"
    )
    assert control.hidden("<" + "a" * 3001, "#") == "#" + "a" * 3001
    assert control.in_any([{"a": ["x", {"<s>": 1}]}])
    assert not control.in_any([{"a": ["<", "s>", 3, None]}])
    assert control.hidden("<|reserved_" * 20_000, "#") == "#|reserved_" * 20_000


def test_a_tokenizer_without_control_tokens():
    backend = Tokenizer(models.BPE({"a": 0}, []))
    assert not ControlTokens(backend, _copy).in_any(["a <s>", ""])
