"""Files of a synthesis run that were edited, cut, swapped or hit by a flipped bit: the run and its readers notice."""

import errno
import json
import shutil
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
import torch
from chat_server import ChatServer
from problem_families import seed_rows, writer
from synthesis_runs import contents, lines, run, write_rows

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.disk.check import check_record
from gvendi_fast.synthesis.disk.digests import FILES, read_events, read_through, summed_line, whole_events
from gvendi_fast.synthesis.disk.journal import Journal
from gvendi_fast.synthesis.disk.record import RunRecord

pytest.importorskip("openai", reason="the extra `synthesis` is not installed")
pytest.importorskip("yaml", reason="the extra `synthesis` is not installed")
pytestmark = pytest.mark.usefixtures("loopback", "undrawn")

DIM = 4
SETTINGS = {"settings": {"a": 1}, "sketches": {"dim": DIM}}


def block_event(number: int) -> dict:
    return {
        "block": number, "round": 0, "pool": 10 + 2 * number, "accepted": 2 * (number + 1), "joined": 2,
        "decided": 3, "rejected": {"parse": 1}, "gvendi": 1.5, "gains": [], "cut_short": False,
    }  # fmt: skip


def write_journal(folder) -> None:
    """Three blocks of two accepted rows and a refused one."""
    journal = Journal(folder, SETTINGS, 99)
    journal.start({"pool": 8})
    journal.round(0, {"block": 0, "pool": 8, "clusters": 2})
    for number in range(3):
        accepted = [{"id": f"s-{2 * number + i}", "prompt": f"é\u2028 {i}\r"} for i in range(2)]
        sketches = np.arange(2 * DIM, dtype=np.float32).reshape(2, DIM) + number
        journal.block(accepted, [{"id": f"r-{number}", "stage": "parse"}], sketches, block_event(number))
    journal.note({"event": "stop", "reason": "target", "why": "enough"})
    journal.close()


@pytest.fixture
def folder(tmp_path):
    write_journal(tmp_path)
    return tmp_path


def open_again(folder) -> Journal:
    journal = Journal(folder, SETTINGS, 99)
    journal.close()
    return journal


def changes(raw: bytes):
    """Every byte flipped, every byte left out, a byte put in everywhere, every line left out, doubled or moved."""
    for place in range(len(raw)):
        yield raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        yield raw[:place] + raw[place + 1 :]
        yield raw[:place] + b" " + raw[place:]
    rows = raw.splitlines(keepends=True)
    for place in range(len(rows)):
        yield b"".join(rows[:place] + rows[place + 1 :])
        yield b"".join(rows[: place + 1] + rows[place:])
        yield b"".join(rows[:place] + rows[place + 1 :] + [rows[place]])


@pytest.mark.parametrize("place", range(3), ids=FILES)
def test_any_byte_of_rows_and_sketches_is_noticed(place, folder):
    blocks, path = open_again(folder).blocks, folder / FILES[place]
    raw, tried = path.read_bytes(), 0
    assert read_through(path, place, blocks)[1] == []
    for changed in changes(raw):
        if changed == raw:
            continue
        path.write_bytes(changed)
        # What stands behind the last block was never decided.
        assert (read_through(path, place, blocks)[1] == []) == (changed[: len(raw)] == raw)
        tried += 1
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        assert (
            f"has {length} bytes and the run had written {len(raw)}"
            in read_through(path, place, blocks)[1][0]
        )
    assert tried > 3 * len(raw) - 10


