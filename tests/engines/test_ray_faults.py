"""Actors and drivers are killed, work units hang and crash their process: nothing is lost or done twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray_parts
from hangs import wait_for
from ray_parts import ENVIRONMENT, RAY, PoisonedRay, settings, write_corpus
from run_contents import contents

import gvendi_fast
from gvendi_fast.analysis.scoring import score_run
from gvendi_fast.base.files import is_dead
from gvendi_fast.data.leases import Terms, quarantined
from gvendi_fast.data.run_directory import RunDirectory
from gvendi_fast.data.worker_records import read_workers
from gvendi_fast.engines import RayEngine
from gvendi_fast.sketching.corpus import UnitsFailedError

pytestmark = pytest.mark.soak
KINDS = ("actor", "driver", "both")
HOME = Path(gvendi_fast.__file__).parents[1]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a Ray of this machine that outlives drivers."""
    ray = pytest.importorskip("ray", reason="the engine 'ray' is an extra")
    pytest.importorskip("ray.data", reason="the engine 'ray' is an extra")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(ray_parts.__file__).parent}:{HOME}")
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        context = ray.init(logging_level="ERROR", **RAY)
        yield context.address_info["gcs_address"]
        ray.shutdown()


def drive(corpus: Path, out: Path, address: str) -> subprocess.Popen:
    command = [sys.executable, ray_parts.__file__, str(corpus), str(out), address]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def actors(out: Path) -> list[int]:
    """Processes that work in a run directory now."""
    records = read_workers(out).found.values()
    return sorted(record.pid for record in records if not record.ended and not is_dead(record.pid))


def parts(out: Path) -> int:
    return len(list((out / "parts").glob("part-*.parquet"))) if (out / "parts").is_dir() else 0


def end(pid: int) -> None:
    """Kill a process, which may have ended meanwhile."""
    if not is_dead(pid):
        os.kill(pid, signal.SIGKILL)


def check_same(out: Path, alone: Path) -> None:
    assert {name: content for name, content in contents(out).items() if name.startswith("parts/")} == {
        name: content for name, content in contents(alone).items() if name.startswith("parts/")
    }
    run, whole = RunDirectory.load(out), RunDirectory.load(alone)
    assert (out / "rejected.jsonl").read_bytes() == (alone / "rejected.jsonl").read_bytes()
    assert score_run(run).gvendi == score_run(whole).gvendi
    assert not quarantined(out)


@pytest.mark.parametrize("seed", [1])
def test_twenty_kills_of_actors_and_drivers_lose_and_double_nothing(address, seed, tmp_path):
    draw = random.Random(seed)
    units, kills = 120, 20
    corpus = write_corpus(tmp_path / "corpus.jsonl", units)
    gvendi_fast.sketch(corpus, out=tmp_path / "alone", proxy="tiny", settings=settings())
    out, driver, done = tmp_path / "run", None, 0
    for kill in range(kills):
        if driver is None or driver.poll() is not None:
            driver = drive(corpus, out, address)
        before = parts(out)
        # A few work units later, with an actor at work on the next.
        wanted = min(before + draw.randint(1, 5), units - 2 * (kills - kill))
        wait_for(
            lambda wanted=wanted, driver=driver: (
                (parts(out) >= wanted and actors(out)) or driver.poll() is not None
            ),
            f"part {wanted} and an actor, before kill {kill}",
        )
        assert driver.poll() is None, driver.stderr.read().decode()
        kind = draw.choice(KINDS)
        if kind in ("actor", "both"):
            end(draw.choice(actors(out) or [driver.pid]))
        if kind in ("driver", "both"):
            driver.kill()
            driver.communicate()
        done += 1
        print(f"kill {kill + 1}: {kind}, at {parts(out)} of {units} parts", flush=True)
    if driver.poll() is not None:
        driver = drive(corpus, out, address)
    said = driver.communicate()[1].decode()
    assert driver.returncode == 0, said
    assert done == kills
    check_same(out, tmp_path / "alone")


def test_a_driver_whose_own_ray_dies_with_it_is_followed_by_the_next(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="the engine 'ray' is an extra")
    monkeypatch.setenv("PYTHONPATH", f"{Path(ray_parts.__file__).parent}:{HOME}")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    corpus = write_corpus(tmp_path / "corpus.jsonl", 30)
    gvendi_fast.sketch(corpus, out=tmp_path / "alone", proxy="tiny", settings=settings())
    out = tmp_path / "run"
    first = drive(corpus, out, "local")
    wait_for(lambda: parts(out) >= 3 or first.poll() is not None, "three parts")
    pids = actors(out)
    first.kill()
    first.communicate()
    wait_for(lambda: all(map(is_dead, pids)), "the actors of a driver that was killed")
    second = drive(corpus, out, "local")
    said = second.communicate()[1].decode()
    assert second.returncode == 0, said
    check_same(out, tmp_path / "alone")


def test_two_drivers_on_one_run_directory_share_its_work(address, tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", 60)
    gvendi_fast.sketch(corpus, out=tmp_path / "alone", proxy="tiny", settings=settings())
    out = tmp_path / "run"
    drivers = [drive(corpus, out, address) for _ in range(2)]
    for driver in drivers:
        said = driver.communicate()[1].decode()
        assert driver.returncode == 0, said
    check_same(out, tmp_path / "alone")


def test_units_that_raise_hang_crash_and_exit_are_named_and_the_rest_is_done(address, tmp_path):
    marks = {3: "POISON", 8: "HANG", 13: "CRASH", 18: "EXIT"}
    corpus = write_corpus(tmp_path / "corpus.jsonl", 24, marks)
    gvendi_fast.sketch(corpus, out=tmp_path / "alone", proxy="tiny", settings=settings())
    terms = Terms(lease_s=20, max_attempts=2, max_losses=2, hang_after_s=4)
    out = tmp_path / "run"
    with pytest.raises(UnitsFailedError) as caught:
        gvendi_fast.sketch(corpus, out=out, proxy="tiny", settings=settings(terms), engine=PoisonedRay(2))
    assert caught.value.units == sorted(marks)
    assert caught.value.exit_code == 3
    found = quarantined(out)
    kinds = {unit: {attempt.kind for attempt in failed.attempts} for unit, failed in found.items()}
    assert kinds[3] == {"error"}
    assert "hung" in kinds[8]
    assert kinds[13] == kinds[18] == {"lost"}
    assert "this row is poison" in found[3].attempts[0].traceback
    assert "_hang" in "".join(attempt.traceback for attempt in found[8].attempts)
    assert parts(out) == 20
    # The same command, when what failed is mended: they are tried again.
    again = replace(settings(), retry_failed=True)
    gvendi_fast.sketch(corpus, out=out, proxy="tiny", settings=again, engine=RayEngine(2))
    check_same(out, tmp_path / "alone")
