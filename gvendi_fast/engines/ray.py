"""The workers of Ray: an engine whose actors do the work units of a run directory, and whose tasks do the rest.

Ray starts workers, restarts those that are lost and gives them their work again; what is done, the run directory
remembers. Ray is loaded when the first work is handed out.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

from gvendi_fast.base._version import __version__
from gvendi_fast.base.engine import Engine, Item, Result, Worker
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import host_name
from gvendi_fast.base.printing import put_text
from gvendi_fast.base.threads import using, wait_briefly

# Work units of a task where they share batches on a GPU: several fills of one.
UNITS_A_TASK_OF_A_GPU = 16
# For each worker, so that none is left with a long task when the others have none.
LEAST_TASKS_A_WORKER = 4
# Ray keeps a block, an object and an entry for each.
MOST_TASKS = 10_000
# Times that an item of `map` is begun again, when its worker is lost, before it is no longer put down to chance.
LOSSES = 5
# Items of `map` in Ray's hands, a worker: one in work, and one that waits for it.
IN_FLIGHT = 2
# Functions of `map` that a worker keeps: they may hold much, and more than two passes are not under way at once.
KEPT = 2
# For actors that end.
FAREWELL_S = 5.0
# Workers from which on one's CPUs are spared for what reads beside them.
SPARING = 4
HANG_AFTER_S = 1800.0
# Characters of Ray's own words in an error.
MOST_SAID = 600
# For a cluster to answer: one that is started beside this program takes its time.
ANSWER_S, ASK_AGAIN_S = 60.0, 1.0
ITEM, RECEIPT = "item", "receipt"
_QUIET = {"logging_level": logging.ERROR, "log_to_driver": False}


class RayEngine(Engine):
    """Work is done by the actors and tasks of Ray, on this machine or on a cluster.

    workers: how many at most, or (fewest, most): Ray Data starts more while there is work for them and room.
    gpus_per_worker, cpus_per_worker: what Ray reserves for each; a worker computes with as many threads as CPUs.
    address: of a cluster, as `ray.init` takes it; None: the one of RAY_ADDRESS or of this machine, else one that is
        started here and ended by `close`. Where the program has called `ray.init`, that is used.
    units_a_task: work units that a worker is handed at once (None: 1, and on GPUs, where they share batches, 16).
    init: more arguments of `ray.init`. What workers and nodes print stays in Ray's logs, as it would stand among the
        results on stdout; {"log_to_driver": True} shows it.

    Every node needs this package, in this version, and sees the run directory and the corpus under the same path or
    URL. A worker that fails to says so, with the name of its node. `hang_after_s` is half an hour.
    Raises GvendiError for arguments that cannot be used, and, with the first work, where Ray is missing or cannot be
    reached.
    """

    name = "ray"
    is_remote = True
    # GPUs are the workers'.
    device = "cpu"
    hang_after_s = HANG_AFTER_S

    def __init__(
        self,
        workers: int | tuple[int, int] = (1, 64),
        *,
        gpus_per_worker: float = 0,
        cpus_per_worker: float = 1,
        address: str | None = None,
        units_a_task: int | None = None,
        init: Mapping[str, Any] | None = None,
    ) -> None:
        self.run_id = uuid4().hex[:16]
        self.fewest, self.most = _workers(workers)
        self.gpus_per_worker = _amount("gpus_per_worker", gpus_per_worker, 0.0)
        self.cpus_per_worker = _amount("cpus_per_worker", cpus_per_worker, 0.01)
        self.address = address
        if units_a_task is not None and units_a_task < 1:
            raise GvendiError(f"units_a_task is {units_a_task}; wanted at least 1")
        self.units_a_task = units_a_task
        self.init = dict(init or {})
        self._is_ours = False

    @property
    def threads(self) -> int:
        """Of a worker."""
        return max(1, int(self.cpus_per_worker))

    def close(self) -> None:
        """End the Ray that this engine has started; one that was there stays."""
        if not self._is_ours:
            return
        ray = importlib.import_module("ray")
        if self._is_alone(ray):
            # Actors without work end by themselves, and say so in the run directory, if they are let.
            until = time.monotonic() + FAREWELL_S
            while time.monotonic() < until and ray.available_resources().get(
                "CPU"
            ) != ray.cluster_resources().get("CPU"):
                time.sleep(0.05)
        self._is_ours = False
        ray.shutdown()

    def dtype(self, asked: Any = "auto") -> Any:
        """See `Engine.dtype`: "auto" is what one worker finds, on a GPU where workers have one."""
        if asked != "auto":
            return asked
        ray = self._ray()
        self._pool(ray)
        return self._result(ray, self._task(ray, self.gpus_per_worker).remote(self._desk(), _dtype), "a task")

    def map(
        self, make: Callable[[], Callable[[Item], Result]], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        """See `Engine.map`. At most as many results are held as there may be workers."""
        if not len(items):
            return
        ray = self._ray()
        # In a list Ray hands the reference on, and each process fetches what it stands for once.
        task, made = self._task(ray), _Made(uuid4().hex, [ray.put(make)])
        window = max(1, min(self.most, IN_FLIGHT * self._room(ray)))
        left = iter(range(len(items)))
        under_way: dict[Any, int] = {}
        try:
            while True:
                while len(under_way) < window and (place := next(left, None)) is not None:
                    under_way[task.remote(self._desk(), made, items[place])] = place
                if not under_way:
                    return
                for ref in ray.wait(list(under_way), num_returns=1)[0]:
                    place = under_way.pop(ref)
                    yield place, self._result(ray, ref, f"item {place} of {len(items)}")
        finally:
            for ref in under_way:
                ray.cancel(ref)

    def work(self, open_worker: Callable[[], Worker], items: Sequence[int]) -> Iterator[Any]:
        """See `Engine.work`."""
        if not len(items):
            return
        ray = self._ray()
        data = importlib.import_module("ray.data")
        fewest, most = self._pool(ray)
        rows = [{ITEM: item} for item in items]
        with _quiet():
            dataset = data.from_items(rows, override_num_blocks=self._tasks(len(rows), most))
            _settle(dataset.context)
            dataset = dataset.map_batches(
                _Units,
                fn_constructor_args=([ray.put(open_worker)], self._desk()),
                compute=data.ActorPoolStrategy(min_size=fewest, max_size=most),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=self.cpus_per_worker,
                num_gpus=self.gpus_per_worker or None,
            )
            batches = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
            while (batch := self._next(ray, batches)) is not None:
                for content in batch.column(RECEIPT).to_pylist():
                    yield _unpacked(content)

    def _desk(self) -> _Desk:
        return _Desk(os.getcwd(), self.threads)

    def _ray(self) -> ModuleType:
        """Ray, connected."""
        try:
            ray = importlib.import_module("ray")
            importlib.import_module("ray.data")
        except ImportError as error:
            raise GvendiError(
                f"the engine 'ray' needs the package ray with ray.data, and loading it says: {error}; "
                "pip install 'gvendi-fast[ray]'"
            ) from error
        if ray.is_initialized():
            return ray
        address = self.address
        if address or os.environ.get("RAY_ADDRESS"):
            _check_answers(address or os.environ["RAY_ADDRESS"])
        elif _refusal(_left_behind()) is not None:
            # Of a cluster that was killed, whose address Ray would ask for a quarter of an hour.
            address = "local"
        # Nothing is told to Ray's makers by a program that only uses it.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(address=address, **{**_QUIET, **self.init})
        # Whatever is wrong with a cluster, it is for the user to mend.
        except Exception as error:
            where = "" if self.address is None else f" of {self.address!r}"
            raise GvendiError(
                f"Ray{where} cannot be reached or started: {type(error).__name__}: {error}; see `ray status`, give the "
                "address of a cluster that runs (`ray start --head`), or address='local' for one of this machine"
            ) from error
        self._is_ours = True
        return ray

    def _room(self, ray: ModuleType) -> int:
        """Workers that the CPUs of today are enough for."""
        return int(ray.cluster_resources().get("CPU", 0.0) / self.cpus_per_worker)

    def _pool(self, ray: ModuleType) -> tuple[int, int]:
        """(fewest, most) workers. Raises GvendiError where this machine, alone, has not what the fewest need."""
        # A cluster may grow, or have others on it, and Ray itself says what it waits for.
        if not self._is_alone(ray):
            return self.fewest, self.most
        there = ray.cluster_resources()
        for kind, each in (("GPU", self.gpus_per_worker), ("CPU", self.cpus_per_worker)):
            if self.fewest * each > there.get(kind, 0.0):
                name = f"{kind.lower()}s_per_worker"
                raise GvendiError(
                    f"{self.fewest} worker{'s' * (self.fewest != 1)} with {name}={each:g} need "
                    f"{self.fewest * each:g} {kind}s, and Ray has {there.get(kind, 0.0):g} here; give fewer workers, "
                    f"a smaller {name}, or the address of a cluster"
                )
        return self.fewest, _reserved(self.fewest, self.most, self._room(ray))

    def _is_alone(self, ray: ModuleType) -> bool:
        """Whether Ray is this machine, for this engine."""
        is_named = self.address not in (None, "local") or "RAY_ADDRESS" in os.environ
        return self._is_ours and not is_named and sum(node["Alive"] for node in ray.nodes()) == 1

    def _tasks(self, count: int, workers: int) -> int:
        """How many tasks `count` items are cut into."""
        wanted = self.units_a_task or (UNITS_A_TASK_OF_A_GPU if self.gpus_per_worker else 1)
        fair = max(1, count // (LEAST_TASKS_A_WORKER * workers))
        size = max(min(wanted, fair), -(-count // MOST_TASKS))
        return -(-count // size)

    def _task(self, ray: ModuleType, gpus: float = 0) -> Any:
        return ray.remote(_run).options(
            num_cpus=self.cpus_per_worker, num_gpus=gpus, max_retries=LOSSES, retry_exceptions=False
        )

    def _result(self, ray: ModuleType, ref: Any, what: str) -> Any:
        try:
            content = ray.get(ref)
        except ray.exceptions.RayError as error:
            raise _lost(error, what) from error
        return _unpacked(content)

    def _next(self, ray: ModuleType, batches: Iterator[Any]) -> Any:
        try:
            return next(batches, None)
        except ray.exceptions.RayError as error:
            raise _lost(error, "a worker") from error


def _check_answers(address: str) -> None:
    """Raises GvendiError for a host and port where nobody listens, which Ray asks for a quarter of an hour."""
    until = time.monotonic() + ANSWER_S
    while (error := _refusal(address)) is not None:
        if time.monotonic() >= until or not isinstance(error, ConnectionRefusedError):
            raise GvendiError(
                f"Ray of {address!r} cannot be reached: {error}; see `ray status` on its first node, and give the "
                "address that `ray start --head` printed there"
            ) from error
        time.sleep(ASK_AGAIN_S)


def _refusal(address: str) -> Exception | None:
    """Why nobody can be reached at a host and port; None for an address of another form."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return None
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_S):
            return None
    # The port may be none, and the host no name.
    except (OSError, OverflowError, UnicodeError) as error:
        return error