def test_any_byte_of_the_events_is_noticed_or_takes_back_whole_blocks(folder):
    path = folder / "events.jsonl"
    raw = path.read_bytes()
    whole, tried, told = whole_events(path, raw)[0], 0, set()
    rows = raw.splitlines(keepends=True)
    for changed in (*changes(raw), *(raw[:length] for length in range(len(raw)))):
        try:
            events = whole_events(path, changed)[0]
        except GvendiError as error:
            told.add(str(error).partition("' is damaged in line ")[0])
        else:
            assert events == whole[: len(events)]
        tried += 1
    assert tried > 4 * len(raw)
    assert told == {f"'{path}"}
    for wrong in (rows[:3] + rows[4:], rows[1:], rows[:1] + rows[2:], [rows[1], rows[0], *rows[2:]]):
        with pytest.raises(GvendiError, match="damaged in line"):
            whole_events(path, b"".join(wrong))


@pytest.mark.parametrize("name", FILES)
def test_a_run_is_not_opened_over_a_changed_file_and_leaves_it_as_it_is(name, folder):
    path = folder / name
    raw = path.read_bytes()
    changed = bytearray(raw)
    changed[len(raw) // 3] ^= 4
    for there in (bytes(changed), raw[:-1], raw[5:], b""):
        path.write_bytes(there)
        with pytest.raises(GvendiError, match=f"{name}' (is damaged|has .* bytes)") as raised:
            open_again(folder)
        assert "the same run decides again from the answers" in str(raised.value)
        assert path.read_bytes() == there
    path.write_bytes(raw + b"half a li")
    open_again(folder)
    assert path.read_bytes() == raw


def test_a_row_that_was_deleted_gives_no_other_row_its_sketch(folder):
    path = folder / "accepted.jsonl"
    first, second, *others = path.read_bytes().split(b"\n")
    # As long as before, and as many rows as before.
    for there in ([second, *others, first], [first, first, *others]):
        path.write_bytes(b"\n".join(there))
        with pytest.raises(GvendiError, match=r"accepted\.jsonl"):
            open_again(folder)


def without_digests(folder) -> list[dict]:
    """The events as earlier versions wrote them."""
    events = lines(folder / "events.jsonl")
    for event in events:
        for name in ("sum", "digests", "fingerprint"):
            event.pop(name, None)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return events


def test_a_run_of_an_earlier_version_goes_on_and_is_sealed_from_then_on(folder):
    without_digests(folder)
    journal = Journal(folder, SETTINGS, 99)
    assert len(journal.blocks) == 3
    assert [row["id"] for row in journal.accepted()] == [f"s-{i}" for i in range(6)]
    journal.start({"pool": 14})
    journal.block([{"id": "s-6"}], [], np.ones((1, DIM), np.float32), {**block_event(3), "accepted": 7})
    journal.close()
    again = open_again(folder)
    assert ["digests" in event for event in again.blocks] == [False] * 3 + [True]
    # The digest of the fourth block is of the rows before it too.
    for name in ("accepted.jsonl", "events.jsonl"):
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw.replace(b"s-0" if name == "accepted.jsonl" else b"1.5", b"9.9", 1))
        with pytest.raises(GvendiError, match=name):
            open_again(folder)
        (folder / name).write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bytes", [1, 2]), ("bytes", None), ("bytes", [-1, 0, 0]), ("bytes", ["1", 0, 0]), ("bytes", [1.5, 0, 0]),
        ("accepted", -1), ("accepted", "6"), ("block", 7), ("block", True), ("pool", 2**60), ("decided", None),
        ("gains", {}), ("rejected", []), ("rejected", {"parse": "1"}), ("gvendi", "1"), ("cut_short", 0),
        ("digests", [""]), ("event", 3),
    ],
)  # fmt: skip
def test_an_event_of_an_earlier_version_that_was_edited_is_one_sentence(name, value, folder):
    events = without_digests(folder)
    for remove in (False, True):
        changed = [dict(event) for event in events]
        target = next(event for event in changed if event["event"] == "block" and event["block"] == 1)
        if remove:
            target.pop(name, None)
        else:
            target[name] = value
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in changed))
        if remove and name == "digests":
            open_again(folder)
            continue
        with pytest.raises(GvendiError, match=r"events\.jsonl' is damaged in line"):
            open_again(folder)


