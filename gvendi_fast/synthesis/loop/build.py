"""The parts of a synthesis run, made from its configuration."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gvendi_fast.base.differences import PARAMETERS, comparable, differences, same_spec
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.progress import Progress
from gvendi_fast.data.kinds import kind_of
from gvendi_fast.data.listing import find_files, short_names
from gvendi_fast.data.originals import original_rows
from gvendi_fast.data.pool import as_pool
from gvendi_fast.data.records import readable
from gvendi_fast.data.rows import Fields, Reason, record_id
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.sketched_parameters import differing_from
from gvendi_fast.data.sources import records_of_file
from gvendi_fast.sketching.corpus import Settings, parameters_of, sketch_corpus, spec_of
from gvendi_fast.sketching.gradients.sketcher import GradientSketcher
from gvendi_fast.sketching.proxy.load import Proxy
from gvendi_fast.synthesis.config.config import Config
from gvendi_fast.synthesis.config.paths import is_run_directory
from gvendi_fast.synthesis.filters.decontaminate import Decontaminator, read_questions
from gvendi_fast.synthesis.filters.paraphrase import ParaphraseCheck, SimilarQuestions
from gvendi_fast.synthesis.generators.local import HFGenerator
from gvendi_fast.synthesis.generators.openai import OpenAIGenerator, Pace
from gvendi_fast.synthesis.generators.request_store import RequestStore
from gvendi_fast.synthesis.generators.stops import Budget
from gvendi_fast.synthesis.generators.stored import StoredGenerator
from gvendi_fast.synthesis.loop.candidate_sketcher import load_sketcher
from gvendi_fast.synthesis.loop.proposer import request_of
from gvendi_fast.synthesis.tasks.task import Task


@dataclass(frozen=True)
class SeedPool:
    """ids, records and unit sketches [N, K] of the rows that growth starts from; spec: what the sketches depend on.

    A row without an id has its file, as seen from the folder that holds all files of the pool, and its line for one.
    """

    ids: list[str]
    records: list[dict[str, Any]]
    sketches: torch.Tensor
    spec: dict[str, Any]


def check_prompts(config: Config, task: Task) -> None:
    """Raises GvendiError where the task can make no request of the pool.

    Of files that are still to be sketched, which may take hours, all rows are looked at until one can be shown.
    """
    sketched, first = is_run_directory(config.pool.data), None
    for row in read_records(config, 1 if sketched else sys.maxsize):
        why = task.shot(row)
        if not isinstance(why, Reason):
            request_of(task.ask([row]), config.generator.max_tokens)
            return
        first = first or why
    if not sketched:
        raise GvendiError(
            f"pool.data has no row that the task '{task.name}' can show in a prompt (first row: {first or 'none'})"
        )


def make_generator(config: Config, store: RequestStore) -> StoredGenerator:
    """The generator of the configuration, in front of `store`."""
    given, stop = config.generator, config.stop
    prices = None if given.prices is None else (given.prices[0], given.prices[1])
    budget = Budget(stop.requests, stop.tokens, stop.seconds)
    if given.kind == "local":
        if budget != Budget():
            raise GvendiError(
                "stop.requests, stop.tokens and stop.seconds are of an endpoint; a local generator ends at stop.target "
                "or stop.floor"
            )
        limit = {} if given.max_tokens is None else {"max_tokens": given.max_tokens}
        return HFGenerator(given.model, store, batch=given.batch, prices=prices, **limit)
    names = (
        "concurrency",
        "max_concurrency",
        "retries",
        "time_limit",
        "patience",
        "first_delay",
        "longest_delay",
    )
    return OpenAIGenerator(
        given.base_url,
        given.model,
        store,
        key_variable=given.key_variable,
        budget=budget,
        pace=Pace(**{name: getattr(given, name) for name in names}, seed=config.seed),
        prices=prices,
        limit_field=given.limit_field,
        send_seed=given.send_seed,
        answer_mb=given.answer_mb,
    )


def make_tests(config: Config) -> Decontaminator | None:
    """The test questions to keep out, if there are any."""
    return Decontaminator(config.filter.tests, config.filter.ngram) if config.filter.tests else None


def make_paraphrase_check(config: Config) -> ParaphraseCheck | None:
    """The check on paraphrases of the test questions, if it is asked for."""
    given = config.filter
    if not given.paraphrase:
        return None
    questions = SimilarQuestions(read_questions(given.tests))
    return ParaphraseCheck(questions, given.paraphrase, given.paraphrase_template)


def make_sketching(config: Config) -> tuple[Proxy, GradientSketcher, Settings]:
    """The proxy, its sketcher and the settings that the pool is sketched with."""
    given = config.proxy
    proxy, sketcher = load_sketcher(given)
    settings = Settings(
        spec=sketcher.spec,
        max_tokens=given.max_tokens,
        batch_tokens=given.batch_tokens,
        mask=given.mask,
        limit=config.pool.limit,
        exclude=tuple(given.exclude),
    )
    return proxy, sketcher, settings


def open_pool(
    config: Config,
    folder: Path,
    proxy: Proxy,
    sketcher: GradientSketcher,
    settings: Settings,
    progress: Progress,
) -> SeedPool:
    """The seed pool: a run directory as it is, or a corpus, sketched into `folder` first."""
    data = config.pool.data
    if is_run_directory(data):
        run = RunDirectory.load(data[0])
        wanted = spec_of(proxy, sketcher, settings, run.spec["max_tokens"])
        if not same_spec(run.sketch_spec, wanted):
            renamed = differing_from(run.path, run.sketch_spec, parameters_of(sketcher))
            differing = differences(*comparable(wanted, run.sketch_spec))
            shown = "\n".join(
                renamed if key == PARAMETERS and renamed else f"  {key}: {there} there, {here} in proxy"
                for key, here, there in differing
            )
            raise GvendiError(
                f"pool.data: '{data[0]}' was sketched with other settings than the section proxy says\n{shown}"
            )
    else:
        run = sketch_corpus(data, folder, proxy, settings, progress)
    pool = as_pool(run)
    size = len(pool) if config.pool.limit is None else min(len(pool), config.pool.limit)
    ordinals = pool.numbers("row").tolist()[:size]
    found = {
        row.ordinal: (readable(row.record()), row.file, row.line)
        for row in original_rows(run, ordinals, config.pool.corpus)
    }
    paths = sorted({file for _, file, _ in found.values()})
    names, ids, records = dict(zip(paths, short_names(paths), strict=True)), [], []
    for id_, ordinal in zip(pool.ids[:size], ordinals, strict=True):
        record, file, line = found[ordinal]
        ids.append(id_ if record_id(record, Fields()) is not None else f"{names[file]}:{line}")
        records.append(record)
    return SeedPool(ids, records, pool.take(range(size)), run.sketch_spec)


def read_records(config: Config, most: int) -> Iterator[dict[str, Any]]:
    """The first readable rows of the pool's files, at most `most`, without sketching them."""
    data = config.pool.data
    if is_run_directory(data):
        run = RunDirectory.load(data[0])
        ordinals = as_pool(run).numbers("row").tolist()[:most]
        yield from [readable(row.record()) for row in original_rows(run, ordinals, config.pool.corpus)]
        return
    left = min(most, config.pool.limit or most)
    for path in find_files(data):
        for _, record in records_of_file(path, kind_of(path), Fields()):
            if left == 0:
                return
            if not isinstance(record, Reason):
                left -= 1
                yield readable(record)
