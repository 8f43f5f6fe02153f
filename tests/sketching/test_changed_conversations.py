"""Conversations of every make, under templates of every manner: each is read as its template writes it, or refused."""

import copy
import json
import random

import numpy as np
import pytest
from places import PACKAGE
from transformers import AutoTokenizer

from gvendi_fast.data.rows import Rejected, Row
from gvendi_fast.sketching.proxy.encode import Encoder

TURN = "<|im_start|>{{ m.role }}\n"
END = "<|im_end|>\n{% endfor %}"
CALLS = (
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}{{ c.function.arguments | tojson }}]{% endfor %}"
)
TEMPLATES = {
    "appends": "{% for m in messages %}" + TURN + "{{ m.content }}" + CALLS + END,
    "rewrites": "{% for m in messages %}" + TURN + "{% if loop.last and m.role == 'assistant' %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1] | trim }}"
    + CALLS + END,
    "marks": "{% for m in messages %}" + TURN + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}",
    "by number": "{% for i in range(messages | length) %}{% set m = messages[i] %}" + TURN
    + "{{ m.content | trim }}" + END,
    "strict": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + TURN + "{{ m.content }}" + END,
    "skips": "{% for m in messages %}{% if m.role not in ('user', 'assistant') or not m.content %}{% continue %}"
    "{% endif %}" + TURN + "{{ m.content }}" + END,
    "next header ends": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}",
    "parts": "{% for m in messages %}" + TURN + "{% for p in m.content %}{{ p.text }}{% endfor %}" + END,
}  # fmt: skip
WORDS = [
    "", " ", "four", "\n\n4\n", "<think>\nhm\n</think>\n\nyes", "<think>open", "close</think> x", "<|im_end|>",
    "assistant", "<|im_start|>assistant\nno", "content-3f1b77", "call_3f1b77", "{{ x }}", "😀 漢字", "</think>",
    "a" * 70,
]  # fmt: skip
FLAGS = [0, 1, True, False, 0.5, "x", "false", None]
CALL = [
    {"id": "callnr001", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
    {"type": "function", "function": {"name": "g", "arguments": '{"b": "x"}'}},
    {"name": "h", "arguments": {}},
    {"function": {"name": "k", "arguments": "none"}},
    {"function": {}},
    3,
]


def message(role, draw):
    made = {"role": role, "content": draw.choice(WORDS) + draw.choice(WORDS)}
    if role == "assistant" and draw.random() < 0.3:
        made["tool_calls"] = draw.choices(CALL, k=draw.randint(0, 2))
        made["content"] = draw.choice(["", made["content"]])
    if role == "assistant" and draw.random() < 0.3:
        made[draw.choice(["reasoning_content", "reasoning", "thinking"])] = draw.choice([*WORDS, "a thought"])
    if draw.random() < 0.15:
        made[draw.choice(["weight", "train", "trainable"])] = draw.choice(FLAGS)
    return made


def conversation(draw):
    if draw.random() < 0.3:
        roles = draw.choices(["user", "assistant", "system", "tool", "developer"], k=draw.randint(1, 6))
    else:
        roles = ["user", "assistant"] * draw.randint(1, 3) + ["user"] * draw.randint(0, 1)
    return [message(role, draw) for role in roles]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_conversation_is_read_or_refused(name):
    tokenizer = copy.copy(AutoTokenizer.from_pretrained(PACKAGE / "assets" / "tiny"))
    tokenizer.chat_template = TEMPLATES[name]
    encoder, draw = Encoder(tokenizer), random.Random(name)
    rows = [Row(n, str(n), "", "f", n + 1, messages=conversation(draw)) for n in range(120)]
    results, read = encoder.encode(rows), 0
    assert len(results) == len(rows)
    for row, result in zip(rows, results, strict=True):
        given = json.dumps(row.messages)
        found = encoder.preview(row)
        assert json.dumps(row.messages) == given
        if isinstance(result, Rejected):
            assert found == result
            assert len(result.reason) < 250
            continue
        read += 1
        assert np.array_equal(found.labels[: result.length], result.labels)
        edges = [edge for span in found.spans for edge in span]
        assert edges == sorted(edges)
        assert 0 <= edges[0] < edges[-1] <= len(found.text)
        assert all(start < end for start, end in found.spans)
        said = [m["content"] for m in row.messages if m["role"] == "assistant"]
        if all(m.keys() == {"role", "content"} for m in row.messages) and name != "parts":
            assert found.text == tokenizer.apply_chat_template(row.messages, tokenize=False)
            # Each turn begins with its own words: no header, and nothing that the template adds, is supervised.
            said = [words for words in said if words or name != "skips"]
            for (start, end), words in zip(found.spans, said, strict=True):
                own = words.split("</think>")[-1] if name == "rewrites" else words
                assert found.text[start:end].lstrip().startswith(own.strip())
    assert read > 20