def old_run_of_two_starts(folder) -> list[dict]:
    """A run of an earlier version that was started twice, with two rounds; its last block met the target."""
    events = without_digests(folder)
    start, round_, *blocks, stop = events
    again = {**start, "pool": 12}
    second = {**round_, "round": 1, "block": 2, "pool": 12}
    blocks[2] = {**blocks[2], "round": 1}
    stops = [{**stop, "reason": "budget", "pool": 12}, {**stop, "pool": 14}]
    return [start, round_, *blocks[:2], stops[0], again, second, blocks[2], stops[1]]


def blocks_read(folder) -> list[dict]:
    return [event for event in read_events(folder)[1] if event["event"] == "block"]


def write_events(folder, events) -> None:
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.mark.parametrize("how", ["deleted", "doubled", "moved"])
@pytest.mark.parametrize("place", range(9))
def test_a_line_of_an_earlier_version_that_is_lost_doubled_or_moved_is_noticed(place, how, folder):
    events = old_run_of_two_starts(folder)
    write_events(folder, events)
    assert len(blocks_read(folder)) == 3
    found = events[:place] + events[place + 1 :]
    if how != "deleted":
        found.insert(place if how == "doubled" else (place + 2) % 9, events[place])
    found = events[: place + 1] + events[place:] if how == "doubled" else found
    write_events(folder, found)
    # Starts and stops tell of no row: without them, or with more, the run is one that was killed, or begun again.
    harmless = {("deleted", 0), ("deleted", 4), ("deleted", 8), *(("doubled", i) for i in (0, 4, 5, 8))}
    if (how, place) in harmless:
        assert len(blocks_read(folder)) == 3
    elif (how, place) == ("deleted", 7):
        # As a kill would leave it; only what comes behind tells that its rows were whole.
        assert any("lacks the events of the last blocks" in told for told in check_record(folder))
    else:
        with pytest.raises(GvendiError, match=r"events\.jsonl' is damaged in line"):
            blocks_read(folder)


@pytest.mark.parametrize(
    ("name", "value"), [("joined", 1), ("accepted", 5), ("pool", 13), ("decided", 9), ("round", 1)]
)
def test_numbers_of_an_earlier_version_must_agree(name, value, folder):
    events = without_digests(folder)
    events[3] = {**events[3], name: value}
    write_events(folder, events)
    with pytest.raises(GvendiError, match=r"line 4: .*; a line was lost or edited"):
        open_again(folder)


def test_a_row_copied_over_another_one_is_found_without_digests(folder):
    without_digests(folder)
    assert not [told for told in check_record(folder) if "jsonl" in told]
    path = folder / "accepted.jsonl"
    first, second, *others = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([first, first, *others]))
    assert any("'s-0' is there twice" in told for told in check_record(folder))
    # As many bytes, and one row less in the first block.
    path.write_bytes(b"\n".join([first + b" " + second, *others]))
    assert any("accepted.jsonl" in told and "line 1" in told for told in check_record(folder))


@pytest.mark.parametrize("there", [b"", b"{", b"[]", b"3", b"{}", b"null", b"\xff", b"[" * 9999, b'{"a": 1}'])
def test_an_edited_fingerprint_is_one_sentence(there, folder):
    (folder / "fingerprint.json").write_bytes(there)
    with pytest.raises(
        GvendiError, match=r"fingerprint.json' is (damaged|missing or not the one)|other settings"
    ):
        open_again(folder)


def test_a_fingerprint_of_another_run_is_noticed_though_the_settings_are_its(folder):
    other = {**SETTINGS, "batch_tokens": 7}
    (folder / "fingerprint.json").write_text(json.dumps(other))
    with pytest.raises(GvendiError, match=r"not the one that the run began with"):
        Journal(folder, other, 99)
    (folder / "fingerprint.json").unlink()
    with pytest.raises(GvendiError, match=r"not the one that the run began with"):
        Journal(folder, other, 99)
    # Its white space and order do not count.
    (folder / "fingerprint.json").write_text(json.dumps(dict(reversed(SETTINGS.items())), indent=7))
    open_again(folder)


