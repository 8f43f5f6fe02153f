"""How much of each source to train on next, from the gradients of what was trained on lately.

Every E steps the weights move towards those whose mixture has the most entropy (`mixture_weights`):

    v = argmax H_1(sum_k v_k Sigma_k),  floor <= v_k <= cap,        w <- smoothing w + (1 - smoothing) v
Sigma_k is the second moment of the last n sketches of source k, with one n for all: entropy grows with n, and a source
that is drawn often would look diverse for that alone and be drawn more often still.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gvendi_fast.analysis.mixture import Mixture, mixture_weights
from gvendi_fast.base.arguments import whole
from gvendi_fast.base.draws import order, stream
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.unit_length import Rows, check_matrix, has_direction
from gvendi_fast.integrations.batches import BatchChooser, BatchEpoch
from gvendi_fast.integrations.meter_input import Label, Labels, label_of, plain_labels
from gvendi_fast.vendi.state import VendiState

if TYPE_CHECKING:
    from gvendi_fast.sketching.gradients.sketches import Sketches

# In nats: 0.1 % of G-Vendi, far below what the next sketches change.
_TOLERANCE = 1e-3
_ROUNDING = 1e-9


class SourceWeights:
    """Sampling weights of sources that follow the diversity of what each brings.

    sources: their names, or whole numbers, of which 1 and "1" are one name. Sketches are labelled by a name or, as a
        tap's tags are, by its place here; a number that is one source's place and another's name is refused.
    every: steps between two updates.
    floor, cap: least and most weight of any source; floor None is a tenth of an equal share, since a source without
        weight is never looked at again.
    smoothing: share of the old weights in the new ones, from 0 (none) to below 1.
    rows: how many of the last sketches of each source count; 4 K bytes each.
    least: a source with fewer sketches keeps its weight until it has them.
    start: weights to begin with, scaled to sum 1, from floor to cap; None: all equal.

        weights = SourceWeights(["math", "code", "web"], every=200)
        sampler = SourceSampler(source_of_row, 32, weights)
        for batch in DataLoader(data, batch_sampler=sampler, collate_fn=collate):
            ...                                       # a step under a tap with tag="source"
            weights.step(tap.take())
    On several ranks give all of them the same sketches (gathered), or call `share` after each step: it makes the
    weights those of all ranks' mean. Raises GvendiError, with the argument's name, for arguments that cannot be used.
    """

    def __init__(
        self,
        sources: Sequence[Label],
        *,
        every: int = 100,
        floor: float | None = None,
        cap: float = 1.0,
        smoothing: float = 0.5,
        rows: int = 256,
        least: int = 16,
        start: Mapping[Label, float] | None = None,
    ) -> None:
        self.sources = tuple(label_of(name, "sources") for name in sources)
        if not self.sources or len(set(self.sources)) != len(self.sources):
            raise GvendiError(f"sources is {list(self.sources)}; wanted at least one name, each once")
        count = len(self.sources)
        self.every = whole(every, "every", "the number of steps between two updates, at least 1", 1)
        self.rows = whole(rows, "rows", "how many of the last sketches of a source count, at least 2", 2)
        self.least = whole(least, "least", "the fewest sketches that a source is judged by, at least 2", 2)
        self.floor, self.cap = 0.1 / count if floor is None else floor, cap
        if not 0 <= self.floor <= 1 / count <= self.cap <= 1:
            raise GvendiError(
                f"floor is {floor} and cap {cap}; {count} sources need 0 <= floor <= {1 / count:.4g} <= cap <= 1"
            )
        if not 0 <= smoothing < 1:
            raise GvendiError(f"smoothing is {smoothing}; wanted a share from 0 to below 1")
        if self.least > self.rows:
            raise GvendiError(f"least is {least}; wanted at most rows, which is {rows}")
        self.smoothing = smoothing
        self._weights = self._begun(start)
        self._last: dict[str, torch.Tensor] = {}
        self.steps = 0
        # Samples without a direction, which were left out.
        self.left_out = 0
        # The mixture of the last update; None before the first.
        self.mixture: Mixture | None = None

    @property
    def weights(self) -> dict[str, float]:
        """By source, sum 1."""
        return dict(zip(self.sources, self._weights.tolist(), strict=True))

    def update(self, sketches: Sketches | Rows, source: Labels | None = None) -> None:
        """Take in the sketches of a step's samples [S, K].

        source: one a sample or one for all, by name or by place in `sources`; None: the sketches' own tags.
        Samples whose sketch is zero or not finite are left out and counted.
        """
        z: Any = getattr(sketches, "z", sketches)
        tags = getattr(sketches, "tags", None) if source is None else source
        if tags is None:
            raise GvendiError(
                "source is None and the sketches carry no tags; give one source a sample, or tap with tag=..."
            )
        check_matrix(z)
        plain = plain_labels(tags, "source")
        is_one = isinstance(plain, str) or not isinstance(plain, Iterable)
        names = self._names([plain] * len(z) if is_one else list(plain))
        if len(names) != len(z):
            raise GvendiError(f"source has {len(names)} entries for {len(z)} samples; wanted one for each")
        z = torch.as_tensor(z).detach().to("cpu", torch.float32)
        norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        good = has_direction(norm)[:, 0]
        self.left_out += int((~good).sum())
        for name in dict.fromkeys(names):
            here = torch.tensor([other == name for other in names]) & good
            unit = z[here] / norm[here]
            before = self._last.get(name, unit[:0])
            if before.shape[1] != unit.shape[1]:
                raise GvendiError(
                    f"sketches have K = {unit.shape[1]}, and those before {before.shape[1]}; sketch all with one spec"
                )
            self._last[name] = torch.cat([before, unit])[-self.rows :].clone()

    def step(
        self,
        sketches: Sketches | Rows | None = None,
        source: Labels | None = None,
    ) -> bool:
        """`update`, where there are sketches, and count a training step; whether the weights were recomputed."""
        if sketches is not None:
            self.update(sketches, source)
        self.steps += 1
        if self.steps % self.every:
            return False
        self.recompute()
        return True

    def recompute(self, states: Mapping[str, VendiState] | None = None) -> dict[str, float]:
        """Move the weights now; returns them.

        states: second moments by source to use in place of the own ones, such as a meter's; sources that they lack keep
            their weight. Let them hold about as many rows each.
        """
        states = self._states() if states is None else {name: s for name, s in states.items() if s.n}
        self._names(list(states))
        there = np.array([name in states for name in self.sources])
        if there.sum() < 2:
            return self.weights
        # The others keep theirs, so that the weights of these have this sum.
        share = float(self._weights[there].sum())
        equal = 1 / int(there.sum())
        floor, cap = min(self.floor / share, equal), max(min(self.cap / share, 1.0), equal)
        self.mixture = mixture_weights(states, floor=floor, cap=cap, tolerance=_TOLERANCE)
        best = np.array([self.mixture.weights.get(name, 0.0) for name in self.sources]) * share
        target = np.where(there, best, self._weights)
        moved = self.smoothing * self._weights + (1 - self.smoothing) * target
        self._weights = moved / moved.sum()
        return self.weights

    def share(self, group: Any = None) -> None:
        """Make the weights the mean of all ranks' (torch.distributed): one all-reduce of as many numbers as sources."""
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise GvendiError("torch.distributed is not initialised; call share() on several ranks only")
        # NCCL knows no tensors on the CPU.
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        total = torch.from_numpy(self._weights).to(device)
        dist.all_reduce(total, group=group)
        mean = total.cpu().numpy()
        self._weights = mean / mean.sum()

    def state_dict(self) -> dict[str, Any]:
        """Weights, steps and the last sketches of each source."""
        return {
            "sources": list(self.sources),
            "weights": self._weights.tolist(),
            "steps": self.steps,
            "left_out": self.left_out,
            "last": {name: rows.clone() for name, rows in self._last.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same sources."""
        if list(state.get("sources", ())) != list(self.sources):
            raise GvendiError(
                f"state is of the sources {state.get('sources')}, and these weights of {list(self.sources)}; give the "
                "same sources in the same order"
            )
        self._weights = np.array(state["weights"], np.float64)
        self.steps, self.left_out = state["steps"], state["left_out"]
        self._last = {name: rows.clone() for name, rows in state["last"].items()}

    def _begun(self, start: Mapping[Label, float] | None) -> np.ndarray:
        if start is None:
            return np.full(len(self.sources), 1 / len(self.sources))
        by_name = _by_name(start, "start")
        given = np.array([by_name.get(name, -1.0) for name in self.sources], np.float64)
        if set(by_name) != set(self.sources) or not (
            np.isfinite(given).all() and (given >= 0).all() and given.any()
        ):
            raise GvendiError(
                f"start is {dict(start)}; wanted a weight of at least 0 for each of {list(self.sources)}"
            )
        weights = given / given.sum()
        for name, weight in zip(self.sources, weights.tolist(), strict=True):
            # What lies on a limit may miss it by the rounding of the sum.
            if not self.floor - _ROUNDING <= weight <= self.cap + _ROUNDING:
                raise GvendiError(
                    f"start gives {name!r} {weight:.4g} of the sum; wanted from floor, {self.floor:.4g}, to cap, "
                    f"{self.cap:.4g}: a source without weight gets no sketches, and so keeps it; give floor= or cap= "
                    "that allow this start, or another start"
                )
        return weights

    def _names(self, given: Sequence[Any]) -> list[str]:
        """The names of labels, each a name or a place."""
        return [self._name(one) for one in given]

    def _name(self, label: Any) -> str:
        if isinstance(label, str):
            if label in self.sources:
                return label
        elif not isinstance(label, bool) and hasattr(label, "__index__"):
            place, as_name = operator.index(label), str(operator.index(label))
            there = self.sources[place] if 0 <= place < len(self.sources) else None
            if as_name in self.sources and there != as_name:
                raise GvendiError(
                    f"source holds the number {place}, and the source {as_name!r} is not the one at place {place} of "
                    f"{list(self.sources)}; give names as strings, [str(one) for one in source], or, where numbers are "
                    "places, name the sources otherwise"
                )
            if there is not None:
                return there
        raise GvendiError(f"source holds {label!r}; wanted one of {list(self.sources)} or a place among them")

    def _states(self) -> dict[str, VendiState]:
        judged = {name: rows for name, rows in self._last.items() if len(rows) >= self.least}
        n = min((len(rows) for rows in judged.values()), default=0)
        return {name: VendiState(rows.shape[1]).update(rows[-n:]) for name, rows in judged.items()}


def _by_name(weights: Mapping[Label, float], argument: str) -> dict[str, float]:
    """A copy with the names as strings."""
    found = {label_of(label, argument): weight for label, weight in weights.items()}
    if len(found) != len(weights):
        raise GvendiError(
            f"{argument} is {dict(weights)}; wanted each source once, and 1 and '1' are one source"
        )
    return found


class SourceSampler(BatchChooser):
    """A batch sampler that draws each batch's sources by weights that may change while it runs.

    source_of_row: the source of each row of the data set, N names.
    batch_size: rows of a batch of one process.
    weights: `SourceWeights`, read anew for every batch; or fixed ones by source, copied.
    steps: batches of an epoch; None is N // batch_size, at least 1.
    seed, rank, world: as of `GainSampler`. The weights must be the same on every rank.

    A batch of B rows has B w_k rows of source k, rounded up or down at random so that the mean is right. The rows of a
    source come in a random order, all of them before one comes again, across batches and epochs; so a source of small
    weight is not gone through in an epoch, and one of large weight comes again.

    With fixed weights an epoch's batches are a function of the arguments and the epoch's number, as those of
    `GainSampler`, so a trainer that resumes by `set_epoch` and skipping batches goes on with the right ones. With
    `SourceWeights` they depend on what the weights were at each step: resume by `state_dict` and `load_state_dict` of
    both, the sampler's and the weights', and skip nothing.
    """

    def __init__(
        self,
        source_of_row: Sequence[Label],
        batch_size: int,
        weights: SourceWeights | Mapping[Label, float],
        *,
        steps: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(batch_size, seed, rank, world, drop_last=True)
        names, code = np.unique(np.asarray(source_of_row, dtype=object).astype(str), return_inverse=True)
        self._rows = {name: np.flatnonzero(code == k) for k, name in enumerate(names.tolist())}
        self.rows = len(code)
        if self.rows == 0:
            raise GvendiError("source_of_row is empty; give the source of each row of the data set")
        self._given = weights if isinstance(weights, SourceWeights) else _by_name(weights, "weights")
        known = set(self.weights())
        if known != set(self._rows):
            raise GvendiError(
                f"weights are of {sorted(known)}, and the rows of {sorted(self._rows)}; wanted the same sources"
            )
        most = self.rows // (self.batch_size * self.world)
        self.steps = (
            max(1, most) if steps is None else whole(steps, "steps", "the number of batches of an epoch", 1)
        )
        # How many rows of each source were drawn: moving weights, by all epochs so far.
        self._drawn = dict.fromkeys(self._rows, 0)
        # Fixed weights, before the epoch of this number.
        self._before = 0, dict.fromkeys(self._rows, 0)
        self._order: dict[str, tuple[int, np.ndarray]] = {}

    def weights(self) -> dict[str, float]:
        """By source, as they are now, sum 1."""
        given = self._given.weights if isinstance(self._given, SourceWeights) else self._given
        total = sum(given.values())
        if not (0 < total < float("inf") and min(given.values()) >= 0):
            raise GvendiError(f"weights is {dict(given)}; wanted numbers of at least 0, not all 0")
        return {name: weight / total for name, weight in given.items()}

    def settings(self) -> dict[str, Any]:
        """What a state must agree on."""
        return {
            "rows": self.rows,
            "sources": sorted(self._rows),
            "batch_size x world": self.batch_size * self.world,
            "steps": self.steps,
            "seed": self.seed,
        }

    def _begin(self, epoch: int) -> _Drawn:
        return _Drawn(self, epoch)

    def _drawn_before(self, epoch: int) -> dict[str, int]:
        """How many rows of each source the epochs before this one drew; to be counted up by those who draw."""
        if isinstance(self._given, SourceWeights):
            return self._drawn
        first, before = self._before if self._before[0] <= epoch else (0, dict.fromkeys(self._rows, 0))
        drawn = dict(before)
        for earlier in range(first, epoch):
            for step in range(self.steps):
                for name, count in self._counts(self._words(earlier, step)).items():
                    drawn[name] += count
        self._before = epoch, dict(drawn)
        return dict(drawn)

    def _words(self, epoch: int, step: int) -> np.random.Philox:
        """The random words of a batch: the first is for `_counts`."""
        return stream("source sampler", self.seed, epoch, step)

    def _counts(self, words: np.random.Philox) -> dict[str, int]:
        """How many rows of each source a batch of all ranks has, by the weights of the moment."""
        size, weights = self.batch_size * self.world, self.weights()
        offset = float(words.random_raw()) / 2.0**64
        # Points at equal distances over the sum of the weights: a source has as many as fall on it.
        names = sorted(weights)
        ends = np.cumsum([weights[name] for name in names]) * size
        ends[-1] = size
        counts = np.diff(np.ceil(ends - offset), prepend=np.ceil(0 - offset)).astype(int)
        return dict(zip(names, counts.tolist(), strict=True))

    def _shuffled(self, name: str, turn: int) -> np.ndarray:
        """The rows of a source in the order of their turn; that of the last call is kept."""
        if self._order.get(name, (None, None))[0] != turn:
            own = self._rows[name]
            self._order[name] = turn, own[order(stream("source sampler", self.seed, name, turn), len(own))]
        return self._order[name][1]


class _Drawn(BatchEpoch):
    """Batches by the weights of the moment."""

    _sampler: SourceSampler

    def __init__(self, sampler: SourceSampler, epoch: int) -> None:
        super().__init__(sampler, epoch)
        self._drawn = sampler._drawn_before(epoch)

    def _batch(self) -> list[int]:
        words = self._sampler._words(self.epoch, self.step)
        counts = self._sampler._counts(words)
        rows = [row for name, count in counts.items() for row in self._of(name, count)]
        return [rows[i] for i in order(words, len(rows))]

    def _of(self, name: str, count: int) -> list[int]:
        """The next rows of a source."""
        own, place = self._sampler._rows[name], self._drawn[name]
        self._drawn[name] = place + count
        found: list[int] = []
        while count:
            turn, first = divmod(place, len(own))
            part = self._sampler._shuffled(name, turn)[first : first + count].tolist()
            found, place, count = found + part, place + len(part), count - len(part)
        return found

    def _state(self) -> dict[str, Any]:
        return {"cursor": dict(self._drawn)}

    def _restore(self, state: dict[str, Any]) -> None:
        # In place: of moving weights it is the sampler's own.
        self._drawn.update(state["cursor"])
