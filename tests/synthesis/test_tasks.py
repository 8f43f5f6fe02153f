"""The tasks of the synthesis loop: prompts, parsing of what models write, decisions."""

import json
import os
import time

import pytest

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Reason
from gvendi_fast.synthesis.checks.verifiers import AnswerChecker
from gvendi_fast.synthesis.checks.workers import Verdict
from gvendi_fast.synthesis.config.yaml_text import read_text
from gvendi_fast.synthesis.tasks import make_task
from gvendi_fast.synthesis.tasks.prompts import Template
from gvendi_fast.synthesis.tasks.sections import boxed_answer, clean, sections, without_thinking
from gvendi_fast.synthesis.tasks.task import Accepted, Candidate, Refused, text_fields

INJECTIONS = [
    "{{ 7*7 }}",
    "{% for i in range(9) %}x{% endfor %}",
    "{# note #}",
    "{{ ''.__class__ }}",
    "{% endblock %}",
]


class Texts:
    """A checker for which answers are the same as their texts are."""

    def compare(self, pairs):
        return [Verdict("same" if one == other else "different") for one, other in pairs]


def math_rows(*problems):
    return [{"prompt": problem, "completion": "\\boxed{1}"} for problem in problems]


def nli_row(premise="A dog runs.", hypothesis="An animal moves.", label="entailment"):
    return {"premise": premise, "hypothesis": hypothesis, "label": label}


def nli_answer(premise="A cat sleeps.", hypothesis="A pet rests.", label="entailment"):
    return f"<premise>{premise}</premise>\n<hypothesis>{hypothesis}</hypothesis>\n<label>{label}</label>"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a\x00b", "control character U+0000"),
        ("a\x1b[31m", "control character U+001B"),
        ("a\x85", "control character U+0085"),
        ("a\ud800", "lone surrogate"),
        ("x" * 1_000_000, "1000000 characters"),
        ("", "empty answer"),
        (" \n\t ", "empty answer"),
        (None, "no answer"),
        (["a"], "is a list"),
    ],
)
def test_text_that_cannot_be_training_data_has_a_reason(text, reason):
    found = clean(text)
    assert isinstance(found, Reason)
    assert reason in found
    for task in (make_task("math"), make_task("nli"), make_task("generic")):
        refused = task.parse(text)
        assert isinstance(refused, Refused)
        assert refused.stage == "parse"
        assert reason in refused.reason


def test_line_ends_become_one_kind_and_tabs_stay():
    assert clean("a\r\nb\rc\td\n") == "a\nb\nc\td"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Sure!\n```\n<problem> a < b </problem>\n```\nHope it helps", [{"problem": "a < b"}]),
        ("<Problem>x</PROBLEM>", [{"problem": "x"}]),
        ("<problem><b>x</b></problem>", [{"problem": "<b>x</b>"}]),
        ("a problem", "no <problem>"),
        ("", "no <problem>"),
        ("<problem>x", "<problem> is not closed"),
        ("x</problem>", "</problem> without <problem>"),
        ("<problem> </problem>", "empty <problem>"),
        ("<problem>x</problem><problem>y</problem>", "two <problem>"),
        ("<problem>x</problem>" * 5, "5 <problem>"),
        ("<problem>a<problem>b</problem></problem>", "<problem> is not closed before <problem>"),
    ],
)
def test_sections(text, found):
    assert sections(text, ("problem",)) == found


def test_sections_of_several_names_do_not_overlap_and_come_once():
    names = ("premise", "hypothesis", "label")
    assert sections(nli_answer(), names)[0]["label"] == "entailment"
    assert sections("<premise>a<label>b</label></premise>", names) == "<premise> is not closed before <label>"
    assert sections(nli_answer() + "<label>neutral</label>", names) == "two <label>"
    assert sections("<premise>a</premise>", names) == "no <hypothesis>"


