"""What threads do to one object that collects: nothing is lost, and what would be is refused and changes nothing."""

import copy
import importlib
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from hangs import HANG_S

from gvendi_fast.base import one_thread
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.clusters import SphericalKMeans
from gvendi_fast.vendi import RowMean, VendiState, between_source, diagnose, jackknife

# Functions have the names of some of these modules.
state_module = importlib.import_module("gvendi_fast.vendi.state")
centered_module = importlib.import_module("gvendi_fast.vendi.centered")
sums_module = importlib.import_module("gvendi_fast.clusters.sums")
WAIT_S = HANG_S
K = 64
ROWS = torch.randn(60, K, generator=torch.Generator().manual_seed(0))
MORE = torch.randn(7, K, generator=torch.Generator().manual_seed(1))


def state():
    return VendiState(K).update(ROWS)


def mean():
    return RowMean(K).update(ROWS)


def clusters():
    return SphericalKMeans(3, seed=1).fit(ROWS)


def bits(one):
    if isinstance(one, VendiState):
        return one.n, one.matrix.numpy().tobytes()
    if isinstance(one, RowMean):
        return one.n, one._sum.numpy().tobytes()
    return one.counts.tolist(), one.objective, one.centroids.numpy().tobytes()


# What each kind is made by; where a change of it can be stopped half-way; its changes; its readings.
KINDS = {
    "VendiState": (
        state,
        (state_module.ops, "covariance"),
        {"update": lambda s: s.update(MORE), "merge": lambda s: s.merge(VendiState(K).update(MORE))},
        {
            "gvendi": lambda s: s.gvendi(),
            "order 2": lambda s: s.gvendi(2),
            "spectrum": lambda s: s.spectrum(),
            "eigenbasis": lambda s: s.eigenbasis(),
            "gain": lambda s: s.gain(MORE),
            "interval": lambda s: s.gvendi(ci="jackknife", rows=ROWS),
            "jackknife": lambda s: jackknife(state=s, rows=ROWS),
            "diagnose": lambda s: diagnose(s, mean()),
            "between_source": lambda s: between_source({"a": s, "b": state()}),
            "merge of it": lambda s: VendiState(K).merge(s),
            "copy": copy.copy,
            "deepcopy": copy.deepcopy,
            "pickle": pickle.dumps,
        },
    ),
    "RowMean": (
        mean,
        (centered_module, "unit_rows"),
        {"update": lambda m: m.update(MORE), "merge": lambda m: m.merge(RowMean(K).update(MORE))},
        {
            "vector": lambda m: m.vector(),
            "mark": lambda m: m.mark,
            "merge of it": lambda m: RowMean(K).merge(m),
            "pickle": pickle.dumps,
        },
    ),
    "SphericalKMeans": (
        clusters,
        (sums_module.ops, "assign"),
        {
            "update": lambda c: c.update(MORE),
            "partial_fit": lambda c: c.partial_fit(MORE),
            "fit": lambda c: c.fit(ROWS),
        },
        {
            "assign": lambda c: c.assign(MORE),
            "counts": lambda c: c.counts,
            "objective": lambda c: c.objective,
            "pickle": pickle.dumps,
        },
    ),
}
CASES = [(kind, name) for kind, (_, _, *calls) in KINDS.items() for some in calls for name in some]


@contextmanager
def stopped_in(place, call):
    """While another thread is in the midst of `call`, stopped inside the function at `place` that it calls."""
    module, name = place
    own, inside, go_on = getattr(module, name), threading.Event(), threading.Event()

    def stop(*args, **more):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(WAIT_S)
        return own(*args, **more)

    setattr(module, name, stop)
    try:
        with ThreadPoolExecutor(1, "other") as pool:
            result = pool.submit(call)
            try:
                assert inside.wait(WAIT_S)
                yield result
            finally:
                go_on.set()
            result.result(WAIT_S)
    finally:
        setattr(module, name, own)
    assert one_thread._uses == {}


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_call_that_meets_a_change_is_refused_and_changes_nothing(kind, name):
    make, place, changes, readings = KINDS[kind]
    one, wanted = make(), make()
    changes["update"](wanted)
    with (
        stopped_in(place, lambda: changes["update"](one)),
        pytest.raises(GvendiError, match=r"thread 'other_0' is in update of it; nothing was changed"),
    ):
        {**changes, **readings}[name](one)
    assert bits(one) == bits(wanted)
    changes["update"](one)


@pytest.mark.parametrize("kind", KINDS)
def test_a_change_that_meets_a_reading_is_refused_and_readings_meet(kind):
    make, _, changes, _ = KINDS[kind]
    one, before = make(), bits(make())
    inside, go_on = threading.Event(), threading.Event()

    def read():
        with one_thread.reading(one, doing="save"):
            inside.set()
            assert go_on.wait(WAIT_S)

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(read)
        assert inside.wait(WAIT_S)
        for change in changes.values():
            with pytest.raises(GvendiError, match="is in save of it"):
                change(one)
        assert bits(one) == before
        go_on.set()
        result.result(WAIT_S)


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_lost_however_threads_meet(kind):
    make = KINDS[kind][0]
    one, done, refused, start = make(), [0] * 4, [], threading.Barrier(4)
    rows = ROWS.repeat(4, 1)

    def add(index):
        start.wait(WAIT_S)
        for _ in range(25):
            try:
                one.update(rows)
                done[index] += 1
            except GvendiError as error:
                refused.append(str(error))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert all("nothing was changed" in text for text in refused)
    wanted = make()
    for _ in range(sum(done)):
        wanted.update(rows)
    assert bits(one) == bits(wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_everything_of_its_own(kind, copied):
    make, _, changes, _ = KINDS[kind]
    one, before = make(), bits(make())
    other = copied(one)
    assert bits(other) == before
    changes["update"](other)
    assert bits(one) == before != bits(other)


def test_rows_that_change_the_state_they_are_compared_with_are_refused():
    one = state()

    def rows():
        yield ROWS[:30]
        one.update(MORE)
        yield ROWS[30:]

    with pytest.raises(
        GvendiError, match="update of this VendiState is called from inside its own jackknife"
    ):
        jackknife(one, rows())
    assert bits(one) == bits(state())


def test_what_follows_a_fit_may_read_and_not_change_it():
    seen = []
    one = SphericalKMeans(3, seed=1)
    one.fit(ROWS, lambda *_: seen.append(one.counts.sum().item()))
    assert seen
    assert set(seen) == {len(ROWS)}
    with pytest.raises(GvendiError, match="from inside its own fit"):
        one.fit(ROWS, lambda *_: one.partial_fit(MORE))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_object_is_free_again_after_an_error(error, monkeypatch):
    def fail(*_):
        raise error

    one = state()
    with monkeypatch.context() as patch:
        patch.setattr(state_module.ops, "covariance", fail)
        with pytest.raises(error):
            one.update(MORE)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(one.gvendi).result(WAIT_S) == state().gvendi()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("one_thread")
def test_a_process_forked_inside_a_change_refuses_the_half_changed_object_and_uses_others():
    one, free = mean(), mean()
    with stopped_in(KINDS["RowMean"][1], lambda: one.update(MORE)):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                try:
                    one.vector()
                    code = 2
                except GvendiError as error:
                    code = 0 if "forked" in str(error) and free.merge(mean()).n == 2 * len(ROWS) else 3
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
