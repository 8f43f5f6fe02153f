"""The tables of the study of proxies: whether they rank data alike, and what makes them agree."""

from __future__ import annotations

from collections.abc import Callable

MISSING = "not measured"
# In proxies.json `tiny` is the former one, in tiny.json the one of the package.
FORMER = "the former `tiny`"
NAMES = {
    "smollm2": "SmolLM2-135M",
    "gemma3": "Gemma-3-270M",
    "stories260K": "stories260K",
    "tiny": FORMER,
}
# The pair of real models comes first.
PAIRS = ("smollm2 / gemma3", "smollm2 / tiny", "smollm2 / stories260K", "stories260K / tiny")
OF_TINY = {**NAMES, "tiny": "`tiny`", "former": FORMER}
PAIRS_OF_TINY = ("smollm2 / gemma3", "smollm2 / tiny", "gemma3 / tiny", "smollm2 / former", "gemma3 / former")
REAL = ("smollm2", "gemma3")
Table = Callable[[list[str], list[list[str]]], str]


def proxy_entries(study: dict) -> list[dict]:
    """The result, if there is one."""
    return [study] if study else []


def proxy_line(study: dict) -> str:
    """What was compared."""
    if not study:
        return f"{MISSING.capitalize()}."
    pool, mixtures, dims = study["pool"], study["mixtures"], study["dims"]
    return (
        f"Spearman correlation of G-Vendi between proxies over {mixtures['count']} mixtures of "
        f"{mixtures['rows']} rows, drawn from {pool['rows']} rows of {', '.join(pool['sources'])} in equal parts "
        f"(at most {pool['most characters']} characters), K = {dims[-1]}. In brackets 95 % over mixtures, and after "
        "the semicolon 95 % over rows (jackknife over twelve groups of them). *Centred*: the mean of the pool's rows "
        "taken out and rows normalised again."
    )


def agreement_table(study: dict, table: Table) -> str:
    """A line for each variant, a column for each pair."""
    if not study:
        return ""
    key = f"K = {study['dims'][-1]}"
    rows = []
    for entry in study["variants"]:
        cells = []
        for pair in PAIRS:
            found = _pair(entry[key], pair)
            shown = f"{found['spearman']:.3f} ({found['low']:.3f} to {found['high']:.3f}; "
            cells.append(f"{shown}{found['low over rows']:.2f} to {found['high over rows']:.2f})")
        rows.append([entry["variant"], *cells])
    head = ["sketched", *(" and ".join(NAMES[name] for name in pair.split(" / ")) for pair in PAIRS)]
    return table(head, rows)


def dim_table(study: dict, table: Table) -> str:
    """What a smaller K does to a variant, and the size of its scores."""
    if not study:
        return ""
    small, large = study["dims"]
    rows = []
    for entry in study["variants"]:
        real, over = _pair(entry[f"K = {small}"], PAIRS[0]), _pair(entry["over plain"], PAIRS[0])
        rows.append(
            [
                entry["variant"],
                f"{over['difference']:+.3f} ({over['low']:+.3f} to {over['high']:+.3f})",
                f"{real['spearman']:.3f} ({real['low']:.3f} to {real['high']:.3f})",
                *(_range(entry["with its own at disjoint coordinates"][name]) for name in REAL),
                *(_range(entry["with plain at the largest K"][name]) for name in REAL),
                *(f"{entry['median G-Vendi'][name]:.1f}" for name in NAMES),
            ]
        )
    head = [
        "sketched",
        f"both real models, K = {large}: difference from plain",
        f"both real models, K = {small}",
        *(f"{NAMES[name]}: K = {small} and {large - small}, other coordinates" for name in REAL),
        *(f"{NAMES[name]}: K = {small} and plain at {large}" for name in REAL),
        *(f"median G-Vendi, {name}" for name in NAMES.values()),
    ]
    return table(head, rows)


def share_table(study: dict, table: Table) -> str:
    """Shares of the squared gradient norm by kind of layer."""
    if not study:
        return ""
    proxies = study["proxies"]
    kinds = list(dict.fromkeys(kind for name in NAMES for kind in proxies[name]["norm shares"]))
    rows = [
        [NAMES[name], *(f"{100 * proxies[name]['norm shares'].get(kind, 0):.1f} %" for kind in kinds)]
        for name in NAMES
    ]
    return table(["share of the squared gradient norm, mean over rows", *kinds], rows)


