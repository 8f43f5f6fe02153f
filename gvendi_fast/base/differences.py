"""What differs between two settings, such as the spec of a run directory and that of the present command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What a spec says of the sketched parameters: a digest, which those of earlier versions do not have.
PARAMETERS = "parameters_digest"


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], absent: Any = None
) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of each key whose values differ: keys of `old` first, then those that only `new` has.

    A key that one side lacks has the value `absent` there.
    """
    pairs = ((key, old.get(key, absent), new.get(key, absent)) for key in {**old, **new})
    return [(key, was, now) for key, was, now in pairs if was != now]


def comparable(
    one: Mapping[str, Any] | None, other: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]:
    """Two specs of sketches, both without the digest of parameters where one of them says nothing of it.

    Where neither lacks it, it counts: a renamed parameter is another sketch matrix.
    """
    if one is None or other is None or (PARAMETERS in one) == (PARAMETERS in other):
        return one, other
    first, second = ({key: spec[key] for key in spec if key != PARAMETERS} for spec in (one, other))
    return first, second


def same_spec(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two specs are of sketches that can be mixed."""
    first, second = comparable(one, other)
    return first == second


def flat(content: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted paths for keys: {"a": {"b": 1}} -> {"a.b": 1}. An empty dict is a value."""
    if not isinstance(content, dict) or not content:
        return {path: content}
    flattened: dict[str, Any] = {}
    for key, value in content.items():
        flattened |= flat(value, f"{path}.{key}" if path else str(key))
    return flattened
