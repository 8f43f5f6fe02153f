"""Help and completion as people read them: panels, no types of Python's, limits in words, values to complete."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

# Where a shell asks for completions.
ASKED = "_GVENDI_COMPLETE"
# {panel of a command's help: its parameters}; what is in none stands under Options.
PANELS = {
    "What is read": (
        *("by", "limit", "prompt_field", "completion_field", "messages_field", "text_field", "id_field"),
        *("max_row_bytes", "max_rejected", "skip_unreadable"),
    ),
    "What is computed": (
        *(
            "proxy",
            "dim",
            "sketch",
            "seed",
            "dtype",
            "max_tokens",
            "mask",
            "exclude",
            "layers",
            "sketch_groups",
            "parameters",
            "quantize",
        ),
    ),
    "How it runs: the same results up to rounding": (
        "threads",
        "batch_tokens",
        "unit_rows",
        "attention",
        "compile",
    ),
    "Which processes do it, and what becomes of those that fail": (
        *("engine", "workers", "gpus_per_worker", "cpus_per_worker", "ray_address"),
        *("max_attempts", "hang_after", "lease", "retry_failed"),
    ),
}
_PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}
# Commands with fewer options have them in one list.
_LONG = 15


class _Worded:
    """A command whose parameters are described for people."""

    def get_params(self, ctx: Any) -> list[Any]:
        found = super().get_params(ctx)  # type: ignore[misc]
        for param in found:
            _word(param)
            if len(found) > _LONG:
                param.rich_help_panel = _PANEL_OF.get(param.name, getattr(param, "rich_help_panel", None))
        # Panels come in the order in which their first option does.
        order = [None, *PANELS]
        return (
            sorted(found, key=lambda p: order.index(_PANEL_OF.get(p.name))) if len(found) > _LONG else found
        )


class Command(_Worded, TyperCommand):
    """As typer's, with help for people."""


class Group(_Worded, TyperGroup):
    """As typer's, with help for people."""


def _word(param: Any) -> None:
    """typer's own words are those of Python: <bool> for a flag, <list[str]>, [x>=1]."""
    if param.param_type_name == "argument" or getattr(param, "is_flag", False):
        param.display_type_rich = lambda ctx: None
    low, high = getattr(param, "min", None), getattr(param, "max", None)
    if low is not None or high is not None:
        least = f"at least {low:g}" if low is not None else ""
        most = f"at most {high:g}" if high is not None else ""
        param._get_number_range_help_str = lambda: " and ".join(filter(None, (least, most)))


def values(*known: str) -> Callable[[str], Sequence[str]]:
    """What completes an option that takes one of these words, beside others."""

    def complete(incomplete: str) -> Sequence[str]:
        return [one for one in known if one.startswith(incomplete)]

    return complete


def complete(app: typer.Typer) -> bool:
    """Answer a shell that asks for completions, and end; False where none does."""
    if ASKED not in os.environ:
        return False
    typer.main.get_command(app).main(prog_name="gvendi")
    return True
