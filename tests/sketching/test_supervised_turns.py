"""Which words of a conversation are supervised, under templates that write their turns in one manner or another."""

import copy
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from places import PACKAGE, ROOT
from transformers import AutoTokenizer

from gvendi_fast.data.rows import Rejected, Row, kind_of_reason
from gvendi_fast.sketching.proxy import chat
from gvendi_fast.sketching.proxy.encode import Encoder, Sample

SHARED = ROOT.parent / "shared"
# Written for this test, in the manners of templates in use.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An empty thought in the last turn and after the last question, and none before.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set content = m.content %}{% set thought = '' %}"
    "{% if m.role == 'assistant' %}{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n"
    "{% endif %}{{ content.strip('\n') }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
# The end of a turn is the next header, and the last turn has none.
OPEN = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
# By number, so that no loop tells the turns.
NUMBERED = (
    "{% for i in range(messages | length) %}<|im_start|>{{ messages[i].role }}\n{{ messages[i].content }}"
)
NUMBERED += "<|im_end|>\n{% endfor %}"
# As Phi-3 ends: one more marker behind the last turn.
FOOTED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)


@pytest.fixture(scope="module")
def tiny():
    return AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny")


def with_template(tokenizer, source):
    made = copy.copy(tokenizer)
    made.chat_template = source
    return made


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def talk(*messages, tools=None):
    return Row(0, "id", "", "f", 1, messages=list(messages), tools=tools)


USER, ANSWER = said("user", "What is two?"), said("assistant", "Half of four.")
AGAIN, MORE = said("user", "And three?"), said("assistant", "One more.")


def supervised(tokenizer, row, **settings):
    """The supervised ranges of a row's text; its tokens are checked to be those, as far as tokens allow."""
    encoder = Encoder(tokenizer, **settings)
    found = encoder.preview(row)
    assert not isinstance(found, Rejected), found.reason
    (sample,) = encoder.encode([row])
    assert np.array_equal(sample.labels, found.labels[: sample.length])
    parts = [found.text[start:end] for start, end in found.spans]
    assert "".join(parts).split() == tokenizer.decode(found.labels[found.labels != -100]).split()
    return parts


def reason(tokenizer, row):
    (refused,) = Encoder(tokenizer).encode([row])
    assert Encoder(tokenizer).preview(row) == refused
    return refused.reason


def test_earlier_turns_that_are_written_anew_are_told_apart(tiny):
    tokenizer = with_template(tiny, THINKING)
    row = talk(USER, ANSWER, AGAIN, MORE)
    assert supervised(tokenizer, row) == ["Half of four.<|im_end|>", "One more.<|im_end|>"]
    text = Encoder(tokenizer).preview(row).text
    assert text == tokenizer.apply_chat_template(row.messages, tokenize=False)
    # What the template puts into the turn by itself is prompt.
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\nOne more.<|im_end|>\n")


def test_a_thought_that_is_written_is_supervised_to_the_end_of_the_turn(tiny):
    tokenizer = with_template(tiny, THINKING)
    whole = ["It is a number.\n</think>\n\nHalf of four.<|im_end|>"]
    thought = "It is a number."
    for name in ("reasoning_content", "reasoning", "thinking"):
        row = talk(USER, {**ANSWER, name: thought})
        assert supervised(tokenizer, row) == whole
        assert Encoder(tokenizer).preview(row).notes == ()
    inside = talk(USER, said("assistant", f"<think>\n{thought}\n</think>\n\nHalf of four."))
    assert supervised(tokenizer, inside) == whole
    empty = talk(USER, said("assistant", "<think>\n\n</think>\n\nHalf of four."))
    assert supervised(tokenizer, empty) == ["Half of four.<|im_end|>"]
    # Where no template writes it anew, what a row says is the assistant's.
    said_so = "<think>\n\n</think>\n\nHalf of four.<|im_end|>"
    assert supervised(with_template(tiny, CHATML), empty) == [said_so]