@pytest.mark.parametrize("moment", range(4))
def test_a_disk_that_is_full_loses_nothing_and_leaves_no_half_line(moment, tmp_path, monkeypatch):
    write_journal(tmp_path)
    before, events = contents(tmp_path), (tmp_path / "events.jsonl").read_bytes()
    journal = Journal(tmp_path, SETTINGS, 99)
    file = [*journal._files, journal._events][moment]
    stream = file._stream

    class Full:
        def write(self, content):
            stream.write(content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(stream, name)

    file._stream = Full()
    row = [{"id": "s-9"}]
    with pytest.raises(OSError, match="No space left") as raised:
        journal.block(row, row, np.ones((1, DIM), np.float32), {**block_event(3), "accepted": 7})
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(file.path))
    # A run that ends by it notes its end, where it can: not behind half a line.
    file._stream = stream
    if moment < 3:
        journal.note({"event": "stop", "reason": "error", "why": "full"})
    else:
        with pytest.raises(OSError, match="earlier write"):
            journal.note({"event": "stop"})
    journal.close()
    assert len(open_again(tmp_path).blocks) == 3
    assert contents(tmp_path) == before
    assert (tmp_path / "events.jsonl").read_bytes().startswith(events)


def test_rewriting_the_last_block_keeps_the_digests(tmp_path):
    write_journal(tmp_path)
    journal = Journal(tmp_path, SETTINGS, 16)
    cut = {**block_event(3), "accepted": 7, "pool": 16, "cut_short": True}
    journal.block([{"id": "s-6"}], [], np.ones((1, DIM), np.float32), cut)
    journal.note({"event": "stop", "reason": "target", "why": "enough"})
    journal.close()
    assert len(open_again(tmp_path).blocks) == 3
    again = open_again(tmp_path)
    assert [event["event"] for event in lines(tmp_path / "events.jsonl")][-1] == "stop"
    assert len(again.accepted()) == 6


