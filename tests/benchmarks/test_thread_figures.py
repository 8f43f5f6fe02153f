"""benchmarks/threads.py: every setting in every round, ratios of one round, and no setting of the caller's."""

from benchmarks import threads


def test_every_setting_is_run_once_a_round_in_an_order_that_moves_on(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(threads, "measure", lambda corpus, env: asked.append(env) or float(len(asked)))
    found = threads.rounds(tmp_path, 2, 2, 0)
    known = list(threads.settings(2).values())
    assert asked == [*known, *known[1:], known[0]]
    assert {len(values) for values in found.values()} == {2}
    assert known[0] == {"OMP_NUM_THREADS": "1"}
    assert {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": threads_spins()} in known


def threads_spins() -> str:
    from gvendi_fast.base.threads import SPINS

    return SPINS


def test_a_ratio_is_of_one_round():
    found = threads.summary({threads.ONE: [10.0, 1000.0, 20.0], "other": [5.0, 500.0, 40.0]})
    assert found["other"]["median"] == 40.0
    assert found["other"]["ratio_to_one_thread"] == 0.5
    assert found[threads.ONE]["ratio_to_one_thread"] == 1.0


def test_what_the_caller_has_set_does_not_count(monkeypatch, tmp_path):
    seen = {}

    class Done:
        stdout = "warm\n12.5\n"

    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("KMP_BLOCKTIME", "7")
    monkeypatch.setattr(threads.subprocess, "run", lambda *given, env, **more: seen.update(env) or Done)
    assert threads.measure(tmp_path, {"GOMP_SPINCOUNT": "1"}) == 12.5
    assert seen["GOMP_SPINCOUNT"] == "1"
    assert not {"OMP_NUM_THREADS", "KMP_BLOCKTIME"} & set(seen)
