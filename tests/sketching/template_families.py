"""Stock chat templates of model families, tokenizers for them without the network, and conversations to read with them.

`tests/sketching/templates/index.json` lists the families. A template whose licence allows it lies beside the index; one
of another licence is read from the package that ships it, and its family is absent where the package is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gvendi_fast.data.rows import Row
from tests.places import TESTS

FOLDER = TESTS / "sketching" / "templates"
# Files that may be kept here are those of models under these licences.
FREE = ("Apache-2.0", "MIT")


@dataclass(frozen=True)
class Family:
    """One stock template.

    family, model: its name, and a model that ships it.
    licence, source: those of the template's text.
    bos, eos: tokens that the template asks for by these names.
    tokens: its markers that are one token in the model's tokenizer.
    file: the template beside the index; None where `package` ships it under `path`.
    training: TRL's template for training with it, which marks what is supervised; None where there is none.
    """

    family: str
    model: str
    licence: str
    source: str
    bos: str | None
    eos: str | None
    tokens: tuple[str, ...]
    file: str | None = None
    package: str | None = None
    path: str | None = None
    training: str | None = None

    def template(self) -> str | None:
        """Its text; None where the package that ships it is not installed."""
        if self.file is not None:
            return (FOLDER / self.file).read_text()
        return packaged(self.package, self.path)

    def training_template(self) -> str | None:
        """The text of `training`; None where there is none or TRL is not installed."""
        return packaged("trl", self.training) if self.training else None


@cache
def packaged(package: str, path: str) -> str | None:
    """A file of an installed package, which is not imported; None without the package, or where it has no such file."""
    try:
        found = Path(distribution(package).locate_file(path))
    except PackageNotFoundError:
        return None
    return found.read_text() if found.is_file() else None


def families() -> list[Family]:
    """All that the index lists."""
    entries = json.loads((FOLDER / "index.json").read_text())
    return [Family(**{**entry, "tokens": tuple(entry["tokens"])}) for entry in entries]


def tokenizer_of(family: Family, template: str) -> PreTrainedTokenizerFast:
    """One token a byte and one for each of the family's markers; nothing is trained or fetched."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        chat_template=template,
        name_or_path=family.model,
    )


@dataclass(frozen=True)
class Case:
    """A conversation, and the tools that go with it."""

    name: str
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None

    def row(self) -> Row:
        """The row that a file of this conversation would give."""
        messages = json.loads(json.dumps(self.messages))
        row = Row(0, "row", "", "f.jsonl", 1, messages=messages)
        return row if self.tools is None else replace(row, tools=json.loads(json.dumps(self.tools)))

    def pieces(self) -> Iterator[Piece]:
        """What the messages say, in the order in which templates write it."""
        for number, message in enumerate(self.messages):
            own = message["role"] == "assistant" and message.get("train", True) and message.get("weight", 1)
            content = message["content"]
            for name in ("reasoning_content", "reasoning", "thinking"):
                if name in message:
                    yield Piece(number, "reasoning", message[name], own)
            if content.startswith("<think>"):
                reasoning, content = content.removeprefix("<think>\n").split("\n</think>\n\n")
                yield Piece(number, "reasoning", reasoning, own)
            if content:
                yield Piece(number, "content", content, own)
            for call in message.get("tool_calls", ()):
                yield Piece(number, "call", call["function"]["name"], own)
                arguments = call["function"]["arguments"]
                arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
                yield from (Piece(number, "call", value, own) for value in arguments.values())


@dataclass(frozen=True)
class Piece:
    """A text of message `number` that a template should write; `own`: to be supervised."""

    number: int
    kind: str
    text: str
    own: bool


WEATHER = {
    "type": "function",
    "function": {
        "name": "find_weather",
        "description": "Tells the weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "description": "Name of the town."}},
            "required": ["town"],
        },
    },
}


