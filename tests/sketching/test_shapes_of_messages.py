"""A template is given contents, tool calls and reasoning in the shape that it reads, and a row that cannot be given is
refused."""

import copy
import json

import pytest
from places import PACKAGE
from transformers import AutoTokenizer

from gvendi_fast.data.rows import Rejected, Row, kind_of_reason
from gvendi_fast.sketching.proxy.encode import Encoder


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


def call(arguments, name="lookup", **more):
    return {"id": "callnr001", "type": "function", "function": {"name": name, "arguments": arguments}, **more}


USER, ANSWER = said("user", "What is two?"), said("assistant", "Half of four.")
HEADER, END = "<|im_start|>{{ m.role }}\n", "<|im_end|>\n{% endfor %}"
# How templates in use write the arguments of a call; what each of them needs.
ARGUMENTS = {
    "as JSON": ("{{ c.function.arguments | tojson }}", dict),
    "by items": ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %}", dict),
    "joined": ("{{ '(' + c.function.arguments + ')' }}", str),
    "joined by ~": ("{{ c.function.name ~ c.function.arguments }}", str),
    "whole call": ("{{ c.function | tojson }}", dict),
    "either": (
        "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
        "{{ c.function.arguments | tojson }}{% endif %}",
        None,
    ),
}


def calling(written):
    loop = "{% for c in m.tool_calls or [] %}[{{ c.function.name }}" + written + "]{% endfor %}"
    return "{% for m in messages %}" + HEADER + "{{ m.content }}" + loop + END


GIVEN = {"as an object": {"town": "Quito", "days": 2}, "as JSON": '{"town": "Quito", "days": 2}'}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("written", ARGUMENTS)
def test_arguments_are_given_in_the_form_that_the_template_writes(written, given, tiny):
    source, form = ARGUMENTS[written]
    tokenizer = with_template(tiny, calling(source))
    row = talk(USER, said("assistant", "", tool_calls=[call(GIVEN[given])]), said("tool", "Dry."), ANSWER)
    found = Encoder(tokenizer).preview(row)
    value = GIVEN[given]
    if form is dict:
        value = GIVEN["as an object"]
    elif form is str:
        value = GIVEN["as JSON"]
    wanted = [USER, said("assistant", "", tool_calls=[call(value)]), said("tool", "Dry."), ANSWER]
    assert found.text == tokenizer.apply_chat_template(wanted, tokenize=False)
    assert "Quito" in found.text
    assert '\\"' not in found.text
    assert "'town'" not in found.text
    called, answered = (found.text[start:end] for start, end in found.spans)
    assert called.startswith("[lookup")
    assert called.endswith("]<|im_end|>")
    assert answered == "Half of four.<|im_end|>"


@pytest.mark.parametrize("arguments", ["Quito", "[1]", "{", "[" * 3000, "1" * 5000])
def test_arguments_that_are_no_object_refuse_the_row_where_one_is_needed(arguments, tiny):
    row = talk(USER, said("assistant", "", tool_calls=[call(arguments)]))
    refused = Encoder(with_template(tiny, calling(ARGUMENTS["by items"][0]))).preview(row)
    assert isinstance(refused, Rejected)
    assert kind_of_reason(refused.reason) == (
        "a message: the arguments of a tool call are not a JSON object, which the chat template needs"
    )
    assert not isinstance(
        Encoder(with_template(tiny, calling(ARGUMENTS["joined"][0]))).preview(row), Rejected
    )


def test_a_call_without_the_word_function_is_given_with_it(tiny):
    tokenizer = with_template(tiny, calling(ARGUMENTS["as JSON"][0]))
    flat = {"name": "lookup", "arguments": {"town": "Quito"}, "id": "callnr001"}
    found = Encoder(tokenizer).preview(talk(USER, said("assistant", "", tool_calls=[flat])))
    wanted = [USER, said("assistant", "", tool_calls=[call({"town": "Quito"})])]
    assert found.text == tokenizer.apply_chat_template(wanted, tokenize=False)
    as_it_is = with_template(
        tiny, "{% for m in messages %}{{ m.tool_calls | tojson if m.tool_calls else m.content }}{% endfor %}"
    )
    assert (
        Encoder(as_it_is)
        .preview(talk(USER, said("assistant", "", tool_calls=[flat])))
        .text.endswith(json.dumps([flat]))
    )


@pytest.mark.parametrize("calls", ["lookup", [1, None, "a"], [{}], [{"function": 3}], {"a": 1}], ids=str)
def test_calls_that_are_none_end_no_run(calls, tiny):
    for written, _ in ARGUMENTS.values():
        row = talk(USER, said("assistant", "four", tool_calls=calls))
        (result,) = Encoder(with_template(tiny, calling(written))).encode([row])
        assert result.id == "id"


def test_calls_that_are_written_beside_no_content_only(tiny):
    source = (
        "{% for m in messages %}" + HEADER + "{% if m.content is none %}{% for c in m.tool_calls %}"
        "{{ c.function | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}" + END
    )
    found = Encoder(with_template(tiny, source)).preview(
        talk(USER, said("assistant", "", tool_calls=[call({})]))
    )
    assert found.text.endswith('assistant\n{"name": "lookup", "arguments": {}}<|im_end|>\n')
    assert [found.text[a:b] for a, b in found.spans] == ['{"name": "lookup", "arguments": {}}<|im_end|>']
    assert found.notes == ()


