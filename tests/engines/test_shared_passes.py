"""What ranks make together in a pass: all results in each of them, each made once, whoever is lost or late."""

import os
import pickle
import signal
from functools import partial
from pathlib import Path

import torch
from children import children
from small_runs import make_run

from gvendi_fast.base.engine import LocalEngine
from gvendi_fast.data import file_index, index
from gvendi_fast.data.passes import over_run
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.run_files import PASSES
from gvendi_fast.engines import RanksEngine
from gvendi_fast.engines.shared_passes import SharedPasses


class Square:
    """Notes in a folder which process made which item."""

    def __init__(self, notes, dies_at: int | None = None) -> None:
        self.notes, self.dies_at = notes, dies_at

    def __call__(self, item: int) -> int:
        if item == self.dies_at and not (self.notes / "died").exists():
            (self.notes / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (self.notes / f"{item}-{os.getpid()}").touch()
        return item * item


def passes(folder, rank: int, world: int, dies_at: int | None = None) -> None:
    """Two passes, of which the second depends on the first."""
    engine = RanksEngine(rank, world, run_id="one command", lease_s=1.0)
    engine.folder = folder / "run"
    found, items = [], range(10)
    for number in range(2):
        notes = folder / f"notes-{number}"
        results = dict(engine.map(partial(Square, notes, None if number else dies_at), items))
        found.append([results[place] for place in range(len(items))])
        items = found[-1]
    (folder / f"found-{rank}").write_bytes(pickle.dumps(found))


def run(folder, world: int, **named) -> list[int]:
    for number in range(2):
        (folder / f"notes-{number}").mkdir()
    (folder / "run").mkdir()
    ranks = [
        children().Process(target=passes, args=(folder, rank, world), kwargs=named) for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return [rank.exitcode for rank in ranks]


EXPECTED = [[n**2 for n in range(10)], [n**4 for n in range(10)]]


def made(folder, number: int) -> list[int]:
    return sorted(int(path.name.split("-")[0]) for path in (folder / f"notes-{number}").glob("*-*"))


def test_each_item_is_made_by_one_rank_and_all_have_all_results(tmp_path):
    assert run(tmp_path, 3) == [0, 0, 0]
    for rank in range(3):
        assert pickle.loads((tmp_path / f"found-{rank}").read_bytes()) == EXPECTED
    assert made(tmp_path, 0) == list(range(10))
    assert made(tmp_path, 1) == [n**2 for n in range(10)]
    assert not list((tmp_path / "run" / PASSES).iterdir())


def test_items_of_a_rank_that_is_killed_are_made_by_the_others(tmp_path):
    codes = run(tmp_path, 2, dies_at=4)
    assert sorted(codes) == [-signal.SIGKILL, 0]
    assert pickle.loads((tmp_path / f"found-{codes.index(0)}").read_bytes()) == EXPECTED
    assert made(tmp_path, 0) == list(range(10))


def test_a_damaged_result_is_made_again(tmp_path):
    make, items = partial(Square, tmp_path), [2, 3, 4]
    before, now = (SharedPasses(tmp_path / "run", "one command", 0, 1, 1.0) for _ in range(2))
    root = before._of(make, items)
    root.mkdir(parents=True)
    for place, content in enumerate([b"", b"\x80\x05 no result of any pass"]):
        (root / f"result-{place:06d}.pickle").write_bytes(content)
    assert dict(now.map(make, items, range(3))) == {0: 4, 1: 9, 2: 16}


def test_a_call_is_known_by_what_it_says_not_by_which_objects_are_one(tmp_path):
    passes = SharedPasses(tmp_path, "one command", 0, 2, 1.0)
    twice, numbers = "a" * 3, torch.arange(6.0)

    def folder(*items):
        return SharedPasses(tmp_path, "one command", 0, 2, 1.0)._of(Square, items).name

    assert folder(twice, twice) == folder(twice, "".join(["a"] * 3))
    assert folder(numbers) == folder(numbers.clone()) != folder(numbers + 1)
    assert folder(numbers) != folder(numbers.reshape(2, 3))
    assert passes._of(Square, [1]) != passes._of(Square, [1])


def test_what_a_rank_has_looked_up_in_a_run_directory_is_no_part_of_a_pass(tmp_path):
    path = make_run(tmp_path / "run", is_old=False)
    fresh, used = RunDirectory.load(path), RunDirectory.load(path)
    used.advice = "give --prompt question"
    assert used.finish() == 0
    assert not used.broken()

    def folder(run):
        noted = []

        class Noting(LocalEngine):
            def map(self, make, items):
                noted.append(SharedPasses(tmp_path, "one command", 0, 2, 1.0)._of(make, items).name)
                return super().map(make, items)

        list(over_run(Noting(), run, ["row"], len_of))
        return noted

    assert folder(fresh) == folder(used)


def len_of(parts) -> int:
    return sum(1 for _ in parts)


def test_without_a_run_id_or_a_run_directory_each_rank_makes_everything(tmp_path):
    for engine, folder in ((RanksEngine(1, 2), tmp_path), (RanksEngine(1, 2, run_id="one"), None)):
        engine.folder = folder
        assert dict(engine.map(partial(Square, tmp_path), range(4))) == {0: 0, 1: 1, 2: 4, 3: 9}
    assert not (tmp_path / PASSES).exists()


def noted_scanner(cut, max_bytes):
    """Notes in the folder of the files which process reads which."""
    scan = file_index.scanner(cut, max_bytes)

    def scans(files):
        for file in files:
            (Path(file.here).parent.parent / f"{Path(file.here).stem}-{os.getpid()}").touch()
        return scan(files)

    return scans


def index_alone(folder, rank: int, world: int) -> None:
    index.scanner = noted_scanner
    engine = RanksEngine(rank, world, run_id="one command", folder=folder / "run")
    found = index.index_corpus(folder / "data", rows_per_unit=2, engine=engine)
    (folder / f"found-{rank}").write_bytes(pickle.dumps(found))


def test_the_files_of_a_corpus_are_read_by_one_rank_each(tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(8):
        (tmp_path / "data" / f"{number}.jsonl").write_text('{"text": "one"}\n' * (number + 1))
    ranks = [children().Process(target=index_alone, args=(tmp_path, rank, 2)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    wanted = index.index_corpus(tmp_path / "data", rows_per_unit=2)
    assert [pickle.loads((tmp_path / f"found-{rank}").read_bytes()) for rank in range(2)] == [wanted] * 2
    assert len(list(tmp_path.glob("[0-9]-*"))) == 8
