"""Comparing answers in processes that can be killed, and voting."""

import os
import signal
import subprocess
import sys
import time
from itertools import product

import pytest
from hangs import HANG_S, LIMITS_S, in_time

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.synthesis.checks.verifiers import AnswerChecker, RowVerifier, majority
from gvendi_fast.synthesis.checks.workers import Verdict

LATE = "no verdict within "
USER_CHECKS = """
import os, subprocess, sys, time
from pathlib import Path

def good(row):
    print("a check may print")
    return row["completion"] == "good" or "not good"

def slow(row):
    time.sleep(6000)

def raises(row):
    raise KeyError(row["prompt"])

def leaves(row):
    sys.exit(3)

def crashes(row):
    os.kill(os.getpid(), 11)

def hoards(row):
    return len(bytearray(1 << 40)) > 0

def regex(row):
    import re
    return re.fullmatch("(a+)+b", "a" * 64) is None

def counts(row):
    return 3

def by_name(row):
    name = row["prompt"]
    return globals()[name](row) if name in globals() else True

def forks(row):
    child = subprocess.Popen(["sleep", "6000"])
    Path(row["prompt"]).write_text(str(child.pid))
    time.sleep(6000)

def leaves_behind(row):
    child = subprocess.Popen(["sleep", "6000"])
    Path(row["prompt"]).write_text(str(child.pid))
    return True

class Checks:
    @staticmethod
    def both(row):
        return bool(row["prompt"] and row["completion"])
"""


@pytest.fixture(scope="module")
def checker():
    pytest.importorskip("math_verify", reason="needs the extra 'synthesis'")
    with AnswerChecker(limit_s=HANG_S) as answers:
        yield answers


@pytest.fixture(scope="module")
def hasty():
    """One that waits no longer than it takes to see that it would not wait."""
    pytest.importorskip("math_verify", reason="needs the extra 'synthesis'")
    with AnswerChecker(limit_s=LIMITS_S[0]) as answers:
        yield answers


def is_late(found: Verdict) -> bool:
    return found.reason.startswith(LATE)


def the_next_comparison_works(checker: AnswerChecker) -> bool:
    """A busy machine may be late a few times."""
    return any(checker.same("1/2", "0.5").outcome == "same" for _ in range(20))


@pytest.fixture(scope="module")
def user_checks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checks")
    (folder / "my_checks.py").write_text(USER_CHECKS)
    sys.path.insert(0, str(folder))
    yield "my_checks"
    sys.path.remove(str(folder))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *product(["1/2", "0.5", r"\frac12", r"\frac{1}{2}", r"\dfrac{1}{2}"], ["1/2", r"50\%", ".5"]),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("1,000", "1000"),
        (r"\{1, 2\}", r"\{2, 1\}"),
        ("x = 5", "5"),
        ("x^2 + 2x + 1", "(x+1)^2"),
        ("5 ", " 5"),
        (r"\text{yes}", "yes"),
    ],
)
def test_equal_forms_are_the_same_in_both_orders(checker, one, other):
    assert [checker.same(one, other).outcome, checker.same(other, one).outcome] == ["same", "same"]


@pytest.mark.parametrize(
    ("one", "other"), [("1", "2"), ("x", "y"), ("yes", "no"), ("-3", "3"), ("1\x00", "2")]
)
def test_other_answers_are_different(checker, one, other):
    assert checker.same(one, other) == Verdict("different")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "empty"),
        ("9" * 1_000_000, "1000000 characters"),
        ("}{", "unbalanced"),
        ("1} \\boxed{2", "unbalanced"),
        ("\\frac{1}{2", "unbalanced"),
    ],
)
def test_unusable_answers_are_errors_without_a_comparison(checker, answer, reason):
    begun = time.process_time()
    for pair in [(answer, "1"), ("1", answer), (answer, answer)]:
        verdict = checker.same(*pair)
        assert verdict.outcome == "error"
        assert reason in verdict.reason
    assert time.process_time() - begun < 1


def test_a_hostile_answer_is_an_error_in_time_and_the_next_comparison_works(hasty):
    for answer in ["9^{9^{9^{9}}}", "10000000!", "{" * 60 + "1" + "}" * 60]:
        assert hasty.same(answer, "1") == Verdict("error", f"no verdict within {LIMITS_S[0]:g} s")
        assert the_next_comparison_works(hasty)


@pytest.mark.parametrize(
    "answer", [r"\frac{1}{0}", "(" * 90 + "1" + ")" * 90, "x^{" * 60 + "2" + "}" * 60, "\\" * 99]
)
def test_an_answer_that_upsets_the_checker_is_never_the_same(hasty, answer):
    assert hasty.same(answer, "1").outcome in ("different", "error")
    assert the_next_comparison_works(hasty)


