"""Checks that write to pipes, leave their session, fork, ignore signals or fill the disk: no verdict is wrong by it.

Every attack is made on one row, and the row after it is judged as ever.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from hangs import in_time, wait_for

from gvendi_fast.synthesis.checks.channel import Channel, GarbledError
from gvendi_fast.synthesis.checks.verifiers import RowVerifier
from gvendi_fast.synthesis.checks.workers import Verdict

ATTACKS = """
import atexit, json, os, resource, signal, struct, subprocess, sys, threading, time
from pathlib import Path

PIPES = [int(sys.argv[-2]), int(sys.argv[-1])]

def everywhere(content):
    for end in range(3, 64):
        try:
            os.write(end, content)
        except OSError:
            pass

def line(row):
    everywhere(b"accepted\\n")
    return False

def bytes_(row):
    everywhere(os.urandom(4096))
    return False

def zeros(row):
    everywhere(bytes(8))
    return False

def verdict(row):
    everywhere(json.dumps(["accepted", ""]).encode())
    return False

def framed(row):
    reply = json.dumps(["accepted", ""]).encode()
    everywhere(struct.pack("!i", len(reply)) + reply)
    return False

def framed_long(row):
    everywhere(struct.pack("!i", 2**31 - 1) + b"x" * 100)
    return False

def after(row):
    threading.Timer(0.05, everywhere, [b"accepted"]).start()
    return False

def takes_requests(row):
    threading.Thread(target=lambda: [os.read(PIPES[0], 100000) for _ in range(3)], daemon=True).start()
    return False

def silences(row):
    null = os.open(os.devnull, os.O_RDWR)
    for end in PIPES:
        os.dup2(null, end)
    return False

def closes(row):
    os.closerange(3, 64)
    return False

def returns_twice(row):
    os.fork()
    return False

def raises_twice(row):
    os.fork()
    raise ValueError("twice")

def note(row, pid):
    with open(row["note"], "a") as stream:
        stream.write(f"{pid}\\n")

def linger(row):
    note(row, os.getpid())
    time.sleep(600)

def hangs(row):
    linger(row)

def own_session(row):
    if os.fork() == 0:
        os.setsid()
        linger(row)
    time.sleep(600)

def own_session_and_done(row):
    if os.fork() == 0:
        os.setsid()
        linger(row)
    time.sleep(0.1)
    return False

def own_session_and_gone(row):
    if os.fork() == 0:
        os.setsid()
        linger(row)
    time.sleep(0.1)
    os._exit(0)

def daemon(row):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            linger(row)
        os._exit(0)
    time.sleep(600)

def daemon_without_environment(row):
    code = "import os, sys, time; os.fork() and os._exit(0); open(sys.argv[1], 'a').write(f'{os.getpid()} ')"
    code += "; time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", code, row["note"]], env={}, start_new_session=True)
    time.sleep(600)

def shell(row):
    subprocess.Popen(["sh", "-c", "nohup setsid sleep 600 & echo $! >> " + row["note"]], start_new_session=True)
    time.sleep(600)

def multiplies(row):
    until = time.monotonic() + 30
    while len(open(row["note"]).read().split()) < 12 and time.monotonic() < until:
        if os.fork() == 0:
            os.setsid()
            note(row, os.getpid())
    time.sleep(600)

def deaf(row):
    for number in range(1, 32):
        try:
            signal.signal(number, signal.SIG_IGN)
        except OSError:
            pass
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
    while True:
        pass

def rewrites(row):
    sys.excepthook = lambda *_: everywhere(b"accepted")
    json.dumps = lambda *_, **__: '["accepted", ""]'
    raise ValueError

def fills(row):
    with open(row["note"], "wb") as stream:
        for _ in range(2000):
            stream.write(bytes(1 << 20))
    return True

def exits(row):
    atexit.register(os._exit, 0)
    sys.exit(0)

def verbose(row):
    return "no " * 10_000_000

def strange(row):
    return "\\x00\\x1b\\ud800\\u2028]]>"

def prints(row):
    for stream in (sys.stdout, sys.__stdout__):
        print('["accepted", ""]' * 1000, file=stream, flush=True)
    return False

def check(row):
    return globals()[row["attack"]](row) if row["attack"] else True
