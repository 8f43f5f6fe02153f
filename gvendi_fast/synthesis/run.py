"""A synthesis run from its configuration: everything opened in order, the loop run, everything closed."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.files import atomic_write
from gvendi_fast.base.os_errors import sentence
from gvendi_fast.base.progress import Progress, Silent
from gvendi_fast.clusters.distinct import cluster_number
from gvendi_fast.data.rows import Reason
from gvendi_fast.sketching.batch_memory import choose_batch_tokens
from gvendi_fast.synthesis.checks.verifiers import AnswerChecker, RowVerifier
from gvendi_fast.synthesis.config.config import Config, dump_config
from gvendi_fast.synthesis.config.paths import absolute
from gvendi_fast.synthesis.disk.digests import FINGERPRINT, read_fingerprint
from gvendi_fast.synthesis.disk.folder import CONFIG, POOL, REQUESTS, open_run
from gvendi_fast.synthesis.disk.journal import Journal
from gvendi_fast.synthesis.filters.paraphrase import ParaphraseCheck
from gvendi_fast.synthesis.generators.request_store import RequestStore
from gvendi_fast.synthesis.generators.stops import EndpointDownError, GenerationStoppedError, KeyRefusedError
from gvendi_fast.synthesis.generators.stored import StoredGenerator
from gvendi_fast.synthesis.loop.build import (
    SeedPool,
    check_prompts,
    make_generator,
    make_paraphrase_check,
    make_sketching,
    make_tests,
    open_pool,
    read_records,
)
from gvendi_fast.synthesis.loop.candidate_sketcher import CandidateSketcher
from gvendi_fast.synthesis.loop.grown_pool import GrownPool
from gvendi_fast.synthesis.loop.judge import Judge
from gvendi_fast.synthesis.loop.loop import Loop
from gvendi_fast.synthesis.loop.proposer import Proposer, request_of, shot_rows
from gvendi_fast.synthesis.loop.sketch_process import SketchProcess
from gvendi_fast.synthesis.loop.status import Status, Watcher
from gvendi_fast.synthesis.report.page import REPORT, write_synthesis_report
from gvendi_fast.synthesis.tasks import make_task
from gvendi_fast.synthesis.tasks.task import Candidate, Refused, Task

# Of how answers become decisions; another number where the same answers come to be decided otherwise.
_RULES = 1
# Below so many clusters a half of them says little.
_FEW_CLUSTERS = 5
# Rows that a preview reads at most.
_PREVIEW_ROWS = 10_000


class _Unwatched:
    def update(self, status: Status) -> None:
        """Nobody looks."""


def synthesize(
    config: Config,
    watcher: Watcher | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Status:
    """Grow a pool in the directory `config.out`, going on where an earlier run of the same settings stopped.

    Writes accepted.jsonl, rejected.jsonl, events.jsonl, requests.sqlite, config.yaml and what resuming needs, and at
    the end, whatever it is, report.html and report.json. Returns where the run ended and which limit ended it.
    progress: of sketching the seed pool; say: is told that the report is being written. Raises GvendiError for a
    configuration or a directory that cannot be used, which leaves no new directory behind, and EndpointDownError or
    KeyRefusedError where the endpoint ends the run; what was answered and decided is kept then too. Warns where no
    report can be written.
    """
    config = absolute(config)
    folder, task = Path(config.out), make_task(config.task.name, **config.task.settings)
    # Whatever can be refused without a directory is refused before one is made.
    check_prompts(config, task)
    with ExitStack() as opened:
        # First, for it keeps a second process out.
        store = opened.enter_context(open_run(folder))
        generator = make_generator(config, store)
        checker = _start_checker(opened, task, config.filter.workers)
        tests, paraphrase = make_tests(config), make_paraphrase_check(config)
        began = time.perf_counter()
        seeds, candidates, device = _sketch_seeds(opened, config, folder, progress or Silent())
        accept, spec = config.accept, seeds.spec
        pool = GrownPool(seeds.ids, seeds.records, seeds.sketches, task, accept.round, accept.refresh)
        # The pool grows into a matrix of its own.
        del seeds
        fingerprint = _fingerprint(config, task, spec, pool, candidates.batch_tokens, paraphrase, generator)
        journal = Journal(folder, fingerprint, config.stop.target)
        opened.callback(journal.close)
        with atomic_write(folder / CONFIG) as stream:
            stream.write(dump_config(config).encode())
        if say is not None:
            for note in _notes(config, len(pool)):
                say(f"note: {note}")
        threads = opened.enter_context(ThreadPoolExecutor(config.filter.workers, thread_name_prefix="decide"))
        longest = config.generator.max_tokens
        proposer = Proposer(task, generator, checker, threads, tests, longest, paraphrase)
        judge = Judge(pool, accept, config.seed, device)
        loop = Loop(config, pool, judge, journal, generator, proposer, candidates, watcher or _Unwatched())
        loop.replay()
        journal.start({"pool": len(pool)})
        loop.seconds["seed pool"] = time.perf_counter() - began
        with _reported(loop, folder, say):
            return asyncio.run(loop.run())


def _start_checker(opened: ExitStack, task: Task, workers: int) -> AnswerChecker | RowVerifier | None:
    """The task's checker with a process that runs, closed with `opened`; None where the task checks nothing."""
    checker = task.checker(workers)
    if checker is not None:
        opened.enter_context(checker).start()
    return checker


