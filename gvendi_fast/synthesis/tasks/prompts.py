"""Prompts as Jinja templates. What a model or a pool row says is only ever a value in one, never a template."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import read_text

# Characters of a template.
LONGEST = 1 << 20


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to a model: chat messages, the number of the draw (0 for the first) and how to sample it."""

    messages: tuple[dict[str, str], ...]
    sample: int = 0
    temperature: float = 1.0
    top_p: float = 1.0


class Template:
    """A template file whose blocks are the parts of what it makes, such as `system` and `user`.

    Source: the file `path`, else `name`.j2 of this package. Runs in Jinja's sandbox with a bound on its steps and on
    the characters it handles; a variable that it names and that is not given is an error. Threads may share it.
    Raises GvendiError for a file that is not UTF-8, cannot be compiled, or lacks one of the blocks `wanted`, and
    OSError, with the path, for one that the system does not let be read.
    """

    def __init__(
        self, name: str, path: str | os.PathLike | None = None, wanted: tuple[str, ...] = ("user",)
    ) -> None:
        from jinja2 import StrictUndefined, TemplateSyntaxError

        from gvendi_fast.base.bounded_jinja import BoundedEnvironment, words_of

        self.source = _read(path) if path is not None else _packaged(f"{name}.j2")
        self.name = os.fspath(path) if path is not None else f"{name}.j2"
        environment = BoundedEnvironment(
            undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
        )
        try:
            self._template = environment.from_string(self.source)
        except TemplateSyntaxError as error:
            raise GvendiError(f"template '{self.name}' line {error.lineno}: {error.message}") from error
        except Exception as error:
            # Of brackets in brackets, say, or an integer of too many digits: Python's compiler raises what it likes.
            raise GvendiError(f"template '{self.name}' cannot be compiled: {words_of(error)}") from error
        missing = [block for block in wanted if block not in self._template.blocks]
        if missing:
            raise GvendiError(
                f"template '{self.name}' has no block '{missing[0]}'; wanted "
                f"{{% block {missing[0]} %}} ... {{% endblock %}}"
            )

    def digest(self) -> str:
        """BLAKE2b (8 bytes, hex) of the source: another prompt makes another data set."""
        return hashlib.blake2b(self.source.encode(), digest_size=8).hexdigest()

    def block(self, name: str, values: Mapping[str, Any]) -> str:
        """The text of one block with these values, outer white space removed; "" for a block that is not there."""
        from gvendi_fast.base.bounded_jinja import budget_for, counting, words_of

        render = self._template.blocks.get(name)
        if render is None:
            return ""
        try:
            with counting(budget_for(values)):
                return "".join(render(self._template.new_context(dict(values)))).strip()
        except Exception as error:
            # There is no end of what a template may raise.
            given = ", ".join(sorted(values))
            raise GvendiError(
                f"template '{self.name}' cannot be filled: {words_of(error)} (it is given {given})"
            ) from error

    def messages(self, values: Mapping[str, Any]) -> tuple[dict[str, str], ...]:
        """Chat messages of the blocks `system` (optional) and `user`."""
        texts = {role: self.block(role, values) for role in ("system", "user")}
        if not texts["user"]:
            raise GvendiError(f"template '{self.name}': the block 'user' is empty")
        return tuple({"role": role, "content": text} for role, text in texts.items() if text)


def _read(path: str | os.PathLike) -> str:
    # A number would be taken for an open file.
    if not isinstance(path, (str, os.PathLike)):
        raise GvendiError(f"a template is {path!r}; wanted the path of a file")
    return read_text(path, LONGEST, "template", "a prompt, with rows as values")


def _packaged(name: str) -> str:
    return (files(__package__) / "templates" / name).read_text(encoding="utf-8")