def _left_behind() -> str:
    """The address of the cluster that was started on this machine last, as Ray finds it; it may have ended since."""
    folder = os.environ.get("RAY_TMPDIR") or ("/tmp" if sys.platform == "darwin" else tempfile.gettempdir())
    try:
        return Path(folder, "ray", "ray_current_cluster").read_text().strip()
    except (OSError, UnicodeError):
        return ""


def _workers(workers: int | tuple[int, int]) -> tuple[int, int]:
    both = (workers, workers) if isinstance(workers, int) else tuple(workers)
    if len(both) != 2 or not all(isinstance(count, int) for count in both) or not 1 <= both[0] <= both[1]:
        raise GvendiError(
            f"workers is {workers!r}; wanted how many, at least 1, or the fewest and the most, as (1, 64)"
        )
    return both


def _amount(name: str, value: float, least: float) -> float:
    if not least <= value < float("inf"):
        raise GvendiError(f"{name} is {value!r}; wanted a number of at least {least:g}")
    return value


def _reserved(fewest: int, most: int, room: int) -> int:
    """How many workers at most leave one's CPUs to what reads beside them, where that costs a quarter or less."""
    spare = room - 1 if room >= SPARING else room
    return max(fewest, min(most, spare))


def _lost(error: Exception, what: str) -> GvendiError:
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return GvendiError(
        f"Ray has given up {what}: {type(error).__name__}: {' '.join(said)[:MOST_SAID]}; see that every node has this "
        "package, and memory enough for its workers (fewer share a node with a larger cpus_per_worker), then run the "
        "same command: what is done stays"
    )


