"""The shapes of rows that people have: which fields are read, and how they make a prompt with its completion, a
conversation or a text.

The shape "fields" is what the field options name. Any other is recognised from the first rows of a corpus, or named by
`--format`; then every row is read so, and a row of another shape is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.printable import printable
from gvendi_fast.data.messages import read_messages, read_tools, supervised_problem
from gvendi_fast.data.records import Fields, Reason, decode_value, kind_of_value, lone_surrogate, text_of

# Rows by which a shape is recognised.
FIRST_ROWS = 64
# Prompt, completion, messages, text and tools of a row, up to the last one that is set.
Content = tuple[Any, ...]
Reader = Callable[[dict], Content | Reason]
# Fields that an error lists, and characters of each.
_LISTED, _SHOWN = 12, 40
_TOOLS = ("tools", "functions")
# Names of fields that people give to what a model is to see, or to learn, beside a prompt and its completion.
_MEANT = (
    *(
        "system",
        "system_prompt",
        "context",
        "instruction",
        "input",
        "passage",
        "document",
        "documents",
        "history",
    ),
    *("reasoning", "reasoning_content", "thinking", "rationale", "cot"),
)
# From this share of the first rows on, such a field that is not read is told.
_TOLD = 0.05
_TALKS = ("conversations", "conversation", "dialog", "dialogue")
# How a text begins that spells out a list of messages, as JSON or as Python shows it.
_SPELLED = re.compile(r"""\s*\[\s*\{\s*(["'])(?:role|content|from|value)\1\s*:""")
_HH = re.compile(r"\n\n(Human|Assistant): ?")


@dataclass(frozen=True)
class Shape:
    """One shape of rows.

    title: how it is called in sentences.
    says: what is read from which fields.
    reads: the fields, in use or not in a given row.
    fits: whether a record is of this shape; only the fields that make it are asked.
    read: the content of a record, or why it has none.
    """

    title: str
    says: str
    reads: tuple[str, ...]
    fits: Callable[[Mapping[str, Any]], bool]
    read: Reader


def _is_text(value: Any) -> bool:
    return isinstance(value, str | bytes)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | dict) or (isinstance(value, str) and value.lstrip()[:1] == "[")


def _pair(
    title: str,
    prompt: str,
    completion: str,
    context: str | None = None,
    system: str | None = None,
    history: str | None = None,
    told_by: str | None = None,
) -> Shape:
    """A prompt and its completion under other names, with more text for the prompt, a system message and a history.

    told_by: a field without which a record is of another shape.
    """

    def fits(record: Mapping[str, Any]) -> bool:
        is_there = told_by is None or told_by in record
        return is_there and _is_text(record.get(prompt)) and _is_text(record.get(completion))

    def read(record: dict) -> Content | Reason:
        if record.get(prompt) is None or record.get(completion) is None:
            return _missing(record, prompt, completion)
        texts = {}
        for name in (prompt, completion, context, system):
            value = None if name is None else record.get(name)
            texts[name] = "" if value is None else text_of(value, name)
            if isinstance(texts[name], Reason):
                return texts[name]
        if not texts[completion].strip():
            return Reason("empty completion")
        asked = texts[prompt]
        if context is not None and texts[context].strip():
            asked = f"{asked}\n{texts[context]}" if asked.strip() else texts[context]
        earlier = _history(record.get(history), history) if history is not None else []
        if isinstance(earlier, Reason):
            return earlier
        if system is not None and texts[system].strip():
            earlier = [{"role": "system", "content": texts[system]}, *earlier]
        if not earlier:
            return asked, texts[completion]
        return None, None, [*earlier, *_turns(asked, texts[completion])]

    first = prompt if context is None else f"{prompt} + {context}"
    more = [f"{system} -> system message"] if system else []
    more += [f"{history} -> earlier turns"] if history else []
    says = "; ".join([f"{first} -> prompt, {completion} -> completion", *more])
    reads = tuple(name for name in (prompt, context, completion, system, history) if name is not None)
    return Shape(title, says, reads, fits, read)


def _turns(prompt: str, completion: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _history(value: Any, field: str) -> list[dict[str, Any]] | Reason:
    turns: list[dict[str, Any]] = []
    for pair in [] if value is None else value if isinstance(value, list) else [value]:
        if not isinstance(pair, list) or len(pair) != 2:
            return Reason(f"field '{field}' is not a list of pairs of texts")
        texts = [text_of(text, field) for text in pair]
        problem = next((text for text in texts if isinstance(text, Reason)), None)
        if problem is not None:
            return problem
        turns += _turns(*texts)
    return turns


def _missing(record: Mapping[str, Any], *wanted: str) -> Reason:
    """Why a record without some of these fields is no row, and what it is instead."""
    absent = [name for name in wanted if record.get(name) is None]
    other = shape_of(record)
    shown = ", ".join(f"'{name}'" for name in absent)
    return Reason(
        f"missing field{'s' * (len(absent) > 1)} {shown}"
        + (f"; the row is of format {other}" if other else "")
    )


def _conversation(messages: list[dict[str, Any]] | Reason, record: dict) -> Content | Reason:
    if isinstance(messages, Reason):
        return messages
    problem = supervised_problem(messages)
    if problem is not None:
        return problem
    tools = read_tools(record)
    if tools is None:
        return None, None, messages
    return tools if isinstance(tools, Reason) else (None, None, messages, None, tools)


def _read_talk(record: dict) -> Content | Reason:
    name = next((name for name in _TALKS if record.get(name) is not None), None)
    if name is None:
        return _missing(record, _TALKS[0])
    messages = read_messages(record[name], name)
    if isinstance(messages, Reason):
        return messages
    system = record.get("system")
    if system is not None:
        text = text_of(system, "system")
        if isinstance(text, Reason):
            return text
        if text.strip() and not (messages and messages[0]["role"] == "system"):
            messages = [{"role": "system", "content": text}, *messages]
    return _conversation(messages, record)


def _prompted(prompt: Any, completion: Any, names: tuple[str, str], record: dict) -> Content | Reason:
    """A prompt and a completion of which at least one is a list of messages: only the completion's are supervised."""
    parts = []
    for value, name, role in ((prompt, names[0], "user"), (completion, names[1], "assistant")):
        if isinstance(value, str | bytes):
            text = text_of(value, name)
            if isinstance(text, Reason):
                return text
            parts.append([{"role": role, "content": text}])
            continue
        messages = read_messages(value, name)
        if isinstance(messages, Reason):
            return messages
        parts.append(messages)
    return _asked(*parts, record)


def _spelled_out(value: Any, field: str) -> Any:
    """The list of messages that a text spells out as JSON, as tables without lists hold them; else the value itself."""
    begin = _SPELLED.match(value) if isinstance(value, str) else None
    if begin is None:
        return value
    if begin[1] == "'":
        return Reason(f"field '{field}' is a list as Python shows it, not JSON; write it with json.dumps")
    messages = decode_value(value, field)
    is_list = isinstance(messages, list) and all(map(_is_message, messages))
    return messages if is_list else value


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _asked(prompt: list[dict[str, Any]], answer: list[dict[str, Any]], record: dict) -> Content | Reason:
    """A conversation of which only the turns of the answer are supervised."""
    problem = supervised_problem(answer)
    return problem or _conversation([*map(_as_prompt, prompt), *answer], record)


def _as_prompt(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "train": False} if message["role"] == "assistant" else message


def _read_preference(record: dict) -> Content | Reason:
    """The chosen one of two answers. What both begin with is the prompt, where the row names none."""
    prompt, chosen, other = record.get("prompt"), record.get("chosen"), record.get("rejected")
    if chosen is None:
        return _missing(record, "chosen")
    prompt = _spelled_out(prompt, "prompt")
    answers = _spelled_out(chosen, "chosen"), _spelled_out(other, "rejected")
    # One alone may be what is to be learnt.
    if all(isinstance(answer, list | Reason) for answer in answers):
        chosen, other = answers
    if isinstance(prompt, Reason) or isinstance(chosen, Reason):
        return prompt if isinstance(prompt, Reason) else chosen
    if _is_text(chosen):
        chosen = text_of(chosen, "chosen")
        if isinstance(chosen, Reason):
            return chosen
        if prompt is not None:
            if not _is_text(prompt):
                return _prompted(prompt, chosen, ("prompt", "chosen"), record)
            return _text_pair(text_of(prompt, "prompt"), chosen)
        other = text_of(other, "rejected")
        if isinstance(other, Reason):
            return Reason("missing field 'prompt'")
        turns = _spoken(chosen)
        if turns is None:
            cut = _common(chosen, other)
            return _text_pair(chosen[:cut], chosen[cut:])
        chosen, other = turns, _spoken(other) or []
    messages = read_messages(chosen, "chosen")
    if isinstance(messages, Reason):
        return messages
    if _is_text(prompt):
        # A whole conversation holds the text that the prompt repeats.
        is_answer = not messages or messages[0]["role"] == "assistant"
        prompt = [{"role": "user", "content": prompt}] if is_answer else None
    begins = (
        read_messages(prompt, "prompt") if prompt is not None else _or_none(read_messages(other, "rejected"))
    )
    if isinstance(begins, Reason):
        return begins
    shared = 0
    # The last message is an answer, even where both answers are the same.
    while shared < min(len(begins), len(messages) - 1) and begins[shared] == messages[shared]:
        shared += 1
    if prompt is not None and shared < len(begins):
        return _asked(begins, messages, record)
    if not shared:
        shared = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    return _asked(messages[:shared], messages[shared:], record)


def _common(one: str, two: str) -> int:
    """How many characters two texts begin with together, up to a word that only begins alike."""
    shorter = min(len(one), len(two))
    size = next((i for i in range(shorter) if one[i] != two[i]), shorter)
    while size and not one[size - 1].isspace():
        size -= 1
    return size


def _or_none(messages: list[dict[str, Any]] | Reason) -> list[dict[str, Any]]:
    """The messages of an answer that is not scored, if they can be read."""
    return [] if isinstance(messages, Reason) else messages


def _text_pair(prompt: str | Reason, completion: str) -> Content | Reason:
    if isinstance(prompt, Reason):
        return prompt
    return (prompt, completion) if completion.strip() else Reason("empty completion")


def _spoken(text: str) -> list[dict[str, Any]] | None:
    """A conversation that is one text with "Human:" and "Assistant:" before the turns, as messages."""
    parts = _HH.split(text)
    if parts[0].strip() or len(parts) < 3:
        return None
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said}
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _read_kto(record: dict) -> Content | Reason:
    if any(record.get(name) is None for name in ("prompt", "completion", "label")):
        return _missing(record, "prompt", "completion", "label")
    if not isinstance(record["label"], bool):
        return Reason(f"field 'label' is not true or false ({kind_of_value(record['label'])})")
    return _read_pair(record) if record["label"] else Reason("an undesired completion (label is false)")


def _read_content(record: dict) -> Content | Reason:
    if record.get("content") is None:
        return _missing(record, "content")
    return _text(record["content"], "content")


def _text(value: Any, field: str) -> Content | Reason:
    text = text_of(value, field)
    if isinstance(text, Reason):
        return text
    return (None, None, None, text) if text.strip() else Reason(f"empty {field}")


def _fields_reader(fields: Fields) -> Reader:
    """The reader of the shape "fields"."""
    names = prompt_name, completion_name = fields.prompt, fields.completion
    messages_name, text_name = fields.messages, fields.text

    def read(record: dict) -> Content | Reason:
        prompt, completion = record.get(prompt_name), record.get(completion_name)
        if prompt is not None and completion is not None:
            # Nearly every pair: nothing is to be changed.
            if type(prompt) is str and type(completion) is str:
                fine = prompt[:1] != "[" and (completion.isascii() or not lone_surrogate(completion))
                if fine and (prompt.isascii() or not lone_surrogate(prompt)):
                    return (prompt, completion) if completion.strip() else Reason("empty completion")
            prompt = _spelled_out(prompt, prompt_name)
            if isinstance(prompt, Reason):
                return prompt
            if isinstance(prompt, list) or isinstance(completion, list):
                # Behind a prompt that is a text, a completion that spells messages out may be what is to be learnt.
                if isinstance(prompt, list):
                    completion = _spelled_out(completion, completion_name)
                if isinstance(completion, Reason):
                    return completion
                return _prompted(prompt, completion, names, record)
            completion = text_of(completion, completion_name)
            prompt = text_of(prompt, prompt_name)
            if isinstance(prompt, Reason) or isinstance(completion, Reason):
                return prompt if isinstance(prompt, Reason) else completion
            return _text_pair(prompt, completion)
        messages, text = record.get(messages_name), record.get(text_name)
        if messages is not None:
            return _conversation(read_messages(messages, messages_name), record)
        if text is not None:
            if type(text) is str and text.isascii() and text.strip():
                return None, None, None, text
            return _text(text, text_name)
        if prompt is not None:
            return Reason(f"missing field '{completion_name}'")
        if completion is not None:
            return Reason(f"missing field '{prompt_name}'")
        other = shape_of(record)
        return Reason(
            f"missing fields: none of '{prompt_name}' with '{completion_name}', '{messages_name}', '{text_name}'"
            + (f"; the row is of format {other}" if other else "")
        )

    return read


_read_pair = _fields_reader(Fields())

# {name of --format: the shape}, those that are told by fewer fields behind those that have them and more.
SHAPES: dict[str, Shape] = {
    "sharegpt": Shape(
        "ShareGPT",
        "conversations (also conversation, dialog), from/value or role/content -> messages; system -> system message",
        (*_TALKS, "system", *_TOOLS),
        lambda record: any(_is_list(record.get(name)) for name in _TALKS),
        _read_talk,
    ),
    "preference": Shape(
        "preference pairs",
        "prompt, or what chosen and rejected begin with -> prompt, chosen -> completion; rejected is not scored",
        ("prompt", "chosen", "rejected", *_TOOLS),
        lambda record: record.get("chosen") is not None and record.get("rejected") is not None,
        _read_preference,
    ),
    "openorca": _pair("OpenOrca", "question", "response", system="system_prompt", told_by="system_prompt"),
    "alpaca": _pair("Alpaca", "instruction", "output", "input", "system", "history"),
    "dolly": _pair("Dolly", "instruction", "response", "context"),
    "question-answer": _pair("questions and answers", "question", "answer"),
    "question-response": _pair("questions and responses", "question", "response"),
    "problem-solution": _pair("problems and solutions", "problem", "solution"),
    "query-response": _pair("queries and responses", "query", "response"),
    "prompt-response": _pair("prompts and responses", "prompt", "response"),
    "input-output": _pair("inputs and outputs", "input", "output"),
    "kto": Shape(
        "KTO",
        "prompt -> prompt, completion -> completion, where label is true; the others are refused",
        ("prompt", "completion", "label", *_TOOLS),
        # Rows of the shape "fields", too, which is what they are read as unless this one is asked for.
        lambda record: False,
        _read_kto,
    ),
    "content": Shape(
        "texts",
        "content -> text",
        ("content",),
        lambda record: _is_text(record.get("content")) and "role" not in record,
        _read_content,
    ),
}
# What --format takes.
FORMATS = ("auto", "fields", *SHAPES)
_BY_FIELDS = ("prompt", "completion", "messages", "text")


def shape_of(record: Mapping[str, Any]) -> str | None:
    """The first shape of SHAPES that a record has."""
    return next((name for name, shape in SHAPES.items() if shape.fits(record)), None)


@lru_cache(maxsize=64)
def reader_of(fields: Fields) -> Reader:
    """What reads the content of a record: (prompt, completion, messages, text, tools) up to the last one that is set.

    Raises GvendiError for a format that there is not, and for a shape together with names of fields.
    """
    check_format(fields)
    return _fields_reader(fields) if fields.format in ("auto", "fields") else SHAPES[fields.format].read


def check_format(fields: Fields) -> None:
    """GvendiError for a format that there is not, and for one whose fields have other names than were given."""
    if fields.format not in FORMATS:
        raise GvendiError(f"format is {fields.format!r}; wanted one of {', '.join(FORMATS)}")
    named = _named(fields)
    if fields.format in SHAPES and named:
        raise GvendiError(
            f"--format {fields.format} names the fields of a row, and so does --{named[0]}-field "
            f"{getattr(fields, named[0])}; leave one of them out"
        )


def _named(fields: Fields) -> list[str]:
    """Forms whose field the user named."""
    return [name for name in _BY_FIELDS if getattr(fields, name) != getattr(Fields, name)]


def columns_of(fields: Fields) -> tuple[str, ...]:
    """The fields that rows are read from, without those of id and group."""
    if fields.format in SHAPES:
        return SHAPES[fields.format].reads
    return (*(getattr(fields, name) for name in _BY_FIELDS), *_TOOLS)


def all_columns(fields: Fields) -> tuple[str, ...]:
    """The fields by which shapes are told apart."""
    # A role beside a content makes a message of it, and no text.
    names = (*columns_of(fields), *(name for shape in SHAPES.values() for name in shape.reads), "role")
    return tuple(dict.fromkeys(names))


def outline(record: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """What `recognise` asks of a record: a few names of its fields and the kinds of their values, however large."""
    wanted, few = set(all_columns(fields)), dict(islice(record.items(), FIRST_ROWS))
    few |= {name: record[name] for name in wanted & record.keys()}
    return {name: _outline(value) for name, value in few.items()}


def _outline(value: Any) -> Any:
    if isinstance(value, str | bytes):
        return value.lstrip()[:1]
    return type(value)() if isinstance(value, list | dict) else value


@dataclass(frozen=True)
class Recognised:
    """What the first rows of a corpus say.

    fields: as given, with the format that was recognised.
    notes: sentences for the user, before the run.
    advice: which fields the rows have and what would read them, "" where most of the first rows can be read.
    """

    fields: Fields
    notes: tuple[str, ...] = ()
    advice: str = ""


def recognise(records: Sequence[Mapping[str, Any]], fields: Fields, seen: Sequence[str] = ()) -> Recognised:
    """The shape that most of these records have; of two that as many have, the first in the order of FORMATS.

    seen: names of fields beside those of the records, such as columns that were not read.
    Names of fields that the user gave count more than any shape. Raises GvendiError as `check_format` does.
    """
    check_format(fields)
    votes = [_vote(record, fields) for record in records]
    counts = Counter(vote for vote in votes if vote)
    best = max(counts, key=lambda name: (counts[name], -FORMATS.index(name)), default="fields")
    asked = fields.format
    if asked == "auto":
        # The shape of earlier versions, which their run directories do not name.
        found = replace(fields, format="auto" if _named(fields) or best == "fields" else best)
    else:
        found = replace(fields, format="auto" if asked == "fields" else asked)
    notes = []
    if found.format != "auto":
        notes.append(describe(found) + ("" if asked != "auto" else "; --format says otherwise"))
    else:
        notes += _doubts(records, fields)
    others = [record for record in records if not _has(record, found)]
    advice = _advice(others, found, seen, best) if 2 * len(others) > len(records) else ""
    if advice:
        notes.append(f"most of the first rows cannot be read: {advice}")
    else:
        notes += _unread(records, found, seen)
    return Recognised(found, tuple(notes), advice)


def describe(fields: Fields) -> str:
    """One sentence on how rows are read."""
    if fields.format in SHAPES:
        shape = SHAPES[fields.format]
        return f"rows are read as {shape.title} ({fields.format}): {shape.says}"
    return (
        f"rows are read by their fields: {fields.prompt} with {fields.completion}, else {fields.messages}, "
        f"else {fields.text}"
    )


def _has(record: Mapping[str, Any], fields: Fields) -> bool:
    """Whether a record has the fields that are read."""
    if fields.format == "kto":
        return record.get("prompt") is not None and record.get("completion") is not None
    if fields.format in SHAPES:
        return SHAPES[fields.format].fits(record)
    is_pair = record.get(fields.prompt) is not None and record.get(fields.completion) is not None
    return is_pair or record.get(fields.messages) is not None or record.get(fields.text) is not None


def _vote(record: Mapping[str, Any], fields: Fields) -> str | None:
    return "fields" if _has(record, replace(fields, format="auto")) else shape_of(record)


def _doubts(records: Sequence[Mapping[str, Any]], fields: Fields) -> list[str]:
    """Sentences on fields beside those that are read, which another --format reads."""
    if fields.format == "fields":
        return []
    if records and all(
        isinstance(record.get("label"), bool)
        and record.get(fields.prompt) is not None
        and record.get(fields.completion) is not None
        for record in records
    ):
        return [
            "rows have a label that is true or false, as for KTO; all are read: --format kto leaves out the false"
        ]
    texts = [
        record
        for record in records
        if record.get(fields.text) is not None
        and record.get(fields.messages) is None
        and None in (record.get(fields.prompt), record.get(fields.completion))
    ]
    others = {shape_of(record) for record in texts}
    if texts and len(texts) == len(records) and len(others) == 1 and None not in others:
        name = next(iter(others))
        shape = SHAPES[str(name)]
        return [
            f"rows are read as texts, all of it supervised, from the field {fields.text}; they have the fields of "
            f"{shape.title}, too: --format {name} reads those"
        ]
    return []


def _is_read_as_text(record: Mapping[str, Any], fields: Fields) -> bool:
    is_pair = None not in (record.get(fields.prompt), record.get(fields.completion))
    is_by_fields = fields.format not in SHAPES and not is_pair and record.get(fields.messages) is None
    return fields.format == "content" or is_by_fields


def _unread(records: Sequence[Mapping[str, Any]], fields: Fields, seen: Sequence[str]) -> list[str]:
    """A sentence on fields that probably belong to the rows' texts, and are not read."""
    # A text may well have been made of them.
    others = [record for record in records if not _is_read_as_text(record, fields)]
    # An outline has every list empty.
    counts = Counter(
        name for record in others for name in _MEANT if name in record and record[name] not in (None, "", b"")
    )
    held = {name for name, count in counts.items() if count >= _TOLD * len(records)}
    # Columns that are not read have no values here.
    held |= set(seen) - {name for record in records for name in record} if others else set()
    names = [
        name for name in _MEANT if name in held and name not in (*columns_of(fields), fields.id, fields.by)
    ]
    if not names:
        return []
    listed = " and ".join(f"'{name}'" for name in names)
    return [
        f"rows have {listed}, too, which {'is' if len(names) == 1 else 'are'} not read: the number is without "
        f"{'it' if len(names) == 1 else 'them'}; put what the model is to see into the prompt, or give messages (a "
        "system message, reasoning_content of an answer)"
    ]


def _advice(records: Sequence[Mapping[str, Any]], fields: Fields, seen: Sequence[str], best: str) -> str:
    names = list(dict.fromkeys([*(name for record in records for name in record), *seen]))
    listed = ", ".join(f"'{printable(name[:_SHOWN])}'" for name in names[:_LISTED])
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    has = f"rows have the fields {listed}{more}" if names else "rows have no fields"
    return f"{has}; {_remedy(records, names, fields, best)}"


def _remedy(records: Sequence[Mapping[str, Any]], names: list[str], fields: Fields, best: str) -> str:
    if records and all("role" in record and "content" in record for record in records):
        return "each is one message: write a conversation a row, as {'messages': [...]}"
    if best != "fields" and best != fields.format:
        named = _named(fields)
        without = f", without --{named[0]}-field" if named else ""
        return f"--format {best} reads them{without}"
    if best == "fields" and fields.format != "auto":
        return "--format fields reads them"
    texts = [name for name in names if any(_is_text(record.get(name)) for record in records)]
    for pair in _PAIRS:
        near = [get_close_matches(name, texts, 1, 0.6) for name in pair]
        if all(near) and near[0] != near[1]:
            if (near[0][0], near[1][0]) == (fields.prompt, fields.completion):
                both = f"{_quoted(fields.prompt)} and {_quoted(fields.completion)}"
                return f"a row is read where both {both} have a value"
            return f"--prompt-field {_quoted(near[0][0])} --completion-field {_quoted(near[1][0])} would read them"
    lists = [name for name in names if any(isinstance(record.get(name), list) for record in records)]
    if len(lists) == 1 and lists[0] != fields.messages:
        return f"--messages-field {_quoted(lists[0])} would read them as messages"
    if len(texts) == 1 and texts[0] != fields.text:
        return f"--text-field {_quoted(texts[0])} would read them as texts"
    return (
        "name those to read with --prompt-field and --completion-field, --messages-field or --text-field, or the shape "
        "of the rows with --format"
    )


def _quoted(name: str) -> str:
    shown = printable(name)
    return shown if re.fullmatch(r"[\w.-]+", shown) else f"'{shown}'"


# Fields of a prompt and its completion, for names that are spelled a little otherwise.
_PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("problem", "solution"),
    ("query", "response"),
    ("prompt", "response"),
    ("input", "output"),
    ("inputs", "targets"),
    ("src", "tgt"),
)
