"""How many threads: affinity, quotas of both versions of control groups, what others use, and the user's own word."""

import os
import subprocess
import sys

import pytest
import torch
from hangs import HANG_S

from gvendi_fast.base import threads
from gvendi_fast.base.threads import Choice, Cores, Load, choose, crowded, quota, using, wait_briefly


def tree(root, files: dict[str, str]):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


GROUPS = {
    "none": ({}, None),
    "version 2": (
        {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"},
        1.5,
    ),
    "version 2, no limit": ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
    "version 2, a limit above": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "400000 100000\n",
            "sys/fs/cgroup/cpu.max": "800000 100000\n",
        },
        4.0,
    ),
    "version 2 in a container": (
        {"proc/self/cgroup": "0::/host/docker/1\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"},
        2.0,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/a\n0::/\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/x/cpu.max": "1 100000\n",
        },
        0.5,
    ),
    "version 1, no limit": (
        {
            "proc/self/cgroup": "1:cpu:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
}


@pytest.mark.parametrize(("files", "wanted"), GROUPS.values(), ids=GROUPS)
def test_the_quota_of_either_version_is_read(tmp_path, files, wanted):
    assert quota(tree(tmp_path, files)) == wanted


def stat(*busy: int) -> str:
    """/proc/stat of cores that have been busy for so many ticks; what is idle or waits for a disk does not count."""
    lines = [f"cpu{i} {n} 0 10 999 50 0 0 0 7 0" for i, n in enumerate(busy)]
    return "\n".join(["cpu  1 2 3 4 5 6 7 8 0 0", *lines, "intr 1 2", "ctxt 5", ""])


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Four cores of which this process may use so many; returns the load after a second."""
    tick = os.sysconf("SC_CLK_TCK")
    clock = [0.0]
    monkeypatch.setattr(threads.time, "monotonic", lambda: clock[0])

    def after_a_second(may_use, busy, own=0.0, files=None):
        clock[0] = 0.0
        tree(tmp_path, {"proc/stat": stat(0, 0, 0, 0), **(files or {})})
        monkeypatch.setattr(threads, "affinity", lambda: frozenset(may_use))
        monkeypatch.setattr(threads.os, "times", lambda: (own * clock[0], 0.0, 0.0, 0.0, 0.0))
        load = Load(tmp_path)
        clock[0] = 1.0
        tree(tmp_path, {"proc/stat": stat(*(round(share * tick) for share in busy))})
        return load.cores()

    return after_a_second


def test_what_others_use_is_what_the_cores_do_less_what_this_process_does(machine):
    assert machine(range(4), (1.0, 0.5, 0.0, 0.0), own=0.5) == Cores(4, 1.0)
    assert machine(range(4), (0.9, 0.0, 0.0, 0.0), own=1.0) == Cores(4, 0.0)
    # Cores that it may not use may do what they like.
    assert machine((2, 3), (1.0, 1.0, 0.0, 0.25)) == Cores(2, 0.25)


def test_a_quota_takes_cores_and_the_rest_of_the_machine_may_be_busy(machine):
    two = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}
    assert machine(range(4), (1.0, 1.0, 0.0, 0.0), files=two) == Cores(2, 0.0)
    assert machine(range(4), (1.0, 1.0, 1.0, 0.0), files=two) == Cores(2, 1.0)
    less_than_one = {"sys/fs/cgroup/cpu.max": "50000 100000\n"}
    assert machine(range(4), (0.0,) * 4, files=less_than_one).allowed == 1


def test_a_system_that_does_not_count_leaves_all_cores(tmp_path):
    load = Load(tmp_path)
    assert load.cores() == Cores(len(threads.affinity()), None)
    assert load.cores().free == len(threads.affinity())


@pytest.mark.parametrize(
    ("allowed", "others", "free"),
    [
        (2, 0.0, 2),
        (2, 0.2, 2),
        (2, 0.5, 1),
        (2, 1.0, 1),
        (2, 2.0, 1),
        (1, 1.0, 1),
        (16, 3.5, 12),
        (4, None, 4),
    ],
)
def test_threads_find_a_core_each(allowed, others, free):
    assert Cores(allowed, others).free == free


def test_the_user_comes_first_and_crowded_cores_are_said():
    busy, quiet = Cores(2, 1.0), Cores(2, 0.0)
    assert choose(None, {}, quiet).count == 2
    assert choose(None, {}, quiet).said is None
    chosen = choose(None, {}, busy)
    assert chosen.count == 1
    assert chosen.said == "1 thread: other processes use 1.0 of 2 cores (--threads 2 takes all)"
    # What OMP_NUM_THREADS says stays as it is, and --threads beats it.
    assert choose(None, {"OMP_NUM_THREADS": "2"}, busy).count is None
    assert "--threads 1 may be faster" in choose(None, {"OMP_NUM_THREADS": "2,1"}, busy).said
    assert choose(2, {"OMP_NUM_THREADS": "1"}, busy).count == 2
    assert choose(None, {"OMP_NUM_THREADS": "x"}, busy).count == 1
    assert crowded(2, busy) == (
        "2 threads on 2 cores of which other processes use 1.0: threads wait for each other, and --threads 1 may be "
        "faster"
    )
    assert crowded(3, quiet).startswith("3 threads on 2 cores: ")
    assert crowded(2, quiet) is crowded(1, busy) is None


def test_a_task_of_slurm_takes_the_cpus_that_it_was_given_bound_or_not():
    node, bound, busy = Cores(16, 0.0), Cores(2, 0.0), Cores(16, 14.0)
    for task in ({"SLURM_PROCID": "3"}, {"SLURM_ARRAY_TASK_ID": "7"}):
        environment = {**task, "SLURM_CPUS_PER_TASK": "4"}
        assert choose(None, environment, node) == Choice(4, "SLURM_CPUS_PER_TASK")
        assert choose(None, environment, bound).count == 2
        assert "--threads 2 may be faster" in choose(None, environment, busy).said
        # What is said of threads themselves counts first.
        assert choose(None, {**environment, "OMP_NUM_THREADS": "1"}, node).count is None
        assert choose(8, environment, node).count == 8
        # Of several processes in one task none has them all.
        assert choose(None, {**environment, "RANK": "0", "WORLD_SIZE": "4"}, busy).count == 2
        assert choose(None, task, node).count == 16
    # A shell of salloc is no task.
    assert choose(None, {"SLURM_CPUS_PER_TASK": "4"}, node).count == 16


def test_numbers_hold_within_the_block_alone():
    environment, before = {"MKL_NUM_THREADS": "7"}, torch.get_num_threads()
    with using(before + 1, environment):
        assert environment == {"OMP_NUM_THREADS": str(before + 1), "MKL_NUM_THREADS": str(before + 1)}
        assert torch.get_num_threads() == before + 1
    assert environment == {"MKL_NUM_THREADS": "7"}
    assert torch.get_num_threads() == before
    with using(None, environment):
        assert environment == {"MKL_NUM_THREADS": "7"}


@pytest.mark.parametrize("name", threads.WAITING)
def test_how_threads_wait_is_the_users_to_say(name):
    environment = {name: "x"}
    wait_briefly(environment)
    assert environment == {name: "x"}


def said(code: str) -> list[str]:
    """Lines of a process without settings of threads."""
    dropped = (threads.NUMBER, "MKL_NUM_THREADS", *threads.WAITING)
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, check=True, timeout=HANG_S
    ).stdout.splitlines()


def test_the_command_sets_both_before_pytorch_and_an_import_sets_neither():
    code = (
        "import os, sys\nfrom gvendi_fast import cli\nsys.argv = ['gvendi', '--version']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "from gvendi_fast.cli.threads import with_threads\n"
        "def command():\n"
        "    assert 'torch' not in sys.modules\n    import torch\n"
        "    print(torch.get_num_threads(), os.environ['GOMP_SPINCOUNT'])\n"
        "with_threads(command)(threads=1)\n"
    )
    assert said(code)[1:] == [f"1 {threads.SPINS}"]
    left = (
        "import os, gvendi_fast; gvendi_fast.SketchSpec\n"
        "print([name for name in os.environ if name.startswith(('OMP', 'GOMP'))])"
    )
    assert said(left) == ["[]"]
