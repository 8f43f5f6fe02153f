"""One HTTP request to a chat endpoint, and what its reply means. Nothing is retried here and nothing is kept.

The API key is read from the environment when the endpoint is made. It goes into the header of each request and
nowhere else: it is cut out of every text that the endpoint or the client sends back (key.py). Bodies are bounded
(http.py).
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from gvendi_fast.base.errors import GvendiError
from gvendi_fast.base.printable import printable
from gvendi_fast.synthesis.generators.http import UNREAD, make_client
from gvendi_fast.synthesis.generators.key import Key, LogFilter
from gvendi_fast.synthesis.generators.pacing import retry_after_seconds

if TYPE_CHECKING:
    from openai import APIStatusError

# Of a text that the endpoint sends with an error, as much as fits a message.
_TOLD = 200
# Seconds to reach the endpoint; a host that drops packets says nothing at all.
_CONNECT = 15.0


class Kind(enum.Enum):
    """What a reply means for the request and for the run."""

    ANSWERED = "answered"
    UNUSABLE = "answered with what is not kept"
    BUSY = "too busy"
    SLOW = "no reply within the time limit"
    SILENT = "no connection"
    BROKEN = "connection broken"
    FAULT = "server error"
    REFUSED = "request refused"
    WRONG_KEY = "key refused"
    WRONG_PLACE = "wrong address or model"


@dataclass(frozen=True)
class Reply:
    """text: body of an answer that is kept, else empty. reason: one clause. wait: seconds of Retry-After.
    what_to_check: a remedy."""

    kind: Kind
    text: str = ""
    reason: str = ""
    wait: float | None = None
    what_to_check: str = ""


class Endpoint:
    """The chat completions under `base_url`; arguments as in OpenAIGenerator, time_limit in seconds, most in bytes."""

    def __init__(self, base_url: str, key_variable: str | None, time_limit: float, most: int) -> None:
        try:
            from openai import AsyncOpenAI, Timeout
        except ImportError as error:
            raise GvendiError(
                f"An endpoint needs the openai client ({error}); install it with `pip install gvendi-fast[synthesis]`"
            ) from error
        parts = _parts(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise GvendiError(
                "base_url must be an address such as http://localhost:8000/v1, with http or https and a host; "
                f"it has scheme {parts.scheme!r} and host {parts.hostname!r}"
            )
        if parts.username is not None or parts.query:
            raise GvendiError(
                "base_url holds a user name or a query; secrets belong into the environment variable that "
                "key_variable names"
            )
        self.place = base_url.rstrip("/")
        self._key, self._time_limit = Key(key_variable), time_limit
        timeout = Timeout(time_limit, connect=min(_CONNECT, time_limit))
        self._client = AsyncOpenAI(
            base_url=base_url,
            api_key=self._key.for_client,
            max_retries=0,
            timeout=timeout,
            http_client=make_client(self._key, parts.hostname, most, timeout),
        )
        self._logs = LogFilter(self._key)
        self._logs.attach()

    async def aclose(self) -> None:
        await self._client.close()
        self._logs.detach()

    async def send(self, body: Mapping[str, Any]) -> Reply:
        """Send one body; raises nothing that an endpoint or a network can cause."""
        from openai import APIConnectionError, APIStatusError, APITimeoutError

        create = self._client.chat.completions.with_raw_response.create
        try:
            # The client's own limit is between two bytes; a reply that trickles would never meet it.
            raw = await asyncio.wait_for(create(**body), self._time_limit)
        except asyncio.TimeoutError:
            return self._slow()
        except APIConnectionError as error:
            cause = error.__cause__ or error
            # By name, because the client's HTTP library has changed between its releases.
            kind = Kind.SILENT if type(cause).__name__ in ("ConnectError", "ConnectTimeout") else Kind.BROKEN
            if isinstance(error, APITimeoutError) and kind is Kind.BROKEN:
                return self._slow()
            return Reply(kind, reason=self._clean(f"{type(cause).__name__}: {cause}".removesuffix(": ")))
        except APIStatusError as error:
            return self._by_status(error)
        return self._answered(raw.http_response)

    def _answered(self, response: Any) -> Reply:
        unread = response.extensions.get(UNREAD)
        if unread is not None:
            return Reply(Kind.UNUSABLE, reason=f"the answer was not read: {self._clean(unread)}")
        text = self._key.cut(response.content.decode("utf-8", "replace"))
        if self._key.hides_in(text):
            return Reply(Kind.UNUSABLE, reason="the answer holds the API key in another spelling")
        return Reply(Kind.ANSWERED, text)

    def _slow(self) -> Reply:
        return Reply(Kind.SLOW, reason=f"no reply within {self._time_limit:g} s")

    def _by_status(self, error: APIStatusError) -> Reply:
        status, code = error.status_code, error.code
        unread, onward = error.response.extensions.get(UNREAD), error.response.headers.get("location")
        told = self._clean(error.response.content.decode("utf-8", "replace"))
        reason = f"answered {status}" + (f": {told}" if told else "")
        reason += f" (of its body: {self._clean(unread)})" if unread else ""
        variable = self._key.variable
        key = "API key" if variable is None else f"API key in the environment variable {variable}"
        if 300 <= status < 400:
            reason += f" and points to {self._clean(onward)!r}" if onward else ""
            return Reply(
                Kind.WRONG_PLACE,
                reason=reason,
                what_to_check="base_url, for no redirect is followed",
            )
        if status in (401, 403):
            return Reply(Kind.WRONG_KEY, reason=reason, what_to_check=key)
        if status == 402 or code == "insufficient_quota":
            return Reply(
                Kind.WRONG_KEY, reason=reason, what_to_check=f"credit of the account behind the {key}"
            )
        if status in (429, 503):
            return Reply(
                Kind.BUSY, reason=reason, wait=retry_after_seconds(error.response.headers.get("retry-after"))
            )
        if status >= 500 or status in (408, 409, 425):
            return Reply(Kind.FAULT, reason=reason)
        if status in (400, 413, 422):
            return Reply(Kind.REFUSED, reason=reason)
        return Reply(Kind.WRONG_PLACE, reason=reason, what_to_check="base_url and the name of the model")

    def _clean(self, text: str) -> str:
        """Free of the key, on one line, short; cut last, so that no part of the key stays at the edge."""
        return printable(" ".join(self._key.clean(text).split())[:_TOLD])


def _parts(base_url: str) -> SplitResult:
    try:
        parts = urlsplit(base_url)
        # Read here, because a port that is no number shows only now.
        _ = parts.port
    except ValueError as error:
        raise GvendiError(
            "base_url has brackets or a port that cannot be read; give an address such as http://localhost:8000/v1"
        ) from error
    return parts
