"""Nested dicts checked against dataclasses: an error names the key's path, what it was and what is allowed."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gvendi_fast.base.errors import GvendiError


def number(default: Any = MISSING, least: float | None = None, most: float | None = None) -> Any:
    """A field with a range; both ends belong to it."""
    return field(default=default, metadata={"least": least, "most": most})


def section(kind: type, values: Any, path: str = "") -> Any:
    """The dataclass `kind` of these values; its fields are sections, texts, numbers, choices, lists or free dicts.

    path: of the section, for errors. Raises GvendiError for an unknown, missing or wrong key.
    """
    if not isinstance(values, Mapping):
        raise GvendiError(f"{path or 'the configuration'} is {shown(values)}; wanted a section with keys")
    known = {f.name: f for f in fields(kind)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean '{near[0]}'? " if near else ""
            where = f"{path}.{key}" if path else str(key)
            raise GvendiError(f"{where} is not known; {hint}Known here: {', '.join(known)}")
    hints, taken = get_type_hints(kind), {}
    for name, f in known.items():
        where = f"{path}.{name}" if path else name
        if name in values:
            taken[name] = _value(hints[name], values[name], where, f.metadata)
        elif f.default is MISSING and f.default_factory is MISSING:
            raise GvendiError(f"{where} is missing; wanted {_wanted(hints[name], f.metadata)}")
    return kind(**taken)


def _value(hint: Any, value: Any, path: str, limits: Mapping[str, Any]) -> Any:
    if is_dataclass(hint):
        return section(hint, value, path)
    kinds = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    if value is None and type(None) in kinds:
        return None
    (kind,) = (k for k in kinds if k is not type(None))
    origin, given = get_origin(kind), value
    if origin is Literal:
        good = isinstance(value, str) and value in get_args(kind)
    elif origin is list:
        item = get_args(kind)[0]
        value = [value] if isinstance(value, str) and item is str else value
        good = isinstance(value, list) and all(_is(item, v) for v in value)
        value = list(map(item, value)) if good else value
    elif origin is dict:
        good = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    else:
        good = _is(kind, value)
        value = kind(value) if good else value
        if good and not isinstance(value, str):
            least, most = limits.get("least"), limits.get("most")
            good = (least is None or value >= least) and (most is None or value <= most)
    if not good:
        raise GvendiError(f"{path} is {shown(given)}; wanted {_wanted(hint, limits)}")
    return value


def _is(kind: type, value: Any) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and abs(value) < float("inf")
    return isinstance(value, kind)


def _wanted(hint: Any, limits: Mapping[str, Any]) -> str:
    kinds = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    names = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
    said = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            said.append("one of " + ", ".join(get_args(kind)))
        elif get_origin(kind) is list:
            said.append(f"a list of {'texts' if get_args(kind)[0] is str else 'numbers'}")
        elif is_dataclass(kind) or get_origin(kind) is dict:
            said.append("a section with keys")
        else:
            said.append(names[kind])
    least, most = limits.get("least"), limits.get("most")
    said[0] += "" if least is None else f" of at least {least:g}"
    said[0] += "" if most is None else f" and at most {most:g}"
    return " or ".join(said)


def shown(value: Any) -> str:
    """A value as an error shows it: JSON, cut at 80 characters."""
    return json.dumps(value, ensure_ascii=False, default=str)[:80]
