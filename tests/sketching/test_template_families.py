"""Stock chat templates of model families: no row ends a run, no text is lost in silence, and what is supervised is
what the assistant says, by a rule and by the masks of TRL's training templates."""

import re
from dataclasses import replace

import pytest
import transformers
from places import ROOT

from gvendi_fast.sketching.proxy.encode import Rejected, Sample
from tests.sketching.template_families import CASES, FOLDER, FREE, MORE, families
from tests.sketching.template_readings import (
    agreement,
    encoder_of,
    faults,
    masked,
    present,
    readings,
    template_takes,
)
from tests.sketching.template_table import BEGIN, END, PAGE, page

FAMILIES, EVERY = families(), (*CASES, *MORE)
PRESENT = present()
BY_NAME = [pytest.param(family, id=family.family) for family in PRESENT]
TRAINED = [param for param in BY_NAME if param.values[0].training_template() is not None]

# (family, fault): what of the template, not of the package, breaks the rule.
_ENDS = "the template ends a call in a marker of its own"
_NEXT = "a turn ends where the next header begins, whosever that is"
_GOES_ON = "the tool's answer stands inside the turn, which goes on behind it"
DEVIATIONS = {
    ("gpt-oss", "a turn ends in <|call|>"): _ENDS,
    ("GLM-4.5", "a turn ends in <|observation|>"): _NEXT,
    ("GLM-4.5", "a turn ends in <|system|>"): _NEXT,
    ("GLM-4.6", "a turn ends in <|observation|>"): _NEXT,
    ("GLM-4.6", "a turn ends in <|system|>"): _NEXT,
    ("GLM-4.7-Flash", "a turn ends in <|observation|>"): _NEXT,
    ("GLM-4.7-Flash", "a turn ends in <|system|>"): _NEXT,
    ("DeepSeek-R1-Distill", "a turn ends in <｜tool▁call▁end｜>"): "a single call is left without an end",
    ("DeepSeek-R1-0528", "a turn ends in <｜tool▁call▁end｜>"): "a single call is left without an end",
    ("Apertus", "a turn ends in <|tools_suffix|>"): _GOES_ON,
    ("Gemma 4", "a turn ends in <tool_call|>"): _GOES_ON,
    ("Gemma 4", "a turn before the last has no end"): _GOES_ON,
    ("DiffusionGemma", "a turn ends in <tool_call|>"): _GOES_ON,
    ("DiffusionGemma", "a turn before the last has no end"): _GOES_ON,
}
# (family, difference): why the package and TRL's mask differ.
_DROPPED = "the stock template drops reasoning that TRL's keeps; it is noted"
_REASONING = "content here, reasoning and content in TRL's mask"
DIFFERENCES = {
    ("Qwen3", _REASONING): _DROPPED,
    ("Qwen3.5", _REASONING): _DROPPED,
    ("Qwen3.6", _REASONING): _DROPPED,
    ("DeepSeek-R1-Distill", _REASONING): _DROPPED,
    (
        "DeepSeek-R1-Distill",
        "call here, nothing in TRL's mask",
    ): "the template writes calls beside a null content alone, which transformers takes away from version 5 on",
    (
        "GLM-4.5",
        "ends in '', in TRL's mask in '<|user|>'",
    ): "TRL's template writes the next header behind the last turn too",
}


def test_the_index_lists_what_is_there_and_what_may_be_there():
    kept = {family.file for family in FAMILIES if family.file}
    assert kept == {path.name for path in FOLDER.glob("*.jinja")}
    assert len({family.family for family in FAMILIES}) == len(FAMILIES)
    assert len(kept) >= 30
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 500_000
    (dev,) = re.findall(r"^dev = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    for family in FAMILIES:
        assert (family.file is None) != (family.package is None), family.family
        assert family.file is None or family.licence in FREE, family.family
        assert family.package is None or f'"{family.package}>=' in dev, family.family


@pytest.mark.parametrize("family", BY_NAME)
def test_no_row_ends_the_run(family):
    rows = [replace(case.row(), row=number, id=case.name) for number, case in enumerate(EVERY)]
    results = list(encoder_of(family).encode(rows))
    assert [result.id for result in results] == [case.name for case in EVERY]
    for result, reading in zip(results, readings(family).values(), strict=True):
        assert isinstance(result, Sample | Rejected)
        assert (result.reason if isinstance(result, Rejected) else None) == reading.refused


@pytest.mark.parametrize("family", BY_NAME)
def test_a_row_is_refused_where_the_template_takes_it_in_no_form(family):
    for reading in readings(family).values():
        assert (reading.refused is None) == template_takes(family, reading.case), reading.case.name


@pytest.mark.parametrize("family", BY_NAME)
def test_what_is_supervised_is_what_the_assistant_says(family):
    found = {fault for reading in readings(family).values() for fault in faults(reading)}
    assert found == {fault for name, fault in DEVIATIONS if name == family.family}


@pytest.mark.parametrize("family", BY_NAME)
def test_supervised_tokens_are_those_of_the_supervised_text(family):
    for reading in readings(family).values():
        assert "".join(reading.tokens) == "".join(reading.parts)


@pytest.mark.parametrize("family", BY_NAME)
def test_arguments_of_a_call_read_the_same_as_a_string_and_as_an_object(family):
    found = readings(family)
    as_object, as_string = (found[f"call, arguments as {form}"] for form in ("an object", "a string"))
    assert replace(as_string, case=as_object.case) == as_object


@pytest.mark.skipif(not TRAINED, reason="needs the trl package, which ships the training templates")
@pytest.mark.parametrize("family", TRAINED)
def test_what_is_supervised_agrees_with_trl_s_mask(family):
    marked, found, compared = masked(family), set(), 0
    for reading in (readings(family)[case.name] for case in CASES):
        if reading.refused is None and marked[reading.case.name] is not None:
            found |= set(agreement(reading, marked[reading.case.name]))
            compared += 1
    assert compared >= 5
    # Not all of them are seen with an older transformers.
    assert found <= {difference for name, difference in DIFFERENCES if name == family.family}
    assert found or not any(name == family.family for name, _ in DIFFERENCES)


@pytest.mark.skipif(transformers.__version__ < "5", reason="the page is made with transformers 5")
def test_the_page_shows_the_readings():
    text = PAGE.read_text()
    assert page(text) == text, "run 'python -m tests.sketching.template_table'"
    lines = text.split(BEGIN)[1].split(END)[0].strip().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {family.family}" for family in FAMILIES]