def test_groups_of_sections_are_complete():
    two = "<p>1</p><q>2</q>\n<p>3</p><q>4</q>"
    assert sections(two, ("p", "q"), 2) == [{"p": "1", "q": "2"}, {"p": "3", "q": "4"}]
    assert "not in groups" in sections("<p>1</p><p>3</p><q>2</q>", ("p", "q"), 2)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} and later \boxed {\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{3}", "3"),
        (r"\boxed{" * 5 + "x" + "}" * 5, "x"),
        ("the answer is 5", "no \\boxed answer"),
        (r"\boxed{}", "empty \\boxed"),
        (r"\boxed{\boxed{}}", "empty \\boxed"),
        (r"\boxed{5", "\\boxed is not closed"),
        (r"\boxed{1} \boxed{2", "\\boxed is not closed"),
        (r"\boxed{1 + \boxed{2}}", "a \\boxed inside another expression in \\boxed"),
    ],
)
def test_boxed_answer(solution, answer):
    assert boxed_answer(solution) == answer


def test_deep_and_many_boxes_take_no_time():
    begun = time.process_time()
    assert isinstance(boxed_answer("\\boxed{" * 20_000 + "}" * 20_000), Reason)
    assert isinstance(boxed_answer("\\boxed{" * 20_000), Reason)
    assert boxed_answer("\\boxed{1}" * 20_000) == "1"
    assert isinstance(sections("<problem>" * 20_000, ("problem",)), Reason)
    assert time.process_time() - begun < 5


def test_reasoning_before_the_answer_is_passed_over():
    assert without_thinking("<think>a</think> b") == "b"
    assert without_thinking("a </think> b") == "b"
    assert without_thinking("b") == "b"
    assert without_thinking("<think>a") == "<think> is not closed"
    assert without_thinking("<think>a</think>") == "nothing after </think>"
    answer = "<think>maybe <problem>bad</problem></think><problem>good</problem>"
    assert make_task("math").parse(answer) == [Candidate({"problem": "good"})]


@pytest.mark.parametrize("text", INJECTIONS)
def test_generated_text_and_rows_are_never_templates(text):
    math, nli, generic = make_task("math"), make_task("nli"), make_task("generic")
    assert text in math.ask(math_rows(text)).messages[-1]["content"]
    assert text in nli.ask([nli_row(premise=text)]).messages[-1]["content"]
    assert text in generic.ask(math_rows(text)).messages[-1]["content"]
    [problem] = math.parse(f"<problem>{text}</problem>")
    assert all(text in ask.messages[-1]["content"] for ask in math.follow_ups(problem))
    [pair] = nli.parse(nli_answer(hypothesis=text))
    assert all(text in ask.messages[-1]["content"] for ask in nli.follow_ups(pair))
    row = nli.decide(pair, ["entailment", "entailment"]).row
    assert row["prompt"] == f"Premise: A cat sleeps.\nHypothesis: {text}"
    row = math.decide(problem, [f"{text} \\boxed{{1}}"] * 3, Texts()).row
    assert (row["prompt"], row["completion"]) == (text, f"{text} \\boxed{{1}}")


def test_math_shows_the_rows_and_asks_for_n_solutions():
    task = make_task("math", solutions=4, solution_temperature=0.5)
    ask = task.ask(math_rows("one?", "two?"), sample=7)
    assert [message["role"] for message in ask.messages] == ["system", "user"]
    assert "Problem 1:\none?" in ask.messages[1]["content"]
    assert "\\boxed" not in ask.messages[1]["content"]
    assert (ask.sample, ask.temperature, ask.top_p) == (7, 1.0, 0.95)
    asks = task.follow_ups(Candidate({"problem": "three?"}))
    assert [other.sample for other in asks] == [0, 1, 2, 3]
    assert {other.temperature for other in asks} == {0.5}
    assert asks[0].messages[-1]["content"].endswith("three?")


