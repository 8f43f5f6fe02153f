"""Every key of a configuration with its default and what it means, from the classes that hold them."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

import gvendi_fast.synthesis.config.schema as schema
from gvendi_fast.synthesis.config.config import Config, GeneratorConfig
from gvendi_fast.synthesis.generators.openai import OpenAIGenerator, Pace
from gvendi_fast.synthesis.tasks.generic import GenericTask
from gvendi_fast.synthesis.tasks.math import MathTask
from gvendi_fast.synthesis.tasks.nli import NliTask


def describe_keys() -> str:
    """The keys as text: a paragraph for each section, then the settings of each task."""
    parts = [_section(Config, "")]
    for name, kind in get_type_hints(Config).items():
        if is_dataclass(kind):
            parts.append(_section(kind, name))
    for task in (MathTask, NliTask, GenericTask):
        lines = [f"task.settings of {task.name}", *_told(task)]
        for parameter in list(inspect.signature(task).parameters.values()):
            lines.append(f"  {parameter.name}: {schema.shown(parameter.default)}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _section(kind: type, path: str) -> str:
    lines = [path or "top level", *_told(kind)]
    for f in fields(kind):
        default: Any = f.default_factory() if f.default_factory is not MISSING else f.default
        if is_dataclass(default) or is_dataclass(get_type_hints(kind)[f.name]):
            continue
        name = f"{path}.{f.name}" if path else f.name
        lines.append(f"  {name}: {'(needed)' if default is MISSING else schema.shown(default)}")
    return "\n".join(lines)


def _told(kind: type) -> list[str]:
    """The documentation of a class, and of those that its keys are handed to."""
    handed = {GeneratorConfig: (OpenAIGenerator, Pace)}.get(kind, ())
    return [
        f"  # {line}".rstrip()
        for part in (kind, *handed)
        for line in (*inspect.getdoc(part).splitlines(), "")
    ][:-1]
