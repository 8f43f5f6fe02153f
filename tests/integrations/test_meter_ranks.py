"""A meter over ranks: the same numbers to the bit on each, those of the merged meters, by rows or by matrices."""

import threading

import pytest
import torch
from children import children
from test_meter import CLOSE, labels_of, sketches

from gvendi_fast import DiversityMeter, GvendiError
from gvendi_fast.integrations.meter_figures import FIGURES
from gvendi_fast.integrations.meter_snapshot import RowSnapshot, SumSnapshot


class Table:
    """Ranks that are threads and lay their values on one table."""

    def __init__(self, size):
        self.size, self.values, self.barrier = size, [None] * size, threading.Barrier(size, timeout=60)

    def exchange(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        everyone = list(self.values)
        self.barrier.wait()
        return everyone


class ThreadRank:
    device = torch.device("cpu")

    def __init__(self, table, rank):
        self.table, self.rank, self.size, self.received = table, rank, table.size, 0

    def gathered(self, value):
        return self.table.exchange(self.rank, value)

    def gathered_rows(self, rows):
        everyone = self.table.exchange(self.rank, rows.clone())
        assert len({tuple(one.shape) for one in everyone}) == 1
        self.received += (self.size - 1) * rows.numel() * rows.element_size()
        return everyone

    def summed(self, values):
        self.received += 2 * (self.size - 1) * values.numel() * values.element_size() // self.size
        return torch.stack(self.table.exchange(self.rank, values)).sum(dim=0)


def joined(meters):
    """The union that each rank gets, or its error, and the bytes that each received."""
    table = Table(len(meters))
    ranks = [ThreadRank(table, rank) for rank in range(len(meters))]
    found = [None] * len(meters)

    def run(rank):
        try:
            found[rank] = meters[rank]._joined(ranks[rank])
        except GvendiError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(meters))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, [rank.received for rank in ranks]


def of_rank(rank, sizes, window=60, **more):
    meter = DiversityMeter(window=window, decay=0.95, **more)
    for step, size in enumerate(sizes):
        labels = labels_of(size, rank + step) if rank != 1 else ["own"] * size
        meter.update(sketches(size, 10 * rank + step), labels if rank != 3 else None)
    return meter


# Uneven batches, a source that one rank alone has, a rank without sources, one without a batch, one that saw nothing.
UNEVEN = [[5, 6, 7], [3], [9, 0], [4, 4], []]
LONG = [[30, 30, 5], [60, 2], [20, 1], [70, 9], []]


@pytest.mark.parametrize(("sizes", "taken"), [(UNEVEN, "rows"), (LONG, "matrices")], ids=["rows", "matrices"])
def test_every_rank_gets_the_merged_meter_to_the_bit(sizes, taken):
    meters = [of_rank(rank, each) for rank, each in enumerate(sizes)]
    own = [meter.compute(FIGURES) for meter in meters]
    unions, received = joined(meters)
    found = [union.compute(FIGURES) for union in unions]
    assert all(one == found[0] for one in found)
    assert [meter.compute(FIGURES) for meter in meters] == own
    exchange = unions[0].exchange
    assert exchange.window == taken
    assert (exchange.rows < exchange.matrices) == (taken == "rows")
    assert received == [exchange.received] * len(sizes)
    assert isinstance(unions[0]._snapshot, RowSnapshot if taken == "rows" else SumSnapshot)
    merged = meters[-1].merge_state(meters[:-1])
    assert found[0] == pytest.approx(merged.compute(FIGURES), **CLOSE)
    assert {f"samples/source/{name}" for name in ("own", "web", "code", "math")} < set(found[0])
    assert unions[0].by_source().keys() == merged.by_source().keys()
    # A rank goes on with its own stream, and the union does not see it.
    meters[0].update(sketches(2), "web")
    assert unions[0].compute(FIGURES) == found[0]
    with pytest.raises(GvendiError, match="takes no more sketches"):
        unions[0].update(sketches(2))