def test_an_echo_of_a_shown_row_is_refused():
    rows = math_rows("What is  1 + 1?")
    task = make_task("math", problems=2)
    assert task.parse("<problem>what is 1 + 1?</problem>", rows) == Refused(
        "parse", "echoes a row of the prompt"
    )
    mixed = "<problem>what is 1 + 1?</problem><problem>What is 1 - 1?</problem>"
    assert task.parse(mixed, rows) == [Candidate({"problem": "What is 1 - 1?"})]
    assert (
        make_task("nli")
        .parse(nli_answer(), [nli_row("A cat sleeps.", "a pet rests.")])
        .reason.startswith("echoes")
    )
    generic = "<prompt>What is 1 + 1?</prompt><completion>2</completion>"
    assert make_task("generic").parse(generic, rows).reason.startswith("echoes")


def test_math_keeps_the_first_solution_of_the_majority():
    task, problem = make_task("math"), Candidate({"problem": "p"})
    answers = ["a \\boxed{1}", "<think>\\boxed{1}</think> b \\boxed{2}", "c \\boxed{2}"]
    accepted = task.decide(problem, answers, Texts())
    assert accepted == Accepted(
        {
            "prompt": "p",
            "completion": answers[1],
            "meta": {"task": "math", "answer": "2", "votes": 2, "answers": ["1", "2", "2"], "errors": []},
        }
    )
    assert json.loads(json.dumps(accepted.row)) == accepted.row


def test_math_without_a_majority_says_how_the_vote_went():
    task, problem = make_task("math"), Candidate({"problem": "p"})
    refused = task.decide(problem, ["\\boxed{1}", "\\boxed{2}", None], Texts())
    assert refused == Refused("answers", "no majority: 1 of 3 agree, wanted 2 (no answer)")
    refused = task.decide(problem, ["x", "<think>", "\\boxed{"], Texts())
    assert refused.reason.startswith(
        "no majority: 0 of 3 agree, wanted 2 (no \\boxed answer; <think> is not closed"
    )


def test_math_compares_by_math_verify_and_survives_hostile_answers():
    pytest.importorskip("math_verify", reason="needs the extra 'synthesis'")
    task, problem = make_task("math", checks={"limit_s": 1.0}), Candidate({"problem": "p"})
    with task.checker() as checker:
        assert isinstance(checker, AnswerChecker)
        row = task.decide(
            problem, ["\\boxed{9^{9^{9^{9}}}}", "\\boxed{0.5}", "\\boxed{\\frac12}"], checker
        ).row
        assert (row["meta"]["answer"], row["meta"]["votes"]) == ("0.5", 2)
        assert row["meta"]["errors"]
        refused = task.decide(problem, [f"\\boxed{{{'9' * 100_000}}}"] * 3, checker)
        assert "no majority: 1 of 3" in refused.reason
        assert "100000 characters" in refused.reason


def test_nli_takes_rows_with_the_parts_as_fields_or_in_meta():
    task = make_task("nli")
    in_meta = {"prompt": "x", "completion": "y", "meta": nli_row(premise="In meta.", label="Neutral")}
    content = task.ask([nli_row(), in_meta]).messages[-1]["content"]
    assert "<premise>A dog runs.</premise>" in content
    assert (
        "<premise>In meta.</premise>\n<hypothesis>An animal moves.</hypothesis>\n<label>neutral</label>"
        in content
    )
    with pytest.raises(GvendiError, match="row 2 of the prompt cannot be shown: no premise"):
        task.ask([nli_row(), {"prompt": "x", "completion": "y"}])


@pytest.mark.parametrize(
    ("label", "found"),
    [
        ("Entailment.", "entailment"),
        ("**neutral**", "neutral"),
        ("entailment or neutral", "two labels: entailment and neutral"),
        ("neutral, entailment, contradiction", "three labels: neutral and entailment and contradiction"),
        ("maybe", "label 'maybe' is none of entailment, neutral, contradiction"),
        ("not entailment", "label 'not entailment' is none of entailment, neutral, contradiction"),
    ],
)
def test_nli_labels(label, found):
    parsed = make_task("nli").parse(nli_answer(label=label))
    assert (parsed.reason if isinstance(parsed, Refused) else parsed[0].values["label"]) == found


