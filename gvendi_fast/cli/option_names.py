"""Errors of the library begin with an argument's name; of a command that is an option, named as it is typed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gvendi_fast.base.errors import GvendiError

# {argument of the library: parameter of a command} where the two differ.
_OTHERS = {
    "orders": "order",
    "n_clusters": "clusters",
    "groups": "sketch_groups",
    "count": "show",
    "lease_s": "lease",
    "hang_after_s": "hang_after",
}
_FIRST = re.compile(
    r"(?P<name>[a-z][a-z_]*)(?==| ['\"]| (?:is|are|has|have|holds|must|needs|gives|leaves|goes|pattern)\b)"
)


@contextmanager
def as_typed(context: Any) -> Iterator[None]:
    """Errors of the command that `context`, the parser's, is of name the options that were given, --dim for dim."""
    try:
        yield
    except GvendiError as error:
        command = context.command.get_command(context, context.invoked_subcommand)
        error.args = (in_options(str(error), {p.name: p.opts[0] for p in command.params}), *error.args[1:])
        raise


def in_options(text: str, options: dict[str, str]) -> str:
    """The message with the option of {parameter: option} in place of the argument that it begins with, if one does."""
    found = _FIRST.match(text)
    option = found and options.get(_OTHERS.get(found["name"], found["name"]), "")
    return option + text[found.end() :] if option and option.startswith("--") else text
