"""The whole loop against one endpoint that does everything wrong at once, and against answers in other words."""

import json
import random
import threading
import zlib
from collections import Counter

import pytest
from chat_server import TRUNCATED, ChatServer, Fault, completion, content
from problem_families import seed_rows, writer
from synthesis_runs import contents, outcomes_of, paid, run, stored, write_rows

pytest.importorskip("openai", reason="the extra `synthesis` is not installed")
pytest.importorskip("yaml", reason="the extra `synthesis` is not installed")
pytestmark = pytest.mark.usefixtures("loopback", "undrawn")

HTML = b"<!DOCTYPE html><html><body><h1>502 Bad Gateway</h1></body></html>"
DAMAGED = [
    (Fault(body=TRUNCATED), "the answer is not JSON (JSONDecodeError)"),
    (Fault(body=HTML, type="text/html"), "the answer is not JSON (JSONDecodeError)"),
    (Fault(body=b""), "the answer is not JSON (JSONDecodeError)"),
    (Fault(body=b"\xff\xfe\x00"), "the answer is not JSON (JSONDecodeError)"),
    (Fault(body=b"[" * 100_000), "the answer is not JSON (RecursionError)"),
    (Fault(body=b"[1, 2]"), "the answer is a JSON list, not an object"),
    (Fault(body={"choices": []}), "the answer has no choices"),
    (Fault(body={"choices": {"0": "all"}}), "the answer has no choices"),
    (Fault(body={"error": {"message": "overloaded"}}), "the answer has no choices"),
    (Fault(body={"choices": [{"text": "an answer"}]}), "the first choice has no message"),
    (Fault(body=completion(None)), "the message has no content (finish_reason 'stop')"),
    (Fault(body=completion(17)), "the message has content of type int (finish_reason 'stop')"),
    (
        Fault(body=completion([{"type": "text", "text": "a"}])),
        "the message has content of type list (finish_reason 'stop')",
    ),
    (Fault(body=completion("half an ans", ended="length")), "the answer was cut at the token limit"),
    (Fault(body=completion("half", ended="content_filter")), "the answer was cut by a content filter"),
    (Fault(body=completion(" \n")), "the content is empty"),
    (Fault(body=completion("half a pair: \ud800")), "the content has half a surrogate pair"),
]
ON_THE_WAY = [Fault(429), Fault(429, "0.02"), Fault(500), Fault(502, body=HTML, type="text/html"), Fault(503)]
DROPPED = [Fault(drop="before"), Fault(drop="within")]


def number_of(what: str) -> int:
    """The same for equal requests, whenever they come."""
    return zlib.crc32(what.encode())


