"""What is asked of a generator and what it answers, without saying where the generator runs.

The key of a request is the SHA-256 of its canonical JSON: model, messages, sampling parameters and the number of the
draw. The endpoint's address and the API key are no part of it, so the same model served elsewhere answers from what
is already on disk.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.data.records import lone_surrogate

OK = "ok"
FAILED = "failed"
REFUSED = "refused"
UNSERVED = "unserved"
SENT = "sent"
# Answered, and paid for where answers are: never asked again. The others cost nothing or were lost, and are.
FINAL = (OK, FAILED)
_MOST_DIGITS = 4300


@dataclass(frozen=True)
class Request:
    """One draw of one prompt.

    messages: chat messages, each with `role` and `content`. temperature: >= 0; 0 is greedy. top_p: in (0, 1].
    max_tokens: most tokens of the answer; None leaves it to the generator. sample: number of the draw, >= 0; other
    numbers are other requests. extra: further fields of the request's body, such as {"stop": ["\\n\\n"]}.

    Raises GvendiError for values outside these ranges and for text that UTF-8 cannot hold.
    """

    messages: Sequence[Mapping[str, str]]
    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int | None = None
    sample: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_messages(self.messages)
        if not 0 <= self.temperature < float("inf"):
            raise GvendiError(f"temperature={self.temperature!r} must be 0 or more and finite")
        if not 0 < self.top_p <= 1:
            raise GvendiError(f"top_p={self.top_p!r} must lie above 0 and not above 1; 1 keeps every token")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise GvendiError(f"max_tokens={self.max_tokens!r} must be at least 1, or None")
        if self.sample < 0:
            raise GvendiError(f"sample={self.sample!r} must be 0 or more: it numbers the draws of one prompt")
        taken = sorted(
            set(self.extra) & {"model", "messages", "temperature", "top_p", "max_tokens", "n", "stream"}
        )
        if taken:
            raise GvendiError(
                f"extra holds {', '.join(taken)}; fields of Request are set there, and each request is one whole "
                "answer: number repeated draws by `sample`"
            )

    def canonical(self, model: str) -> dict[str, Any]:
        """What the key is made of, and what the request store keeps."""
        return {
            "model": model,
            "messages": [dict(message) for message in self.messages],
            "temperature": float(self.temperature),
            "top_p": float(self.top_p),
            "max_tokens": self.max_tokens,
            "extra": dict(self.extra),
            "sample": self.sample,
        }

    def key(self, model: str) -> str:
        """64 hexadecimal digits that name this request to `model`."""
        return hashlib.sha256(canonical_json(self.canonical(model)).encode("ascii")).hexdigest()


@dataclass(frozen=True)
class Answer:
    """What came of a request.

    text: the content; None where there is none. reason: None where the answer can be used, else one clause that says
    why not. status: "ok", "failed" (answered, but unusable), "refused" (the request itself) or "unserved" (no answer
    after all retries). attempts: times it was sent. tokens: as the generator counted them, None where it did not.
    cost: in the currency of the prices given, None without prices or counts. cached: whether it was on disk already.
    """

    key: str
    text: str | None
    reason: str | None
    status: str
    attempts: int
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float | None = None
    cached: bool = False

    @property
    def ok(self) -> bool:
        return self.status == OK


@dataclass(frozen=True)
class Completion:
    """One chat completion as read from its JSON; fields as in Answer."""

    text: str | None
    reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


def canonical_json(body: Mapping[str, Any]) -> str:
    """JSON with sorted keys, no spaces and ASCII only: equal for equal bodies."""
    try:
        return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise GvendiError(
            f"The request cannot be written as JSON ({error}); `extra` takes JSON values"
        ) from error


def read_completion(raw: str) -> Completion:
    """The first choice of a chat completion, or why it holds nothing usable; never raises on what `raw` holds."""
    try:
        body = json.loads(raw, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        return Completion(None, f"the answer is not JSON ({type(error).__name__})", None, None)
    if not isinstance(body, dict):
        return Completion(None, f"the answer is a JSON {type(body).__name__}, not an object", None, None)
    usage = body.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    text, reason = _first_choice(body.get("choices"))
    return Completion(
        text, reason, _count(counts.get("prompt_tokens")), _count(counts.get("completion_tokens"))
    )


def _whole(digits: str) -> int:
    # Some versions of Python take minutes to read a million digits, the others refuse from here on by themselves.
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _first_choice(choices: Any) -> tuple[str | None, str | None]:
    if not isinstance(choices, list) or not choices:
        return None, "the answer has no choices"
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        return None, "the first choice has no message"
    text = message.get("content")
    ended = choice.get("finish_reason")
    if not isinstance(text, str):
        # A refusal or a call of a tool comes without content.
        what = "no content" if text is None else f"content of type {type(text).__name__}"
        return None, f"the message has {what} (finish_reason {ended!r:.40})"
    if not _is_utf8(text):
        return None, "the content has half a surrogate pair"
    if ended == "length":
        return text, "the answer was cut at the token limit"
    if ended == "content_filter":
        return text, "the answer was cut by a content filter"
    if not text.strip():
        return text, "the content is empty"
    return text, None


def _count(value: Any) -> int | None:
    """A number of tokens that SQLite can hold, or None for anything else."""
    return value if type(value) is int and 0 <= value < 2**53 else None


def _is_utf8(text: str) -> bool:
    return not lone_surrogate(text)


def _check_messages(messages: Any) -> None:
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise GvendiError(
            f"messages={messages!r:.80} must be a non-empty list of {{'role': ..., 'content': ...}} objects"
        )
    for index, message in enumerate(messages):
        right = isinstance(message, Mapping) and all(
            isinstance(message.get(k), str) for k in ("role", "content")
        )
        if not right:
            raise GvendiError(f"messages[{index}]={message!r:.80} must have a role and a content, both text")
        if not all(_is_utf8(text) for text in message.values() if isinstance(text, str)):
            raise GvendiError(
                f"messages[{index}] has half a surrogate pair, which UTF-8 cannot hold; clean the text with "
                'text.encode("utf-8", "replace").decode()'
            )
