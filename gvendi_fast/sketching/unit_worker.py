"""One worker: it takes work units, sketches their rows and writes their parts, whatever engine hands them out.

A work unit that fails does not end the run: it is tried again by itself, and quarantined when that fails too often.
What concerns the whole run does: errors for the user (a corpus that has changed), a full disk, an interrupt.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import exists, host_name
from gvendi_fast.base.progress import Progress, Silent
from gvendi_fast.base.transfer import Fetched, fetch
from gvendi_fast.data.leases import Leases
from gvendi_fast.data.manifest import Manifest, Unit
from gvendi_fast.data.rows import Rejected
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.run_files import read_json
from gvendi_fast.data.work_units import UnitReader
from gvendi_fast.data.worker_records import Lease
from gvendi_fast.sketching.batch_memory import choose_batch_tokens, sketch_batch
from gvendi_fast.sketching.proxy.encode import Encoder, Sample, batches
from gvendi_fast.sketching.proxy.load import Proxy, load_proxy
from gvendi_fast.sketching.receipts import DONE, ELSEWHERE, QUARANTINED, Receipt
from gvendi_fast.sketching.settings import Settings
from gvendi_fast.sketching.unit_sketches import Columns, UnitSketches, UnitsTogether

if TYPE_CHECKING:
    from gvendi_fast.sketching.gradients.sketcher import GradientSketcher

# Work units share batches on a GPU until they have this many rows or tokens. The 7,473 rows of GSM8K make 148 batches
# of 10,400 padded tokens (7.8 % padding, budget 65,536) in units of 512, 26 of 56,500 (3.1 %) from 8192 rows on. Tokens
# bound long rows: 34 MB of ids and labels, twice with the group that is tokenised ahead. A kill loses one group.
ROWS_TOGETHER, TOKENS_TOGETHER = 8192, 1 << 22


@dataclass(frozen=True)
class ProxyByName:
    """A proxy that each worker loads, with what `load_proxy` takes; it must be the one of this revision."""

    name: str
    revision: str
    options: Mapping[str, Any]

    @classmethod
    def of(cls, proxy: Proxy) -> ProxyByName | Proxy:
        """How workers elsewhere come by a proxy: by name, or as it is where it was not loaded by one."""
        if proxy.loading is None:
            return replace(proxy, model=proxy.model.to("cpu"))
        return cls(proxy.name, proxy.revision, {**proxy.loading, "dtype": proxy.dtype})

    def load(self) -> Proxy:
        """The proxy on this machine. Raises GvendiError where its files are others here."""
        proxy = load_proxy(self.name, **self.options)
        if proxy.revision != self.revision:
            raise GvendiError(
                f"the proxy {self.name!r} is {proxy.revision} on this machine, and {self.revision} where the run was "
                "begun; put the same files on every machine"
            )
        return proxy


@dataclass(frozen=True, eq=False)
class UnitJob:
    """Opens a worker; it is pickled for one elsewhere, then with a proxy by name and without `sketcher` and `progress`.

    manifest: the corpus. path, spec, recorded: of the run directory.
    settings, longest: how rows are sketched, by what make_sketcher makes of a model and the settings.
    run, engine, rank: what the worker's record says.
    again: work units that are made even if they have a part, which is damaged.
    void: leases of others that hold no more.
    """

    manifest: Manifest
    path: Path
    spec: dict[str, Any]
    recorded: dict[str, Any] | None
    settings: Settings
    longest: int
    make_sketcher: Callable[[Any, Settings], GradientSketcher]
    proxy: Proxy | ProxyByName
    run: str
    engine: str = "local"
    rank: int | None = None
    again: frozenset[int] = frozenset()
    void: frozenset[Lease] = frozenset()
    sketcher: GradientSketcher | None = None
    progress: Progress | None = None

    def __call__(self) -> UnitWorker:
        return UnitWorker(self)


@dataclass(frozen=True)
class _Unread:
    unit: Unit
    error: BaseException


@dataclass(frozen=True)
class _Results:
    group: UnitsTogether
    batch: list[Sample]
    fetched: Fetched | None = None
    error: BaseException | None = None


class UnitWorker:
    """See `engine.Worker`; its receipts are `Receipt`s."""

    def __init__(self, job: UnitJob) -> None:
        _check_sight(job)
        proxy = job.proxy if isinstance(job.proxy, Proxy) else job.proxy.load()
        self.job, self.proxy = job, proxy
        self.run_directory = RunDirectory(job.path, job.spec, job.recorded)
        self.encoder = encoder_for(proxy, job.settings, job.longest)
        self.progress = job.progress or Silent()
        self.is_on_gpu = proxy.device.type == "cuda"
        # From here on a worker that ends is a worker that was lost with what it has.
        self.leases = Leases(
            job.path, job.settings.terms, job.run, job.engine, job.rank, str(proxy.device), job.void
        )
        try:
            self.sketcher = job.sketcher or job.make_sketcher(proxy.model, job.settings)
            self.batch_tokens = choose_batch_tokens(self.sketcher, job.settings.batch_tokens)
        except BaseException:
            self.leases.close()
            raise
        groups = self.sketcher.groups.names
        self.columns = Columns(self.sketcher.spec.dim, groups, job.settings.groups is not None)
        self._made: set[int] = set()
        self._since = time.monotonic()

    def close(self) -> None:
        """See `engine.Worker`."""
        self.leases.close()

    def run(self, items: Iterable[int]) -> Iterator[Receipt]:
        """See `engine.Worker`. Raises what concerns the whole run; what is done stays."""
        rows = self.job.settings.rows_together or (ROWS_TOGETHER if self.is_on_gpu else 1)
        self._since = time.monotonic()
        broken: set[int] = set()
        suspects: list[int] = []
        for event in _behind(self._queued(_ahead(self._groups(items, suspects, rows))), int(self.is_on_gpu)):
            self.leases.alive()
            if isinstance(event, Receipt):
                yield event
            elif isinstance(event, _Unread):
                yield self._alone(event.unit, event.error)
            elif id(event.group) not in broken:
                error = event.error or self._take(event)
                if error is None:
                    yield from [self._written(unit) for unit in event.group.finished()]
                    continue
                broken.add(id(event.group))
                left = event.group.unfinished()
                for unit in left:
                    self._tell(unit.taken, -1)
                    # Of several that shared a batch it is not known which one it was.
                    yield self._alone(unit.unit, error if len(left) == 1 else None)
        # With nothing else in hand, so that another loss or hang tells which one it was.
        for ordinal in suspects:
            is_mine = self._is_mine(ordinal)
            yield (
                self._alone(self.job.manifest.units[ordinal], None)
                if is_mine
                else Receipt(ordinal, ELSEWHERE)
            )

    def _take(self, event: _Results) -> Exception | None:
        """Store a batch's results; the error if computing them has failed."""
        if event.fetched is None:
            return None
        try:
            event.group.take(event.batch, event.fetched)
        # Whatever rows, tokenizer or model raise is the work unit's; the rest goes on.
        except Exception as error:
            if _ends_the_run(error):
                raise
            return error
        self._tell(event.batch)
        return None

    def _tell(self, samples: Sequence[Sample], times: int = 1) -> None:
        self.progress.advance(times * len(samples), times * sum(sample.length for sample in samples), 0)

    def _written(self, unit: UnitSketches) -> Receipt:
        refused = len(unit.refused) + unit.write(self.run_directory)
        self.progress.advance(len(unit.refused), 0, refused)
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        tokens = sum(sample.length for sample in unit.samples)
        ordinal, rows = unit.unit.ordinal, unit.unit.rows
        self._made.add(ordinal)
        self.leases.done(ordinal, rows, tokens, refused, seconds)
        is_counted = self.job.progress is not None
        return Receipt(ordinal, DONE, self.leases.name, rows, refused, tokens, seconds, is_counted)

    def _alone(self, unit: Unit, error: BaseException | None) -> Receipt:
        """Try a work unit by itself until it is done, or fails once too often. error: of the attempt before this."""
        ordinal = unit.ordinal
        while error is None or not self.leases.failed(ordinal, error):
            self.leases.alive()
            try:
                with UnitReader(self.job.manifest) as reader:
                    sketches = self._read(reader, unit)
                group = UnitsTogether([sketches])
                for batch in batches(group.samples, self.batch_tokens):
                    group.take(batch, self._sketched(batch))
                    self.leases.alive()
            # Whatever rows, tokenizer or model raise is the work unit's; the rest goes on.
            except Exception as again:
                if _ends_the_run(again):
                    raise
                error = again
                continue
            self._tell(sketches.samples)
            return self._written(sketches)
        self.leases.release([ordinal])
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return Receipt(ordinal, QUARANTINED, self.leases.name, unit.rows, error=said[:500])

    def _sketched(self, batch: list[Sample]) -> Fetched:
        pad = self.proxy.tokenizer.pad_token_id
        got = sketch_batch(self.sketcher, batch, 0 if pad is None else pad)
        norms = torch.linalg.vector_norm(got.by_group, dim=-1)
        kept = got.by_group if self.columns.keeps_groups else got.by_group[:, :0]
        return fetch(got.z, got.loss, got.tokens, norms, kept)

    def _queued(
        self, groups: Iterable[UnitsTogether | _Unread | Receipt]
    ) -> Iterator[_Results | _Unread | Receipt]:
        """Each group with each of its batches, whose results may still be computed; once with None if it has none."""
        for group in groups:
            if not isinstance(group, UnitsTogether):
                yield group
                continue
            if not group.samples:
                yield _Results(group, [])
            for batch in batches(group.samples, self.batch_tokens):
                try:
                    fetched = self._sketched(batch)
                # Whatever rows, tokenizer or model raise is the work unit's; the rest goes on.
                except Exception as error:
                    if _ends_the_run(error):
                        raise
                    yield _Results(group, batch, error=error)
                    break
                yield _Results(group, batch, fetched)

    def _groups(
        self, items: Iterable[int], suspects: list[int], rows: int
    ) -> Generator[UnitsTogether | _Unread | Receipt, None, None]:
        """Whole work units, read and tokenised, in groups of at least `rows` rows or TOKENS_TOGETHER tokens.

        Those at which a worker was lost before are put into `suspects` in place of that.
        """
        with UnitReader(self.job.manifest) as reader:
            units: list[UnitSketches] = []
            held = tokens = 0
            for ordinal in items:
                unit = self.job.manifest.units[ordinal]
                if self.leases.is_suspect(ordinal):
                    suspects.append(ordinal)
                    continue
                if not self._is_mine(ordinal):
                    yield Receipt(ordinal, ELSEWHERE)
                    continue
                try:
                    sketches = self._read(reader, unit)
                # Whatever rows, tokenizer or model raise is the work unit's; the rest goes on.
                except Exception as error:
                    if _ends_the_run(error):
                        raise
                    yield _Unread(unit, error)
                    continue
                units.append(sketches)
                held, tokens = held + unit.rows, tokens + sum(s.length for s in sketches.samples)
                if held >= rows or tokens >= TOKENS_TOGETHER:
                    yield UnitsTogether(units)
                    units, held, tokens = [], 0, 0
            if units:
                yield UnitsTogether(units)

    def _is_mine(self, ordinal: int) -> bool:
        """Whether this worker is to do a work unit; its lease is taken then."""
        is_there = self.run_directory.has_part(ordinal)
        if is_there and (ordinal not in self.job.again or ordinal in self._made):
            return False
        return self.leases.take(ordinal)

    def _read(self, reader: UnitReader, unit: Unit) -> UnitSketches:
        refused: list[Rejected] = []
        samples: list[Sample] = []
        # Streamed, since the texts of a work unit may be large.
        for sample in self.encoder.stream(reader.read(unit)):
            (samples if isinstance(sample, Sample) else refused).append(sample)
        return UnitSketches(unit, samples, refused, self.columns)


