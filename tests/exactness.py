"""Whether a model's sketches are those of its own gradients: alone, padded on either side, and batched.

What is wanted is the sketch, by the definition, of the gradient that autograd gives over all parameters for a sample by
itself. A parameter that the loss does not reach has a zero gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from small_models import FP32_RELATIVE, SPEC, pad, samples

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.kernels import reference
from gvendi_fast.kernels.sketch_matrix import SketchSpec
from gvendi_fast.sketching.gradients.names import named_parameters, plain_model
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher

EXACT, REFUSED, WRONG = "exact", "refused", "wrong"
CASES = ALONE, RIGHT, LEFT, BATCHED, MIXED = (
    "alone",
    "padded right",
    "padded left",
    "batched",
    "batched, padded left",
)


@dataclass
class Finding:
    """status: EXACT, REFUSED or WRONG. errors: by case, the largest of all samples. detail: why, where not exact.

    Without a case that the sketcher refuses by itself: `detail` says so.
    """

    status: str
    detail: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    share: float = 0.0


def off(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest 1 - cosine of two sketches of the same samples, both [S, K]."""
    return float((1 - torch.cosine_similarity(got.double(), wanted.double(), dim=1)).max())


def wanted_sketch(model: torch.nn.Module, sketcher: GradientSketcher, ids, labels) -> torch.Tensor:
    """By the definition, float64 [K]: the sketch of autograd's gradient of one sample by itself."""
    parameters = named_parameters(plain_model(model))
    chosen = {name: parameters[name] for name in sketcher.parameters}
    flags = {name: p.requires_grad for name, p in parameters.items()}
    for p in chosen.values():
        p.requires_grad_(True)
    try:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1].float(), labels[1:], reduction="sum")
        found = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
    finally:
        for name, p in parameters.items():
            p.requires_grad_(flags[name])
    gradients = {name: g for name, g in zip(chosen, found, strict=True) if g is not None}
    stacked = getattr(sketcher, "stacked", frozenset())
    return reference.sketch_of_gradient(gradients, sketcher.spec, sketcher.transposed, stacked)


def case_errors(
    model: torch.nn.Module, sketcher: GradientSketcher, rows=None, step: int = 2
) -> dict[str, float]:
    """The largest relative error of each case over the samples.

    Of the samples every `step`-th is padded by itself: in a batch all but the longest are padded anyway.
    """
    rows = samples() if rows is None else rows
    wanted = [wanted_sketch(model, sketcher, *row) for row in rows]
    width = max(len(ids) for ids, _ in rows) + 3
    some = rows[::step]
    got = {
        ALONE: torch.stack([sketcher(ids[None], labels[None])[0] for ids, labels in rows]),
        RIGHT: torch.stack([sketcher(*pad([row], to=width))[0] for row in some]),
        BATCHED: sketcher(*pad(rows)),
    }
    if not sketcher._reading.reads_padding:
        got[LEFT] = torch.stack([sketcher(*pad([row], side="left", to=width))[0] for row in some])
        got[MIXED] = sketcher(*pad(rows, side="left"))
    errors = {
        case: _largest_error(found, wanted[::step] if case in (RIGHT, LEFT) else wanted)
        for case, found in got.items()
    }
    # As many samples as the model has heads, layers or streams: an axis must not be taken for that of the samples.
    for count in (2, 4):
        errors[BATCHED] = max(errors[BATCHED], _largest_error(sketcher(*pad(rows[:count])), wanted[:count]))
    return errors


def reads_padding_on_the_right(model: torch.nn.Module, rows=None) -> bool:
    """Whether what the model itself says of a text changes with padding after it, as where tokens tie for a place."""
    rows = samples() if rows is None else rows
    longest = max(len(ids) for ids, _ in rows)
    with torch.no_grad():
        for ids, _ in rows:
            alone = model(input_ids=ids[None], use_cache=False).logits[0]
            for width in (longest, longest + 3):
                padded = torch.cat([ids, ids.new_zeros(width - len(ids))])
                got = model(input_ids=padded[None], use_cache=False).logits[0, : len(ids)]
                if float((got - alone).abs().max()) > 1e-3 * float(alone.abs().max()):
                    return True
    return False


def _largest_error(found: torch.Tensor, wanted: list[torch.Tensor]) -> float:
    return max(float((z.double() - w).norm() / w.norm()) for z, w in zip(found, wanted, strict=True))


def judge(
    model: torch.nn.Module, spec: SketchSpec = SPEC, most: float = FP32_RELATIVE, rows=None, **more
) -> Finding:
    """What the sketcher makes of a model; `more` goes to it."""
    try:
        sketcher = GradientSketcher(model, spec, **more)
        errors = case_errors(model, sketcher, rows, step=1)
    except GvendiError as error:
        return Finding(REFUSED, " ".join(str(error).split()))
    share = sketcher.coverage.share
    bad = [case for case, error in errors.items() if not error <= most]
    if bad and ALONE not in bad and reads_padding_on_the_right(model, rows):
        errors = {ALONE: errors[ALONE]}
        return Finding(EXACT, "alone: the model's own logits change with padding after a text", errors, share)
    if bad and max(errors.values()) <= 10 * most and next(model.parameters()).dtype == torch.float32:
        wide = judge(model.double(), spec, most, rows, **more)
        if wide.status == EXACT:
            worst = f"{max(errors.values()):.1e}"
            return Finding(
                EXACT, f"in float64; the model's own rounding makes it {worst} in float32", wide.errors, share
            )
    if not bad:
        detail = "" if LEFT in errors else "reads padding on the left as text: refused, padded right exact"
        return Finding(EXACT, detail, errors, share)
    return Finding(WRONG, ", ".join(f"{case} {errors[case]:.1e}" for case in bad), errors, share)