def test_sums_alone_are_not_merged_again():
    unions, _ = joined([of_rank(rank, each) for rank, each in enumerate(LONG)])
    assert unions[0].window_state().n == 201
    with pytest.raises(GvendiError, match="holds no rows of the window"):
        DiversityMeter(window=60, decay=0.95).merge_state(unions[0])


def test_the_other_series_is_the_same_on_all_ranks():
    meters = [of_rank(rank, each, max_sources=2) for rank, each in enumerate(LONG)]
    unions, _ = joined(meters)
    with pytest.warns(UserWarning, match="4 sources: the 2 largest"):
        found = [union.compute(FIGURES) for union in unions]
    assert all(one == found[0] for one in found)
    with pytest.warns(UserWarning, match="4 sources: the 2 largest"):
        merged = meters[0].merge_state(meters[1:]).compute(FIGURES)
    assert found[0] == pytest.approx(merged, **CLOSE)
    assert "samples/source/other" in merged


def test_ranks_that_saw_nothing_and_meters_without_an_average():
    unions, received = joined([DiversityMeter(), DiversityMeter()])
    assert unions[0].compute() == {"samples/seen": 0, "samples/zero": 0, "samples/non_finite": 0}
    assert received == [0, 0]
    meters = [DiversityMeter(decay=None).update(sketches(3)), DiversityMeter(decay=None)]
    found = [union.compute() for union in joined(meters)[0]]
    assert found[0] == found[1]
    assert found[0]["gvendi/window"] == pytest.approx(meters[0].compute()["gvendi/window"])
    assert "gvendi/average" not in found[0]


def test_ranks_that_differ_all_get_the_error():
    errors, _ = joined([DiversityMeter(window=5), DiversityMeter(window=5), DiversityMeter(window=6)])
    assert len({str(error) for error in errors}) == 1
    assert "ranks differ in window: 5 in 0 and 6 in 2" in str(errors[0])
    errors, _ = joined([DiversityMeter(max_sources=5), DiversityMeter()])
    assert "ranks differ in max_sources: 5 in 0 and 64 in 1" in str(errors[1])
    errors, _ = joined([DiversityMeter().update(sketches(2)), DiversityMeter(5)])
    assert "ranks differ in dim: 12 in 0 and 5 in 1" in str(errors[1])


def test_alone_a_sync_is_a_copy():
    meter = of_rank(0, [5, 6])
    union = meter.sync()
    before = meter.compute(FIGURES)
    assert union.compute(FIGURES) == before
    meter.update(sketches(3))
    assert union.compute(FIGURES) == before


# Sizes by rank.
GLOO = ([[5, 6], [3]], [[40, 9], []], [[150, 9], [150, 30]])


def gloo_rank(rank, address, results):
    """One of two processes."""
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    found = []
    for sizes in GLOO:
        union = of_rank(rank, sizes[rank], window=200).sync()
        found.append((union.exchange.window, union.compute(FIGURES)))
    results.put((rank, found))
    distributed.destroy_process_group()


def test_a_process_group_of_one_is_the_meter_itself():
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        meter = of_rank(0, [50, 60])
        assert meter.sync().compute(FIGURES) == meter.compute(FIGURES)
        assert meter.sync(distributed.group.WORLD).exchange.received == 0
    finally:
        distributed.destroy_process_group()


@pytest.mark.soak
def test_two_processes_get_the_merged_meter_to_the_bit(tmp_path):
    context = children()
    results = context.Queue()
    processes = [context.Process(target=gloo_rank, args=(r, tmp_path / "store", results)) for r in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert found[0] == found[1]
    assert [window for window, _ in found[0]] == ["rows", "rows", "matrices"]
    for (_, figures), sizes in zip(found[0], GLOO, strict=True):
        first, second = (of_rank(rank, sizes[rank], window=200) for rank in range(2))
        assert figures == pytest.approx(first.merge_state(second).compute(FIGURES), **CLOSE)
