"""The check on paraphrases: retrieval against its formula, verdicts, and whole runs with a judge that answers badly."""

import asyncio
import json
import math
import random
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_server import TRUNCATED, ChatServer, Fault
from places import GOLDEN, ROOT
from problem_families import seed_rows, writer
from synthesis_runs import contents, lines, paid, run, settings

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Reason
from gvendi_fast.synthesis.config.config import config_from
from gvendi_fast.synthesis.filters.decontaminate import Decontaminator, Question, read_questions
from gvendi_fast.synthesis.filters.paraphrase import ParaphraseCheck, SimilarQuestions, read_verdict
from gvendi_fast.synthesis.generators.requests import Answer
from gvendi_fast.synthesis.loop.build import make_paraphrase_check
from gvendi_fast.synthesis.loop.proposer import Proposal, Proposer
from gvendi_fast.synthesis.run import preview
from gvendi_fast.synthesis.tasks.nli import NliTask
from gvendi_fast.synthesis.tasks.words import words

pytest.importorskip("sklearn", reason="the extra `synthesis` is not installed")
pytest.importorskip("openai", reason="the extra `synthesis` is not installed")
pytest.importorskip("yaml", reason="the extra `synthesis` is not installed")
pytestmark = pytest.mark.usefixtures("loopback", "undrawn")
PARAPHRASES = GOLDEN / "paraphrases.jsonl"

GOATS = "Mara has twelve goats and buys nine sheep. How many animals graze on her meadow?"
FERRY = "A ferry crosses the bay in forty minutes. How long do three crossings take?"
PLANET = "Which planet comes next after Jupiter when counted from the Sun?"
# What the writer makes of them, and of something like them.
GOATS_AGAIN = "On her meadow Ines keeps nine sheep and twelve goats. How many animals are that?"
FERRY_AGAIN = "At forty minutes each, how long does it take a ferry to cross the bay three times?"
PLANET_AGAIN = "Counted from the Sun, which planet follows Jupiter?"
MOON = "Which moon of Jupiter is the largest?"
# The test file's lines of the questions that the writer takes up.
LINES = {GOATS_AGAIN: (GOATS, 1), FERRY_AGAIN: (FERRY, 3), PLANET_AGAIN: (PLANET, 4)}


def questions(*texts: str) -> list[Question]:
    return [Question("tests.jsonl", line, text) for line, text in enumerate(texts, 1)]


def direct_similarity(texts: list[str], asked: str) -> np.ndarray:
    """The formula of the module, word by word in float64: [Q]."""
    bags = [Counter(words(text)) for text in texts]
    among = Counter(word for bag in bags for word in bag)

    def row(bag: Counter) -> dict[str, float]:
        found = {
            word: (1 + math.log(times)) * (1 + math.log((1 + len(texts)) / (1 + among[word])))
            for word, times in bag.items()
            if word in among
        }
        norm = math.sqrt(math.fsum(x * x for x in found.values()))
        return {word: x / norm for word, x in found.items()}

    own = row(Counter(words(asked)))
    return np.array([math.fsum(own.get(word, 0.0) * x for word, x in row(bag).items()) for bag in bags])


def test_the_most_similar_questions_are_those_of_the_formula():
    texts = [row["prompt"] for row in seed_rows(12)]
    texts = list(dict.fromkeys(texts))
    index = SimilarQuestions(questions(*texts))
    assert len(index) == len(texts)
    asked = [row["prompt"] for row in seed_rows(2, seed=5)] + ["a a a cow, cow: shells?", "cow"]
    for text in asked:
        wanted = direct_similarity(texts, text)
        shown = min(7, np.count_nonzero(wanted))
        found = [question.line - 1 for question in index.nearest(text, 7)]
        assert len(found) == len(set(found)) == shown
        # float32 may swap what differs by its rounding only.
        assert np.allclose(wanted[found], np.sort(wanted)[::-1][:shown], rtol=0, atol=1e-6)


