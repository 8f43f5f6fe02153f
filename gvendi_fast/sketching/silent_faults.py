"""Faults of rows that no error tells of: what is sketched is then not what its owner takes it to be.

Each check looks at the same few rows as they were tokenised and gives one `Fault` with its count and its remedy, or
none. Where a share decides, it was set by what GSM8K, BBH, e-SNLI, AQuA-RAT and MED show (see `SHARED`).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gvendi_fast.base.printable import printable
from gvendi_fast.data.rows import Row
from gvendi_fast.sketching.proxy.encode import IGNORED, Encoder, Preview
from gvendi_fast.sketching.row_texts import (
    CALLS,
    CONTENT,
    REASONING,
    TOOLS,
    Held,
    held_by,
    left_out,
    squeezed,
)

# From this share of the rows on, a fault that one row may well have is told.
NOTABLE = 0.05
# Rows that are copies of others.
COPIES = 0.1
# So many rows with the same supervised tokens are nearly all; fewer rows than LEAST say nothing about a share.
NEARLY_ALL, LEAST = 0.9, 8
# Tokens that nearly all answers begin or end with. Of answers that people or models wrote for many tasks nearly all
# share none or one (GSM8K, e-SNLI, AQuA-RAT, MED, all of BBH; Qwen2's tokens); single tasks of BBH share up to 71, and
# four of them a tenth of all supervised tokens and more. An empty <think></think> is four, and says nothing.
SHARED, SHARED_PART, ADDED = 4, 0.1, 3
# Tokens of an answer that are compared, from either end.
_COMPARED = 512
# Characters of a text that are told of others, so that no short one is found by chance.
_TELLING = 16
_SHOWN = 60
# The encoder's word for a template that ends a turn with the one that follows it.
NO_END = "no end of the last turn"
# Its word for what --control-tokens text asks for, which is no fault.
SPELT = "control tokens in a content read as text"
# How people write a conversation as one text: what stands before the question, and before the answer after it. Words
# begin a line, as in prose they may be anywhere; control tokens of other tokenizers count as well.
_WRITTEN = tuple(
    (marks, re.compile(asks, re.MULTILINE), re.compile(answers, re.MULTILINE))
    for marks, asks, answers in (
        (
            "'### Instruction:' and '### Response:'",
            r"^#+ ?Instructions?:",
            r"^#+ ?(?:Response|Output|Answer):",
        ),
        (
            "'### Human:' and '### Assistant:'",
            r"^#+ ?(?:Human|User|Question):",
            r"#+ ?(?:Assistant|Response|Answer):",
        ),
        ("'[INST]' and '[/INST]'", r"\[INST\]", r"\[/INST\]"),
        ("'User:' and 'Assistant:'", r"^(?:User|Human|USER|HUMAN): ", r"\b(?:Assistant|ASSISTANT|AI):"),
        ("'Question:' and 'Answer:'", r"\A\s*(?:Question|Q): ", r"^(?:Answer|A):"),
        ("'<|im_start|>user'", r"<\|im_start\|>user", r"<\|im_start\|>assistant"),
        ("'<|user|>' and '<|assistant|>'", r"<\|user\|>", r"<\|assistant\|>"),
        ("'<start_of_turn>user'", r"<start_of_turn>user", r"<start_of_turn>model"),
        ("'<|start_header_id|>user'", r"<\|start_header_id\|>user", r"<\|start_header_id\|>assistant"),
    )
)
_EMPTY_ELEMENT = re.compile(r"<([^<>/\s]+)>\s*</\1>")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with some of the rows that were looked at, or of the files.

    kind: its name, the same in every version.
    count, of: rows that have it, and rows that were looked at; or files, and all files.
    what: what is wrong with them, after "12 of 64 rows".
    remedy: what mends it.
    unit: "rows" or "files".
    """

    kind: str
    count: int
    of: int
    what: str
    remedy: str
    unit: str = "rows"

    def __str__(self) -> str:
        return f"{self.count:,} of {self.of:,} {self.unit} {self.what}; {self.remedy}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; `text` is the whole sentence."""
        return {**asdict(self), "text": str(self)}


