"""Which rank a process is, by the variables of torchrun, accelerate and Slurm, and what is said of wrong ones."""

import pytest

from gvendi_fast.base.engine import LocalEngine
from gvendi_fast.base.errors import GvendiError
from gvendi_fast.engines import RanksEngine, engine_of
from gvendi_fast.engines.choice import parse_workers
from gvendi_fast.engines.rank_numbers import numbers


def array(task, count, first=None, last=None, step=None, **more):
    given = {"ID": task, "COUNT": count, "MIN": first, "MAX": last, "STEP": step}
    named = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in given.items() if value is not None}
    return {**named, "SLURM_ARRAY_JOB_ID": "77", "SLURM_JOB_ID": str(77 + task), **more}


def task(rank, tasks, **more):
    return {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(tasks), "SLURM_JOB_ID": "78", **more}


@pytest.mark.parametrize(
    ("environment", "rank", "world"),
    [
        ({"RANK": "2", "WORLD_SIZE": "4", **task(0, 9)}, 2, 4),
        (array(3, 4), 3, 4),
        (array(1, 4, 1, 4, 1), 0, 4),
        (array(4, 4, 1, 4, 1), 3, 4),
        (array(10, 4, 4, 10, 2), 3, 4),
        # A list of numbers: each is another rank.
        (array(3, 3, 1, 7, 1), 2, 7),
        (array(7, 3, 1, 7, 1), 6, 7),
        (task(1, 3), 1, 3),
        # Tasks of each job of an array.
        (array(2, 2, 1, 2, 1) | task(1, 3), 4, 6),
    ],
)
def test_variables_of_launchers(environment, rank, world):
    found = numbers(environment)
    assert (found.rank, found.world) == (rank, world)
    engine = engine_of(environment=environment)
    assert isinstance(engine, RanksEngine)
    assert (engine.rank, engine.world, engine.is_first) == (rank, world, rank == 0)


def test_ranks_of_one_command_have_one_run_id_and_other_commands_another():
    def run_id(environment):
        return numbers(environment).run_id

    assert run_id(array(0, 4)) == run_id(array(3, 4, SLURM_RESTART_COUNT="1"))
    assert run_id(task(0, 2)) == run_id(task(1, 2)) != run_id(task(1, 2, SLURM_STEP_ID="1"))
    assert run_id(task(0, 2)) != run_id(task(0, 2, SLURM_RESTART_COUNT="1"))
    torch = {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2"}
    first, second = numbers({"RANK": "0", **torch}), numbers({"RANK": "1", **torch})
    assert first.run_id == second.run_id
    assert first.is_unique
    # On several machines nothing is known of the command beside its name.
    assert not numbers({"RANK": "0", **torch, "WORLD_SIZE": "4"}).is_unique


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, and WORLD_SIZE is 2"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "RANK is 'first'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_COUNT is not set"),
        (array(9, 4, 1, 4, 1), "SLURM_ARRAY_TASK_ID is 9"),
        ({"SLURM_PROCID": "3"}, "SLURM_NTASKS is not set"),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "3"}, "SLURM_PROCID is 3"),
    ],
)
def test_variables_that_do_not_agree_are_named(environment, said):
    with pytest.raises(GvendiError, match=f"^{said}.*--engine local"):
        engine_of(environment=environment)


def test_auto_is_one_process_where_nothing_says_otherwise():
    alone = {"RANK": "0", "WORLD_SIZE": "1"}
    # salloc sets the number of tasks, and starts none.
    for environment in ({}, alone, {"SLURM_NTASKS": "4"}, task(0, 1)):
        assert isinstance(engine_of(environment=environment), LocalEngine)
    assert isinstance(engine_of("local", {"RANK": "0"}), LocalEngine)
    assert isinstance(engine_of(environment=array(1, 2), with_arrays=False), LocalEngine)
    with pytest.raises(GvendiError, match="start the command with torchrun"):
        engine_of("ranks", {})


@pytest.mark.parametrize(("gpus", "local", "device"), [(0, 3, "auto"), (4, 3, "cuda:3"), (1, None, "auto")])
def test_the_local_rank_picks_the_gpu(monkeypatch, gpus, local, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    named = {} if local is None else {"LOCAL_RANK": str(local)}
    assert RanksEngine(environment={"RANK": "3", "WORLD_SIZE": "4", **named}).device == device


def test_more_ranks_than_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(GvendiError, match="--nproc-per-node 1"):
        RanksEngine(environment={"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"})
    # Slurm shows a task its own.
    assert RanksEngine(environment=task(1, 2, SLURM_LOCALID="1")).device == "cuda:0"


def test_own_work_units_first_then_those_of_others_from_the_end():
    engine = RanksEngine(1, 3)
    assert list(engine._in_turn(range(9))) == [1, 4, 7, 8, 5, 2, 6, 3, 0]
    assert list(engine.share([0, 1, 4, 5])) == [1, 4]


@pytest.mark.parametrize(("text", "workers"), [(None, None), ("4", 4), ("1:64", (1, 64))])
def test_numbers_of_workers(text, workers):
    assert parse_workers(text) == workers


@pytest.mark.parametrize("text", ["", "0", "2:1", "a", "1:", "1:2:3"])
def test_numbers_of_workers_that_are_none(text):
    with pytest.raises(GvendiError, match="--workers"):
        parse_workers(text)