def _settle(context: Any) -> None:
    """Have Ray Data give each receipt as it comes, and wait as long as a work unit takes."""
    wanted = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        # A block ends with each receipt: a block in the making is handed on when it is larger than this.
        "target_max_block_size": 1,
        "execution_no_progress_timeout_s": -1,
    }
    for name, value in wanted.items():
        # Versions of Ray have more of them or fewer.
        if hasattr(context, name):
            setattr(context, name, value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Of Ray Data's log, show what warns alone; all of it stays in its file."""
    handlers = logging.getLogger("ray.data").handlers
    for handler in handlers:
        handler.addFilter(_warns)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(_warns)


def _warns(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING and not record.getMessage().startswith("Progress bars disabled")


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker; error: None where it cannot be pickled."""

    error: Exception | None
    said: str
    traceback: str
    node: str
    is_for_user: bool


class _InWorker(Exception):  # noqa: N818
    """Where in a worker an error was raised; the cause of the one that is raised again."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _packed(value: Any) -> bytes:
    # By value what belongs to a script, as Ray itself does.
    return importlib.import_module("ray.cloudpickle").dumps(value)


def _failed(error: Exception) -> bytes:
    said = f"{type(error).__name__}: {error}"
    text = "".join(traceback.format_exception(error))
    failure = _Failure(error, said, text, host_name(), isinstance(error, GvendiError))
    try:
        content = _packed(failure)
        pickle.loads(content)
    # Whatever an error holds or wants to be made again; its words are what matters.
    except Exception:
        return _packed(replace(failure, error=None))
    return content


def _unpacked(content: bytes) -> Any:
    """What a worker sends. Raises its error, which then names its node."""
    found = pickle.loads(content)
    if not isinstance(found, _Failure):
        return found
    error = found.error
    if error is None:
        error = GvendiError(found.said) if found.is_for_user else RuntimeError(found.said)
    where = f"on the node {found.node!r}"
    if found.is_for_user and len(error.args) == 1 and isinstance(error.args[0], str):
        error.args = (f"{where}: {error.args[0]}",)
    elif hasattr(error, "add_note"):
        error.add_note(where)
    raise error from _InWorker(found.traceback)


@dataclass(frozen=True)
class _Desk:
    """How a worker's process works: as the one that hands out the work, so that paths and numbers mean the same.

    folder: the current one, which relative paths begin in. threads: that compute. version: of this package.
    """

    folder: str
    threads: int
    version: str = __version__

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within the block. Raises GvendiError for another version of this package."""
        if self.version != __version__:
            raise GvendiError(
                f"gvendi-fast is {__version__} here and {self.version} where the run was begun; install the same"
            )
        before = os.getcwd()
        # Where it is missing, whatever is not found under a relative path says so.
        os.chdir(self.folder if os.path.isdir(self.folder) else before)
        wait_briefly(os.environ)
        try:
            with using(self.threads, os.environ):
                yield
        finally:
            os.chdir(before)


def _run(desk: _Desk, function: Callable[..., Any], *arguments: Any) -> bytes:
    """A task: the function's result, or its error, pickled, so that arrays can be written into like any others."""
    try:
        with desk.taken():
            return _packed(function(*arguments))
    except Exception as error:
        return _failed(error)


@dataclass(frozen=True)
class _Made:
    """The function of one `map`, made once in a process. make: the reference to what makes it, in a list."""

    key: str
    make: list[Any]

    def __call__(self, item: Any) -> Any:
        if self.key not in _made:
            _made[self.key] = importlib.import_module("ray").get(self.make[0])()
        for key in [key for key in _made if key != self.key][: -(KEPT - 1)]:
            del _made[key]
        return _made[self.key](item)


def _dtype() -> str:
    from gvendi_fast.sketching.proxy.load import resolve_device, resolve_dtype

    return str(resolve_dtype("auto", resolve_device())[0]).removeprefix("torch.")


class _Units:
    """What Ray Data calls in an actor: items in, receipts out, each as it comes.

    open_worker: the reference to it, in a list. The worker is opened with the first items, since errors of a
    constructor reach the other side as Ray's own.
    """

    def __init__(self, open_worker: list[Any], desk: _Desk) -> None:
        self._open, self._desk = open_worker, desk
        self._at_desk = ExitStack()
        self._worker: Worker | None = None

    def __call__(self, batch: Any) -> Iterator[dict[str, list[bytes]]]:
        try:
            if self._worker is None:
                self._worker = self._opened()
            for receipt in self._worker.run(batch.column(ITEM).to_pylist()):
                yield {RECEIPT: [_packed(receipt)]}
        except Exception as error:
            # It refuses everything from now on, in this process alone, which Ray starts anew.
            if type(error).__name__ == "AcceleratorError":
                put_text("".join(traceback.format_exception(error)), sys.stderr)
                os._exit(1)
            yield {RECEIPT: [_failed(error)]}

    def _opened(self) -> Worker:
        # For good: the process is this actor's own.
        self._at_desk.enter_context(self._desk.taken())
        return importlib.import_module("ray").get(self._open[0])()

    def __del__(self) -> None:
        # Called when Ray Data has no more work for the actor.
        if self._worker is not None:
            self._worker.close()


# Functions of this process' `map`s, oldest first.
_made: dict[str, Any] = {}