def tiny_table(study: dict, choice: dict, table: Table) -> str:
    """How `tiny` and the former one agree with real models on the study's corpora, and on those it was chosen by."""
    if not study or not choice:
        return ""
    key, rows = f"K = {study['dims'][-1]}", []
    for pair in PAIRS_OF_TINY:
        cells = []
        for entry in study["variants"]:
            found = _pair(entry[key], pair)
            shown = f"{found['spearman']:.3f} ({found['low']:.3f} to {found['high']:.3f}; "
            cells.append(f"{shown}{found['low over rows']:.2f} to {found['high over rows']:.2f})")
        real, name = pair.split(" / ")
        # The former one stands among the candidates by its own name, the one of the package as the one chosen.
        chosen = choice["chosen"] if name == "tiny" else name
        against = choice["candidates"].get(chosen, {}).get("against", {})
        for word in ("plain", "centred"):
            found = against.get(f"{word}, {real}")
            shown = f"{found['spearman']:.3f} ({found['low']:.3f} to {found['high']:.3f})" if found else "-"
            cells.append(shown)
        rows.append([" and ".join(OF_TINY[x] for x in (real, name)), *cells])
    names = [entry["variant"] for entry in study["variants"]]
    head = ["proxies", *names, *(f"{word}, rows of the choice" for word in ("plain", "centred"))]
    return table(head, rows)


def choice_line(study: dict, choice: dict) -> str:
    """What the choice among candidates was made by."""
    if not study or not choice:
        return ""
    pool = choice["pool"]
    means = ", ".join(f"{name} {found['mean']:.3f}" for name, found in choice["candidates"].items())
    return (
        "`tiny` now and before, over the same mixtures as above. It was chosen among candidates by the mean Spearman "
        f"correlation with both real models, plain and centred, over {choice['mixtures']['count']} mixtures of "
        f"{choice['mixtures']['rows']} rows of other corpora ({', '.join(pool['sources'])}; {pool['rows of each']} "
        f"rows of each): {means}. `python -m benchmarks.studies.choose_tiny`, `python -m benchmarks.studies.proxies`."
    )


def set_line(study: dict) -> str:
    """What the table of sets says."""
    if not study:
        return ""
    return (
        "What real models say of each corpus: G-Vendi plain, centred (by the mean of all rows of the pool) and for "
        f"unlimited K, K = {study['dims'][-1]}, of the pool's rows; of BBH also by task, where the pool has 6 rows or "
        "more."
    )


def set_table(study: dict, table: Table) -> str:
    """What each proxy says of every source and of the tasks of BBH."""
    if not study:
        return ""
    shown = ("smollm2", "gemma3", "tiny")
    rows = []
    for what, first in study["sets"][shown[0]].items():
        cells = []
        for name in shown:
            found = study["sets"][name][what]
            cells.append(f"{found['plain']:.1f}, {found['centred']:.1f}, {found['unlimited_k']:.1f}")
        rows.append([what, str(first["n"]), *cells])
    head = ["rows of", "n", *(f"{OF_TINY[name]}: plain, centred, unlimited K" for name in shown)]
    return table(head, rows)


def readme_row(study: dict) -> list[str]:
    """Whether real proxies agree, and `tiny` with one of them. study: tiny.json."""
    what = "Spearman of G-Vendi between proxies: SmolLM2-135M with Gemma-3-270M; with `tiny`"
    if not study:
        return [what, MISSING]
    plain = next(entry for entry in study["variants"] if entry["variant"] == "plain")
    found = [_pair(plain[f"K = {study['dims'][-1]}"], pair) for pair in PAIRS_OF_TINY[:2]]
    return [what, "; ".join(f"{x['spearman']:.2f} ({x['low']:.2f} to {x['high']:.2f})" for x in found)]


def _pair(figures: dict, pair: str) -> dict:
    """Of two proxies in either order."""
    turned = " / ".join(reversed(pair.split(" / ")))
    return figures[pair] if pair in figures else figures[turned]


def _range(found: dict) -> str:
    return f"{found['spearman']:.3f}"
