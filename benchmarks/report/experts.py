"""The table of mixtures of experts: sketching over a training step of the same batch."""

from __future__ import annotations

from collections.abc import Callable

FORMATS = ("fp32", "bf16")


def expert_sections(
    found: dict, ratio: Callable, table: Callable, machine_line: Callable[[list[dict]], str]
) -> list[str]:
    """Machine, model and ratios of each number format; nothing where it was not measured."""
    if not found:
        return []
    s = found["settings"]
    model = (
        f"Mixtures of experts: a Mixtral of {s['num_hidden_layers']} layers, width {s['hidden_size']}, "
        f"{s['num_local_experts']} experts of width {s['intermediate_size']} of which a token sees "
        f"{s['num_experts_per_tok']}, {s['batch']} x {s['length']} tokens."
    )
    rows = [
        [
            name,
            ratio(found[name], "ratio to training step"),
            ratio(found[name], "ratio to forward + input gradients"),
        ]
        for name in FORMATS
    ]
    head = ["weights", "sketching over a training step", "over forward + input gradients"]
    return [f"{model} {machine_line([found])}", table(head, rows)]
