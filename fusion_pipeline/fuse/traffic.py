"""How many requests go out, when, and where to. All of it belongs to one event loop."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from aiolimiter import AsyncLimiter

FIRST_LIMIT = 16
_FEW, _MANY = 1 / 4, 1 / 3
"""Shares of requests that are refused."""
_ENOUGH = 32
"""Requests that make a share of refusals more than bad luck."""
_FIRST_GROWTH, _GROWTH, _SHRINKAGE = 2.0, 1.25, 0.7
_REST_S, _LONGEST_REST_S = 0.5, 30.0
_MOST_LOSSES = 3


class Slots:
    """Requests in flight. The limit is looked at about once a round trip: few were refused, and it
    grows, at first fast; many, and it shrinks. A fault now and then changes nothing."""

    def __init__(self, most: int, first: int = FIRST_LIMIT) -> None:
        """`first`: how many at the beginning, when nothing is known of the server."""
        self._most = most
        self.limit = float(min(first, most))
        self.in_flight = 0
        self._free = asyncio.Condition()
        self._growth = _FIRST_GROWTH
        self._seen = self._refused = 0
        self._was_full = False

    def allow(self, most: int) -> None:
        """From now on so many: of servers of our own, which refuse none."""
        self._most = most
        self.limit = float(most)

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        async with self._free:
            await self._free.wait_for(lambda: self.in_flight < int(self.limit))
            self.in_flight += 1
            self._was_full = self._was_full or self.in_flight >= int(self.limit)
        try:
            yield
        finally:
            async with self._free:
                self.in_flight -= 1
                self._free.notify(max(1, int(self.limit) - self.in_flight))

    def count(self, is_refused: bool) -> None:
        """Of each request that came back, whether it was turned away for now (HTTP 429)."""
        self._seen += 1
        self._refused += is_refused
        if self._seen < self.limit:
            return
        share = self._refused / self._seen
        if share > _MANY:
            if self._seen < min(_ENOUGH, 2 * self.limit):
                return
            self.limit, self._growth = max(self.limit * _SHRINKAGE, 1.0), _GROWTH
        elif share < _FEW and self._was_full:  # else the limit is not what holds us back
            self.limit = min(max(self.limit * self._growth, self.limit + 1), float(self._most))
        self._seen = self._refused = 0
        self._was_full = False


class Rate:
    """Requests and tokens a minute, spread evenly; a limit that is None does not count."""

    def __init__(self, requests: int | None, tokens: int | None) -> None:
        self._requests = _limiter(requests)
        self._tokens = _limiter(tokens)
        self._turn = asyncio.Lock()  # in order: a limiter serves small amounts first

    async def wait(self, tokens: float) -> None:
        async with self._turn:
            if self._requests is not None:
                await self._requests.acquire()
            while self._tokens is not None and tokens > 0:
                part = min(tokens, self._tokens.max_rate)
                await self._tokens.acquire(part)
                tokens -= part


_BURST_S = 2.0


def _limiter(per_minute: int | None) -> AsyncLimiter | None:
    """Never more than this in any minute, a burst at its beginning included."""
    if per_minute is None:
        return None
    per_second = per_minute / (60 + _BURST_S)
    burst = max(per_second * _BURST_S, 1.0)
    return AsyncLimiter(burst, burst / per_second)


@dataclass
class Backend:
    """One of the addresses that serve the model."""

    url: str
    has_others: bool = True
    """Without any, a pause between two attempts at a request is all there can be."""
    in_flight: int = 0
    losses: int = 0
    """Connections lost with no answer in between."""
    rests: int = 0
    """In a row."""
    rests_until: float = 0.0
    """Time of the event loop."""

    def answered(self, headers: Mapping[str, str]) -> None:
        """Anything that came over the connection: it is there."""
        if self.rests:
            self.rests, self.rests_until = 0, 0.0
        self.losses = 0
        if wait := _announced(headers):  # an older answer, come late, does not take it back
            until = asyncio.get_running_loop().time() + wait
            self.rests_until = max(self.rests_until, until)

    def lost(self) -> None:
        """Nothing came. It rests after a few, longer each time; then one request tries it."""
        now = asyncio.get_running_loop().time()
        self.losses += 1
        if self.has_others and self.losses >= _MOST_LOSSES and now >= self.rests_until:
            self.rests_until = now + min(_REST_S * 2**self.rests, _LONGEST_REST_S)
            self.rests += 1

    def free_at(self, now: float) -> float:
        """When it may get another request."""
        if self.rests and self.in_flight and self.rests_until <= now:
            return now + _REST_S  # one is trying
        return max(self.rests_until, now)


class Backends:
    """The least busy one that is there gets the next request."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._all: list[Backend] = []
        self._error: Exception | None = None
        self.use(urls)

    def use(self, urls: Sequence[str], error: Exception | None = None) -> None:
        """From now on these; `error` is raised to whoever waits for one."""
        known = {backend.url: backend for backend in self._all}
        self._all = [known.get(url) or Backend(url) for url in urls]
        for backend in self._all:
            backend.has_others = len(urls) > 1
        self._error = error

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[Backend]:
        loop = asyncio.get_running_loop()
        while True:
            if self._error is not None:
                raise self._error
            if not self._all:
                await asyncio.sleep(_REST_S)
                continue
            now = loop.time()
            backend = min(self._all, key=lambda b: (b.free_at(now), b.in_flight))
            wait = backend.free_at(now) - now
            if wait <= 0:
                break
            await asyncio.sleep(wait)
        backend.in_flight += 1
        try:
            yield backend
        finally:
            backend.in_flight -= 1


_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def _announced(headers: Mapping[str, str]) -> float:
    """Seconds until there is room again, when the last of it is used up: the `x-ratelimit-…`
    headers of OpenAI's API and of those that follow it."""
    waits = [
        _seconds(headers.get(f"x-ratelimit-reset-{kind}", ""))
        for kind in ("requests", "tokens")
        if headers.get(f"x-ratelimit-remaining-{kind}") == "0"
    ]
    return min(max(waits, default=0.0), _LONGEST_REST_S)


def _seconds(text: str) -> float:
    """`6m0s`, `1.5s`, `20ms`."""
    return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION.findall(text))
