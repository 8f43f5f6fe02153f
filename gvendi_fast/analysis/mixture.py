"""How much of each source makes the most diverse mixture.

    maximise H_1(sum_k w_k Sigma_k) over w_k >= 0, sum w = 1, floor <= w_k <= cap
Sigma_k is the covariance (trace 1) of source k. The entropy is concave in w, so its largest value is unique; the
gradient is c_k = -tr(Sigma_k ln Sigma_w) and gap = max over feasible v of <c, v - w> bounds the distance to it; so
does the trivial limit, H <= ln min(K, sum_k exp H_k), since H of a mixture is at most sum_k w_k (H_k - ln w_k).
Exponentiated gradient, w_k ~ w_k exp(eta c_k), with the step rule of `relaxed`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from gvendi_fast.base.differences import same_spec
from gvendi_fast.base.engine import Engine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.one_thread import reading
from gvendi_fast.data.parts import Part
from gvendi_fast.data.passes import over_run
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.kernels.spectrum import entropy_and_surprise
from gvendi_fast.vendi.state import VendiState

_EMPTY = 1e-12
# Each source needs K x K numbers in memory.
MOST_SOURCES = 256
# Tasks of a pass whose results are K x K numbers a source.
MOST_TASKS = 16


@dataclass(frozen=True)
class Mixture:
    """The weights of `mixture_weights`.

    weights: by source, sum 1.
    entropy: H_1 of the mixture, in nats.
    gap: how far, at most, the entropy is below the best one, in nats.
    steps: gradient steps taken.
    """

    weights: dict[str, float]
    entropy: float
    gap: float
    steps: int


def source_states(run: RunDirectory, engine: Engine | None = None) -> dict[str, VendiState]:
    """The state of each source of a run directory, by the groups of its rows, sorted by name.

    engine: which processes read it; None is this one. Raises GvendiError for more than MOST_SOURCES sources, and where
    there is no row.
    """
    states: dict[str, VendiState] = {}
    for found in over_run(engine, run, ["group", "sketch"], partial(_states_of, run.sketch_spec), MOST_TASKS):
        for name, state in found.items():
            if name in states:
                states[name].merge(state)
            else:
                states[name] = state
        _check_few(states)
    if not states:
        raise GvendiError(f"'{run.path}' holds no sketches; run 'gvendi sketch' to the end first")
    return {name: states[name] for name in sorted(states)}


def _states_of(spec: dict, parts: Iterator[Part]) -> dict[str, VendiState]:
    states: dict[str, VendiState] = {}
    for part in parts:
        for name in sorted(set(part.groups)):
            if name not in states:
                states[name] = VendiState(part.sketches.shape[1], spec=spec)
                _check_few(states)
            # Not by NumPy, for whom a text ends before its last null characters.
            states[name].update(part.sketches[[group == name for group in part.groups]])
    return states


def _check_few(states: Mapping[str, VendiState]) -> None:
    if len(states) > MOST_SOURCES:
        raise GvendiError(
            f"--by has more than {MOST_SOURCES} different values; choose a field with fewer, such as a source"
        )


def mixture_weights(
    states: Mapping[str, VendiState],
    *,
    floor: float = 0.0,
    cap: float = 1.0,
    tolerance: float = 1e-4,
    max_steps: int = 500,
) -> Mixture:
    """The weights of sources whose mixture has the largest entropy, to `tolerance` nats or `max_steps` steps.

    states: by source, of one dim and spec, none empty.
    floor, cap: least and most weight of any source.
    tolerance: stop when the gap is at most this, in nats.
    max_steps: stop after this many steps.
    The gap returned holds whether the tolerance was reached or not. Raises GvendiError for arguments that cannot be
    used.
    """
    with reading(*states.values(), doing="mixture_weights"):
        names = _check(states, floor, cap, tolerance)
        sigmas = torch.stack(
            [states[name].matrix.cpu() / states[name].matrix.trace().cpu() for name in names]
        )
    log_w = np.log(np.full(len(names), 1 / len(names)))
    value, scores = _entropy_and_scores(sigmas, np.exp(log_w))
    eta, steps = 1.0, 0
    while True:
        weights = np.exp(log_w)
        gap = float(scores @ (_best_vertex(scores, floor, cap) - weights))
        if gap <= tolerance or steps == max_steps:
            break
        steps += 1
        while True:
            moved = np.log(_project(log_w + eta * scores, floor, cap))
            ahead = np.exp(moved)
            risen, after = _entropy_and_scores(sigmas, ahead)
            promised = float(scores @ (ahead - weights)) - float(ahead @ (moved - log_w)) / eta
            # The condition of mirror ascent, which eta = 1 always meets, up to rounding.
            if risen >= value + promised - 1e-12 or eta <= 1.0:
                break
            eta = max(eta / 2, 1.0)
        if risen <= value:
            break
        log_w, value, scores, eta = moved, risen, after, 1.5 * eta
    limit = _trivial_limit(list(sigmas))
    gap = max(min(gap, limit - value), 0.0)
    return Mixture(dict(zip(names, np.exp(log_w).tolist(), strict=True)), value, gap, steps)


def mixture_entropy(states: Mapping[str, VendiState], weights: Mapping[str, float]) -> float:
    """H_1 in nats of sum_k w_k Sigma_k; weights are scaled to sum 1."""
    total = sum(weights.values())
    dim = next(iter(states.values())).dim
    sigma = torch.zeros(dim, dim, dtype=torch.float64)
    with reading(*states.values(), doing="mixture_entropy"):
        for name, weight in weights.items():
            sigma += weight / total * (states[name].matrix / states[name].matrix.trace()).cpu()
    return _entropy(sigma)


def _entropy(sigma: torch.Tensor) -> float:
    eigenvalues = torch.linalg.eigvalsh(sigma).clamp_min_(0)
    return float(-torch.special.xlogy(eigenvalues, eigenvalues).sum())


def _trivial_limit(sigmas: list[torch.Tensor]) -> float:
    """What no mixture of covariances (trace 1) exceeds, whatever the weights, in nats."""
    return math.log(min(len(sigmas[0]), sum(math.exp(_entropy(sigma)) for sigma in sigmas)))


def _check(states: Mapping[str, VendiState], floor: float, cap: float, tolerance: float) -> list[str]:
    names = sorted(states)
    if not names:
        raise GvendiError("states is empty; give at least one source")
    first = states[names[0]]
    for name in names:
        state = states[name]
        if state.n == 0:
            raise GvendiError(f"source {name!r} holds no rows; leave it out")
        if state.dim != first.dim or not same_spec(state.spec, first.spec):
            raise GvendiError(
                f"sources {names[0]!r} and {name!r} were sketched differently; sketch all with one spec"
            )
    if not 0 <= floor <= 1 / len(names) <= cap:
        raise GvendiError(
            f"floor is {floor} and cap {cap}; {len(names)} sources need 0 <= floor <= "
            f"{1 / len(names):.4g} <= cap"
        )
    if not tolerance > 0:
        raise GvendiError(f"tolerance is {tolerance}; wanted a number of nats above 0")
    return names


def _entropy_and_scores(sigmas: torch.Tensor, weights: np.ndarray) -> tuple[float, np.ndarray]:
    # Every source has weight, so a direction that is empty in the mixture is empty in all of them.
    mixed = torch.einsum("k,kij->ij", torch.from_numpy(weights), sigmas)
    _, entropy, surprise = entropy_and_surprise(mixed, _EMPTY)
    return entropy, torch.einsum("kij,ij->k", sigmas, surprise).numpy()


def _project(logits: np.ndarray, floor: float, cap: float) -> np.ndarray:
    """The weights nearest to exp(logits) in relative entropy: clip(exp(l - tau), floor, cap) with sum 1."""
    # A weight of 0 would stay 0 for ever.
    least = max(floor, 1e-12)
    low, high = float(logits.min()) - np.log(max(cap, 1e-12)), float(logits.max()) - np.log(least)
    low = min(low, high) - 1.0
    for _ in range(100):
        middle = 0.5 * (low + high)
        total = np.clip(np.exp(np.minimum(logits - middle, 50.0)), least, cap).sum()
        low, high = (middle, high) if total > 1 else (low, middle)
    weights = np.clip(np.exp(np.minimum(logits - low, 50.0)), least, cap)
    return weights / weights.sum()


def _best_vertex(scores: np.ndarray, floor: float, cap: float) -> np.ndarray:
    """The feasible weights of the largest <scores, v>: the floor for all, the rest to the best up to the cap."""
    vertex, rest = np.full(len(scores), floor), 1 - floor * len(scores)
    for k in np.argsort(-scores, kind="stable"):
        vertex[k] += min(rest, cap - floor)
        rest -= vertex[k] - floor
    return vertex