def test_what_is_dropped_is_said(tiny):
    row = talk(USER, {**ANSWER, "reasoning_content": "First."}, AGAIN, {**MORE, "thinking": "Second."})
    assert Encoder(with_template(tiny, THINKING)).preview(row).notes == (
        "reasoning of earlier turns dropped",
    )
    both = ("reasoning of earlier turns dropped", "reasoning dropped")
    assert Encoder(with_template(tiny, CHATML)).preview(row).notes == both
    calls = [{"type": "function", "function": {"name": "lookup", "arguments": {}}}]
    called = talk(USER, said("assistant", "One moment.", tool_calls=calls), tools=calls)
    assert Encoder(with_template(tiny, CHATML)).preview(called).notes == (
        "tool calls dropped",
        "tools dropped",
    )
    first = CHATML.replace(
        "{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0] | tojson }}{% endif %}"
    )
    twice = talk(USER, said("assistant", "", tool_calls=calls * 2))
    assert Encoder(with_template(tiny, first)).preview(twice).notes == ("tool calls dropped",)
    mute = CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' or m.role == 'assistant' }}")
    heard = talk(said("system", "Be brief."), USER, ANSWER)
    assert Encoder(with_template(tiny, mute)).preview(heard).notes == ("system content dropped",)


def test_no_content_is_taken_for_the_words_that_are_put_in_place_of_the_assistants(tiny):
    words = "content-3f1b77 call_3f1b77 content-3f1b77x"
    for source in (THINKING, NUMBERED):
        row = talk(said("user", words), said("assistant", f"<think>hm</think>{words}"), AGAIN, MORE)
        called, more = supervised(with_template(tiny, source), row)
        assert called.endswith(words + "<|im_end|>")
        assert called.count("content-3f1b77") == 2
        assert more == "One more.<|im_end|>"


def test_an_end_that_is_the_next_header():
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny")
    tokenizer.chat_template = OPEN
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    row = talk(USER, ANSWER, AGAIN, MORE)
    assert supervised(tokenizer, row) == ["Half of four.<|user|>", "One more."]
    assert Encoder(tokenizer).preview(row).notes == ("no end of the last turn",)
    assert Encoder(tokenizer).preview(talk(USER, ANSWER, AGAIN)).notes == ()
    assert Encoder(tokenizer).preview(talk(USER, ANSWER, AGAIN, {**MORE, "weight": 0})).notes == ()


def test_a_footer_belongs_to_the_last_turn(tiny):
    tokenizer = with_template(tiny, FOOTED)
    assert supervised(tokenizer, talk(USER, ANSWER, AGAIN, MORE)) == [
        "Half of four.<|im_end|>",
        "One more.<|im_end|>\n<|im_end|>",
    ]
    assert supervised(tokenizer, talk(USER, ANSWER, AGAIN)) == ["Half of four.<|im_end|>"]


TALKS = {
    "one turn": [USER, ANSWER],
    "two turns": [USER, ANSWER, AGAIN, MORE],
    "system": [said("system", "Be brief."), USER, ANSWER],
    "ends with a user": [USER, ANSWER, AGAIN],
    "begins with an assistant": [ANSWER, AGAIN, MORE],
    "two answers": [USER, ANSWER, MORE],
    "no words": [USER, said("assistant", ""), AGAIN, MORE],
    "other letters": [said("user", "Häuser 漢字 🎉"), said("assistant", "🎉 漢字 ë"), AGAIN, MORE],
}


@pytest.mark.parametrize("name", TALKS)
def test_markers_give_the_mask_of_transformers(name, tiny):
    tokenizer, encoder = with_template(tiny, MARKED), Encoder(with_template(tiny, MARKED))
    assert encoder.method == "markers"
    found = encoder.preview(talk(*TALKS[name]))
    wanted = tokenizer.apply_chat_template(TALKS[name], return_assistant_tokens_mask=True, return_dict=True)
    assert found.ids.tolist() == wanted["input_ids"]
    assert (found.labels != -100).astype(int).tolist() == wanted["assistant_masks"]
    assert found.text == tokenizer.apply_chat_template(TALKS[name], tokenize=False)


