"""What `gvendi inspect --model` prints: the checks of a proxy with their verdicts, what it covers and what it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gvendi_fast.base.printable import printable
from gvendi_fast.base.printing import put

if TYPE_CHECKING:
    from rich.console import Console

    from gvendi_fast.sketching.gradients.sketcher import Coverage
    from gvendi_fast.sketching.self_check import Check, SelfCheck

# Parts of the blocks that are listed.
SLOWEST = 5
VERDICTS = {True: "passed", False: "FAILED", None: "told"}


def print_self_check(out: Console, found: SelfCheck) -> None:
    """Print all of it: a verdict with what was measured for each check, and then what the model covers and costs."""
    from gvendi_fast.cli.tables import headline, print_table, say

    failed = [check for check in found.checks if check.passed is False]
    verdict = "fit to be a proxy" if not failed else f"{len(failed)} check{'s' * (len(failed) != 1)} failed"
    headline(out, f"{verdict}  {printable(found.proxy)} in {found.dtype} on {found.device}")
    for name, value in _lines(found).items():
        say(out, f"  {name:<15}{value}", 17)
    put("", out.file)
    for check in found.checks:
        say(out, f"{VERDICTS[check.passed]:<8}{check.name:<15}{_measured(check)}", 23)
        if check.passed is False and check.remedy:
            say(out, f"{'':<23}{check.remedy}", 23)
    if found.kinds:
        put("", out.file)
        whole = sum(kind.parameters for kind in found.kinds)
        rows = [
            (kind.name, f"{kind.parameters:,}", _percent(kind.parameters / whole), _percent(kind.norm_share))
            for kind in found.kinds
        ]
        print_table(out, ("kind of layer", "parameters", "share", "squared gradient norm"), rows)
    if found.layers:
        put("", out.file)
        whole_model, *parts = found.layers
        rows = [
            (
                layer.path or "the whole model",
                *(f"{1e3 * s:,.1f}" for s in (layer.forward, layer.backward, layer.sketch)),
            )
            for layer in (*parts[:SLOWEST], whole_model)
        ]
        print_table(out, ("slowest layers, ms", "forward", "backward", "sketch"), rows, apart=1)


def coverage_sentence(share: float, left_out: dict[str, int]) -> str:
    """What a sketch covers, and the parts of the model that no text reaches: {part: parameters}."""
    said = f"{100 * share:.1f} % of the proxy's parameters"
    if not left_out:
        return said
    # A file of settings has them by name.
    largest = sorted(left_out.items(), key=lambda item: -item[1])[:SLOWEST]
    parts = ", ".join(f"{printable(part)} ({count:,})" for part, count in largest)
    more = f" and {len(left_out) - SLOWEST:,} more" if len(left_out) > SLOWEST else ""
    return f"{said} that a text reaches; out of its reach: {parts}{more}"


def _lines(found: SelfCheck) -> dict[str, str]:
    compiled = ", compiled" if found.compiled else ""
    lines = {
        "model": f"{found.parameters:,} parameters, {found.revision}, attention {found.attention}{compiled}",
        "measured with": f"{found.rows} rows of {found.row_tokens:,} tokens in all",
    }
    if found.coverage is not None:
        lines["covered"] = coverage_sentence(found.coverage.share, _left_out(found.coverage))
    if found.tokens_per_second is not None:
        lines["speed"] = f"{found.tokens_per_second:,.0f} tokens/s, in a batch of {found.trial_tokens:,}"
    if found.peak_bytes is not None:
        of = "of the GPU beside the model" if found.device.startswith("cuda") else "of this process so far"
        lines["memory"] = (
            f"{found.peak_bytes / 2**20:,.0f} MiB {of}; a run takes batches of {found.batch_tokens:,} tokens"
        )
    return lines


def _left_out(coverage: Coverage) -> dict[str, int]:
    return {part.part: part.parameters for part in coverage.left_out}


def _measured(check: Check) -> str:
    if check.value is None:
        return check.said
    least = "" if check.least is None else f" (at least {_cosine(check.least)})"
    return f"cosine {_cosine(check.value)}{least}: {check.said}"


def _cosine(value: float) -> str:
    return f"{value:.7f}" if value > 0.9999 else f"{value:.4f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