def test_ties_go_by_place_and_repeated_questions_count_once():
    index = SimilarQuestions(
        [
            Question("a.jsonl", 1, "What is 3 - 5?"),
            Question("a.jsonl", 2, "what  is 3 - 5?"),
            Question("a.jsonl", 3, "What is 3 + 5?"),
            Question("b.jsonl", 1, "WHAT IS 3 + 5?"),
            Question("b.jsonl", 2, "What is 3 * 5?"),
            Question("b.jsonl", 3, "?!"),
        ]
    )
    assert len(index) == 3
    found = index.nearest("3 and 5: what is it?", 2)
    assert [(question.file, question.line) for question in found] == [("a.jsonl", 1), ("a.jsonl", 3)]
    assert [question.line for question in index.nearest("what is 3", 9)] == [1, 3, 2]
    assert index.nearest("nothing shared", 3) == []
    assert index.nearest("", 3) == []
    with pytest.raises(GvendiError, match="no question with a word"):
        SimilarQuestions(questions("?", "..."))


def test_questions_are_prompts_user_turns_and_texts(tmp_path):
    turns = [("system", "Be brief."), ("user", "How far?"), ("assistant", "Far."), ("user", "How far now?")]
    rows = [
        {"prompt": "What?", "completion": "That."},
        {"prompt": "broken"},
        {"messages": [{"role": role, "content": text} for role, text in turns]},
        {"text": "A whole text."},
    ]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [(question.line, question.text) for question in read_questions(path)]
    assert found == [(1, "What?"), (3, "How far?"), (3, "How far now?"), (4, "A whole text.")]


def test_recall_of_retrieval_is_what_the_module_says(shared):
    """Hand-made paraphrases of every 65th question of GSM8K's test set, `line` theirs."""
    path = shared / "gsm8k" / "test.jsonl"
    index, guard, made = SimilarQuestions(read_questions(path)), Decontaminator(path), lines(PARAPHRASES)
    assert len(index) == 1319
    assert not any(guard.match(row[kind]) for row in made for kind in ("same_things", "other_things"))
    assert [row["line"] for row in made] == list(range(31, 1319, 65))
    found = {}
    for kind in ("same_things", "other_things"):
        shown = [[question.line for question in index.nearest(row[kind], 5)] for row in made]
        found[kind] = [
            sum(row["line"] in some[:n] for row, some in zip(made, shown, strict=True)) for n in (1, 3, 5)
        ]
    assert found == {"same_things": [19, 20, 20], "other_things": [3, 7, 8]}
    # docs/synthesis.md says these of three questions.
    told = " ".join((ROOT / "docs" / "synthesis.md").read_text().split())
    assert f"among GSM8K's {len(index):,} test questions" in told
    for kind, what in (("same_things", "hand-made"), ("other_things", "that renamed")):
        assert f"for {found[kind][1]} of {len(made)} {what}" in told


def test_the_question_holds_both_texts_as_they_are():
    check = ParaphraseCheck(SimilarQuestions(questions("{% for x in y %}")), 1)
    ask = check.ask("{{ 7*7 }}", check.similar("for x")[0])
    assert "{{ 7*7 }}" in ask.messages[-1]["content"]
    assert "{% for x in y %}" in ask.messages[-1]["content"]
    assert ask.temperature == 0.0


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("They differ in one number.\n<verdict>Yes.</verdict>", True),
        ("<think>yes? no</think><verdict>no</verdict>", False),
        ("yes", "no <verdict>"),
        ("<verdict>maybe</verdict>", "neither yes nor no"),
        ("<verdict>yes</verdict><verdict>no</verdict>", "two <verdict>"),
        (None, "no answer"),
    ],
)
def test_the_answer_is_yes_or_no_or_a_reason(answer, verdict):
    found = read_verdict(answer)
    if isinstance(verdict, bool):
        assert found is verdict
    else:
        assert isinstance(found, Reason)
        assert verdict in found