def test_nli_is_accepted_only_if_all_fresh_labels_agree():
    task = make_task("nli")
    [pair] = task.parse(nli_answer())
    asks = task.follow_ups(pair)
    assert [ask.sample for ask in asks] == [0, 1]
    assert "A pet rests." in asks[0].messages[-1]["content"]
    row = task.decide(pair, ["It follows. <label>Entailment</label>", "entailment"]).row
    assert row["completion"] == "Label: entailment"
    assert row["meta"]["votes"] == 2
    assert row["meta"]["premise"] == "A cat sleeps."
    refused = task.decide(pair, ["entailment", "<label>neutral</label>"])
    assert refused.reason == "labels disagree: generated entailment, then entailment, neutral"
    assert task.decide(pair, ["entailment", None]).reason == "label 2 of 2: no answer"
    assert task.decide(pair, ["I think entailment", "entailment"]).reason == "label 1 of 2: no <label>"
    assert (
        task.decide(pair, ["<label>neutral</label><label>neutral</label>"] * 2).reason
        == "label 1 of 2: two <label>"
    )


def test_nli_without_fresh_labels_asks_and_wants_none():
    task = make_task("nli", labels=0)
    [pair] = task.parse(nli_answer())
    assert task.follow_ups(pair) == []
    assert isinstance(task.decide(pair, []), Accepted)


