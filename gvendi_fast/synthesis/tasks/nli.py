"""Natural-language inference: premise, hypothesis and label in one go, kept if N fresh labels all agree."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gvendi_fast.data.rows import Reason, lone_surrogate
from gvendi_fast.synthesis.tasks.prompts import Ask, Template
from gvendi_fast.synthesis.tasks.sections import LONGEST, answered_sections, clean, sections, without_thinking
from gvendi_fast.synthesis.tasks.task import (
    MOST_ASKED,
    SHOT_CHARS,
    Accepted,
    Candidate,
    Refused,
    ask_with,
    check_answers,
    check_counts,
    check_sampling,
    echoes,
)

LABELS = ("entailment", "neutral", "contradiction")
_PARTS = ("premise", "hypothesis", "label")
# White space, punctuation and the signs of emphasis.
_AROUND = re.compile(r"^[\W_]+|[\W_]+$")
_LABEL = re.compile("|".join(LABELS), re.IGNORECASE)


class NliTask:
    """Pairs of premise and hypothesis with a label.

    shots: rows of the pool that a prompt shows; a row has premise, hypothesis and label as fields of its own or in
        `meta`.
    labels: requests that label the pair again without seeing its label; all must agree; 0 asks none.
    temperature: sampling temperature of pairs.
    top_p: share of the probability that pairs are sampled from, up to 1.
    label_temperature: sampling temperature of labels.
    label_top_p: share of the probability that labels are sampled from, up to 1.
    pair_template: a Jinja file with the prompt for pairs; null takes this package's.
    label_template: a Jinja file with the prompt for labels; null takes this package's.
    row_template: a Jinja file that makes the accepted row's prompt and completion, which should look like the pool's;
        null takes this package's.
    longest: characters of the model's text, at most; a longer one is refused.
    """

    name = "nli"

    def __init__(
        self,
        shots: int = 5,
        labels: int = 2,
        temperature: float = 1.0,
        top_p: float = 0.95,
        label_temperature: float = 0.75,
        label_top_p: float = 0.95,
        pair_template: str | os.PathLike | None = None,
        label_template: str | os.PathLike | None = None,
        row_template: str | os.PathLike | None = None,
        longest: int = LONGEST,
    ) -> None:
        check_counts(shots=(shots, 1), labels=(labels, 0, MOST_ASKED), longest=(longest, 1))
        check_sampling(
            temperature=temperature,
            top_p=top_p,
            label_temperature=label_temperature,
            label_top_p=label_top_p,
        )
        self.shots, self.labels = shots, labels
        self._generation, self._labelling = (temperature, top_p), (label_temperature, label_top_p)
        self._pair = Template("nli_pair", pair_template)
        self._label = Template("nli_label", label_template)
        self._row = Template("nli_row", row_template, wanted=("prompt", "completion"))
        self._longest = longest

    def shot(self, row: Mapping[str, Any]) -> dict[str, Any] | Reason:
        """See Task."""
        meta = row.get("meta")
        values = {name: row.get(name) for name in _PARTS}
        if isinstance(meta, Mapping):
            values = {name: meta.get(name) if value is None else value for name, value in values.items()}
        for name, value in values.items():
            if not isinstance(value, str) or not value.strip() or lone_surrogate(value):
                return Reason(f"no {name}: wanted a text in field '{name}' or 'meta.{name}'")
        label = _one_label(values["label"])
        if isinstance(label, Reason):
            return label
        size = sum(map(len, values.values()))
        if size > SHOT_CHARS:
            return Reason(f"a pair of {size} characters; at most {SHOT_CHARS} are shown in a prompt")
        return {**values, "label": str(label)}

    def ask(self, rows: Sequence[Mapping[str, Any]], sample: int = 0) -> Ask:
        """See Task; the template is given shots."""
        return ask_with(self._pair, [self.shot(row) for row in rows], sample, *self._generation)

    def parse(self, answer: str | None, rows: Sequence[Mapping[str, Any]] = ()) -> list[Candidate] | Refused:
        """See Task."""
        found = answered_sections(answer, self._longest, _PARTS)
        if isinstance(found, Reason):
            return Refused("parse", str(found))
        values = found[0]
        label = _one_label(values["label"])
        if isinstance(label, Reason):
            return Refused("parse", str(label))
        shown = [_pair_text(shot) for row in rows if not isinstance(shot := self.shot(row), Reason)]
        if echoes(_pair_text(values), shown):
            return Refused("parse", "echoes a row of the prompt")
        return [Candidate({**values, "label": str(label)})]

    def follow_ups(self, candidate: Candidate) -> list[Ask]:
        """N draws of the label; the request does not say which one was generated."""
        unlabelled = {name: candidate.values[name] for name in ("premise", "hypothesis")}
        messages = self._label.messages(unlabelled) if self.labels else ()
        return [Ask(messages, sample, *self._labelling) for sample in range(self.labels)]

    def checker(self, workers: int = 1) -> None:
        """Labels are compared as words."""

    def decide(
        self, candidate: Candidate, answers: Sequence[str | None], checker: None = None
    ) -> Accepted | Refused:
        """The pair as a row, if every answer gives its label."""
        check_answers(answers, self.labels)
        wanted, labels = candidate.values["label"], [self._read_label(answer) for answer in answers]
        for number, label in enumerate(labels, 1):
            if isinstance(label, Reason):
                return Refused("answers", f"label {number} of {len(labels)}: {label}")
        votes = sum(label == wanted for label in labels)
        if votes < len(labels):
            return Refused("answers", f"labels disagree: generated {wanted}, then {', '.join(labels)}")
        meta = {"task": self.name, **candidate.values, "answer": wanted, "votes": votes, "answers": labels}
        completion = self._row.block("completion", candidate.values)
        return Accepted({"prompt": self.prompt_of(candidate), "completion": completion, "meta": meta})

    def prompt_of(self, candidate: Candidate) -> str:
        """The block `prompt` of the row template."""
        return self._row.block("prompt", candidate.values)

    def describe(self) -> dict[str, Any]:
        """See Task."""
        templates = {"pair": self._pair, "label": self._label, "row": self._row}
        return {
            "task": self.name,
            "shots": self.shots,
            "labels": self.labels,
            "sampling": [*self._generation, *self._labelling],
            "longest": self._longest,
            "templates": {name: template.digest() for name, template in templates.items()},
        }

    def _read_label(self, answer: str | None) -> str | Reason:
        text = clean(answer, self._longest)
        text = text if isinstance(text, Reason) else without_thinking(text)
        if isinstance(text, Reason):
            return text
        # One bare word is an answer too.
        if "<" not in text:
            label = _one_label(text)
            return Reason("no <label>") if isinstance(label, Reason) else label
        found = sections(text, ("label",))
        return found if isinstance(found, Reason) else _one_label(found[0]["label"])


def _one_label(text: str) -> str | Reason:
    word = _AROUND.sub("", text).lower()
    if word in LABELS:
        return word
    named = list(dict.fromkeys(match.group().lower() for match in _LABEL.finditer(text)))
    if len(named) > 1:
        return Reason(f"{'two' if len(named) == 2 else 'three'} labels: {' and '.join(named)}")
    return Reason(f"label {text[:40]!r} is none of {', '.join(LABELS)}")


def _pair_text(values: Mapping[str, str]) -> str:
    return f"{values['premise']}\n{values['hypothesis']}"