def answer_of(text: str | None, reason: str | None = None, status: str = "ok") -> Answer:
    return Answer("key", text, reason, status, 1)


NO, YES = answer_of("<verdict>no</verdict>"), answer_of("<verdict>yes</verdict>")


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([NO, NO], None),
        ([NO, YES], "a paraphrase of tests.jsonl:2"),
        ([YES, YES], "a paraphrase of tests.jsonl:1"),
        ([answer_of("Hm."), YES], "a paraphrase of tests.jsonl:2"),
        ([NO, answer_of("Hm.")], "not known whether a paraphrase of tests.jsonl:2: no <verdict>"),
        # A usable text in an answer that failed is not taken.
        (
            [answer_of("<verdict>no</verdict>", "the answer was cut at the token limit", "failed"), NO],
            "not known whether a paraphrase of tests.jsonl:1: the answer was cut at the token limit",
        ),
        (
            [answer_of(None, "400: no", "refused"), NO],
            "not known whether a paraphrase of tests.jsonl:1: 400: no",
        ),
        (
            [NO, answer_of(None, None, "unserved")],
            "not known whether a paraphrase of tests.jsonl:2: unserved",
        ),
    ],
)
def test_only_answers_that_are_all_no_let_a_candidate_pass(answers, reason):
    check = ParaphraseCheck(SimilarQuestions(questions("one and two", "two and three")), 2)
    decided = check.decide(questions("one and two", "two and three"), answers)
    assert (decided and (decided.stage, decided.reason)) == (reason and ("paraphrase", reason))


class Recorder:
    """A generator that answers by the kind of the request and keeps the kinds."""

    def __init__(self, verdict: str) -> None:
        self.verdict, self.asked = verdict, []

    async def generate(self, request) -> Answer:
        text = request.messages[-1]["content"]
        if "Text A:" in text:
            self.asked.append(("verdict", request.temperature, request.max_tokens))
            return answer_of(f"<verdict>{self.verdict}</verdict>")
        if "Write one new example" in text:
            self.asked.append("pair")
            return answer_of(
                "<premise>A dog runs.</premise><hypothesis>It moves.</hypothesis><label>entailment</label>"
            )
        self.asked.append("label")
        return answer_of("<label>entailment</label>")


@pytest.mark.parametrize(("verdict", "labels"), [("yes", 0), ("no", 2)])
def test_paraphrases_are_refused_before_the_follow_ups(verdict, labels):
    row = {"premise": "A cat sits.", "hypothesis": "A cat flies.", "label": "contradiction"}
    check = ParaphraseCheck(SimilarQuestions(questions("Premise: dogs move", "Hypothesis: a dog runs")), 3)
    recorder = Recorder(verdict)
    with ThreadPoolExecutor(1) as threads:
        proposer = Proposer(NliTask(shots=1), recorder, None, threads, None, 9, check)
        (outcome,) = asyncio.run(proposer.propose(Proposal(0, "n-0", ("a",), (row,))))
    assert recorder.asked == ["pair"] + [("verdict", 0.0, 9)] * 2 + ["label"] * labels
    assert (outcome.row is None) == (verdict == "yes")
    assert outcome.prompt == "Premise: A dog runs.\nHypothesis: It moves."
    if verdict == "yes":
        assert (outcome.stage, outcome.reason) == ("paraphrase", "a paraphrase of tests.jsonl:2")
    assert proposer.checking > 0


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """Seed rows and test questions, the second of which cannot be read."""
    folder = tmp_path_factory.mktemp("files")
    seeds, tests = folder / "seeds.jsonl", folder / "tests.jsonl"
    seeds.write_text("".join(json.dumps(row) + "\n" for row in seed_rows(4)))
    rows = [{"prompt": GOATS, "completion": "21"}, {"prompt": "broken"}]
    rows += [{"prompt": text, "completion": "x"} for text in (FERRY, PLANET)]
    tests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return seeds, tests


