"""YAML of a configuration, read with bounds: on its size, its depth and what its aliases repeat; one value a key."""

from __future__ import annotations

import os
from typing import Any

from gvendi_fast.base import files
from gvendi_fast.base.errors import GvendiError

# A configuration has a hundred lines; these are far above one.
LONGEST = 1 << 17
MOST_VALUES, DEEPEST, MOST_BITS = 20_000, 32, 1024


def read_text(path: str | os.PathLike) -> str:
    """The text of a configuration's file, of which no more is read than a configuration has.

    Raises OSError, with the path, where the system does not let it be read.
    """
    return files.read_text(path, LONGEST, "the configuration", "a page of settings")


def parse(text: str, where: str) -> Any:
    """The value of a YAML text. where: what an error calls it.

    Raises GvendiError for text that is not YAML, a key that is there twice, tags of other programs, values within
    values of more than 32 levels, and more than 20,000 values, as often as aliases repeat them.
    """
    yaml = _yaml()

    class Loader(yaml.SafeLoader):
        """Refuses what is too much before it is built."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            seen = set()
            for key_node, _ in getattr(node, "value", ()):
                # "<<" takes over the keys of other sections, which its own may replace.
                if key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str | int | float | bool | None):
                    raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: a key is no text")
                if key in seen:
                    raise yaml.YAMLError(
                        f"line {key_node.start_mark.line + 1}: the key {key!r} is there twice"
                    )
                seen.add(key)
            return super().construct_mapping(node, deep)

        def construct_yaml_int(self, node: Any) -> int:
            value = super().construct_yaml_int(node)
            # Hexadecimal ones have no limit of Python's, and no message could show them.
            if value.bit_length() > MOST_BITS:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: an integer has too many digits")
            return value

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    Loader.add_constructor(
        "tag:yaml.org,2002:map", lambda loader, node: loader.construct_mapping(node, deep=True)
    )
    loader = None
    try:
        loader = Loader(text)
        node = loader.get_single_node() if _is_shallow(yaml, text, where) else None
        if node is None:
            return None
        _count(node, where)
        return loader.construct_document(node)
    except GvendiError:
        raise
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        RecursionError,
        OverflowError,
        TypeError,
        AttributeError,
    ) as error:
        # Dates that no calendar has, "!!bool maybe" and numbers of too many digits are errors of Python's.
        raise GvendiError(
            f"{where} is not YAML: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    finally:
        if loader is not None:
            loader.dispose()


def dumped(values: dict[str, Any]) -> str:
    """Values as text that `parse` reads."""
    return _yaml().safe_dump(values, sort_keys=False, allow_unicode=True)


def _is_shallow(yaml: Any, text: str, where: str) -> bool:
    """True; GvendiError for values that lie too deep, found before anything calls itself for each level."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise GvendiError(f"{where} nests its values more than {DEEPEST} deep; settings lie three deep")
    return True


def _count(root: Any, where: str) -> None:
    """GvendiError for too many values, each counted as often as aliases and "<<" repeat it, and for one in itself."""
    sizes: dict[int, int] = {}

    def size(node: Any, above: frozenset[int]) -> int:
        if id(node) in above:
            raise GvendiError(f"{where} has a value that holds itself (line {node.start_mark.line + 1})")
        if id(node) not in sizes:
            inner = node.value if isinstance(node.value, list) else []
            above |= {id(node)}
            parts = [part for pair in inner for part in (pair if isinstance(pair, tuple) else (pair,))]
            sizes[id(node)] = 1 + sum(size(part, above) for part in parts)
        if sizes[id(node)] > MOST_VALUES:
            raise GvendiError(
                f"{where} has more than {MOST_VALUES:,} values, with those that aliases repeat; wanted settings alone"
            )
        return sizes[id(node)]

    size(root, frozenset())


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise GvendiError(
            f"A configuration needs PyYAML ({error}); install it with `pip install gvendi-fast[synthesis]`"
        ) from error
    return yaml
