"""How many requests are under way at once, and how long to wait before the next.

The limit follows additive increase, multiplicative decrease (as TCP does): n successes in a row at the limit n add
one, an overloaded endpoint halves it. Of the requests that one overload hits only the first counts: the others were
sent under the old limit and say nothing about the new one.

tenacity was considered: it repeats one call and knows no other, so that the limit, a Retry-After that holds everybody,
tries that do not count and the end of the run would all be callbacks of ours, and its jitter takes no seed.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from datetime import timezone
from email.utils import parsedate_to_datetime

from gvendi_fast.base.errors import GvendiError


class AdaptiveLimit:
    """A limit that starts at `start`, never exceeds `maximum` and never falls below 1.

    To be used from one event loop. `acquire` gives a round, which goes back with `release`, `succeeded`, `overloaded`.
    """

    def __init__(self, start: int, maximum: int) -> None:
        if not 1 <= start <= maximum:
            raise GvendiError(
                f"concurrency={start!r} must be at least 1 and at most max_concurrency={maximum!r}"
            )
        self.limit, self.maximum = start, maximum
        self.under_way = 0
        self._round = 0
        self._row = 0
        self._open = False
        self._waiting: deque[asyncio.Future] = deque()

    async def acquire(self) -> int:
        """Wait for a free place, in order of arrival; returns the round in which it was given."""
        if self._free() and not self._waiting:
            self.under_way += 1
            return self._round
        place = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await place
        except asyncio.CancelledError:
            # The place was given in the moment of the cancellation.
            if place.done() and not place.cancelled():
                self.release()
            raise
        return self._round

    def release(self) -> None:
        """Give a place back."""
        self.under_way -= 1
        self._wake()

    def succeeded(self) -> None:
        """A request was served."""
        self._row += 1
        if self._row >= self.limit:
            self._row = 0
            self.limit = min(self.limit + 1, self.maximum)
            self._wake()

    def overloaded(self, round_: int) -> bool:
        """The endpoint was too busy for a request of this round; returns whether that was news."""
        self._row = 0
        if round_ < self._round:
            return False
        self._round += 1
        self.limit = max(self.limit // 2, 1)
        return True

    def open(self) -> None:
        """Let everybody pass: the run has ended and whoever waits is to learn of it."""
        self._open = True
        self._wake()

    def _free(self) -> bool:
        return self._open or self.under_way < self.limit

    def _wake(self) -> None:
        while self._waiting and self._free():
            place = self._waiting.popleft()
            if not place.done():
                self.under_way += 1
                place.set_result(None)


class Backoff:
    """Delays in seconds: base * 2^(n-1), at most `longest`, times a random share of [1/2, 1) from `seed`."""

    def __init__(self, base: float, longest: float, seed: int) -> None:
        self._base, self._longest = base, longest
        self._random = random.Random(seed)

    def delay(self, failures: int) -> float:
        """Before the next try after `failures` in a row (>= 1)."""
        # 2.0**64 times any base is beyond any `longest`, and larger powers end in an OverflowError.
        whole = min(self._base * 2.0 ** min(failures - 1, 64), self._longest)
        return whole * self._random.uniform(0.5, 1.0)


def retry_after_seconds(value: str | None, now: float | None = None) -> float | None:
    """The seconds that a Retry-After header asks for (RFC 9110, 10.2.3); None without one or if it is neither form.

    value: seconds or an HTTP date. now: seconds since 1970, for the date; by default the clock's.
    """
    if value is None:
        return None
    text = value.strip()
    # Only whole seconds are in the standard; some endpoints send fractions.
    if text.replace(".", "", 1).isascii() and text.replace(".", "", 1).isdigit():
        seconds = float(text)
        return seconds if math.isfinite(seconds) else None
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max(date.timestamp() - (time.time() if now is None else now), 0.0)