def _sketch_seeds(
    opened: ExitStack, config: Config, folder: Path, progress: Progress
) -> tuple[SeedPool, CandidateSketcher | SketchProcess, torch.device]:
    """The seed pool, what sketches candidates as the pool was sketched, and the device of the proxy."""
    proxy, sketcher, settings = make_sketching(config)
    seeds = open_pool(config, folder / POOL, proxy, sketcher, settings, progress)
    tokens = _recorded(folder).get("batch_tokens")
    tokens = tokens or choose_batch_tokens(sketcher, config.proxy.batch_tokens)
    device, max_tokens = proxy.device, seeds.spec["max_tokens"]
    own_process = config.proxy.process
    if own_process is None:
        own_process = config.generator.kind == "openai"
    if not own_process:
        return seeds, CandidateSketcher(proxy, sketcher, max_tokens, config.proxy.mask, tokens), device
    # Its memory is the other process's from here on.
    del proxy, sketcher
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return seeds, opened.enter_context(SketchProcess(config.proxy, max_tokens, tokens)), device


def _fingerprint(
    config: Config,
    task: Task,
    spec: dict[str, Any],
    pool: GrownPool,
    batch_tokens: int,
    paraphrase: ParaphraseCheck | None,
    generator: StoredGenerator,
) -> dict[str, Any]:
    """Everything that decides what a run accepts; a directory of another fingerprint is refused."""
    found = {
        "settings": config.deciding(),
        "task": task.describe(),
        "sketches": spec,
        "seeds": pool.digest(),
        "batch_tokens": batch_tokens,
        "rules": _RULES,
    }
    if paraphrase is not None:
        found["paraphrase"] = paraphrase.describe()
    if config.generator.kind == "local":
        found["generator"] = generator.model
    return found


def _recorded(folder: Path) -> dict[str, Any]:
    """The fingerprint of the run that is there already; empty where there is none."""
    path = folder / FINGERPRINT
    if not path.exists():
        return {}
    found = read_fingerprint(path)
    tokens = found.get("batch_tokens", 1)
    if type(tokens) is not int or tokens < 1:
        raise GvendiError(f"'{path}' is damaged: batch_tokens is {tokens!r}; restore it from a copy")
    return found