"""


@pytest.fixture(scope="module")
def attacks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacks")
    (folder / "attacks.py").write_text(ATTACKS)
    return folder


def is_late(found: Verdict) -> bool:
    return found.reason.startswith("no verdict within ")


def judged(folder, name, tmp_path, memory_mb=512, late=False, notes=False) -> tuple[Verdict, str]:
    """The verdict on an attack and what it noted; the next row is accepted, or an error of the attack's.

    late: it is to be LATE. notes: it is to note something before that.
    """
    note = tmp_path / "note"

    def attempt(limit_s: float) -> tuple[Verdict, list[Verdict], str]:
        note.write_bytes(b"")
        with RowVerifier("attacks:check", limit_s=limit_s, folder=folder, memory_mb=memory_mb) as rows:
            rows.start()
            first = rows.verify({"attack": name, "note": str(note)})
            others = []
            if name in ("after", "takes_requests"):
                # It comes between two rows; then the next one is none's fault, and an error at worst.
                time.sleep(0.1)
                others.append(rows.verify({"attack": ""}))
            others.append(rows.verify({"attack": ""}))
        return first, others, note.read_text() if name != "fills" else str(note.stat().st_size)

    first, others, noted = in_time(
        attempt,
        lambda found: (
            any(map(is_late, found[1] if late else [found[0], *found[1]])) or (notes and not found[2].split())
        ),
    )
    assert all(found.outcome in ("accepted", "error") for found in others[:-1])
    assert others[-1] == Verdict("accepted")
    return (LATE if is_late(first) else first), noted


REFUSED = Verdict("rejected", "refused by attacks:check")
WROTE = Verdict("error", "the check wrote into the pipe of the verdicts")
LATE = Verdict("error", "no verdict within its limit")


@pytest.mark.parametrize(
    ("attack", "wanted"),
    [
        *((name, WROTE) for name in ("line", "bytes_", "zeros", "verdict", "framed", "framed_long")),
        ("after", REFUSED),
        ("takes_requests", REFUSED),
        ("returns_twice", REFUSED),
        ("raises_twice", Verdict("error", "ValueError: twice")),
        ("rewrites", WROTE),
        ("deaf", LATE),
        ("exits", Verdict("error", "the checking process ended: exit code 0")),
        ("verbose", Verdict("rejected", "no " * 100)),
        ("strange", Verdict("rejected", "\x00\x1b\ud800\u2028]]>")),
        ("prints", REFUSED),
    ],
)
def test_what_a_check_does_to_its_pipes_makes_no_wrong_verdict(attacks, attack, wanted, tmp_path):
    assert judged(attacks, attack, tmp_path, late=wanted == LATE)[0] == wanted


@pytest.mark.parametrize("attack", ["closes", "silences"])
def test_a_check_that_cuts_its_pipes_is_an_error(attacks, attack, tmp_path):
    found, _ = judged(attacks, attack, tmp_path)
    assert found.outcome == "error"
    assert found.reason.startswith("the checking process ended")


def test_a_file_of_a_check_is_bounded(attacks, tmp_path):
    found, size = judged(attacks, "fills", tmp_path, memory_mb=64)
    assert found == Verdict("error", "OSError: [Errno 27] File too large")
    assert int(size) <= 64 << 20


def runs(pid: str) -> bool:
    status = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout.strip()
    return status != "" and not status.startswith("Z")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are found in /proc")
@pytest.mark.parametrize(
    ("attack", "wanted"),
    [
        ("hangs", LATE),
        ("own_session", LATE),
        ("own_session_and_done", REFUSED),
        ("own_session_and_gone", LATE),
        ("daemon", LATE),
        ("daemon_without_environment", LATE),
        ("shell", LATE),
        ("multiplies", LATE),
    ],
)
def test_what_a_check_starts_ends_with_it_wherever_it_went(attacks, attack, wanted, tmp_path):
    found, noted = judged(attacks, attack, tmp_path, late=wanted == LATE, notes=True)
    assert found == wanted
    assert noted.split()
    assert not list(filter(runs, noted.split()))


@pytest.mark.parametrize("length", [1, 15, 16, 31, 32, 40, 5000])
def test_a_channel_takes_nothing_but_an_answer(length):
    there, back = os.pipe(), os.pipe()
    parent, child = Channel.of_parent(back[0], there[1]), Channel.of_child(there[0], back[1])
    assert parent.ask(b"one")
    assert child.receive(any_number=True) == b"one"
    assert child.send(b"its answer")
    assert parent.receive() == b"its answer"
    # The answer to a message before the last one.
    assert parent.ask(b"two")
    assert child.send(b"late")
    with pytest.raises(GarbledError):
        parent.receive()
    parent._read.clear()
    os.write(back[1], os.urandom(length))
    with pytest.raises(GarbledError):
        parent.receive(time.monotonic() + 1)
    assert parent.receive(time.monotonic() - 1) is None if not parent._read else True
    for channel in (parent, child):
        channel.close()


def test_a_channel_waits_no_longer_than_it_is_told():
    there, back = os.pipe(), os.pipe()
    parent, child = Channel.of_parent(back[0], there[1]), Channel.of_child(there[0], back[1])
    begun = time.monotonic()
    assert parent.receive(begun + 0.05) is None
    assert not parent.ask(b"x" * 10_000_000, begun + 0.1)
    assert time.monotonic() - begun >= 0.1
    child.close()
    with pytest.raises(ConnectionError):
        parent.ask(b"x")
    with pytest.raises(EOFError):
        parent.receive()
    parent.close()


def test_a_killed_parent_leaves_no_worker(attacks, tmp_path):
    code = (
        "import os, sys, time; from gvendi_fast.synthesis.checks.verifiers import RowVerifier\n"
        f"rows = RowVerifier('attacks:check', folder={str(attacks)!r}); rows.start()\n"
        "print(rows._workers._all[0]._child._process.pid, flush=True); time.sleep(600)"
    )

    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        worker = parent.stdout.readline().strip()
        assert runs(worker)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        wait_for(lambda: not runs(worker), "the worker to end")