def test_division_by_zero_is_an_error_that_names_itself(checker):
    verdict = checker.same(r"\frac{1}{0}", "1")
    assert verdict.outcome == "error"
    assert "ValueError" in verdict.reason


def test_identical_texts_are_the_same_even_where_they_cannot_be_computed(checker):
    assert checker.same("9^{9^{9^{9}}}", "9^{9^{9^{9}}} ").outcome == "same"


def test_many_comparisons_keep_their_order_and_the_hung_one_is_alone():
    pytest.importorskip("math_verify", reason="needs the extra 'synthesis'")
    pairs = [("1/2", "0.5"), ("9^{9^{9^{9}}}", "1"), ("1", "2"), ("x", "x"), ("", "1")] * 2

    def attempt(limit_s: float) -> list[Verdict]:
        with AnswerChecker(workers=2, limit_s=limit_s) as answers:
            return answers.compare(pairs)

    found = in_time(attempt, lambda verdicts: sum(map(is_late, verdicts)) > 2)
    assert [verdict.outcome for verdict in found] == ["same", "error", "different", "same", "error"] * 2


def test_memory_has_a_limit(user_checks):
    with RowVerifier(f"{user_checks}:hoards", memory_mb=512) as rows:
        assert rows.verify({"prompt": ""}) == Verdict("error", "MemoryError")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raises", "KeyError: 'raises'"),
        ("leaves", "the checking process ended: exit code 3"),
        ("crashes", "the checking process ended: signal 11"),
        ("counts", "returned a int; wanted True, False or a reason"),
        ("slow", LATE),
        ("regex", LATE),
    ],
)
def test_a_failing_check_is_an_error_and_the_next_row_is_checked(user_checks, name, reason):
    def attempt(limit_s: float) -> list[Verdict]:
        with RowVerifier(f"{user_checks}:by_name", limit_s=limit_s) as rows:
            return rows.verify_all([{"prompt": name}, {"prompt": "-"}])

    first, second = in_time(attempt, lambda found: any(map(is_late, found[reason == LATE :])))
    assert first.outcome == "error"
    assert reason in first.reason
    assert second == Verdict("accepted")


def test_a_users_check_accepts_and_rejects_with_its_reason(user_checks):
    with RowVerifier(f"{user_checks}:good") as rows:
        good, bad = rows.verify_all([{"completion": "good"}, {"completion": "bad"}])
    assert (good, bad) == (Verdict("accepted"), Verdict("rejected", "not good"))
    with RowVerifier(f"{user_checks}:Checks.both") as rows:
        assert rows.verify({"prompt": "a", "completion": ""}).reason == "refused by my_checks:Checks.both"


def test_what_a_hung_check_started_is_killed_with_it(user_checks, tmp_path):
    note = tmp_path / "pid"

    def attempt(limit_s: float) -> Verdict:
        with RowVerifier(f"{user_checks}:forks", limit_s=limit_s) as rows:
            return rows.verify({"prompt": str(note)})

    assert in_time(attempt, lambda found: not note.exists() or not note.read_text()).outcome == "error"
    assert is_gone(note.read_text())


def is_gone(pid: str) -> bool:
    """Whether a process is gone, or dead and waits for an adopter to notice."""
    status = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True).stdout.strip()
    return status == "" or status.startswith("Z")


def test_what_a_check_started_ends_with_the_worker(user_checks, tmp_path):
    note = tmp_path / "pid"
    with RowVerifier(f"{user_checks}:leaves_behind") as rows:
        assert rows.verify({"prompt": str(note)}) == Verdict("accepted")
    assert is_gone(note.read_text())


def test_the_limit_counts_while_a_long_row_is_handed_over(user_checks):
    with RowVerifier(f"{user_checks}:good", limit_s=1.0) as rows:
        rows.start()
        os.kill(rows._workers._all[0]._child._process.pid, signal.SIGSTOP)
        verdict = rows.verify({"completion": "x" * 300_000})
        assert verdict == Verdict("error", "no verdict within 1 s")
        # A busy machine may be late a few times.
        assert any(rows.verify({"completion": "good"}) == Verdict("accepted") for _ in range(20))


def test_a_worker_that_ends_within_its_reply_is_an_error(user_checks, monkeypatch):
    with RowVerifier(f"{user_checks}:good") as rows:
        rows.start()

        def torn(until, any_number):
            raise EOFError("the pipe was closed")

        monkeypatch.setattr(rows._workers._all[0]._child._channel, "receive", torn)
        assert rows.verify({"completion": "good"}).reason.startswith("the checking process ended")
        assert rows.verify({"completion": "good"}) == Verdict("accepted")