def preview(config: Config, count: int) -> list[dict[str, Any]]:
    """`count` prompts and what was read from their answers; nothing is kept and nothing sketched.

    Each: messages, answer (text or None), reason (of a failure, or of a refused answer) and candidates, a list of
    dicts: values, and what the task's check says where it asks nothing further (None where it does). Rows are drawn
    uniformly from the pool's first 10,000.
    """
    if count < 1:
        raise GvendiError(f"count is {count}; wanted a preview of at least 1 prompt")
    config = absolute(config)
    task = make_task(config.task.name, **config.task.settings)
    found = read_records(config, _PREVIEW_ROWS)
    rows = [row for row in found if not isinstance(task.shot(row), Reason)]
    if not rows:
        raise GvendiError(f"pool.data has no row that the task '{task.name}' can show in a prompt")
    shown = [[rows[i] for i in shot_rows(config.seed, 0, n, len(rows), task.shots)] for n in range(count)]
    asks = [task.ask(some, sample=number) for number, some in enumerate(shown)]
    requests = [request_of(ask, config.generator.max_tokens) for ask in asks]

    async def answers(store: RequestStore):
        async with make_generator(config, store) as generator:
            return await asyncio.gather(*map(generator.generate, requests))

    with TemporaryDirectory() as folder, RequestStore(Path(folder) / REQUESTS) as store:
        answered = asyncio.run(answers(store))
    previews = []
    with task.checker() or nullcontext() as checker:
        for ask, answer, some in zip(asks, answered, shown, strict=True):
            parsed = task.parse(answer.text if answer.ok else None, some)
            refused = parsed.reason if isinstance(parsed, Refused) else None
            candidates = [] if isinstance(parsed, Refused) else parsed
            previews.append(
                {
                    "messages": list(ask.messages),
                    "answer": answer.text,
                    "reason": answer.reason or refused,
                    "candidates": [
                        {"values": dict(found.values), "check": _checked(task, found, checker)}
                        for found in candidates
                    ],
                }
            )
    return previews


def _checked(task: Task, candidate: Candidate, checker: Any) -> str | None:
    """What a check without further requests says of a candidate; None where there is none."""
    if checker is None or task.follow_ups(candidate):
        return None
    decided = task.decide(candidate, [], checker)
    return f"{decided.stage}: {decided.reason}" if isinstance(decided, Refused) else "accepted"


def _notes(config: Config, seeds: int) -> Iterator[str]:
    """What a run of so many seeds is told before it begins."""
    asked, block = config.accept.clusters, config.block
    clusters = cluster_number(asked, seeds)
    if config.accept.rule == "cluster" and clusters < _FEW_CLUSTERS:
        yield (
            f"accept.clusters={asked:g} makes {clusters} of {seeds:,} seeds, too few to tell sparse regions "
            f"(one cluster is always sparse); such a pool wants about accept.clusters={max(10, seeds // 10)}"
        )
    if config.stop.requests is not None and config.stop.requests < block:
        yield (
            f"stop.requests={config.stop.requests} does not reach for one block of {block} prompts, and a block is "
            "decided whole; set a smaller block too"
        )


@contextmanager
def _reported(loop: Loop, folder: Path, say: Callable[[str], None] | None) -> Iterator[None]:
    """Note an end that is no limit's, and leave a report at any end."""
    try:
        yield
    except BaseException as error:
        with _warned(f"the end of the run is not noted in '{folder}'"):
            loop.end(*_why(error))
        raise
    finally:
        if say is not None:
            say(f"writing {folder / REPORT}")
        with _warned(f"no report was written ('gvendi report {folder}' tries again)"):
            # Only the end needs what this file brings with it.
            from gvendi_fast.synthesis.report.data import synthesis_report_data

            write_synthesis_report(synthesis_report_data(folder))


def _why(error: BaseException) -> tuple[str, str]:
    """Reason and words for the event of a stop."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "it was interrupted from the keyboard"
    kinds = {EndpointDownError: "endpoint", KeyRefusedError: "key"}
    reason = next((name for kind, name in kinds.items() if isinstance(error, kind)), "error")
    why = error.why if isinstance(error, GenerationStoppedError) else ""
    said = sentence(error) if isinstance(error, OSError) else str(error)
    return reason, why or said or type(error).__name__


@contextmanager
def _warned(what: str) -> Iterator[None]:
    """Tell a failure that must hide neither how the run ended nor the error that ended it."""
    try:
        yield
    # Whatever it is, the library that draws included: the run itself has ended as it has.
    except Exception as error:
        is_systems = isinstance(error, OSError) and error.errno is not None
        said = sentence(error) if is_systems else f"{type(error).__name__}: {error}"
        warnings.warn(f"{what}: {said}", stacklevel=2)
