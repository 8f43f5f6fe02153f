"""The table of what the sketch dimension K does to G-Vendi."""

from __future__ import annotations

from collections.abc import Callable

Table = Callable[[list[str], list[list[str]]], str]
# The results hold more K than the table.
SHOWN = (256, 1024)
# Where the plain value is off by so much, the estimate is judged.
JUDGED = (0.05, 0.40)
METHODS = {
    "plain, order 1": "at K",
    "2 G_K - G_(K/2)": "2 G_K - G_(K/2)",
    "three values of K": "from K, K/2, K/4",
    "unlimited K, order 1": "`unlimited_k`",
    "plain, order 2": "order 2, at K",
    "unlimited K, order 2": "order 2, `unlimited_k`",
}


def dimension_line(found: dict, missing: str) -> str:
    """What was measured, and how far each way is off where the plain value is off by 5 to 40 %."""
    if not found:
        return f"{missing.capitalize()}."
    judged = _judged(found)
    names = sorted({p["population"] for p in judged})
    close = [p for p in judged if abs(p["errors"]["unlimited K, order 1"]["mean"]) <= 0.02]
    worst = {
        title: max(abs(p["errors"][name]["mean"]) for p in judged)
        for name, title in METHODS.items()
        if not name.endswith("2")
    }
    cover = {
        q: tuple(sum(p["covered"][q][i] for p in found["populations"]) for i in (0, 1))
        for q in ("order 1", "order 2")
    }
    return (
        "Errors against exact gradients, in the mean over sketch matrices, with their standard deviation from one to "
        f"the next. Of {len(found['populations'])} pairs of population and K, {len(judged)} (of {len(names)} "
        f"populations) have a plain value that is 5 to 40 % too low; there `unlimited_k` is off by at most 2 % in "
        f"{len(close)} of them. The largest mean error there: "
        + ", ".join(f"{title} {100 * value:.1f} %" for title, value in worst.items())
        + ". Over all pairs and matrices its 95 % interval covers the truth in "
        + " and ".join(f"{a} of {b} cases ({100 * a / b:.1f} %) at {q}" for q, (a, b) in cover.items())
        + "."
    )


def dimension_row(found: dict, missing: str) -> list[str]:
    """How far the score at K and the value for unlimited K are off exact gradients, for the README."""
    what = (
        "G-Vendi of exact gradients, where K takes 5 to 40 % off: largest mean error of `unlimited_k`; at K"
    )
    if not found:
        return [what, missing]
    worst, plain = (
        max(abs(p["errors"][name]["mean"]) for p in _judged(found))
        for name in ("unlimited K, order 1", "plain, order 1")
    )
    return [what, f"{100 * worst:.1f} %; {100 * plain:.1f} %"]


def _judged(found: dict) -> list[dict]:
    """Pairs of population and K whose plain value is so much too low that the estimate is judged."""
    return [
        p for p in found["populations"] if JUDGED[0] <= -p["errors"]["plain, order 1"]["mean"] <= JUDGED[1]
    ]


def dimension_table(found: dict, table: Table) -> str:
    """A row for each population and shown K."""
    rows = []
    for p in found.get("populations", []):
        if p["dim"] not in SHOWN:
            continue
        errors = [_error(p["errors"][name]) for name in METHODS]
        covered, of = p["covered"]["order 1"]
        rows.append(
            [
                p["population"],
                f"{p['n']}",
                f"{p['dim']}",
                f"{p['gvendi']['1']:.1f}",
                *errors,
                f"{covered} of {of}",
                f"{100 * p['not seen']:.1f} %",
            ]
        )
    head = [
        "population",
        "n",
        "K",
        "exact",
        *METHODS.values(),
        "interval covers",
        "width of what K does not show",
    ]
    return table(head, rows)


def _error(error: dict[str, float]) -> str:
    return f"{100 * error['mean']:+.1f} % ± {100 * error['sd']:.1f}"