def test_an_answer_that_is_no_expression_costs_no_new_worker(checker):
    checker.same("1", "2")
    workers = [worker._child._process.pid for worker in checker._workers._all if worker._child]
    assert checker.same("\\text{}", "1").outcome == "error"
    assert [worker._child._process.pid for worker in checker._workers._all if worker._child] == workers


def test_a_worker_that_died_between_requests_is_replaced(user_checks):
    with RowVerifier(f"{user_checks}:good") as rows:
        rows.start()
        process = rows._workers._all[0]._child._process
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert rows.verify({"completion": "good"}) == Verdict("accepted")


def test_an_interrupted_exchange_leaves_no_reply_for_the_next_request(user_checks, monkeypatch):
    with RowVerifier(f"{user_checks}:good") as rows:
        rows.start()
        worker = rows._workers._all[0]

        def interrupt(until, any_number):
            raise KeyboardInterrupt

        monkeypatch.setattr(worker._child._channel, "receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            worker.ask(b'{"completion": "bad"}')
        assert rows.verify({"completion": "good"}) == Verdict("accepted")


@pytest.mark.parametrize("target", ["no_such_module:check", "my_checks:no_such_function"])
def test_a_check_that_cannot_be_loaded_is_named(user_checks, target):
    with RowVerifier(target) as rows, pytest.raises(GvendiError, match=r"no_such_.*wanted an importable"):
        rows.start()


def test_a_check_that_does_not_fit_is_named_at_the_start():
    pytest.importorskip("math_verify", reason="needs the extra 'synthesis'")
    with (
        AnswerChecker(memory_mb=50) as answers,
        pytest.raises(GvendiError, match=r"cannot start: .*50 MB \(memory_mb"),
    ):
        answers.same("1", "2")


@pytest.mark.parametrize("target", ["my_checks", "os.system('x'):f", "a:b c", ":f", ""])
def test_a_verifier_that_is_no_module_and_function_is_refused(target):
    with pytest.raises(GvendiError, match="wanted 'module:function'"):
        RowVerifier(target)


@pytest.mark.parametrize(
    "settings", [{"workers": 0}, {"limit_s": 0}, {"limit_s": float("nan")}, {"memory_mb": 0}, {"longest": 0}]
)
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(GvendiError, match=next(iter(settings))):
        AnswerChecker(**settings)


def test_closed_workers_say_so(user_checks):
    with RowVerifier(f"{user_checks}:good") as rows:
        pass
    with pytest.raises(GvendiError, match="closed"):
        rows.start()


def test_a_worker_imports_neither_torch_nor_numpy():
    code = (
        "import sys, gvendi_fast.synthesis.checks.check_worker; print({'torch', 'numpy'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def by_table(*same, error=()):
    def compare(pairs):
        return [
            Verdict("error", "hung")
            if {a, b} in error
            else Verdict("same" if a == b or {a, b} in same else "different")
            for a, b in pairs
        ]

    return compare


@pytest.mark.parametrize(
    ("answers", "same", "winner", "votes"),
    [
        ([], [], None, 0),
        ([None, None], [], None, 0),
        (["1"], [], 0, 1),
        (["1", "2", "3"], [], 0, 1),
        (["1", "2", "2"], [], 1, 2),
        ([None, "2", "1", "2"], [], 1, 2),
        (["1", "2", "1", "2"], [], 0, 2),
        # 50% is 50 and 1/2, which are not each other: only the one in the middle has three.
        (["50", "50%", "1/2"], [{"50", "50%"}, {"50%", "1/2"}], 1, 3),
        (["a", "b", "c", "d"], [{"a", "b"}, {"c", "d"}], 0, 2),
    ],
)
def test_majority(answers, same, winner, votes):
    vote = majority(answers, by_table(*same))
    assert (vote.winner, vote.votes, vote.errors) == (winner, votes, ())


def test_errors_count_for_nothing_and_are_kept():
    vote = majority(["a", "b", "a"], by_table({"a", "b"}, error=[{"a", "b"}]))
    assert (vote.winner, vote.votes, vote.errors) == (0, 2, ("hung",))


def test_two_answers_too_long_to_compare_do_not_agree(checker):
    vote = majority(["9" * 2000, "9" * 2000, "1"], checker.compare)
    assert (vote.winner, vote.votes) == (0, 1)
    assert len(vote.errors) == 2


def test_sameness_that_is_not_transitive_is_counted_as_math_verify_sees_it(checker):
    vote = majority(["50", r"50\%", "1/2"], checker.compare)
    assert (vote.winner, vote.votes) == (1, 3)
