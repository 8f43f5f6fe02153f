"""Jinja templates that say, while they render, which characters each message wrote and which are marked as generated.

A chat template goes through its messages in a loop and writes as it goes. What a turn of that loop writes is the
message's, so that one rendering tells the turns apart, also where earlier turns are written otherwise than the last.
What `{% generation %}` encloses is counted in the same way. Inside a macro or a block whose text is collected first, it
is not known where the text will stand: loops in there are left alone, and of a mark it is looked up whether its words
stand where it was met.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateRuntimeError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from gvendi_fast.base.bounded_jinja import BoundedEnvironment, Budget, counting

_BEGINS, _ENDS = "turn of a loop begins", "turn of a loop ends"


class Track:
    """What one rendering told.

    turns: (message, start, end) of what was written in a loop's turn with that message; several where several loops, or
        loops in loops, wrote with it.
    generated: (message or None, start, end) of what `{% generation %}` encloses, the outer one where one is in another.
    """

    def __init__(self, messages: Sequence[Any]) -> None:
        self.turns: list[tuple[int, int, int]] = []
        self.generated: list[tuple[int | None, int, int]] = []
        self.position = 0
        self._words: list[str] = []
        self._inside = 0
        self._index = {id(message): index for index, message in enumerate(messages)}
        self._open: dict[int, tuple[int, int]] = {}

    def begin(self, loop: int, value: Any) -> None:
        """A turn of a loop with this value; a turn that was left by `continue` has ended."""
        self.end(loop)
        index = self._index.get(id(value))
        if index is not None:
            self._open[loop] = index, self.position

    def end(self, loop: int) -> None:
        """The turn of a loop, if it was one with a message."""
        if loop in self._open:
            index, start = self._open.pop(loop)
            if start < self.position:
                self.turns.append((index, start, self.position))

    def generation(self, caller: Callable[[], str]) -> str:
        """What a mark encloses, which is written next as far as is known."""
        self._inside += 1
        words = caller()
        self._inside -= 1
        index = next((index for index, _ in reversed(self._open.values())), None)
        if words and not self._inside:
            self.generated.append((index, self.position, self.position + len(words)))
            self._words.append(words)
        return words

    def is_placed(self, text: str) -> bool:
        """Whether what marks enclose stands where they were met, as it does not behind what is collected first."""
        return all(
            text[start:end] == words
            for (_, start, end), words in zip(self.generated, self._words, strict=True)
        )

    def only_turn(self, index: int) -> tuple[int, int] | None:
        """(start, end) of what was written with a message, None where it is nothing or lies apart."""
        found = [(start, end) for at, start, end in self.turns if at == index]
        return found[0] if len(found) == 1 else None


class _Active(threading.local):
    track: Track | None = None


_active = _Active()


def _tracked() -> Track:
    if _active.track is None:
        # So that Jinja does not work it out while it compiles.
        raise TemplateRuntimeError("a template is rendered outside of a track")
    return _active.track


def _begins(value: Any, loop: int) -> None:
    _tracked().begin(loop, value)


def _ends(loop: int) -> None:
    _tracked().end(loop)


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`, which writes what stands inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("enclosed"), [], [], inside, lineno=line)

    def enclosed(self, caller: Macro) -> str:
        """What stands inside."""
        return _tracked().generation(caller)


class TrackedEnvironment(BoundedEnvironment):
    """Compiles templates whose renderings fill a Track.

    marks: whether the template compiled last has a generation block at a place that is known.
    """

    marks = False

    @classmethod
    def like(cls, other: ImmutableSandboxedEnvironment) -> TrackedEnvironment:
        """See BoundedEnvironment; its own tag for generations in place of the other's."""
        made = super().like(other)
        made.extensions = {name: one for name, one in made.extensions.items() if "generation" not in one.tags}
        made.extensions[_Generation.identifier] = _Generation(made)
        return made

    def _bind(self) -> None:
        super()._bind()
        self.filters |= {_BEGINS: _begins, _ENDS: _ends}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tracker = _Tracker()
        tree = tracker.visit(super()._parse(source, name, filename))
        self.marks = tracker.marks
        return tree.set_environment(self)


class _Tracker(NodeTransformer):
    """Puts a begin and an end around each turn of the loops whose text is written at once."""

    def __init__(self) -> None:
        self.marks, self._loops = False, 0

    def visit_For(self, node: nodes.For) -> nodes.For | list[nodes.Node]:  # noqa: N802
        if node.recursive:
            # Its text is collected, as that of a macro.
            return node
        self.generic_visit(node)
        if not isinstance(node.target, nodes.Name):
            return node
        self._loops += 1
        loop = nodes.Const(self._loops, lineno=node.lineno)
        value = nodes.Name(node.target.name, "load", lineno=node.lineno)
        begins = nodes.Filter(value, _BEGINS, [loop], [], None, None, lineno=node.lineno)
        ends = nodes.Filter(loop, _ENDS, [], [], None, None, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(begins, lineno=node.lineno))
        # Behind the loop, for a turn that was left by `break` or `continue`.
        return [node, nodes.ExprStmt(ends, lineno=node.lineno)]

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.CallBlock:  # noqa: N802
        called = node.call.node
        self.marks |= (
            isinstance(called, nodes.ExtensionAttribute) and called.identifier == _Generation.identifier
        )
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:  # noqa: N802
        return node

    visit_FilterBlock = visit_AssignBlock = visit_Block = visit_Macro  # noqa: N815


def render(template: Template, messages: Sequence[Any], budget: Budget, **values: Any) -> tuple[str, Track]:
    """The text of messages, and what is known of it. Takes of the budget."""
    track, before, written = Track(messages), _active.track, []
    _active.track = track
    try:
        with counting(budget):
            for piece in template.generate(messages=messages, **values):
                written.append(piece)
                track.position += len(piece)
    finally:
        _active.track = before
    return "".join(written), track
