"""What a section of a configuration is, and its errors: the key's path, what it was, what is allowed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, get_origin

from gvendi_fast.base.errors import GvendiError

try:
    from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
except ImportError as error:
    raise GvendiError(
        f"A configuration needs pydantic 2 ({error}); install it with `pip install gvendi-fast[synthesis]`"
    ) from error

__all__ = ["Field", "Section", "Texts", "inner", "model_validator", "shown", "validated", "wanted"]

# pydantic's names for a key that no field has; the second is one that is not even text.
_UNKNOWN = ("extra_forbidden", "invalid_key")
_NAMES = {
    "string": "text",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}


class Section(BaseModel):
    """Keys of exactly these types: neither "5" nor true is a number. What stands below a field describes it.

    No text is empty: a path that is would be the working directory.
    """

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        str_min_length=1,
        use_attribute_docstrings=True,
    )


_Section = TypeVar("_Section", bound=Section)
# One text stands for a list of it.
Texts = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


def validated(kind: type[_Section], values: Any) -> _Section:
    """The section of these nested dicts. Raises GvendiError with a line for each unknown, missing or wrong key."""
    values = dict(values) if isinstance(values, Mapping) else values
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise GvendiError("\n".join(dict.fromkeys(_messages(kind, values, error)))) from None


def inner(kind: type[Section], key: Any) -> type[Section] | None:
    """The section that a key of this one holds; None for a value and for a key that is not known."""
    field = kind.model_fields.get(key)
    held = field.annotation if field is not None else None
    # Python 3.10 takes list[str] for a class.
    is_class = isinstance(held, type) and get_origin(held) is None
    return held if is_class and issubclass(held, Section) else None


def wanted(kind: type[Section], key: str) -> str:
    """What a key may hold, in words, from the JSON schema of its section."""
    schema = kind.model_json_schema()["properties"][key]
    return " or ".join(map(_words, schema.get("anyOf", [schema])))


def shown(value: Any) -> str:
    """A value as an error shows it: JSON, cut at 80 characters."""
    return json.dumps(value, ensure_ascii=False, default=str)[:80]


def _words(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if schema.get("type") == "array":
        return f"a list of {'texts' if schema['items']['type'] == 'string' else 'numbers'}"
    said = _NAMES.get(schema.get("type"), "a section with keys")
    said += f" of at least {schema['minimum']:g}" if "minimum" in schema else ""
    return said + (f" and at most {schema['maximum']:g}" if "maximum" in schema else "")


def _messages(kind: type[Section], values: Any, error: ValidationError) -> Iterator[str]:
    found = error.errors(include_url=False)
    misspelt = {one["loc"][:-1] for one in found if one["type"] in _UNKNOWN}
    for one in found:
        place, section, value = one["loc"], kind, values
        # An error inside a list or a free dict is one of the key that holds it.
        for depth, key in enumerate(place):
            where, holder = ".".join(map(str, place[: depth + 1])), section
            value = value.get(key) if isinstance(value, Mapping) else value
            section = inner(holder, key)
            if section is None:
                break
        if not place:
            yield f"the configuration is {shown(values)}; wanted a section with keys"
        elif one["type"] == "value_error":
            yield f"{where}.{one['ctx']['error']}"
        elif one["type"] in _UNKNOWN:
            near = difflib.get_close_matches(str(key), holder.model_fields, 1, 0.5)
            hint = f"did you mean '{near[0]}'? " if near else ""
            yield f"{where} is not known; {hint}Known here: {', '.join(holder.model_fields)}"
        elif one["type"] == "string_too_short":
            yield f"{where} is empty; wanted {wanted(holder, key)}"
        elif one["type"] != "missing":
            yield f"{where} is {shown(value)}; wanted {wanted(holder, key)}"
        # Beside an unknown key the missing one is, as a rule, the same, misspelt.
        elif place[:-1] not in misspelt:
            yield f"{where} is missing; wanted {wanted(holder, key)}"
