"""Whether a candidate says a test question in other words: a model is asked about the most similar test questions.

Similar is what shares rare words. A text is a row of weights over the words of the tests,
    x_w = (1 + ln n_w) (1 + ln((1 + Q) / (1 + q_w))),   n_w: times in the text, q_w: of the Q questions that have w,
and similarity is the cosine of two rows: the TF-IDF of scikit-learn (`sublinear_tf`, `smooth_idf`).

What retrieval misses is never asked about, and it knows words alone, neither meaning nor spelling: a paraphrase in
another language shares none. Of 20 paraphrases of GSM8K test questions that keep the things and change names, words and
order, the original is among the 1, 3, 5 most similar of 1,319 for 19, 20, 20; of 20 that also call the things by other
names (marbles become stickers; half of them have other numbers too) for 3, 7, 8, and for fewer the more tests there
are. The match of 10-grams finds none of the 40. Pairs of neighbouring words beside the words find 25 and 27 of them at
3 and 5, not 27 and 28, and take four times the memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.rows import Reason
from gvendi_fast.synthesis.filters.decontaminate import Question
from gvendi_fast.synthesis.generators.requests import Answer
from gvendi_fast.synthesis.tasks.prompts import Ask, Template
from gvendi_fast.synthesis.tasks.sections import clean, sections, without_thinking
from gvendi_fast.synthesis.tasks.task import Refused
from gvendi_fast.synthesis.tasks.words import normal_form, words


class SimilarQuestions:
    """Test questions by the weights of their words: float32 [words, Q], sparse.

    A question that stands there twice counts once, at its first place; one without a word is left out. Needs
    scikit-learn; raises GvendiError where it is missing and where no question is left. May be used from many threads.
    """

    def __init__(self, questions: Iterable[Question]) -> None:
        vectorizer = _vectorizer()
        first: dict[str, Question] = {}
        for question in questions:
            if words(question.text):
                first.setdefault(normal_form(question.text), question)
        if not first:
            raise GvendiError(
                "filter.paraphrase: the files of filter.tests hold no question with a word; name others, or set it to 0"
            )
        self._questions = list(first.values())
        # By word, so that a text touches the questions that share one with it only.
        self._weights = vectorizer.fit_transform(question.text for question in self._questions).T.tocsr()
        self._vectorizer = vectorizer

    def __len__(self) -> int:
        return len(self._questions)

    def nearest(self, text: str, count: int) -> list[Question]:
        """The `count` most similar questions, ties by their place; fewer where fewer share a word with `text`."""
        found = self._vectorizer.transform([text]) @ self._weights
        similarity, places = found.data, found.indices
        if len(places) > count:
            # Ties with the last one stay in, so that the place decides among them.
            kept = similarity >= np.partition(similarity, -count)[-count]
            similarity, places = similarity[kept], places[kept]
        order = np.lexsort((places, -similarity))[:count]
        return [self._questions[place] for place in places[order]]


class ParaphraseCheck:
    """Asks a model about the `count` test questions most similar to a candidate; one "yes" refuses it.

    path: a template file of the user's, given `candidate` and `test`; GvendiError where it does not show both.
    """

    def __init__(
        self, questions: SimilarQuestions, count: int, path: str | os.PathLike | None = None
    ) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise GvendiError(f"count is {count!r}; wanted a number of questions of at least 1")
        self.questions, self.count = questions, count
        self.template = Template("paraphrase", path)
        probe = {"candidate": "1029384756", "test": "6574839201"}
        text = "\n".join(message["content"] for message in self.template.messages(probe))
        for name, value in probe.items():
            if value not in text:
                raise GvendiError(f"template '{self.template.name}' does not show {{{{ {name} }}}}; add it")

    def similar(self, candidate: str) -> list[Question]:
        """The test questions to ask about."""
        return self.questions.nearest(candidate, self.count)

    def ask(self, candidate: str, question: Question) -> Ask:
        """The request about one of them, at temperature 0."""
        values = {"candidate": candidate, "test": question.text}
        return Ask(self.template.messages(values), temperature=0.0)

    def decide(self, questions: Sequence[Question], answers: Sequence[Answer]) -> Refused | None:
        """None if every answer is no; else the refusal by the first yes, or by the first answer that is neither."""
        unknown = None
        for question, answer in zip(questions, answers, strict=True):
            where = f"{question.file}:{question.line}"
            verdict = read_verdict(answer.text) if answer.ok else Reason(answer.reason or answer.status)
            if verdict is True:
                return Refused("paraphrase", f"a paraphrase of {where}")
            if isinstance(verdict, Reason) and unknown is None:
                unknown = Refused("paraphrase", f"not known whether a paraphrase of {where}: {verdict}")
        return unknown

    def describe(self) -> dict[str, Any]:
        """What decides which candidates are refused, beside the tests, JSON-able, for the run's fingerprint."""
        return {"questions": self.count, "template": self.template.digest()}


def read_verdict(answer: str | None) -> bool | Reason:
    """True for yes, False for no, or why the answer is neither."""
    text = clean(answer)
    text = text if isinstance(text, Reason) else without_thinking(text)
    found = text if isinstance(text, Reason) else sections(text, ("verdict",))
    if isinstance(found, Reason):
        return found
    word = found[0]["verdict"].rstrip(".").lower()
    if word not in ("yes", "no"):
        return Reason(f"verdict {word[:40]!r} is neither yes nor no")
    return word == "yes"


def _vectorizer() -> Any:
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise GvendiError(
            f"filter.paraphrase needs scikit-learn ({error}); install it with `pip install gvendi-fast[synthesis]`, or "
            "set filter.paraphrase to 0"
        ) from error
    return TfidfVectorizer(
        tokenizer=words, token_pattern=None, lowercase=False, sublinear_tf=True, dtype=np.float32
    )
