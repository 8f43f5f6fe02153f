"""A tokenizer's chat template writes what transformers writes, and whatever it does refuses the row, not the run."""

import copy
import json

import pytest
from places import PACKAGE, ROOT
from template_attacks import BROKEN, ENDLESS, RAISING
from transformers import AutoTokenizer

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Rejected, Row
from gvendi_fast.sketching.proxy.chat import ChatTemplate
from gvendi_fast.sketching.proxy.encode import Encoder

TINY = PACKAGE / "assets" / "tiny"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Häuser & <b>42</b>?\n"},
    {"role": "assistant", "content": "<think>hm</think> Yes.", "reasoning_content": "hm"},
    {"role": "user", "content": "And 'you'?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2.5, None]}}}
        ],
    },
    {"role": "tool", "content": "3.5", "name": "add"},
    {"role": "assistant", "content": "3.5", "weight": None},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"é": {}}}},
    }
]
DOCUMENTS = [{"title": "T", "text": "x > y"}]
# Written for this test, in the manners of templates in use.
TEMPLATES = {
    "marked turns": "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m.content + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "begin and end tokens": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[U] "
    "{{ m.content | trim }} [/U]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "tools and documents": "{%- if tools %}{% for t in tools %}{{ t | tojson(indent=4) }}"
    "{{ t | tojson(ensure_ascii=True) }}"
    "{% endfor %}{% endif %}{% if documents %}{% for d in documents %}{{ d.title ~ ': ' ~ d['text'] }}"
    "{% endfor %}{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}"
    "{{ c['function'] | tojson(separators=(',', ':'), sort_keys=True) }}{% endfor %}{% endif %}"
    "{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "thinking": "{% set ns = namespace(last=-1) %}{% for m in messages[::-1] %}"
    "{% set i = (messages|length - 1) - loop.index0 %}"
    "{% if ns.last < 0 and m.role == 'user' %}{% set ns.last = i %}{% endif %}{% endfor %}{% for m in messages %}"
    "{% set content = m.content if m.content is string else '' %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}{{ m.reasoning_content | default('none') }}{% endif %}{{ content }}"
    "{% if loop.last or (not loop.last and messages[loop.index0 + 1].role != 'tool') %}|{% endif %}{% endfor %}",
    "macros": "{%- macro turn(m, deep=0) -%}{{ m.role.upper() }}{% for k, v in m.items() %}{{ k }}="
    "{{ v }};{% endfor %}"
    "{%- endmacro %}{% for m in messages %}{{ turn(m) }}{% if loop.index > 5 %}{% break %}{% endif %}{% endfor %}",
    "refuses tools": "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.content }}{% endfor %}",
}


@pytest.fixture(scope="module")
def tiny():
    return AutoTokenizer.from_pretrained(TINY)


def with_template(tokenizer, source):
    made = copy.copy(tokenizer)
    made.chat_template = source
    return made


def both(tokenizer, messages, **more):
    """What transformers writes and what we write, or the errors."""
    own = ChatTemplate(tokenizer, "t", "completion")
    results = []
    for write in (
        lambda: tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            **{("add_generation_prompt" if k == "prompt" else k): v for k, v in more.items()},
        ),
        lambda: own.text(messages, **more),
    ):
        try:
            results.append(write())
        except Exception as error:
            results.append(str(error))
    return results


MORE = [{}, {"prompt": True}, {"tools": TOOLS}, {"tools": TOOLS, "documents": DOCUMENTS, "prompt": True}]


@pytest.mark.parametrize("more", MORE, ids=["plain", "prompt", "tools", "all"])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("name", [*TEMPLATES, "tiny", "qwen2"])
def test_a_template_writes_what_transformers_writes(name, length, more, tiny):
    if name == "qwen2":
        folder = ROOT.parent / "shared" / "data" / "tokenizers" / "qwen2"
        if not folder.is_dir():
            pytest.skip("the tokenizer of Qwen2 is not here")
        tokenizer = with_template(
            tiny, json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
        )
    else:
        tokenizer = with_template(tiny, TEMPLATES.get(name, tiny.chat_template))
    wanted, got = both(tokenizer, TALK[:length], **more)
    assert got == wanted
    assert wanted or length == 1


def row(number=1):
    messages = [{"role": "user", "content": "Häuser"}, {"role": "assistant", "content": "yes"}]
    return Row(number, str(number), "", "f", number, messages=messages)


FEW = [
    "loops in loops",
    "doubling by ~",
    "nested lists as JSON",
    "breadth 2^40",
    "'%4000000000d' % 1",
    "'a' * 4000000000",
]


@pytest.mark.parametrize("name", FEW)
def test_an_endless_template_refuses_every_row_and_ends_no_run(name, tiny):
    encoder = Encoder(with_template(tiny, ENDLESS[name]))
    for result in encoder.encode([row(1), row(2)]):
        assert isinstance(result, Rejected)
        assert result.reason.startswith(("chat template: more than ", "chat template: a width of "))


@pytest.mark.parametrize("source", [*RAISING.values(), *BROKEN.values()], ids=[*RAISING, *BROKEN])
def test_whatever_a_template_raises_refuses_the_row(source, tiny):
    encoder = Encoder(with_template(tiny, source))
    (result,) = encoder.encode([row()])
    assert isinstance(result, Rejected)
    assert result.reason.startswith("chat template")
    # Texts need none.
    (text,) = encoder.encode([Row(1, "1", "", "f", 1, text="some words here")])
    assert not isinstance(text, Rejected)


def test_a_row_that_a_template_cannot_print_is_refused_alone(tiny):
    deep = json.loads("[" * 500 + "]" * 500)
    for _ in range(3):
        deep = [[[deep]]]
    while True:
        try:
            json.dumps(deep)
        except RecursionError:
            break
        for _ in range(500):
            deep = [deep]
    bad = row(1)
    bad.messages[0]["tool_calls"] = deep
    encoder = Encoder(with_template(tiny, TEMPLATES["tools and documents"]))
    refused, fine = encoder.encode([bad, row(2)])
    assert isinstance(refused, Rejected)
    assert "nested too deeply" in refused.reason
    assert not isinstance(fine, Rejected)


@pytest.mark.parametrize(
    "source", [{"a": "x", "b": "y"}, "x" * (1 << 21)], ids=["no default", "2 million characters"]
)
def test_templates_that_are_no_template_name_the_tokenizer(source, tiny):
    with pytest.raises(GvendiError, match="chat template"):
        Encoder(with_template(tiny, source))
