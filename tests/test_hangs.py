"""What ends a test: processor time and quiet, not the clock of a busy machine."""

import ast
import os
import subprocess
import sys
import threading
from pathlib import Path

import hangs
import pytest
from hangs import HANG_S, LOOK_EVERY_S, QUIET_S, QUIET_SHARE, Watch

TESTS = Path(__file__).parent


class Machine:
    """A clock and a count of processor seconds that a test moves."""

    used = now = 0.0

    def watch(self, limit_s: float = 900) -> Watch:
        return Watch(limit_s, lambda: self.used, lambda: self.now)

    def passes(self, watch: Watch, seconds: float, share: float) -> str | None:
        """Looks while `seconds` go by in which its processes have this share of a core: the first reason to end."""
        for _ in range(int(seconds / LOOK_EVERY_S)):
            self.now += LOOK_EVERY_S
            self.used += share * LOOK_EVERY_S
            if (why := watch.why_ended()) is not None:
                return why
        return None


def test_a_test_that_gets_a_fiftieth_of_a_core_is_not_ended():
    machine = Machine()
    assert machine.passes(machine.watch(), 40_000, 2 * QUIET_SHARE) is None


def test_a_loop_without_an_end_is_ended_by_processor_time():
    machine = Machine()
    assert machine.passes(machine.watch(), 100_000, 0.1).startswith("901 s of processor time")
    assert machine.now == 9_010
    assert machine.passes(machine.watch(5), 10, 1.0) == "10 s of processor time, and 5 s are its limit"


@pytest.mark.skipif(not hangs.PROC.exists(), reason="quiet is seen in /proc")
@pytest.mark.parametrize("share", [0.0, QUIET_SHARE / 2])
def test_a_wait_for_what_never_comes_is_ended(share):
    machine = Machine()
    assert machine.passes(machine.watch(), 10_000, share).startswith("waits: ")
    assert QUIET_S < machine.now < 2.5 * QUIET_S


@pytest.mark.skipif(not hangs.PROC.exists(), reason="children that still run are seen in /proc")
def test_processor_time_is_of_the_whole_family():
    before = hangs.processor_time()
    code = (
        "import subprocess, sys, time; subprocess.run([sys.executable, '-c', 'sum(range(8_000_000))'])\n"
        "while time.process_time() < 0.3: pass\nprint(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as child:
        child.stdout.readline()
        while_it_runs = hangs.processor_time() - before
        child.stdin.close()
    assert while_it_runs > 0.3
    # Ended, it counts as before.
    assert hangs.processor_time() - before >= while_it_runs


HANGING = """
import pytest

@pytest.fixture
def slow():
    while True:
        pass

def test_one(slow):
    pass

def test_two():
    while True:
        pass
"""


def test_the_step_that_hangs_is_named_and_the_next_test_is_run(tmp_path):
    (tmp_path / "test_hanging.py").write_text(HANGING)
    (tmp_path / "conftest.py").write_text(
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\nimport hangs\nhangs.LOOK_EVERY_S = 0.05\n"
        "def pytest_configure(config): config.pluginmanager.register(hangs.Plugin())\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-o", "timeout=0.2", "-p", "no:cacheprovider"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S).stdout
    assert "hangs in the fixture 'slow': " in said
    assert "hangs in the test itself: " in said
    assert "1 failed, 1 error" in said


@pytest.mark.skipif(not hangs.PROC.exists(), reason="children that still run are seen in /proc")
def test_children_are_the_same_with_and_without_the_kernel_s_list():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(flush=True); input()'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as child:
        child.stdout.readline()
        if not Path(f"/proc/self/task/{threading.get_native_id()}/children").exists():
            pytest.skip("the kernel keeps no list of children")
        backwards = hangs._parents_read_backwards()
        for process in (os.getpid(), child.pid):
            assert sorted(hangs._listed_children(process)) == sorted(backwards(process)) != []
        child.stdin.close()


# {call: place of its limit} where a test waits by the clock.
WAITS = {"communicate": None, "wait": 0, "result": 0, "join": 0, "run": None}


def short_limits(source: str) -> list[int]:
    """Lines where a wait has a number of seconds as its limit: on a busy machine that is a failure.

    A part of a second is meant to pass: that something still waits, or looks again.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        place = WAITS.get(node.func.attr, "no wait")
        if place == "no wait":
            continue
        limits = [word.value for word in node.keywords if word.arg == "timeout"]
        limits += node.args[place : place + 1] if place is not None else []
        found += [node.lineno for one in limits if isinstance(one, ast.Constant) and (one.value or 0) >= 1]
    return found


def test_no_test_has_a_limit_of_its_own_by_the_clock():
    found = {
        f"{path.relative_to(TESTS)}:{line}"
        for path in TESTS.rglob("*.py")
        for line in short_limits(path.read_text())
    }
    assert found == set()


def test_a_short_limit_is_found():
    source = (
        "pool.submit(f).result(60)\nx.communicate(timeout=5)\nevent.wait(2)\nsubprocess.run(a, timeout=3)\n"
    )
    assert short_limits(source) == [1, 2, 3, 4]
    assert short_limits("event.wait(HANG_S)\nevent.wait(timeout=None)\nevent.wait(0.3)\n','.join(a)\n") == []
