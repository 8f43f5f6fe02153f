"""The table of ids seen against a dict: in memory and on disk, with ids that collide, growth and files forgotten."""

import errno
import os
import random
import tempfile

import numpy as np
import pytest

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data import seen_ids
from gvendi_fast.data.seen_ids import PackedIds, SeenIds, TooManyIdsError, digests


@pytest.fixture(params=[1 << 26, 0], ids=["memory", "disk"])
def held(request, monkeypatch):
    monkeypatch.setattr(seen_ids, "_IDS_BYTES", request.param)
    return request.param


def colliding(ids):
    """Digests with few different homes, most of them at the end of the table and some at its beginning."""
    made = np.frombuffer(digests(ids), np.uint64).reshape(-1, 2).copy()
    made[:, 0] = np.where(made[:, 0] % 5 == 0, made[:, 0] % 3, np.uint64(2**64 - 1) - made[:, 0] % 7)
    return made.tobytes()


@pytest.mark.parametrize("make", [digests, colliding])
@pytest.mark.parametrize("seed", range(3))
def test_equals_a_dict(held, monkeypatch, make, seed):
    monkeypatch.setattr(seen_ids, "digests", make)
    # So that it grows many times, by pieces whose ends lie among entries.
    monkeypatch.setattr(seen_ids, "_SLOTS", 8)
    monkeypatch.setattr(seen_ids, "_SLOTS_AT_ONCE", 16)
    draws = random.Random(seed)
    expected = {}
    with SeenIds() as seen:
        for file in range(6):
            line, mine = 0, []
            for _ in range(12):
                ids = [f"é{draws.randrange(900)}" for _ in range(draws.choice([1, 3, 40]))]
                rows = sorted(draws.sample(range(4096), len(ids)))
                lines = [line := line + draws.randrange(1, 4) for _ in ids]
                wanted = []
                for row, own, at in zip(rows, ids, lines, strict=True):
                    first = expected.setdefault(own, (file, at))
                    if first == (file, at):
                        mine.append(own)
                    else:
                        wanted.append((row, *first))
                assert seen.repeats(file, rows, ids, lines) == wanted
            # In the middle of a table that goes on growing.
            if file in (1, 2, 4):
                seen.forget(file)
                for own in mine:
                    del expected[own]
        assert len(expected) > 300


def test_a_place_holds_the_largest_numbers(held):
    with SeenIds() as seen:
        file, line = (1 << 23) - 1, (1 << 40) - 2
        assert seen.repeats(0, [0], ["a"], [1]) == []
        assert seen.repeats(file, [7, 9], ["b", "b"], [line - 1, line]) == [(9, file, line - 1)]
        assert seen.repeats(file, [3, 4095], ["a", "b"], [line, line]) == [(3, 0, 1), (4095, file, line - 1)]


def test_packed_ids_tell_the_same(monkeypatch):
    monkeypatch.setattr(seen_ids, "_ROWS_AT_ONCE", 50)
    draws = random.Random(4)
    with SeenIds() as at_once, SeenIds() as later:
        for file in range(3):
            packed, wanted, line = PackedIds(), {}, 0
            for unit in draws.sample(range(100), 30):
                ids = [str(draws.randrange(600)) for _ in range(draws.choice([1, 20, 70]))]
                rows = sorted(draws.sample(range(500), len(ids)))
                lines = [line := line + draws.randrange(1, 4) for _ in ids]
                if found := at_once.repeats(file, rows, ids, lines):
                    wanted[unit] = found
                assert packed.pack(unit, rows, ids, lines) == []
            assert wanted
            assert dict(later.repeats_of(file, packed)) == wanted


def test_a_file_with_too_many_ids_is_not_packed(monkeypatch):
    monkeypatch.setattr(seen_ids, "_IDS_BYTES", 160)
    packed = PackedIds()
    packed.pack(0, range(10), [str(number) for number in range(10)], range(10))
    with pytest.raises(TooManyIdsError):
        packed.pack(1, [0], ["one more"], [10])


@pytest.mark.parametrize("kind", ["full", "no such folder"])
def test_a_temporary_folder_without_space_is_named(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(seen_ids, "_IDS_BYTES", 1 << 18)
    if kind == "full":

        def fails(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", fails, raising=False)
        folder = tempfile.gettempdir()
    else:
        folder = str(tmp_path / "none")
        monkeypatch.setattr(tempfile, "tempdir", folder)
    with SeenIds() as seen:
        # These fit into 256 KiB.
        for start in range(0, 5000, 1000):
            ids = [str(number) for number in range(start, start + 1000)]
            assert seen.repeats(0, range(1000), ids, range(start, start + 1000)) == []
        many = [f"more {number}" for number in range(5000)]
        with pytest.raises(GvendiError, match="set TMPDIR") as caught:
            seen.repeats(1, range(5000), many, range(5000))
        assert f"'{folder}'" in str(caught.value)
        # What is known already stays so.
        assert seen.repeats(1, [0, 1], ["0", "4999"], [1, 2]) == [(0, 0, 0), (1, 0, 4999)]


@pytest.mark.parametrize("error", [OSError(errno.EOPNOTSUPP, "no"), OSError(errno.EINVAL, "no"), None])
def test_a_file_is_reserved_where_the_system_cannot(monkeypatch, error):
    def fails(*_):
        raise error

    if error is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", fails, raising=False)
    with tempfile.TemporaryFile() as file:
        seen_ids._reserve(file, (2 << 20) + 24)
        assert os.fstat(file.fileno()).st_size == (2 << 20) + 24
