"""Pairs and conversations of different words, and chat templates with one fault each, for tests."""

from __future__ import annotations

LINE = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
ASKS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = "{% for m in messages %}" + LINE + "{% endfor %}" + ASKS
# Passes over what is neither a user nor an assistant, as some do.
TWO_ROLES = "{% for m in messages if m['role'] in ('user', 'assistant') %}" + LINE + "{% endfor %}" + ASKS
# Writes no content at all, as where a template expects parts and gets a string.
ROLES_ALONE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\nHello.<|im_end|>\n' }}{% endfor %}" + ASKS
)
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{% if m['role'] != 'assistant' %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REASONS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m.reasoning_content %}"
    "{{ '<think>\n' + m.reasoning_content + '\n</think>\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}" + ASKS
)
CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + ' ' + (c.function.arguments | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    + ASKS
)
NUMBERS = (
    "one two three four five six seven eight nine ten apples pears plums figs dates limes kiwis nuts".split()
)


def words(n: int, count: int = 6) -> str:
    """Some words that differ from number to number."""
    return " ".join(NUMBERS[(n // len(NUMBERS) ** k + k * n) % len(NUMBERS)] for k in range(count))


def pairs(count: int = 40, prompt: str = "{w}?", completion: str = "It is {w}, {n} of them.") -> list[dict]:
    return [
        {"prompt": prompt.format(n=n, w=words(n)), "completion": completion.format(n=n, w=words(3 * n + 1))}
        for n in range(count)
    ]


def chats(count: int = 40, **more) -> list[dict]:
    """Conversations of a question and an answer; `more` are fields of the answer, whose texts take {n} and {w}."""
    rows = []
    for row in pairs(count):
        n = len(rows)
        answer = {
            name: v.format(n=n, w=words(n + 7)) if isinstance(v, str) else v for name, v in more.items()
        }
        user, said = (
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        )
        rows.append({"messages": [user, {**said, **answer}]})
    return rows


def with_message(rows: list[dict], role: str, text: str, place: int = 0) -> list[dict]:
    """Conversations with one more message, whose text takes {n}."""
    for n, row in enumerate(rows):
        row["messages"].insert(place, {"role": role, "content": text.format(n=n)})
    return rows