PARTS = (
    "{% for m in messages %}"
    + HEADER
    + "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
)
PARTS += "{% endfor %}" + END
# Only users and tools speak in parts.
SOME = (
    "{% for m in messages %}"
    + HEADER
    + "{% if m.role in ('user', 'tool') %}{% for p in m.content %}{{ p.text }}"
)
SOME += "{% endfor %}{% else %}{{ m.content }}{% endif %}" + END
EITHER = "{% for m in messages %}" + HEADER + "{% if m.content is string %}{{ m.content }}{% else %}"
EITHER += "{% for p in m.content %}({{ p.text }}){% endfor %}{% endif %}" + END


@pytest.mark.parametrize("source", [PARTS, SOME, EITHER], ids=["parts", "some", "either"])
def test_contents_are_given_as_parts_where_the_template_reads_parts(source, tiny):
    encoder = Encoder(with_template(tiny, source))
    row = talk(said("system", "Be brief."), USER, ANSWER, said("tool", "Dry."), said("assistant", "Dry."))
    found = encoder.preview(row)
    assert found.text == "".join(
        f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in row.messages
    )
    assert [found.text[a:b] for a, b in found.spans] == ["Half of four.<|im_end|>", "Dry.<|im_end|>"]
    pair = encoder.preview(Row(0, "id", "", "f", 1, prompt="What is two?", completion="Half of four."))
    assert pair.text == encoder.preview(talk(USER, ANSWER)).text


READS = (
    "{% for m in messages %}"
    + HEADER
    + "{% if m.NAME %}<think>{{ m.NAME }}</think>{% endif %}{{ m.content }}"
    + END
)


@pytest.mark.parametrize("read", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_given_under_the_name_that_is_read(read, given, tiny):
    encoder = Encoder(with_template(tiny, READS.replace("NAME", read)))
    found = encoder.preview(talk(USER, {**ANSWER, given: "Two and two."}))
    assert found.text.endswith("<think>Two and two.</think>Half of four.<|im_end|>\n")
    assert [found.text[a:b] for a, b in found.spans] == ["Two and two.</think>Half of four.<|im_end|>"]
    assert found.notes == ()


def test_reasoning_without_a_content(tiny):
    encoder = Encoder(with_template(tiny, READS.replace("NAME", "reasoning_content")))
    found = encoder.preview(talk(USER, said("assistant", "", reasoning_content="Two and two.")))
    assert [found.text[a:b] for a, b in found.spans] == ["Two and two.</think><|im_end|>"]


@pytest.mark.parametrize("role", ["system", "tool", "developer"])
def test_a_role_that_a_template_refuses_refuses_the_row_in_its_words(role, tiny):
    strict = "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no ' + m.role) }}"
    encoder = Encoder(with_template(tiny, strict + "{% endif %}" + HEADER + "{{ m.content }}" + END))
    refused, fine = encoder.encode([talk(said(role, "x"), USER, ANSWER), talk(USER, ANSWER)])
    assert refused.reason == f"chat template refused the messages: no {role}"
    assert not isinstance(fine, Rejected)


def test_a_tokenizer_with_a_template_for_tools(tiny):
    plain = "{% for m in messages %}" + HEADER + "{{ m.content }}" + END
    encoder = Encoder(
        with_template(tiny, {"default": plain, "tool_use": "{{ tools | length }} tools\n" + plain})
    )
    assert encoder.preview(talk(USER, ANSWER)).text.startswith("<|im_start|>user")
    found = encoder.preview(talk(USER, ANSWER, tools=[call({})]))
    assert found.text.startswith("1 tools\n<|im_start|>user")
    assert [found.text[a:b] for a, b in found.spans] == ["Half of four.<|im_end|>"]


def test_the_same_message_twice(tiny):
    found = Encoder(tiny).preview(talk(USER, ANSWER, USER, ANSWER))
    assert [found.text[a:b] for a, b in found.spans] == ["Half of four.<|im_end|>"] * 2


def test_a_template_that_writes_answers_of_tools_into_the_turn_that_called(tiny):
    source = (
        "{% for m in messages %}{% if m.role != 'tool' %}" + HEADER + "{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<|call>{{ c.function.name }}<call|>{% endfor %}{% if m.tool_calls %}"
        "{% for k in range(loop.index0 + 1, messages | length) %}{% if messages[k].role == 'tool' %}"
        "<|tool_response>{{ messages[k].content }}<tool_response|>{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endif %}{% endfor %}"
    )
    row = talk(USER, said("assistant", "", tool_calls=[call({})]), said("tool", "Dry."), ANSWER)
    found = Encoder(with_template(tiny, source)).preview(row)
    assert [found.text[a:b] for a, b in found.spans] == [
        "<|call>lookup<call|>",
        "<|im_end|>",
        "Half of four.<|im_end|>",
    ]
    # In other words, its beginning and end are not known.
    other = with_template(
        tiny, source.replace("<|tool_response>", "<answer>").replace("<tool_response|>", "</answer>")
    )
    assert "cannot be found" in Encoder(other).preview(row).reason
