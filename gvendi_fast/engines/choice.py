"""The engine of a name, or the one that a command was started for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from gvendi_fast.base.engine import Engine, LocalEngine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.engines.rank_numbers import numbers
from gvendi_fast.engines.ranks import RanksEngine

NAMES = ("auto", "local", "ranks", "ray")


def engine_of(
    name: str = "auto",
    environment: Mapping[str, str] | None = None,
    with_arrays: bool = True,
    **of_ray: Any,
) -> Engine:
    """The engine called `name`; "auto": "ranks" where a launcher has started several, else "local".

    with_arrays: whether an array of Slurm, whose jobs may each have something else to do, is several for "auto".
    of_ray: arguments of `RayEngine`; None for its own. Raises GvendiError for another name, for one of these with
    another engine, and as the engines do.
    """
    environment = os.environ if environment is None else environment
    given = {key: value for key, value in of_ray.items() if value is not None}
    if name not in NAMES:
        raise GvendiError(f"engine is {name!r}; wanted one of {', '.join(NAMES)}")
    if name == "ray":
        from gvendi_fast.engines.ray import RayEngine

        return RayEngine(**given)
    if given:
        first = next(iter(given))
        raise GvendiError(
            f"{first} goes with the engine 'ray', not with {name!r}; leave it out, or name that engine"
        )
    if name == "auto":
        found = numbers(environment)
        is_several = found is not None and found.world > 1 and (with_arrays or not found.is_array)
        name = "ranks" if is_several else "local"
    return RanksEngine(environment=environment) if name == "ranks" else LocalEngine()


def parse_workers(text: str | None) -> int | tuple[int, int] | None:
    """ "4" -> 4, "1:64" -> (1, 64): the most workers, or the fewest and the most."""
    if text is None:
        return None
    low, colon, high = text.partition(":")
    parts = [low, high] if colon else [low, low]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise GvendiError(
            f"--workers is {text[:40]!r}; wanted a number such as 4, or fewest and most, as 1:64"
        )
    least, most = map(int, parts)
    if not 1 <= least <= most:
        raise GvendiError(f"--workers is {text!r}; wanted at least 1 worker, and the larger number last")
    return (least, most) if colon else most