@dataclass(slots=True)
class Looked:
    """A row as it is tokenised: whole, whether its prompt was cut, and why it was refused in the end, if it was."""

    row: Row
    preview: Preview
    is_cut: bool = False
    refused: str | None = None
    # (kind of text, whose it is) of what the row holds and its text lacks.
    missing: set[tuple[str | None, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.missing = {(held.kind, held.whose) for held in left_out(self.row, self.preview.text)}
        # The encoder knows which turn a text should stand in, and so misses what stands elsewhere by chance.
        for note in self.preview.notes:
            kind, whose = _noted(note)
            if kind in (CONTENT, None) or all(known != kind for known, _ in self.missing):
                self.missing.add((kind, whose))

    @property
    def place(self) -> str:
        """File and line."""
        return printable(f"{os.path.basename(self.row.file)}:{self.row.line}")

    @property
    def supervised(self) -> np.ndarray:
        """The ids that the loss is summed over."""
        return self.preview.ids[self.preview.labels != IGNORED]

    def turn(self, number: int) -> np.ndarray:
        """The supervised ids of one stretch of the text, of the first (0) or the last (-1) turn."""
        places = np.flatnonzero(self.preview.labels != IGNORED)
        turns = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        return self.preview.ids[turns[number]]

    @property
    def answer(self) -> str:
        """The characters that are supervised."""
        return "".join(self.preview.text[start:end] for start, end in self.preview.spans)

    def content(self) -> tuple[Any, ...]:
        """What tells one row from another."""
        row = self.row
        return row.prompt, row.completion, row.text, repr(row.messages), repr(row.tools)


@dataclass
class Looks:
    """The rows that were looked at, and the encoder that tokenised them."""

    rows: Sequence[Looked]
    encoder: Encoder

    def __post_init__(self) -> None:
        tokenizer = self.encoder.tokenizer
        added = tokenizer.added_tokens_decoder
        self.special = {number for number, token in added.items() if token.special}
        self.special |= set(tokenizer.all_special_ids)
        plain = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
        self.control = sorted(
            {token.content for token in added.values() if token.special and len(token.content) > 2} - plain
        )
        # One of each content: copies are a fault of their own, and no other.
        self.different = list({row.content(): row for row in self.rows}.values())
        # Texts that hold control tokens, with the first of them.
        self.spelling = [
            (row, next(token for token in self.control if token in text))
            for row in self.rows
            if (text := row.row.text) is not None and any(token in text for token in self.control)
        ]

    def decoded(self, ids: Sequence[int]) -> str:
        """Some tokens as a short text."""
        text = self.encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return printable(repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"))

    def fault(self, kind: str, rows: Sequence[Looked], what: str, remedy: str) -> Fault:
        """The fault of these rows."""
        return Fault(kind, len(rows), len(self.rows), what, remedy)

    def is_notable(self, count: int, share: float = NOTABLE) -> bool:
        """Whether so many of the rows are worth a word."""
        return count > 0 and count >= share * len(self.rows)


def faults(looks: Looks) -> list[Fault]:
    """Every fault of the rows that were looked at, those that change the most first."""
    return [found for check in _CHECKS for found in check(looks)] if looks.rows else []


def _same_tokens(looks: Looks) -> Iterator[Fault]:
    """Rows that differ, and of which nothing that differs is read."""
    alike = Counter(row.preview.ids.tobytes() for row in looks.different)
    same = [row for row in looks.different if alike[row.preview.ids.tobytes()] > 1]
    if not looks.is_notable(len(same)):
        return
    yield looks.fault(
        "same tokens",
        same,
        f"differ from another row and have the very same tokens ({same[0].place} is the first): nothing that tells "
        "them apart is read, and rows of one and the same text have a G-Vendi of exactly 1.00",
        "look at the rendered rows ('gvendi inspect'): the chat template or the names of the fields leave out what "
        "differs",
    )


_LOST = {
    CONTENT: (
        "content dropped",
        "lose the text of a message in the chat template ({whose}; {place} is the first) and are scored without it",
        "take a proxy whose template renders it, or move the text into a message that it does render",
    ),
    REASONING: (
        "reasoning dropped",
        "lose their reasoning in the chat template ({whose}; {place} is the first) and are scored without it",
        "take a proxy whose template reads that field in every turn, or one without a chat template that removes it",
    ),
    CALLS: (
        "tool calls dropped",
        "lose tool calls in the chat template ({whose}; {place} is the first) and are scored without them",
        "take a proxy whose template renders tool calls, or write them into the content",
    ),
    TOOLS: (
        "tools dropped",
        "lose the list of their tools in the chat template ({place} is the first) and are scored without it",
        "take a proxy whose template renders tools, or write them into a system message",
    ),
}


def _noted(note: str) -> tuple[str | None, str]:
    """(kind of text, whose it is) of a note of `Preview`; (None, the note) where it is of no text of the row."""
    if note.startswith("reasoning"):
        return REASONING, "of earlier turns" if "earlier" in note else "of the last turn"
    if note.startswith("tool calls"):
        return CALLS, "assistant"
    if note.startswith("tools"):
        return TOOLS, "tools"
    role = note.removesuffix(" content dropped")
    return (None, note) if role == note else (CONTENT, role)


def _dropped(looks: Looks) -> Iterator[Fault]:
    """What the rows hold and the template passes over."""
    for kind, (name, what, remedy) in _LOST.items():
        rows = [row for row in looks.rows if any(known == kind for known, _ in row.missing)]
        if not rows:
            continue
        whose = Counter(whose for row in rows for known, whose in row.missing if known == kind)
        ordered = sorted(whose, key=lambda name: (-whose[name], name))
        names = ", ".join(printable(name[:_SHOWN]) for name in ordered[:3])
        # Names of roles are the rows' own, and may hold braces.
        yield looks.fault(
            name, rows, what.replace("{place}", rows[0].place).replace("{whose}", names), remedy
        )
    notes = {note for row in looks.rows for kind, note in row.missing if kind is None}
    for note in sorted(notes - {NO_END, SPELT}):
        rows = [row for row in looks.rows if (None, note) in row.missing]
        yield looks.fault(
            note,
            rows,
            f"are rendered with a loss: {printable(note)} ({rows[0].place} is the first)",
            "look at the rendered rows, and take a proxy whose template renders them whole",
        )


def _outside_the_embedding(looks: Looks) -> Iterator[Fault]:
    vocabulary = looks.encoder.vocabulary
    rows = [row for row in looks.rows if vocabulary is not None and row.preview.ids.max() >= vocabulary]
    if rows:
        largest = max(int(row.preview.ids.max()) for row in rows)
        yield looks.fault(
            "tokens outside the embedding",
            rows,
            f"have tokens that the model's embedding of {vocabulary:,} lacks, such as "
            f"{looks.decoded([largest])} ({largest:,}), and are refused",
            "take the tokenizer that belongs to the model, or take these tokens out of the rows",
        )


def _supervised_elsewhere(looks: Looks) -> Iterator[Fault]:
    """A text of the prompt inside what is supervised, though the answer does not repeat it."""
    rows = [
        row
        for row in looks.rows
        if row.row.text is None and any(_is_supervised(held, row) for held in _told(row.row))
    ]
    if rows:
        yield looks.fault(
            "prompt supervised",
            rows,
            f"have a part of their prompt among the supervised tokens ({rows[0].place} is the first)",
            "the template's marks of what is generated take in more than the answers: take another template",
        )


def _told(row: Row) -> list[Held]:
    return [held for held in held_by(row) if not held.is_answer and len(held.spellings[0]) >= _TELLING]


def _is_supervised(held: Held, row: Looked) -> bool:
    own = [text for other in held_by(row.row) if other.is_answer for text in other.spellings]
    text = held.spellings[0]
    return text in squeezed(row.answer) and not any(text in other for other in own)


def _control_tokens(looks: Looks) -> Iterator[Fault]:
    """Conversations that were written as one text: all of it is supervised, the prompts too."""
    rows = looks.spelling
    if looks.is_notable(len(rows)):
        yield looks.fault(
            "conversations as text",
            [row for row, _ in rows],
            f"are texts with control tokens of the tokenizer such as {printable(rows[0][1])}: a whole conversation, "
            "all of which is supervised, prompts too",
            "give the conversation as messages, of which the assistant's turns alone are supervised",
        )


def _prompts_in_texts(looks: Looks) -> Iterator[Fault]:
    marks, rows = _marked(looks)
    if rows:
        yield looks.fault(
            "prompts in texts",
            rows,
            f"are texts that hold a prompt and its answer, marked as by {marks} ({rows[0].place} is the first): the "
            "prompt is supervised as a part of the text",
            "give the two as fields (prompt and completion) or as messages, of which the answers alone are "
            "supervised, or score the whole texts knowingly",
        )


def _marked(looks: Looks) -> tuple[str, list[Looked]]:
    """The marks of a question and its answer that nearly all texts are written with, and which are."""
    spelling = {id(row) for row, _ in looks.spelling}
    texts = [row for row in looks.rows if row.row.text is not None and id(row) not in spelling]
    for marks, asks, answers in _WRITTEN if len(texts) >= LEAST else ():
        found = [(row, asks.search(row.row.text or "")) for row in texts]
        rows = [row for row, first in found if first and answers.search(row.row.text or "", first.end())]
        if len(rows) >= NEARLY_ALL * len(texts):
            return marks, rows
    return "", []


def _same_supervised(looks: Looks) -> Iterator[Fault]:
    rows = looks.different
    counts = Counter(row.supervised.tobytes() for row in rows)
    (ids, count), n = counts.most_common(1)[0], len(rows)
    if count == n > 1 or (n >= 2 * LEAST and count >= NEARLY_ALL * n):
        same = [row for row in rows if row.supervised.tobytes() == ids]
        text = looks.decoded(np.frombuffer(ids, np.int32).tolist())
        yield looks.fault(
            "same supervised tokens",
            same,
            f"have the same supervised tokens, {text}: only what stands before them tells these rows apart",
            "make sure that the answer is in the field that is read as the completion ('gvendi inspect' shows it)",
        )


def _shared_text(looks: Looks) -> Iterator[Fault]:
    """One text that nearly all answers begin or end with: one direction that all sketches have in common."""
    # The marks of a conversation that is written as a text are told as such.
    told = {id(row) for row in (*(row for row, _ in looks.spelling), *_marked(looks)[1])}
    rows = [row for row in looks.different if id(row) not in told]
    sequences = [tuple(row.supervised.tolist()) for row in rows]
    if len(rows) < LEAST or _most(sequences) >= NEARLY_ALL * len(rows):
        return
    total = sum(map(len, sequences))
    # One turn at a time: what follows the end of an empty turn is another one's.
    for where, turn, step in (("begin", 0, 1), ("end", -1, -1)):
        taken = [_without_end(tuple(row.turn(turn).tolist()), looks)[::step] for row in rows]
        shared, holders = _shared_beginning([sequence[:_COMPARED] for sequence in taken], NEARLY_ALL)
        if not shared:
            continue
        text = looks.encoder.tokenizer.decode(
            shared if where == "begin" else shared[::-1], clean_up_tokenization_spaces=False
        )
        having = [rows[i] for i in holders]
        is_added = _is_added(having, text, where, looks)
        part = len(shared) * len(holders) / total
        if is_added:
            # Behind the answers it is an end-of-turn marker that is no token of its own.
            is_told = len(shared) >= ADDED and where == "begin"
        else:
            is_told = len(shared) >= SHARED and (part >= SHARED_PART or _EMPTY_ELEMENT.search(text))
        if is_told:
            whose = "that the chat template adds" if is_added else "of the rows' own"
            yield looks.fault(
                "shared text",
                having,
                f"{where} what is supervised with the same {len(shared)} tokens {whose}, {_quoted(text)}, "
                f"{100 * part:.0f} % of all supervised tokens: one direction that all these sketches share",
                "take a template that does not write it into the answers"
                if is_added
                else "take it out of the rows, or score with it knowingly",
            )


def _most(sequences: Sequence[tuple[int, ...]]) -> int:
    return Counter(sequences).most_common(1)[0][1]


def _quoted(text: str) -> str:
    return printable(repr(text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"))


def _without_end(ids: tuple[int, ...], looks: Looks) -> tuple[int, ...]:
    """The tokens of an answer before its end-of-turn tokens, which all answers share and a trainer wants."""
    end = len(ids)
    while end and (ids[end - 1] in looks.special or looks.encoder.tokenizer.decode(ids[end - 1]).isspace()):
        end -= 1
    return ids[:end]


def _shared_beginning(
    sequences: Sequence[tuple[int, ...]], share: float
) -> tuple[tuple[int, ...], list[int]]:
    """The longest beginning that this share of the sequences has, and which have it."""
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    wide = -(-round(share * 1000) * len(order) // 1000)
    best: tuple[int, ...] = ()
    # In sorted order those with one beginning stand together, so its length is that of the two at the ends.
    for first in range(len(order) - wide + 1):
        low, high = sequences[order[first]], sequences[order[first + wide - 1]]
        length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), None)
        best = max(best, low[: min(len(low), len(high)) if length is None else length], key=len)
    return best, [i for i, ids in enumerate(sequences) if ids[: len(best)] == best]


def _is_added(rows: Sequence[Looked], text: str, where: str, looks: Looks) -> bool:
    """Whether a text at an end of the answers is none of the rows' own, nor made of it; no template writes a text."""
    # Half a character, where that is what the tokens share.
    mark = squeezed(text).strip("\ufffd")
    own = 0
    for row in rows:
        texts = [spelling for held in held_by(row.row) if held.is_answer for spelling in held.spellings]
        parts = (*texts, _answers(row.row))
        if where == "begin":
            # The first token of all is never supervised.
            first = squeezed(looks.encoder.tokenizer.decode(row.preview.ids[0])) + mark
            is_end = any(part.startswith((mark, first)) for part in parts)
        else:
            is_end = any(part.endswith(mark) for part in parts)
        is_made = any(part in mark for part in texts if len(part) >= _TELLING // 4)
        own += row.row.text is not None or is_end or is_made
    return bool(mark) and own < len(rows) / 2


def _answers(row: Row) -> str:
    """All that the assistant says in a row, as it was given."""
    if row.messages is None:
        return squeezed(row.completion or row.text or "")
    return "".join(squeezed(m.get("content") or "") for m in row.messages if m["role"] == "assistant")


def _no_end(looks: Looks) -> Iterator[Fault]:
    """Answers behind which no end is learnt; texts have none by habit, and --mask released leaves it out."""
    if looks.encoder.mask == "released":
        return
    rows = [row for row in looks.rows if row.row.text is None and not _has_end(row, looks)]
    if looks.is_notable(len(rows)):
        yield looks.fault(
            "no end",
            rows,
            "have a completion without an end: neither an end-of-turn token nor any text of the template follows it",
            "take a proxy whose template ends the assistant's turns, or set eos_token of the tokenizer",
        )


def _has_end(row: Looked, looks: Looks) -> bool:
    if NO_END in row.preview.notes:
        return False
    if int(row.supervised[-1]) in looks.special:
        return True
    # A marker that is no token of its own is still learnt.
    own = [text for held in held_by(row.row) if held.is_answer for text in held.spellings]
    return not any(squeezed(row.answer).endswith(text) for text in own)


def _double_bos(looks: Looks) -> Iterator[Fault]:
    bos = looks.encoder.tokenizer.bos_token_id
    rows = [row for row in looks.rows if bos is not None and row.preview.ids[:2].tolist() == [bos, bos]]
    if rows:
        yield looks.fault(
            "double BOS",
            rows,
            f"begin with the BOS token {looks.decoded([bos])} twice: the rows hold one, and another one is added",
            "take it out of the rows",
        )


def _cut(looks: Looks) -> Iterator[Fault]:
    rows = [row for row in looks.rows if row.is_cut and row.refused is None]
    if looks.is_notable(len(rows)):
        longest = max(len(row.preview.ids) for row in rows)
        yield looks.fault(
            "truncated prompts",
            rows,
            f"lose the beginning of their prompt, as they are longer than {looks.encoder.max_tokens:,} tokens "
            f"({longest:,} the longest)",
            "raise --max-tokens as far as the proxy reads, or shorten the prompts",
        )


def _too_long(looks: Looks) -> Iterator[Fault]:
    rows = [row for row in looks.rows if (row.refused or "").startswith("too long")]
    if looks.is_notable(len(rows)):
        longest = max(len(row.preview.ids) for row in rows)
        yield looks.fault(
            "too long",
            rows,
            f"are refused, as their supervised part does not fit in {looks.encoder.max_tokens:,} tokens "
            f"({longest:,} the longest row)",
            "raise --max-tokens as far as the proxy reads, or split the rows",
        )


def _empty(looks: Looks) -> Iterator[Fault]:
    rows = [row for row in looks.rows if any(map(_says_nothing, row.row.messages or ()))]
    if looks.is_notable(len(rows)):
        yield looks.fault(
            "empty answers",
            rows,
            f"have an assistant's turn that is empty, of which the end alone is learnt ({rows[0].place} is the first)",
            "take these turns out",
        )


def _says_nothing(message: dict[str, Any]) -> bool:
    if message["role"] != "assistant" or message.get("weight") == 0:
        return False
    is_trained = message.get("train", True) and message.get("trainable", True)
    return bool(is_trained) and not (message.get("content") or "").strip() and not message.get("tool_calls")


def _echo(looks: Looks) -> Iterator[Fault]:
    rows = [row for row in looks.rows if _repeats(row.row)]
    if looks.is_notable(len(rows)):
        yield looks.fault(
            "answers equal prompts",
            rows,
            f"have a completion that is the prompt again ({rows[0].place} is the first)",
            "make sure that --prompt-field and --completion-field name two fields",
        )


def _repeats(row: Row) -> bool:
    if row.text is not None:
        return False
    if row.messages is None:
        return squeezed(row.prompt) == squeezed(row.completion)
    said = [squeezed(message.get("content") or "") for message in row.messages]
    asked = [i for i, m in enumerate(row.messages[:-1]) if m["role"] == "user"]
    return bool(asked) and row.messages[-1]["role"] == "assistant" and said[asked[-1]] == said[-1] != ""


def _copies(looks: Looks) -> Iterator[Fault]:
    seen: dict[tuple[Any, ...], Looked] = {}
    rows = [row for row in looks.rows if seen.setdefault(row.content(), row) is not row]
    if looks.is_notable(len(rows), COPIES):
        yield looks.fault(
            "copies",
            rows,
            f"are copies of another one that was looked at ({rows[0].place} is the first)",
            "a copy has no direction of its own and yet counts in n: take copies out before sets are compared",
        )


_CHECKS: tuple[Callable[[Looks], Iterator[Fault]], ...] = (
    _same_tokens,
    _dropped,
    _outside_the_embedding,
    _supervised_elsewhere,
    _control_tokens,
    _prompts_in_texts,
    _same_supervised,
    _shared_text,
    _no_end,
    _double_bos,
    _cut,
    _too_long,
    _empty,
    _echo,
    _copies,
)