def is_judged(messages: list) -> bool:
    return "Text A:" in messages[-1]["content"]


def about(messages: list) -> tuple[str, str]:
    """The candidate and the test question of a request for a verdict."""
    candidate, test = messages[-1]["content"].removeprefix("Text A:\n").split("\n\nText B:\n")
    return candidate, test.split("\n\n")[0]


def answer(messages: list, draw: int) -> str:
    """Problems, one in three on what the tests are about; verdicts on the candidate's own test question and others."""
    if is_judged(messages):
        candidate, test = about(messages)
        own = LINES.get(candidate, ("", 0))[0] == test
        if own and candidate == FERRY_AGAIN:
            return "It may well be one."
        return f"<verdict>{'yes' if own else 'no'}</verdict>"
    r = random.Random(draw)
    if r.random() < 0.33:
        made = r.choice([GOATS_AGAIN, FERRY_AGAIN, PLANET_AGAIN, MOON, PLANET])
        return f"<prompt>{made}</prompt><completion>I do not know.</completion>"
    return writer(favour=0.3)(messages, draw)


def plan(arrival: int, body: dict) -> Fault | None:
    if is_judged(body["messages"]) and about(body["messages"]) == (PLANET_AGAIN, PLANET):
        return Fault(body=TRUNCATED)
    return None


