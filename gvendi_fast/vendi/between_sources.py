"""How much of a data set's entropy lies between its sources, and how much within them.

Sigma = sum_k w_k Sigma_k of sources k with n_k rows each, w_k = n_k / n:
    H(Sigma) = sum_k w_k H(Sigma_k) + sum_k w_k D(Sigma_k || Sigma),   D = tr Sigma_k (ln Sigma_k - ln Sigma) >= 0
The second sum, the Holevo quantity of the sources, is what they add to each other's diversity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.one_thread import reading
from gvendi_fast.vendi.gains import surprisals
from gvendi_fast.vendi.state import VendiState


@dataclass(frozen=True)
class Source:
    """One source of a data set.

    n: its rows.
    weight: its share of all rows.
    entropy: its own, in nats.
    divergence: D from the whole, in nats; weight * divergence is its share of `Decomposition.between`.
    """

    n: int
    weight: float
    entropy: float
    divergence: float


@dataclass(frozen=True)
class Decomposition:
    """The entropy of all rows together in two terms, entropy = within + between, in nats.

    entropy: of all rows together.
    within: the mean of the sources' own entropies, by weight.
    between: what the sources add to each other.
    sources: {name: source}, in the order given.
    """

    entropy: float
    within: float
    between: float
    sources: dict[str, Source]


def between_source(states: Mapping[str, VendiState]) -> Decomposition:
    """Entropy H_1 of the union of the sources, split into within and between them; states are not changed.

    states: {name: state}, each of at least one row, all of one dim and spec; GvendiError otherwise.
    """
    if not states:
        raise GvendiError("states is empty; give {name: VendiState} of at least one source")
    with reading(*states.values(), doing="between_source"):
        return _between_source(states)


def _between_source(states: Mapping[str, VendiState]) -> Decomposition:
    empty = [name for name, state in states.items() if state.n == 0]
    if empty:
        raise GvendiError(f"states: {empty[0]!r} holds no rows (n = 0); leave this source out")
    first = next(iter(states.values()))
    whole = VendiState(first.dim, device=first.matrix.device)
    for state in states.values():
        whole.merge(state)
    vectors, surprisal = whole.eigenbasis()[1], surprisals(whole)
    sources = {}
    for name, state in states.items():
        matrix = (state.matrix / state.matrix.trace()).to(vectors.device)
        # How much of the source lies in each direction: q_j^T Sigma_k q_j.
        part = (vectors * (matrix @ vectors)).sum(dim=0)
        entropy = state.entropy()
        divergence = max(0.0, float(part @ surprisal) - entropy)
        sources[name] = Source(state.n, state.n / whole.n, entropy, divergence)
    within = sum(source.weight * source.entropy for source in sources.values())
    between = sum(source.weight * source.divergence for source in sources.values())
    return Decomposition(whole.entropy(), within, between, sources)