def test_generic_asks_the_users_check(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(
        "def short(row):\n    return len(row['completion']) < 5 or 'too long'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    task = make_task("generic", verifier="my_rules:short")
    [good] = task.parse("<prompt>p</prompt><completion>c</completion>")
    [bad] = task.parse("<prompt>p</prompt><completion>c c c c</completion>")
    with task.checker() as checker:
        assert task.decide(good, [], checker).row["meta"] == {"task": "generic", "verifier": "my_rules:short"}
        assert task.decide(bad, [], checker) == Refused("verifier", "too long")
    with pytest.raises(GvendiError, match="checker is None"):
        task.decide(good, [])


def test_generic_without_a_check_accepts_what_it_can_read():
    task = make_task("generic")
    [candidate] = task.parse("<prompt>p</prompt>\n<completion>c</completion>")
    assert (task.checker(), task.follow_ups(candidate), task.prompt_of(candidate)) == (None, [], "p")
    assert task.decide(candidate).row == {"prompt": "p", "completion": "c", "meta": {"task": "generic"}}
    assert task.parse("<prompt>p</prompt>") == Refused("parse", "no <completion>")


def test_a_template_of_the_users_takes_the_place_of_ours(tmp_path):
    path = tmp_path / "mine.j2"
    path.write_text(
        "{% block user %}{% for s in shots %}[{{ s.prompt }}|{{ s.meta.kind }}]{% endfor %}{% endblock %}"
    )
    task = make_task("generic", template=path)
    row = {"prompt": "p", "completion": "c", "meta": {"kind": "k"}}
    assert task.ask([row, row]).messages == ({"role": "user", "content": "[p|k][p|k]"},)
    assert task.describe()["templates"] != make_task("generic").describe()["templates"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no blocks", "no block 'user'"),
        ("{% block user %}{{ x", r"line 1: unexpected end of template"),
        ("{% block user %}{{ absent }}{% endblock %}", r"'absent' is undefined.*given shots"),
        ("{% block user %}{{ shots[0].absent }}{% endblock %}", "has no attribute 'absent'"),
        ("{% block user %}{{ shots.__class__.__mro__ }}{% endblock %}", "unsafe"),
        ("{% block user %}{{ 1 // 0 }}{% endblock %}", "by zero"),
        ("{% block user %} {% endblock %}", "the block 'user' is empty"),
    ],
)
def test_a_template_that_cannot_be_used_says_why(tmp_path, source, message):
    path = tmp_path / "mine.j2"
    path.write_text(source)
    with pytest.raises(GvendiError, match=message):
        make_task("generic", template=path).ask(math_rows("p"))


def test_a_template_cannot_change_what_it_is_given(tmp_path):
    path = tmp_path / "mine.j2"
    path.write_text("{% block user %}{{ shots.clear() }}{% endblock %}")
    with pytest.raises(GvendiError, match="cannot be filled"):
        make_task("generic", template=path).ask(math_rows("p"))


@pytest.mark.parametrize("name", ["absent.j2", "n" * 300, "folder", "file/inside"])
@pytest.mark.parametrize("read", [read_text, lambda path: Template("generic_row", path)], ids=["yaml", "j2"])
def test_what_the_system_refuses_stays_its_error_with_the_path(name, read, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Errno") as caught:
        read(tmp_path / name)
    assert (os.fspath(caught.value.filename), caught.value.errno > 0) == (str(tmp_path / name), True)


@pytest.mark.parametrize("read", [read_text, lambda path: Template("generic_row", path)], ids=["yaml", "j2"])
def test_bytes_that_are_no_text_are_the_contents_fault(read, tmp_path):
    (tmp_path / "mine").write_bytes(b"\xff\xfe")
    with pytest.raises(GvendiError, match="mine' is not UTF-8"):
        read(tmp_path / "mine")


def test_rows_that_cannot_be_shown_have_a_reason():
    task = make_task("math")
    assert isinstance(task.shot({"prompt": "p" * 9000, "completion": "c"}), Reason)
    assert task.shot({"text": "t"}) == "a bare text has no prompt and completion"
    assert (
        task.shot({"prompt": "a\ud800", "completion": "c"})
        == "invalid Unicode: lone surrogate in field 'prompt'"
    )
    assert make_task("nli").shot(nli_row(premise=" ")).startswith("no premise")
    with pytest.raises(GvendiError, match="at least one row"):
        task.ask([])


def test_text_fields_of_other_shapes():
    assert text_fields({"instruction": "Add", "input": "2 and 2", "output": "4"}) == ("Add\n2 and 2", "4")
    assert text_fields(
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    ) == ("Q", "A")
    assert text_fields({"question": "alone"}).startswith("missing fields: none of 'prompt'")


def test_text_fields_of_a_conversation_are_its_last_question_and_answer():
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    assert text_fields({"messages": [{"role": role, "content": text} for role, text in turns]}) == ("c", "d")
    assert (
        text_fields({"messages": [{"role": "assistant", "content": "d"}]})
        == "no user turn before the last answer"
    )
    assert text_fields({"prompt": "p", "completion": "c"}) == ("p", "c")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("poetry", {}, "task is 'poetry'; wanted one of math, nli, generic"),
        ("math", {"votes": 3}, "task 'math' has no setting 'votes'; it has shots"),
        ("math", {"tau": 4}, "tau is 4 but there are 3 solutions"),
        ("math", {"solutions": 0}, "solutions is 0"),
        ("nli", {"shots": 2.5}, "shots is 2.5; wanted an integer"),
    ],
)
def test_settings_that_make_no_task_are_refused_by_name(name, settings, message):
    with pytest.raises(GvendiError, match=message):
        make_task(name, **settings)


def test_a_decision_wants_an_answer_for_every_follow_up():
    with pytest.raises(GvendiError, match="answers holds 2"):
        make_task("math").decide(Candidate({"problem": "p"}), ["a", "b"], Texts())


@pytest.mark.parametrize("name", ["math", "nli", "generic"])
def test_a_description_is_json_and_the_same_every_time(name):
    description = make_task(name).describe()
    assert json.loads(json.dumps(description)) == description == make_task(name).describe()
    assert make_task(name, shots=3).describe() != description


def test_real_rows_can_be_shown(shared):
    import gzip

    with gzip.open(shared / "esnli" / "dev.jsonl.gz", "rt", encoding="utf-8") as stream:
        pairs = [json.loads(line) for line in stream][:500]
    nli, math = make_task("nli"), make_task("math")
    assert not any(isinstance(nli.shot(row), Reason) for row in pairs)
    with open(shared / "gsm8k" / "train.jsonl", encoding="utf-8") as stream:
        problems = [json.loads(line) for line in stream][:500]
    assert not any(isinstance(math.shot(row), Reason) for row in problems)
    assert problems[0]["prompt"] in math.ask(problems[:5]).messages[1]["content"]