def test_markers_of_messages_that_are_not_to_be_learnt_count_for_nothing(tiny):
    tokenizer = with_template(tiny, MARKED)
    row = talk(USER, {**ANSWER, "weight": 0}, AGAIN, MORE)
    assert supervised(tokenizer, row) == ["One more.<|im_end|>\n"]
    assert supervised(tokenizer, talk(USER, ANSWER), mask="released") == ["Half of four.", "\n"]
    # Outside of the loop, nothing tells whose words are marked.
    outside = "> {% generation %}{{ messages | map(attribute='content') | join }}{% endgeneration %}"
    assert supervised(with_template(tiny, outside), talk(USER, ANSWER)) == ["What is two?Half of four."]
    assert "cannot be found" in reason(with_template(tiny, outside), row)


def test_markers_inside_a_macro_are_no_places(tiny):
    inside = (
        "{% macro turn(m) %}<|im_start|>{{ m.role }}\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
    )
    tokenizer = with_template(tiny, inside)
    assert Encoder(tokenizer).method == "loop"
    assert supervised(tokenizer, talk(USER, ANSWER, AGAIN, MORE)) == [
        "Half of four.<|im_end|>",
        "One more.<|im_end|>",
    ]


_HEADER = "<|im_start|>{{ m.role }}\n"
_ENCLOSED = _HEADER + "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
# A first message of the assistant is written by the loop itself; what collects the text of any other one.
COLLECTED = {
    "macro": "{% macro other(m) %}" + _ENCLOSED + "{% endmacro %}LOOP{{ other(m) }}END",
    "set": "LOOP{% set other %}" + _ENCLOSED + "{% endset %}{{ other }}END",
    "filter": "LOOP{% filter trim %}" + _ENCLOSED + "{% endfilter %}{{ '\n' }}END",
    "call": "{% macro as_is() %}{{ caller() }}{% endmacro %}LOOP{% call as_is() %}" + _ENCLOSED + "{% endcall %}END",
    "late": "LOOP" + _ENCLOSED.replace("{% gen", "{% set other %}{% gen").replace(
        "eration %}\n", "eration %}{% endset %}>{{ other }}\n"
    ) + "END",
    "recursive": "{% for m in messages recursive %}{% if m.role == 'assistant' %}" + _ENCLOSED
    + "{% else %}" + _HEADER + "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("kind", COLLECTED)
def test_marks_in_a_text_that_is_collected_first_are_no_places(tiny, kind):
    loop = "{% for m in messages %}{% if m.role == 'assistant' and loop.index0 == 1 %}" + _ENCLOSED
    loop += "{% elif m.role == 'assistant' %}"
    end = "{% else %}" + _HEADER + "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    tokenizer = with_template(tiny, COLLECTED[kind].replace("LOOP", loop).replace("END", end))
    assert Encoder(tokenizer).method == ("prefix" if kind == "recursive" else "markers")
    found = supervised(tokenizer, talk(USER, ANSWER, AGAIN, MORE))
    assert found == ["Half of four.<|im_end|>", "One more.<|im_end|>"]
    # What is marked at its place counts as it is marked.
    if kind != "recursive":
        marked = "<|im_end|>{% endgeneration %}"
        less = with_template(tiny, tokenizer.chat_template.replace(marked, "{% endgeneration %}<|im_end|>"))
        assert supervised(less, talk(USER, ANSWER)) == ["Half of four."]


def test_a_mark_in_a_mark_counts_once(tiny):
    inner = (
        "{% generation %}{{ m.content }}{% generation %} too{% endgeneration %}<|im_end|>{% endgeneration %}"
    )
    source = "{% for m in messages %}" + _HEADER + "{% if m.role == 'assistant' %}" + inner
    source += "{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    assert supervised(with_template(tiny, source), talk(USER, ANSWER)) == ["Half of four. too<|im_end|>"]


SKIPPING = (
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    + CHATML.removeprefix("{% for m in messages %}")
)
BREAKING = CHATML.replace(
    "<|im_end|>\n{% endfor %}", "<|im_end|>\n{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}"
)
COPIED = CHATML.replace("for m in messages", "for m in messages | list | reverse | list | reverse")
NESTED = "{% for a in [1] %}{% for m in messages[:1] %}{{ m.content }}{% endfor %}{% for m in messages %}" + (
    CHATML.removeprefix("{% for m in messages %}") + "{% endfor %}"
)


@pytest.mark.parametrize("source", [SKIPPING, COPIED, NESTED], ids=["continue", "copied", "nested"])
def test_loops_of_all_kinds(source, tiny):
    tokenizer = with_template(tiny, source)
    row = talk(said("system", "Be brief."), USER, ANSWER, AGAIN, MORE)
    assert supervised(tokenizer, row) == ["Half of four.<|im_end|>", "One more.<|im_end|>"]


def test_a_turn_that_the_template_leaves_out_refuses_the_row(tiny):
    tokenizer = with_template(tiny, BREAKING)
    assert supervised(tokenizer, talk(USER, ANSWER)) == ["Half of four.<|im_end|>"]
    assert "cannot be found" in reason(tokenizer, talk(USER, ANSWER, AGAIN, MORE))


FLAGS = [
    {"weight": 0},
    {"weight": 0.0},
    {"weight": False},
    {"train": False},
    {"trainable": False},
    {"train": "false"},
]


@pytest.mark.parametrize("flag", FLAGS, ids=str)
def test_messages_that_are_not_to_be_learnt(flag, tiny):
    for source in (CHATML, THINKING):
        tokenizer = with_template(tiny, source)
        row = talk(USER, {**ANSWER, **flag}, AGAIN, {**MORE, "weight": 1, "train": True})
        assert supervised(tokenizer, row) == ["One more.<|im_end|>"]
        plain = talk(USER, ANSWER, AGAIN, MORE)
        assert Encoder(tokenizer).preview(row).text == Encoder(tokenizer).preview(plain).text
    # A flag of a message that is not supervised in any case says nothing.
    assert supervised(tokenizer, talk({**USER, **flag}, ANSWER)) == ["Half of four.<|im_end|>"]
    assert reason(tokenizer, talk(USER, {**ANSWER, **flag})) == "nothing supervised"


@pytest.mark.parametrize("value", [0.5, 2, -1, "often", [1], {"a": 1}])
def test_weights_are_no_fractions(value, tiny):
    found = reason(tiny, talk(USER, {**ANSWER, "weight": value}))
    assert found == (
        f"message 2: 'weight' is {json.dumps(value)}; wanted 0 or 1, as a turn is supervised whole or not"
    )
    assert kind_of_reason(found) == "a message: 'weight' is neither 0 nor 1"


@pytest.mark.parametrize(
    "source", [CHATML, THINKING, MARKED, FOOTED], ids=["chatml", "thinking", "marked", "footed"]
)
@pytest.mark.parametrize("name", TALKS)
def test_conversations_of_all_kinds(source, name, tiny):
    tokenizer, row = with_template(tiny, source), talk(*TALKS[name])
    parts = supervised(tokenizer, row)
    assert Encoder(tokenizer).preview(row).text == tokenizer.apply_chat_template(row.messages, tokenize=False)
    answers = [message["content"] for message in TALKS[name] if message["role"] == "assistant"]
    assert len(parts) == len(answers)
    for part, answer in zip(parts, answers, strict=True):
        assert part.startswith(answer + "<|im_end|>")


def test_a_hundred_turns_are_rendered_once(tiny, monkeypatch):
    calls = count_renderings(monkeypatch)
    messages = [said(("user", "assistant")[n % 2], f"number {n}") for n in range(200)]
    encoder = Encoder(with_template(tiny, CHATML))
    encoder.encode([talk(USER, ANSWER)])
    calls.clear()
    (sample,) = encoder.encode([talk(*messages)])
    assert isinstance(sample, Sample)
    assert len(calls) == 1
    assert supervised(with_template(tiny, CHATML), talk(*messages)) == [
        f"number {n}<|im_end|>" for n in range(1, 200, 2)
    ]


def count_renderings(monkeypatch):
    calls, render = [], chat.render

    def counted(template, messages, *args, **more):
        calls.append(len(messages))
        return render(template, messages, *args, **more)

    monkeypatch.setattr(chat, "render", counted)
    return calls


@pytest.mark.parametrize(
    ("source", "content", "most"),
    [
        (CHATML, "Half of four.", 1),
        (THINKING, "Half of four.", 1),
        (THINKING, "<think>hm</think>Half.", 2),
        (MARKED, "x", 1),
    ],
)
def test_renderings_of_a_row(source, content, most, tiny, monkeypatch):
    calls = count_renderings(monkeypatch)
    encoder = Encoder(with_template(tiny, source))
    rows = [talk(USER, said("assistant", content)), Row(0, "id", "", "f", 1, prompt="a", completion=content)]
    encoder.encode(rows)
    calls.clear()
    encoder.encode(rows)
    assert len(calls) == len(rows) * most


def test_threads_share_what_is_known_of_a_template(tiny):
    tokenizer = with_template(tiny, THINKING)
    rows = [
        talk(
            USER, said("assistant", f"<think>{n}</think>Answer {n}."), AGAIN, {**MORE, "reasoning": f"hm {n}"}
        )
        for n in range(40)
    ]
    wanted = [sample.labels.tolist() for sample in Encoder(tokenizer).encode(rows)]
    encoder = Encoder(tokenizer)
    with ThreadPoolExecutor(4) as pool:
        for found in [pool.submit(encoder.encode, rows) for _ in range(8)]:
            assert [sample.labels.tolist() for sample in found.result()] == wanted


LLAMA3 = (
    "{% for m in messages %}{{ (bos_token or '') if loop.first }}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def template_of(name):
    """A template that only appends; those of models are read from their folders."""
    if name in ("ChatML", "Llama 3"):
        return CHATML if name == "ChatML" else LLAMA3
    qwen, smollm = SHARED / "data" / "tokenizers" / "qwen2" / "tokenizer_config.json", Path("/tmp/smollm2")
    path = qwen if name == "Qwen2" else smollm / "chat_template.jinja"
    if not path.is_file():
        pytest.skip(f"the template of {name} is not here")
    return json.loads(path.read_text())["chat_template"] if name == "Qwen2" else path.read_text()


@pytest.mark.parametrize("name", ["ChatML", "Llama 3", "Qwen2", "SmolLM2"])
def test_a_template_that_appends_has_the_turns_that_its_prefixes_tell(name, tiny):
    tokenizer, draw = with_template(tiny, template_of(name)), random.Random(name)
    encoder = Encoder(tokenizer)
    contents = [
        "four",
        " four \n",
        "\n\nfour",
        "a" * 40,
        "漢字 🎉",
        "<think>x</think>y",
        "assistant",
        "{{ y }}",
    ]

    def written(messages, prompt=False):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    for _ in range(40):
        roles = ["system"] * draw.randint(0, 1) + ["user", "assistant"] * draw.randint(1, 4)
        messages = [said(role, draw.choice(contents)) for role in roles + ["user"] * draw.randint(0, 1)]
        found, wanted = encoder.preview(talk(*messages)), []
        assert found.text == written(messages)
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start = len(written(messages[:index], prompt=True))
                wanted.append((start, len(written(messages[: index + 1]).rstrip())))
        assert found.spans == wanted
