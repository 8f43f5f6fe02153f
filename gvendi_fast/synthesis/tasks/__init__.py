"""The tasks of the synthesis loop: what is asked for, how answers are read, what becomes a row; one by its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.tasks.generic import GenericTask
from gvendi_fast.synthesis.tasks.math import MathTask
from gvendi_fast.synthesis.tasks.nli import NliTask
from gvendi_fast.synthesis.tasks.task import Task

__all__ = ["make_task"]


def make_task(name: str, **settings: Any) -> Task:
    """The task "math", "nli" or "generic" with its settings; GvendiError for another name or setting."""
    kinds: dict[str, Callable[..., Task]] = {"math": MathTask, "nli": NliTask, "generic": GenericTask}
    if name not in kinds:
        raise GvendiError(f"task is '{name}'; wanted one of {', '.join(kinds)}")
    known = inspect.signature(kinds[name]).parameters
    for setting in settings:
        if setting not in known:
            raise GvendiError(f"task '{name}' has no setting '{setting}'; it has {', '.join(known)}")
    return kinds[name](**settings)
