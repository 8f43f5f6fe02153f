"""The tables of group rewards: what one adds to GRPO's step, and thousands of small groups against a loop."""

from __future__ import annotations

from collections.abc import Callable


def reward_sections(found: dict, table: Callable, machine_line: Callable[[list[dict]], str]) -> list[str]:
    """Heading, machine and both tables; nothing where they were not measured."""
    if not found:
        return []
    s = found["settings"]
    steps = [
        [name, f"{each['parameters']:,}", _percent(each["reward to the rest of the step"])]
        for name, each in found["steps"].items()
    ]
    proxy = next(iter(found["steps"].values()))
    groups = [
        [
            f"{each['groups']:,} of {each['rows']} rows",
            _microseconds(each["seconds a group"]["group_gains"]),
            _microseconds(each["seconds a group"]["definition"]),
            _ratio(each["definition to group_gains"]),
        ]
        for each in found["groups"]
    ]
    return [
        "## Group rewards",
        f"One group of {s['group']} rollouts of {s['tokens']} tokens a step of TRL's GRPOTrainer on a CPU, all of them "
        f"sketched under the package's tiny model ({proxy['proxy parameters']:,} parameters, {proxy['proxy dtype']}), "
        f"K = {s['dim']}. {machine_line([found])}",
        table(["policy", "its parameters", "time of the reward over the rest of the step"], steps),
        f"What every row adds to its group, K = {s['dim']}: `group_gains` of all groups in one call, and the "
        "definition by the eigenvalues of every leave-one-out group, one by one.",
        table(["groups", "µs a group", "µs a group by definition", "ratio"], groups),
    ]


def _percent(quantiles: dict[str, float]) -> str:
    p20, p50, p80 = (100 * quantiles[q] for q in ("p20", "p50", "p80"))
    return f"{p50:.1f} % ({p20:.1f} to {p80:.1f})"


def _microseconds(quantiles: dict[str, float]) -> str:
    return f"{1e6 * quantiles['p50']:,.0f}"


def _ratio(quantiles: dict[str, float]) -> str:
    return f"{quantiles['p50']:.0f} ({quantiles['p20']:.0f} to {quantiles['p80']:.0f})"
