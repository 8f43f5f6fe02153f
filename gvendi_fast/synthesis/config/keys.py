"""Every key of a configuration: its default, what it may hold and what it means, from the classes that hold them."""

from __future__ import annotations

import inspect
import textwrap

from gvendi_fast.synthesis.config.config import Config
from gvendi_fast.synthesis.config.schema import Section, inner, shown, wanted
from gvendi_fast.synthesis.tasks.generic import GenericTask
from gvendi_fast.synthesis.tasks.math import MathTask
from gvendi_fast.synthesis.tasks.nli import NliTask

_WIDTH = 110
_NO_BREAK = "\xa0"


def describe_keys() -> str:
    """The keys as text: a paragraph for each section, then the settings of each task."""
    parts = [_section(Config, "")]
    for name in Config.model_fields:
        if (kind := inner(Config, name)) is not None:
            parts.append(_section(kind, name))
    for task in (MathTask, NliTask, GenericTask):
        lines = [f"task.settings of {task.name}", *_docstring(task)]
        for parameter in inspect.signature(task).parameters.values():
            lines.append(f"  {parameter.name}: {shown(parameter.default)}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _section(kind: type[Section], path: str) -> str:
    lines = [path or "top level", *_docstring(kind)]
    for name, field in kind.model_fields.items():
        if inner(kind, name) is not None:
            continue
        default = field.get_default(call_default_factory=True)
        allowed = f"[{wanted(kind, name)}]".replace(" ", _NO_BREAK)
        told = textwrap.wrap(
            f"{field.description} {allowed}", _WIDTH, initial_indent="  # ", subsequent_indent="  # "
        )
        lines += ["", *(line.replace(_NO_BREAK, " ") for line in told)]
        whole = f"{path}.{name}" if path else name
        lines.append(f"  {whole}: {'(needed)' if field.is_required() else shown(default)}")
    return "\n".join(lines)


def _docstring(kind: type) -> list[str]:
    return [f"  # {line}".rstrip() for line in inspect.getdoc(kind).splitlines()]