def _check_sight(job: UnitJob) -> None:
    """Raise GvendiError where this machine has another run directory under its path than the run's, or none."""
    path = job.path / "spec.json"
    if not exists(path) or read_json(path) != job.spec:
        raise GvendiError(
            f"'{job.path}' is not the run directory here that it is where the run was begun (host {host_name()!r}): "
            "every worker must see it under one path; put it where all machines look, on a shared file system or in "
            "an object store"
        )


def encoder_for(proxy: Proxy, settings: Settings, longest: int) -> Encoder:
    """What turns rows into samples for a proxy."""
    return Encoder(proxy.tokenizer, longest, settings.mask, proxy.vocabulary, settings.control_tokens)


def _ends_the_run(error: Exception) -> bool:
    """Whether an error is none of the work unit that met it."""
    # A CUDA context that has met an error refuses everything from then on.
    is_lost = type(error).__name__ == "AcceleratorError"
    return is_lost or isinstance(error, GvendiError | OSError)


def _behind(items: Iterable[Any], count: int) -> Iterator[Any]:
    """The items in order, each one when `count` more have been made.

    With a GPU, one: a batch's results are waited for when the next batch is queued, so the GPU has work even while a
    part is written. On a CPU results are ready at once, and a work unit that is done is written at once.
    """
    waiting: deque[Any] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def _ahead(groups: Generator[Any, None, None]) -> Iterator[Any]:
    """Each group read and tokenised while the one before it runs through the proxy."""
    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as pool:
        following = pool.submit(next, groups, None)
        try:
            while (group := following.result()) is not None:
                following = pool.submit(next, groups, None)
                yield group
        finally:
            # A run that ends early leaves an open file, which belongs to the thread that reads it.
            pool.submit(groups.close).result()