def test_a_line_says_what_the_lines_before_it_were():
    _, digest = whole_events("e", b"")
    raw = b"".join(summed_line({"event": "note", "why": "half \ud800", "sum": "x"}, digest) for _ in range(2))
    first, second = raw.splitlines()
    assert first != second
    assert [event["why"] for event in whole_events("e", raw)[0]] == ["half \ud800"] * 2


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A whole run, and the settings that it goes on with."""
    folder = tmp_path_factory.mktemp("grown")
    seeds = write_rows(folder / "seeds.jsonl", seed_rows(1))
    # As the fixture for single tests has it: sums in another order give other last digits.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with ChatServer(writer()) as server:
        sections = {"accept": {"clusters": 4}, "stop": {"target": 30}}
        run(folder / "run", server.url, seeds, **sections)
        asked = server.arrived.total()

        def again(out):
            status = run(out, server.url, seeds, **sections)
            return status, server.arrived.total() - asked

        yield folder / "run", again
    torch.set_num_threads(threads)


@pytest.fixture
def copied(grown, tmp_path):
    shutil.copytree(grown[0], tmp_path / "run")
    return tmp_path / "run"


def test_a_whole_run_has_no_findings(grown):
    assert check_record(grown[0]) == []
    assert RunRecord(grown[0]).stop["reason"] == "target"


def test_rows_that_are_removed_are_decided_again_from_the_answers_as_before(grown, copied):
    before = contents(copied)
    for name in (*FILES, "events.jsonl", "clusters.safetensors"):
        (copied / name).unlink()
    status, asked = grown[1](copied)
    assert (status.pool, asked) == (30, 0)
    assert contents(copied) == before
    assert check_record(copied) == []


def flip(path, place=0.5):
    raw = bytearray(path.read_bytes())
    raw[int(len(raw) * place)] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        *((name, True) for name in (*FILES, "events.jsonl", "clusters.safetensors")),
        ("fingerprint.json", False),
    ],
)
def test_a_flipped_bit_is_found_by_readers_and_by_the_check(name, reader, copied):
    flip(copied / name, 0.9)
    found = check_record(copied)
    assert len(found) == 1
    assert name in found[0]
    if reader:
        with pytest.raises(GvendiError, match=f"{name}' is damaged"):
            RunRecord(copied).clusters  # noqa: B018


@pytest.mark.parametrize("there", [b"", b"{", b"[1]", b'{"a": 1}', b"\x00\xff"])
@pytest.mark.parametrize("name", ["fingerprint.json", "config.yaml"])
def test_an_edited_file_of_settings_is_one_sentence_of_readers(name, there, copied):
    (copied / name).write_bytes(there)
    assert any(name in finding for finding in check_record(copied))
    with pytest.raises(GvendiError):
        RunRecord(copied)


@pytest.mark.parametrize("tokens", ["2048", 0, -1, 1.5, None, [], True])
def test_batch_tokens_that_were_edited_do_not_reach_the_sketcher(tokens, grown, copied):
    found = json.loads((copied / "fingerprint.json").read_text())
    (copied / "fingerprint.json").write_text(json.dumps({**found, "batch_tokens": tokens}))
    from gvendi_fast.synthesis.run import _recorded

    with pytest.raises(
        GvendiError, match=f"fingerprint.json' is damaged: batch_tokens is {tokens!r}".replace("[", r"\[")
    ):
        _recorded(copied)
    assert "not the one that the run began with" in check_record(copied)[0]


def test_a_lost_fingerprint_is_named_and_written_anew_by_the_same_run(gvendi, grown, copied):
    before = contents(copied)
    path = copied / "fingerprint.json"
    path.unlink()
    resume = f"'gvendi synthesize --resume {copied}'"
    said = f"'{path}' is missing; restore it from a copy, or go on with {resume}, which writes it anew if no setting "
    code, out, err = gvendi("check", copied)
    assert (code, err) == (1, "")
    line, summary = out.splitlines()
    assert line.startswith("damaged: ")
    assert said in line
    assert summary.startswith(f"1 finding in '{copied}'")
    assert said in gvendi("report", copied)[2]
    assert grown[1](copied)[1] == 0
    assert contents(copied) == before
    assert gvendi("check", copied)[0] == 0


@pytest.mark.parametrize(
    ("left", "count"),
    [
        (("requests.sqlite", "config.yaml", "accepted.jsonl"), 2),
        (("requests.sqlite", "events.jsonl"), 3),
        (("requests.sqlite", "pool"), 0),
        (("pool", "config.yaml"), None),
        (("requests.sqlite",), None),
    ],
)
def test_what_is_left_of_a_run_is_known_for_one(gvendi, copied, left, count):
    for path in copied.iterdir():
        if path.name not in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    code, out, err = gvendi("check", copied)
    if count is None:
        assert (code, out) == (1, "")
        assert err.startswith(f"error: '{copied}' is not a run directory")
        return
    assert (code, err) == (int(count > 0), "")
    lines = out.splitlines()
    # Rows and sketches that the events name are findings of their own.
    assert len(lines) > count
    assert any("fingerprint.json' is missing" in line for line in lines) == (count > 0)


def test_a_run_that_was_killed_before_it_began_has_no_findings(gvendi, copied, tmp_path):
    shutil.copy(copied / "requests.sqlite", tmp_path / "requests.sqlite")
    shutil.rmtree(copied)
    copied.mkdir()
    shutil.move(tmp_path / "requests.sqlite", copied / "requests.sqlite")
    (copied / "pool").mkdir()
    assert gvendi("check", copied) == (0, f"nothing is wrong in '{copied}'\n", "")
    (copied / "pool" / "units.json").write_text("{}")
    code, out, _ = gvendi("check", copied)
    assert code == 1
    assert f"'{copied / 'pool'}' is not a run directory" in out


def test_a_request_store_that_was_changed_is_found(copied):
    path = copied / "requests.sqlite"
    with sqlite3.connect(path) as store:
        key = store.execute("SELECT key FROM requests WHERE status = 'ok'").fetchone()[0]
        store.execute("UPDATE requests SET answer = 'half' WHERE key = ?", (key,))
    store.close()
    assert check_record(copied) == [
        f"'{path}' is damaged: the answer to {key[:16]}... cannot be read any more"
    ]
    with sqlite3.connect(path) as store:
        store.execute("UPDATE requests SET request = '{}' WHERE key = ?", (key,))
    store.close()
    assert "is not the one that its key names" in check_record(copied)[0]
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    assert "requests.sqlite" in check_record(copied)[0]
    path.write_bytes(b"no database" * 100)
    assert "file is not a database" in check_record(copied)[0]
    path.unlink()
    assert "asked for again" in check_record(copied)[0]


def test_the_check_writes_nothing_and_leaves_a_run_under_way_alone(copied):
    from gvendi_fast.synthesis.generators.request_store import RequestStore

    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in copied.iterdir()}
    assert check_record(copied) == []
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in copied.iterdir()} == before
    with RequestStore(copied / "requests.sqlite"):
        assert check_record(copied) == []


def test_temporary_files_of_a_killed_process_are_gone_with_the_next_run(grown, copied):
    from gvendi_fast.base import files

    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    names = [
        f".{name}.{files.host_name()}.{dead.pid}.{'0' * 32}.tmp"
        for name in ("config.yaml", "fingerprint.json", "events.jsonl", "report.html", "clusters.safetensors")
    ]
    for name in names:
        (copied / name).write_text("half")
    grown[1](copied)
    assert not [name for name in names if (copied / name).exists()]


@pytest.mark.parametrize("how", ["missing", "empty", "half a line"])
def test_lost_events_do_not_cut_off_the_rows(grown, copied, how):
    before = contents(copied)
    raw = (copied / "events.jsonl").read_bytes()
    (copied / "events.jsonl").unlink()
    if how != "missing":
        (copied / "events.jsonl").write_bytes(b"" if how == "empty" else raw[:20])
    wanted = "events.jsonl' is missing" if how == "missing" else "events.jsonl' holds no event"
    assert any(wanted in finding for finding in check_record(copied))
    for act in (grown[1], RunRecord):
        with pytest.raises(GvendiError, match=wanted):
            act(copied)
    assert contents(copied) == before
    (copied / "events.jsonl").write_bytes(raw)
    assert check_record(copied) == []


@pytest.mark.parametrize("name", ["accepted.jsonl", "rejected.jsonl", "sketches.f32", "spec.json"])
def test_a_folder_of_someone_elses_files_is_not_written_over(grown, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(GvendiError, match=f"its '{name}' would be overwritten; give another directory"):
        grown[1](tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["requests.sqlite", "config.yaml", "events.jsonl", "accepted.jsonl"])
@pytest.mark.parametrize(("how", "number"), [("folder", errno.EISDIR), ("circle", errno.ELOOP)])
def test_what_the_system_refuses_is_no_damage_of_a_run(copied, name, how, number):
    from gvendi_fast.synthesis.disk.check import check_directory

    (copied / name).unlink()
    if how == "folder":
        (copied / name).mkdir()
    else:
        (copied / name).symlink_to(copied / name)
    with pytest.raises(OSError, match=name) as caught:
        check_record(copied)
    assert (caught.value.errno, caught.value.filename) == (number, str(copied / name))
    assert [(item.kind, item.path) for item in check_directory(copied).findings] == [
        ("unreadable", str(copied / name))
    ]