def _said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _calling(arguments: Any, content: str = "", **more: Any) -> tuple[dict[str, Any], ...]:
    return (
        _said("user", "Will Quito be dry?"),
        _said("assistant", content, tool_calls=[_call(1, arguments)], **more),
        _answered(1, "Drizzle, nine degrees."),
        _said("assistant", "Rather take an umbrella."),
    )


def _call(number: int, arguments: Any) -> dict[str, Any]:
    # Mistral's templates want ids of nine characters.
    function = {"name": "find_weather", "arguments": arguments}
    return {"id": f"callnr{number:03}", "type": "function", "function": function}


def _answered(number: int, content: str) -> dict[str, Any]:
    return _said("tool", content, name="find_weather", tool_call_id=f"callnr{number:03}")


_ASK, _ANSWER = _said("user", "How many moons has Mars?"), "There are two of them."
_AGAIN, _SECOND = _said("user", "Name the larger one."), "Phobos is the larger."
_THOUGHTS = ("Deimos plus another one.", "Compare both diameters first.")
CASES = (
    Case("one turn", (_ASK, _said("assistant", _ANSWER))),
    Case("two turns", (_ASK, _said("assistant", _ANSWER), _AGAIN, _said("assistant", _SECOND))),
    Case("system", (_said("system", "Answer in verse only."), _ASK, _said("assistant", _ANSWER))),
    Case("tools", (_ASK, _said("assistant", _ANSWER)), (WEATHER,)),
    Case("call, arguments as an object", _calling({"town": "Quito-Centro"}), (WEATHER,)),
    Case("call, arguments as a string", _calling('{"town": "Quito-Centro"}'), (WEATHER,)),
    Case("call after text", _calling({"town": "Quito-Centro"}, "Looking that up."), (WEATHER,)),
    Case("reasoning", (_ASK, _said("assistant", _ANSWER, reasoning_content=_THOUGHTS[0]))),
    Case(
        "reasoning, two turns",
        (
            _ASK,
            _said("assistant", _ANSWER, reasoning_content=_THOUGHTS[0]),
            _AGAIN,
            _said("assistant", _SECOND, reasoning_content=_THOUGHTS[1]),
        ),
    ),
    Case(
        "`<think>` in content",
        (
            _ASK,
            _said("assistant", f"<think>\n{_THOUGHTS[0]}\n</think>\n\n{_ANSWER}"),
            _AGAIN,
            _said("assistant", f"<think>\n{_THOUGHTS[1]}\n</think>\n\n{_SECOND}"),
        ),
    ),
)
# Not in the table: the rule holds for them as well.
MORE = (
    Case(
        "two calls",
        (
            _said("user", "Will Quito and Lima be dry?"),
            _said(
                "assistant",
                "",
                tool_calls=[_call(1, {"town": "Quito-Centro"}), _call(2, {"town": "Lima-Norte"})],
            ),
            _answered(1, "Drizzle, nine degrees."),
            _answered(2, "Sunshine, thirty degrees."),
            _said("assistant", "Rather take an umbrella."),
        ),
        (WEATHER,),
    ),
    Case(
        "reasoning before a call",
        _calling({"town": "Quito-Centro"}, reasoning_content=_THOUGHTS[0]),
        (WEATHER,),
    ),
    Case("`reasoning`", (_ASK, _said("assistant", _ANSWER, reasoning=_THOUGHTS[0]))),
    Case("`thinking`", (_ASK, _said("assistant", _ANSWER, thinking=_THOUGHTS[0]))),
    Case(
        "first turn not trained",
        (_ASK, _said("assistant", _ANSWER, train=False), _AGAIN, _said("assistant", _SECOND)),
    ),
    Case(
        "last turn not trained",
        (_ASK, _said("assistant", _ANSWER), _AGAIN, _said("assistant", _SECOND, weight=0)),
    ),
    Case("ends in a question", (_ASK, _said("assistant", _ANSWER), _AGAIN)),
    Case(
        "a system message between",
        (
            _ASK,
            _said("assistant", _ANSWER),
            _said("system", "Answer in verse only."),
            _AGAIN,
            _said("assistant", _SECOND),
        ),
    ),
)
