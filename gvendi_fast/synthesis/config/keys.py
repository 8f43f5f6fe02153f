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
    parts += [_task(task) for task in (MathTask, NliTask, GenericTask)]
    return "\n\n".join(parts)


def _task(task: type) -> str:
    """The settings of a task, as those of a section, by the words of its docstring."""
    about, told = task_words(task)
    lines = [f"task.settings of {task.name}", f"  # {about}"]
    for parameter in inspect.signature(task).parameters.values():
        words = textwrap.wrap(
            _sentence(told[parameter.name]), _WIDTH, initial_indent="  # ", subsequent_indent="  # "
        )
        lines += ["", *words, f"  task.settings.{parameter.name}: {shown(parameter.default)}"]
    return "\n".join(lines)


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:]


def task_words(task: type) -> tuple[str, dict[str, str]]:
    """The first line of a task's docstring, and {setting: what it says of it}, from lines as "shots: rows of ..."."""
    about, _, rest = inspect.getdoc(task).partition("\n\n")
    told: dict[str, str] = {}
    for line in rest.splitlines():
        name, _, words = line.partition(": ")
        if line.startswith(" "):
            # The last setting goes on.
            told[next(reversed(told))] += f" {line.strip()}"
        else:
            told[name] = words
    return about, told


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