def with_check(seeds: Path, tests: Path, **filter_) -> dict:
    return {
        "seeds": seeds,
        "filter": {"tests": str(tests), "paraphrase": 2, "near": None, **filter_},
        "accept": {"rule": "all"},
        "stop": {"target": 80},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, files):
    """A run with the check: its folder, its status and the server that has answered it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, ChatServer(answer, plan) as server:
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield out, run(out, server.url, **with_check(*files)), server


def texts(path):
    """The lines of accepted.jsonl or rejected.jsonl, each with its prompt."""
    return [{**row, **row.get("row", {})} for row in lines(path)]


def test_a_run_refuses_paraphrases_and_what_it_cannot_decide(whole, files):
    out, status, server = whole
    assert (status.stopped, status.pool) == ("target", 80)
    refused = [row for row in lines(out / "rejected.jsonl") if row["stage"] == "paraphrase"]
    assert status.rejected["paraphrase"] == len(refused)
    where = {text: f"{files[1].name}:{line}" for text, (_, line) in LINES.items()}
    assert {row["prompt"]: row["reason"] for row in refused} == {
        GOATS_AGAIN: f"a paraphrase of {where[GOATS_AGAIN]}",
        FERRY_AGAIN: f"not known whether a paraphrase of {where[FERRY_AGAIN]}: no <verdict>",
        PLANET_AGAIN: f"not known whether a paraphrase of {where[PLANET_AGAIN]}: "
        "the answer is not JSON (JSONDecodeError)",
    }
    accepted = {row["prompt"] for row in lines(out / "accepted.jsonl")}
    assert MOON in accepted
    assert not accepted & {*LINES, PLANET}
    assert paid(out) == server.served

    judged = [body for body in server.bodies if is_judged(body["messages"])]
    assert {body["temperature"] for body in judged} == {0.0}
    pairs = Counter(about(body["messages"]) for body in judged)
    assert max(pairs.values()) == 1
    # What shares ten words with a test is refused without a question.
    assert PLANET in {row["prompt"] for row in lines(out / "rejected.jsonl") if row["stage"] == "tests"}
    asked = Counter(candidate for candidate, _ in pairs)
    assert PLANET not in asked
    index = SimilarQuestions(read_questions(files[1]))
    # The end of a run may come between two questions about a candidate that is not decided then.
    decided = {row["prompt"] for name in ("accepted", "rejected") for row in texts(out / f"{name}.jsonl")}
    assert decided & set(asked)
    for candidate, count in asked.items():
        wanted = len(index.nearest(candidate, 2))
        assert count == wanted or (candidate not in decided and count < wanted)


def test_run_again_it_asks_nothing_and_from_its_answers_alone_nothing_twice(whole, files, tmp_path):
    out, _, server = whole
    before = server.arrived.total()
    assert run(out, server.url, **with_check(*files)).stopped == "target"
    assert server.arrived.total() == before
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copy(out / "requests.sqlite", fresh)
    # What was under way ahead when the run ended may go a step further now.
    with ChatServer(answer, plan) as other:
        run(fresh, other.url, **with_check(*files))
    assert contents(fresh) == contents(out)
    assert not set(other.arrived) & set(paid(out))


@pytest.mark.soak
def test_order_of_the_answers_does_not_matter(whole, files, tmp_path):
    delays = random.Random(5)

    def slow(arrival, body):
        fault = plan(arrival, body) or Fault()
        return Fault(body=fault.body, stall=delays.uniform(0, 0.03))

    with ChatServer(answer, slow) as server:
        run(tmp_path / "run", server.url, **with_check(*files))
    assert contents(tmp_path / "run") == contents(whole[0])


def test_without_it_nothing_of_it_happens(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with ChatServer(answer) as server:
        out = tmp_path / "off"
        run(out, server.url, **with_check(*files, paraphrase=0))
        assert not any(is_judged(body["messages"]) for body in server.bodies)
        assert "paraphrase" not in (out / "fingerprint.json").read_text()
        assert GOATS_AGAIN in {row["prompt"] for row in lines(out / "accepted.jsonl")}
        # A preview stops at what is read from the answers.
        asked = server.arrived.total()
        config = config_from(settings(tmp_path / "on", server.url, **with_check(*files)))
        assert len(preview(config, 2)) == 2
        assert server.arrived.total() == asked + 2
        with pytest.raises(
            GvendiError, match=r"filter\.paraphrase needs scikit-learn .*gvendi-fast\[synthesis\]"
        ):
            make_paraphrase_check(config)


def test_its_number_and_template_belong_to_the_run(whole, files, tmp_path):
    out, _, server = whole
    with pytest.raises(GvendiError, match=r"paraphrase\.questions: 2 there, 3 now"):
        run(out, server.url, **with_check(*files, paraphrase=3))
    with pytest.raises(GvendiError, match=r"paraphrase\.questions: 2 there, None now"):
        run(out, server.url, **with_check(*files, paraphrase=0))
    template = tmp_path / "t.j2"
    template.write_text("{% block user %}{{ candidate }} / {{ test }}? <verdict>{% endblock %}")
    with pytest.raises(GvendiError, match=r"paraphrase\.template: '\w{16}' there, '\w{16}' now"):
        run(out, server.url, **with_check(*files, paraphrase_template=str(template)))
    template.write_text("{% block user %}{{ candidate }}{% endblock %}")
    with pytest.raises(GvendiError, match=r"does not show \{\{ test \}\}"):
        run(out, server.url, **with_check(*files, paraphrase_template=str(template)))


@pytest.mark.parametrize(
    ("filter_", "message"),
    [
        ({"paraphrase": 3}, "filter.paraphrase is 3 but filter.tests names no file"),
        ({"paraphrase": -1}, "filter.paraphrase is -1; wanted an integer of at least 0"),
        ({"paraphrase": True}, "filter.paraphrase is true; wanted an integer"),
        (
            {"tests": "t.jsonl", "paraphrase_template": "p.j2"},
            "filter.paraphrase_template is 'p.j2' but filter.paraphrase is 0",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(filter_, message):
    values = settings(Path("o"), "http://localhost/v1", Path("s.jsonl"), filter=filter_)
    with pytest.raises(GvendiError) as error:
        config_from(values)
    assert message in str(error.value)