def damage_of(body: dict) -> Fault | None:
    """A quarter of all requests are answered with damage, another with no count of tokens."""
    number = number_of(content(body))
    if number % 4 == 0:
        return DAMAGED[number // 4 % len(DAMAGED)][0]
    return Fault(usage=False) if number % 4 == 1 else None


class Everything:
    """A plan: the damage of a request comes after failures on the way, in bursts and alone."""

    def __init__(self) -> None:
        self.came, self.done, self.lock = Counter(), Counter(), threading.Lock()

    def __call__(self, arrival: int, body: dict) -> Fault | None:
        with self.lock:
            what = content(body)
            before, number = self.came[what], number_of(what)
            self.came[what] += 1
            # Three of the first requests hang together, one later alone.
            if arrival in (2, 3, 4, 70):
                return self.noted("stall", Fault(stall=30.0))
            if arrival % 50 in range(20, 28):
                return self.noted(
                    *[("429", Fault(429)), ("429 after", Fault(429, "0.02"))][arrival // 50 % 2]
                )
            # Up to three failures each, never more.
            if before < number // 100 % 4:
                fault = random.Random(number + before).choice(ON_THE_WAY + DROPPED)
                return self.noted(fault.drop or str(fault.status), fault)
            return damage_of(body)

    def noted(self, kind: str, fault: Fault) -> Fault:
        self.done[kind] += 1
        return fault


@pytest.mark.soak
def test_everything_at_once_loses_nothing_and_pays_nothing_twice(tmp_path):
    seeds = write_rows(tmp_path / "seeds.jsonl", seed_rows(4))
    plan, out, calm = Everything(), tmp_path / "run", tmp_path / "calm"
    sections = {"generator": {"retries": 20, "time_limit": 2.0}, "stop": {"target": 70}}
    with ChatServer(writer(), plan) as server:
        status = run(out, server.url, seeds, **sections)
        assert set(plan.done) == {"stall", "429", "429 after", "500", "502", "503", "before", "within"}
        assert plan.done["stall"] == 4
        assert (status.stopped, status.pool) == ("target", 70)
        assert max(server.served.values()) == 1
        assert paid(out) == server.served
        assert status.requests == server.served.total()
        assert server.abandoned.total() >= plan.done["before"] + plan.done["within"]
    outcomes = outcomes_of(out)

    # Damaged answers are final, and refused with their reason; no other prompt is refused for its request.
    reasons = {id(fault): reason for fault, reason in DAMAGED}
    wanted = {}
    for number, record in stored(out):
        body = {key: json.loads(record.request)[key] for key in ("model", "messages", "temperature", "top_p")}
        fault = damage_of({**body, "seed": int(record.key[:7], 16)})
        damaged = fault is not None and id(fault) in reasons
        if record.status == "sent":
            # Its next try was due when the run ended.
            assert number >= len(outcomes)
            continue
        assert record.status == ("failed" if damaged else "ok")
        counted = fault is None or (isinstance(fault.body, dict) and "usage" in fault.body)
        assert (record.prompt_tokens is not None) == counted
        if damaged and number < len(outcomes):
            wanted[number] = reasons[id(fault)]
    found = {n: row["reason"] for n, row in enumerate(outcomes) if row.get("stage") == "request"}
    assert found == wanted
    assert len(set(found.values())) >= 8

    # What fails on the way changes nothing.
    with ChatServer(writer(), lambda arrival, body: damage_of(body)) as server:
        run(calm, server.url, seeds, **sections)
    assert contents(calm) == contents(out)


MATH = [
    (["1/2", r"\frac{1}{2}", "0.5"], 3),
    ([r"\dfrac12", r"50\%", ".5"], 3),
    ([r"\tfrac{2}{4}", r"\frac12", "50%"], 3),
    (["1,000", "1000", "10^3"], 3),
    ([r"1\,234\,567", "1,234,567", "1 234 567"], 3),
    ([r"1{,}000", "1000.", r"1\times10^3"], 3),
    (["x=3", "3", "3.0"], 3),
    (["x = -3", "-3", "3"], 2),
    (["5", r"5\text{ cm}", "5 cm"], 3),
    ([r"\$5", "5", r"5 \text{ dollars}"], 3),
    ([r"2\sqrt{2}", r"\sqrt8", "2.83"], 2),
    ([r"\{1, 2\}", r"\{2, 1\}", r"\{1, 3\}"], 2),
    (["x^2 + 2x + 1", "(x+1)^2", "(1+x)^2"], 3),
    (["yes", r"\text{Yes}", "no"], 2),
    (["1/2", "1/3", "0.25"], 1),
    (["1.5", "15", r"1\frac{1}{5}"], 1),
]


def test_mathematical_answers_in_other_forms_agree_and_others_do_not(tmp_path):
    pytest.importorskip("math_verify", reason="needs the extra 'synthesis'")
    seeds = write_rows(tmp_path / "seeds.jsonl", seed_rows(2))
    came, lock = Counter(), threading.Lock()

    def answer(messages, draw):
        text = messages[-1]["content"]
        with lock:
            if "<problem>" in text:
                came["problems"] += 1
                return f"<problem>What is answer number {came['problems'] - 1} of {draw}?</problem>"
            came[text] += 1
            number = int(text.split("answer number ")[1].split()[0])
            return f"It is \\boxed{{{MATH[number % len(MATH)][0][came[text] - 1]}}}."

    sections = {"accept": {"rule": "all"}, "filter": {"near": None}, "task": {"name": "math"}}
    with ChatServer(answer) as server:
        status = run(tmp_path / "run", server.url, seeds, **sections, stop={"target": 24 + 2 * len(MATH)})
        assert paid(tmp_path / "run") == server.served
    assert status.stopped == "target"
    outcomes = outcomes_of(tmp_path / "run")
    seen = set()
    for row in outcomes:
        case = int(row["prompt"].split("answer number ")[1].split()[0]) % len(MATH)
        forms, votes = MATH[case]
        seen.add(case)
        if votes >= 2:
            assert row["meta"]["votes"] == votes, forms
            assert sorted(row["meta"]["answers"]) == sorted(forms)
            assert row["meta"]["errors"] == []
        else:
            assert (row["stage"], row["reason"]) == ("answers", "no majority: 1 of 3 agree, wanted 2")
    assert seen == set(range(len(MATH)))


LABELS = {
    "entailment": None,
    "<label>Entailment</label>": None,
    "It follows, so <label> ENTAILMENT. </label> is right": None,
    "**Entailment**": None,
    "“entailment”!": None,
    "<think>neutral or contradiction?</think>\n<LABEL>(entailment)</LABEL>": None,
    "_entailment_": None,
    "<label>entailed</label>": "label 'entailed' is none of entailment, neutral, contradiction",
    "<label>not entailment</label>": "label 'not entailment' is none of entailment, neutral, contradiction",
    "<label>entailment or neutral</label>": "two labels: entailment and neutral",
    "<label>yes</label>": "label 'yes' is none of entailment, neutral, contradiction",
    "The answer is entailment, I think": "no <label>",
    "<label>entailment": "<label> is not closed",
    "<label></label>": "empty <label>",
    "<label>entailment</label> <label>entailment</label>": "two <label>",
    "<label>Neutral</label>": "labels disagree: generated entailment, then neutral, neutral",
}


def test_labels_in_other_case_and_punctuation_agree_and_other_words_are_refused(tmp_path):
    pair = {"premise": "A dog runs.", "hypothesis": "An animal moves.", "label": "Neutral"}
    seeds = write_rows(
        tmp_path / "seeds.jsonl",
        [
            {
                "id": f"s{i}",
                "prompt": p["prompt"],
                "completion": "Label: neutral",
                "meta": {**pair, "premise": p["prompt"]},
            }
            for i, p in enumerate(seed_rows(1))
        ],
    )
    forms = list(LABELS)

    def answer(messages, draw):
        text = messages[-1]["content"]
        if "Here are" in text:
            return f"<premise>Case {draw}.</premise><hypothesis>It is.</hypothesis><label>Entailment.</label>"
        return forms[int(text.split("Premise: Case ")[1].split(".")[0]) % len(forms)]

    sections = {
        "accept": {"rule": "all"},
        "filter": {"near": None},
        "task": {"name": "nli", "settings": {"shots": 2}},
    }
    with ChatServer(answer) as server:
        status = run(tmp_path / "run", server.url, seeds, **sections, stop={"target": 12 + 40})
        assert paid(tmp_path / "run") == server.served
    assert status.stopped == "target"
    outcomes = outcomes_of(tmp_path / "run")
    seen = set()
    for row in outcomes:
        form = forms[int(row["prompt"].split("Premise: Case ")[1].split(".")[0]) % len(forms)]
        seen.add(form)
        if LABELS[form] is None:
            assert (row["meta"]["label"], row["meta"]["votes"]) == ("entailment", 2), form
            assert row["completion"] == "Label: entailment"
        else:
            assert row["stage"] == "answers"
            assert row["reason"].removeprefix("label 1 of 2: ") == LABELS[form]
    assert len(seen) == len(forms)
