"""How much of a data set's entropy lies between its sources, and how much within them.

Sigma = sum_k w_k Sigma_k of sources k with n_k rows each, w_k = n_k / n:
    H(Sigma) = sum_k w_k H(Sigma_k) + sum_k w_k D(Sigma_k || Sigma),   D = tr Sigma_k (ln Sigma_k - ln Sigma) >= 0
The second sum, the Holevo quantity of the sources, is what they add to each other's diversity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.vendi.gains import surprisals
from gvendi_fast.vendi.state import VendiState


@dataclass(frozen=True)
class Source:
    """One source: n rows, weight = its part of all rows, its own entropy and its divergence D from the whole, in nats.

    weight * divergence is its part of `Decomposition.between`.
    """

    n: int
    weight: float
    entropy: float
    divergence: float


@dataclass(frozen=True)
class Decomposition:
    """entropy = within + between, in nats, of all rows together; `sources` in the order given."""

    entropy: float
    within: float
    between: float
    sources: dict[str, Source]


def between_source(states: Mapping[str, VendiState]) -> Decomposition:
    """Entropy H_1 of the union of the sources, parted into within and between them; states are not changed.

    states: {name: state}, each of at least one row, all of one dim and spec; GvendiError otherwise.
    """
    if not states:
        raise GvendiError("states is empty; give {name: VendiState} of at least one source")
    empty = [name for name, state in states.items() if state.n == 0]
    if empty:
        raise GvendiError(f"states holds {empty[0]!r} without rows (n = 0); leave this source out")
    first = next(iter(states.values()))
    whole = VendiState(first.dim, device=first.matrix.device)
    for state in states.values():
        whole.merge(state)
    vectors, surprisal = whole.eigenbasis()[1], surprisals(whole)
    sources = {}
    for name, state in states.items():
        matrix = (state.matrix / state.matrix.trace()).to(vectors.device)
        # Directions' parts of the source: q_j^T Sigma_k q_j.
        part = (vectors * (matrix @ vectors)).sum(dim=0)
        entropy = state.entropy()
        divergence = max(0.0, float(part @ surprisal) - entropy)
        sources[name] = Source(state.n, state.n / whole.n, entropy, divergence)
    within = sum(source.weight * source.entropy for source in sources.values())
    between = sum(source.weight * source.divergence for source in sources.values())
    return Decomposition(whole.entropy(), within, between, sources)
