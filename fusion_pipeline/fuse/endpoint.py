"""Caption engine behind any OpenAI-compatible endpoint: a provider, `vllm serve`, a local server.

One chat completion a sample, over the official `openai` client. Three rules shape the module: one
bad sample ends in one typed outcome; nothing is asked, and paid, twice without need (see
`fuse.journal`); and the key never reaches a log, a repr or an exception (providers echo it in error
messages, so their text is never repeated).
"""

import asyncio
import contextlib
import email.utils
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self
from urllib.parse import urlsplit

import httpx2
import openai
from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    model_validator,
)
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential_jitter,
)

from fusion_pipeline.dataset.images import DecodeError
from fusion_pipeline.fuse.base import (
    Captioned,
    CaptionFailed,
    CaptionOutcome,
    CaptionRequest,
    Finish,
)
from fusion_pipeline.fuse.completions import Completion, PaidConfig, Usage, request_body
from fusion_pipeline.fuse.journal import Attempt, Journal, request_id
from fusion_pipeline.fuse.ledger import Ledger, Prices
from fusion_pipeline.fuse.traffic import FIRST_LIMIT, Backend, Backends, Rate, Slots

# The longest `Retry-After` that is obeyed; a longer one ends the attempts.
_MAX_RETRY_AFTER_S = 120.0
_CONNECTIONS = 1000
AGAIN = {408, 409, 429}
"""Statuses that may go away, besides all from 500 on."""
_COSTLY = {408, 502, 504, *range(520, 528)}
"""Statuses behind which an answer may have been made, and paid: gateways that waited no longer."""
TURN_TOKENS = 64
"""The most that a chat template adds."""
# OpenAI's code and Azure's code for a prompt that the content filter refused.
BLOCKED_CODES = {"content_policy_violation", "content_filter", "moderation_blocked"}
_REMEDIES = {
    "max_tokens": "set `token_parameter: max_completion_tokens`",
    "temperature": "set `temperature: null`, which leaves it out",
    "seed": "set `seed: null`, which leaves it out",
}
"""By the parameter that a model refuses."""
_TOO_LONG = ("maximum context length", "longer than the maximum")
"""As vLLM says it, which has no code for it."""
_UNSUPPORTED_CODES = {"unsupported_parameter", "unsupported_value", "unknown_parameter"}


class EndpointError(Exception):
    """The engine itself is misconfigured or refused: every sample would fail. Stops the run."""


def base_url(url: str) -> str:
    """The same URL. Raises ValueError for what is no base URL of an API."""
    parts = urlsplit(url)  # ValueError for a malformed host
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            "must be an http:// or https:// base URL, such as http://localhost:8000/v1"
        )
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user or password: put the key in the variable `key_env`")
    if parts.path.rstrip("/").endswith("/chat/completions"):
        raise ValueError("must be the base URL, without /chat/completions")
    _ = parts.port  # ValueError for a port outside 0..65535
    return url


def _base_urls(value: object) -> object:
    """One or several, each checked."""
    urls = [value] if isinstance(value, str) else value
    if not (isinstance(urls, list | tuple) and urls and all(isinstance(u, str) for u in urls)):
        raise ValueError("must be a base URL, or a list of them")
    return tuple(map(base_url, urls))


class EndpointConfig(PaidConfig):
    """Where captions come from, and how they are asked for."""

    url: Annotated[tuple[str, ...], BeforeValidator(_base_urls)]
    """Base URL, such as `https://api.openai.com/v1` or `http://localhost:8000/v1`; or several that
    serve the same model: the least busy one is asked, and one that is gone is left alone."""
    concurrency: int = Field(default=256, ge=1)
    """Most requests in flight; 1000 is the most connections that the client opens to an address.
    Few at first, and more as long as the endpoint does not refuse too many."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Limit of your account; null: what the endpoint's own headers and refusals say is obeyed."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Of prompts and answers together; null as above."""
    timeout_s: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """Seconds that one attempt may take."""
    max_retries: int = Field(default=5, ge=0, le=100)
    """Attempts after the first on 408, 409, 429, 5xx, timeouts, lost connections and answers that
    are none."""

    @model_validator(mode="after")
    def _connectable(self) -> Self:
        if self.concurrency > _CONNECTIONS * len(self.url):
            raise ValueError(f"concurrency: at most {_CONNECTIONS:,} for each `url`")
        return self


class _Again(Exception):
    """An attempt came to nothing; another one may do better."""

    def __init__(self, reason: str, after: float | None = None, is_charged: bool = False) -> None:
        """`after`: seconds that the endpoint asks for. `is_charged`: it may have cost something."""
        super().__init__(reason)
        self.reason, self.after, self.is_charged = reason, after, is_charged


@dataclass
class _Asking:
    """A request on its way through its attempts."""

    request: CaptionRequest
    id: str
    body: bytes = b""
    is_funded: bool = False
    """Money is set aside for one attempt."""
    funded: float = 0.0
    """Dollars: the most that it can cost."""
    attempt: Attempt | None = None
    """The one that is written down."""


@dataclass
class _Session:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    clients: dict[str, openai.AsyncOpenAI]
    slots: Slots
    rate: Rate
    backends: Backends
    ledger: Ledger


@dataclass
class _Usual:
    """Tokens that a request uses on average, so far."""

    requests: int = 0
    tokens: int = 0

    def add(self, usage: Usage) -> None:
        self.requests += 1
        self.tokens += usage.prompt_tokens + usage.completion_tokens

    def of_one(self, most: float) -> float:
        return self.tokens / self.requests if self.requests else most


class Endpoint:
    """Caption engine (see `CaptionEngine`) that asks an OpenAI-compatible endpoint.

    The client is made inside the running event loop at the first caption, so one engine serves
    several event loops, one at a time; `await close()` at the end of each.

    Failure reasons of a sample: `undecodable`, `timeout`, `connection`, `http_<status>`,
    `bad_response` (no chat completion in the answer) and `empty_answer`.

    Raises EndpointError, at construction for a missing key, later when the endpoint refuses the
    key, the model, a parameter or the account; BudgetError when the money is spent.
    """

    version: ClassVar[int] = 1

    def __init__(
        self,
        config: EndpointConfig,
        journal: Journal | None = None,
        settings: dict[str, Any] | None = None,
        key: str | None = None,
    ) -> None:
        """`journal`: not started; without one nothing is written down, and a crash forgets all.
        `settings`: what an answer hangs on besides image and prompt; by default the config's
        `fingerprint_fields`. `key`: of servers of our own, asked directly whatever proxies the
        environment names; instead of that in `key_env`."""
        self.config = config
        self._key = read_key(config.key_env) if key is None else SecretStr(key)
        self._is_ours = key is not None
        self._journal = journal
        self._settings = config.fingerprint_fields() if settings is None else settings
        self._prices = config.prices or Prices(input=0, output=0)
        self._spent = 0.0
        """Without a journal."""
        self._excess = 0
        """Prompt tokens beyond what was thought to be the most."""
        self._has_answered = False
        self._usual = _Usual()
        self._session: _Session | None = None
        if journal is not None:
            journal.start()

    async def caption(self, request: CaptionRequest) -> CaptionOutcome:
        """Caption one sample; at most `concurrency` samples are decoded or asked for at a time."""
        session = self._session_of_this_loop()
        texts = (request.prompt, *(request.correction or ()))
        asking = _Asking(request, request_id(request.key, texts, self._settings, request.again))
        if self._journal is not None:
            known = self._journal.answer(asking.id, request.shard)
            if known is not None:
                return known
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(_Again),
            stop=stop_after_attempt(self.config.max_retries + 1),
            wait=_pause,
            reraise=True,
        )
        try:
            return await attempts(self._attempt, session, asking)
        except _Again as last:
            await self._settle(session, asking, 0.0)
            return CaptionFailed(last.reason)
        except DecodeError:
            await self._settle(session, asking, 0.0)
            return CaptionFailed("undecodable")
        except EndpointError:
            await self._settle(session, asking, 0.0)
            raise
        finally:
            self._abandon(session, asking)

    async def close(self) -> None:
        """Close the connections. A later `caption` opens new ones."""
        session, self._session = self._session, None
        # Connections of a loop that has ended can't be closed from another one.
        if session is not None and session.loop is asyncio.get_running_loop():
            for client in session.clients.values():
                await client.close()

    def use(self, urls: Sequence[str], error: Exception | None = None) -> None:
        """From now on these addresses, with up to `concurrency` requests for each; requests wait
        while there is none, or, with an `error`, raise it. To be called in the event loop of the
        captions."""
        session = self._session_of_this_loop()
        session.slots.allow(self.config.concurrency * max(len(urls), 1))
        for url in set(urls) - set(session.clients):
            session.clients[url] = self._client(url)
        session.backends.use(urls, error)

    def dollars(self) -> float:
        """Spent so far, over all runs on this folder."""
        return self._spent if self._journal is None else self._journal.spent.dollars

    def _session_of_this_loop(self) -> _Session:
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.loop is not loop:
            config = self.config
            if self._journal is not None:
                self._journal.new_loop()
            self._session = _Session(
                loop,
                {url: self._client(url) for url in config.url},
                # Servers of our own refuse nothing: there is nothing to find out.
                Slots(config.concurrency, config.concurrency if self._is_ours else FIRST_LIMIT),
                Rate(config.requests_per_minute, config.tokens_per_minute),
                Backends(config.url),
                Ledger(config.budget_dollars, self.dollars),
            )
        return self._session

    def _client(self, url: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=url,
            api_key=self._key.get_secret_value(),
            timeout=self.config.timeout_s,
            max_retries=0,  # each attempt is to be written down
            # Half of the default one's CPU time.
            http_client=openai.DefaultAioHttpClient(trust_env=not self._is_ours),
        )

    async def _attempt(self, session: _Session, asking: _Asking) -> CaptionOutcome:
        if not asking.is_funded:  # before the slot: who waits for money must not hold one
            asking.funded = self._most(asking)
            await session.ledger.reserve(asking.funded)
            asking.is_funded = True
        async with session.slots.one():
            if not asking.body:
                # Decoding takes milliseconds a megapixel: the event loop must not wait for it.
                asking.body = await asyncio.to_thread(request_body, asking.request, self.config)
            if asking.attempt is None:
                asking.attempt = await self._intend(asking)
            try:
                outcome, dollars = await self._ask(session, asking)
            except _Again as failure:
                session.slots.count(failure.reason == "http_429")
                if failure.is_charged:
                    await self._settle(session, asking, asking.funded)
                raise
            session.slots.count(False)
        await self._settle(session, asking, dollars, outcome)
        return outcome

    def _most(self, asking: _Asking) -> float:
        """Dollars that one attempt can cost. A token is a byte of the prompt at least."""
        return self._prices.cost(self._most_tokens(asking.request), self.config.max_tokens)

    def _most_tokens(self, request: CaptionRequest) -> int:
        texts = (request.prompt, *(request.correction or ()))
        length = sum(len(text.encode()) + TURN_TOKENS for text in texts)
        return length + self.config.image_tokens + self._excess

    async def _intend(self, asking: _Asking) -> Attempt:
        shard = asking.request.shard
        if self._journal is None:
            return Attempt("", asking.id, shard, asking.funded)
        return await self._journal.intend(asking.id, shard, asking.funded)

    async def _settle(
        self,
        session: _Session,
        asking: _Asking,
        dollars: float,
        outcome: CaptionOutcome | None = None,
    ) -> None:
        """The attempt, if there is one, has ended and cost so much."""
        attempt, asking.attempt = asking.attempt, None
        answer = outcome if isinstance(outcome, Captioned) else None
        try:
            if self._journal is None:
                self._spent += dollars
            elif attempt is not None:
                await self._journal.end(attempt, dollars, answer)
        finally:
            self._release(session, asking)

    def _abandon(self, session: _Session, asking: _Asking) -> None:
        """What was given up (the run ends, the disk is full) counts in full, as it does for the
        next start: its intent has no end."""
        if asking.attempt is not None:
            if self._journal is None:
                self._spent += asking.funded
            else:
                self._journal.give_up(asking.attempt)
            asking.attempt = None
        self._release(session, asking)

    def _release(self, session: _Session, asking: _Asking) -> None:
        if asking.is_funded:
            asking.is_funded = False
            session.ledger.release(asking.funded)

    async def _ask(self, session: _Session, asking: _Asking) -> tuple[CaptionOutcome, float]:
        """What is answered, and what it costs. Raises _Again, EndpointError."""
        content = await self._send(session, asking)
        if isinstance(content, openai.APIStatusError):
            outcome = self._refused(content)
            # A prompt that the filter refused was read, and may be on the bill.
            if isinstance(outcome, CaptionFailed):
                return outcome, 0.0
            completion = Completion.parse(content.response.content)
            return outcome, self._cost(completion.usage if completion else None, asking)
        completion = Completion.parse(content)
        if completion is None:
            raise _Again("bad_response", is_charged=True)
        self._has_answered = True
        return completion.outcome(), self._cost(completion.usage, asking)

    def _cost(self, usage: Usage | None, asking: _Asking) -> float:
        if usage is None:
            return asking.funded
        self._usual.add(usage)
        excess = usage.prompt_tokens - self._most_tokens(asking.request)
        self._excess += max(excess, 0)  # `image_tokens` is too small: more is set aside from now on
        return self._prices.cost(usage.prompt_tokens, usage.completion_tokens)

    async def _send(self, session: _Session, asking: _Asking) -> bytes | openai.APIStatusError:
        most = float(self._most_tokens(asking.request) + self.config.max_tokens)
        await session.rate.wait(self._usual.of_one(most))
        async with session.backends.one() as backend:
            try:
                # The client's own timeout restarts with every byte: a server that sends blanks to
                # keep the connection alive (some do) would hold its slot for ever.
                async with asyncio.timeout(self.config.timeout_s):
                    answer = await session.clients[backend.url].post(
                        "/chat/completions",
                        cast_to=httpx2.Response,
                        content=asking.body,
                        options={
                            "headers": {
                                "Content-Type": "application/json",
                                "X-Client-Request-Id": asking.id,  # for the server's own log
                            },
                            "idempotency_key": asking.id,  # else one is drawn, for a millisecond
                        },
                    )
            except TimeoutError:
                raise _Again("timeout", is_charged=True) from None
            except openai.APIConnectionError as error:
                raise _lost(backend, error.__cause__) from None
            except openai.APIStatusError as error:
                # Returned, for an EndpointError must not carry the provider's text as its context.
                refused = error
            else:
                backend.answered(answer.headers)
                return answer.content
            backend.answered(refused.response.headers)
            return refused

    def _refused(self, error: openai.APIStatusError) -> CaptionOutcome:
        """What a status other than 200 means. Raises _Again, EndpointError."""
        config, status, code = self.config, error.status_code, error.code
        url = str(error.request.url).removesuffix("/chat/completions")
        if status == 403 and self._has_answered:
            return CaptionFailed("http_403")  # some gateways answer so to one flagged picture
        if status in (401, 403):
            hint = (
                "set `key_env` to the environment variable that holds a key"
                if config.key_env is None
                else f"check the key in the environment variable {config.key_env} (`key_env`) "
                f"and that it may use model {config.model!r}"
            )
            raise EndpointError(f"{url} refused access (HTTP {status}): {hint}")
        if status == 404:
            raise EndpointError(
                f"{url} answered HTTP 404: it serves no model {config.model!r} (`model`), "
                "or `url` is not the base URL of its API (it often ends in /v1)"
            )
        if status == 402 or (status == 429 and code == "insufficient_quota"):
            raise EndpointError(
                f"{url} reports that the account's quota is used up (insufficient_quota): "
                f"raise its limit, or use another key in {config.key_env} (`key_env`)"
            )
        if status == 400 and code in _UNSUPPORTED_CODES:
            field = error.param if error.param in EndpointConfig.model_fields else "model"
            remedy = _REMEDIES.get(field, f"change `{field}`")
            raise EndpointError(
                f"model {config.model!r} at {url} refuses a parameter ({code}): {remedy}"
            )
        if status == 400 and code in BLOCKED_CODES:
            return Captioned(None, Finish.BLOCKED)
        if status == 400 and (completion := Completion.parse(error.response.content)) is not None:
            # Azure's model inference reports filtered output as a completion with status 400.
            outcome = completion.outcome()
            if isinstance(outcome, Captioned) and outcome.finish is Finish.BLOCKED:
                return outcome
        if status == 400 and (
            code == "context_length_exceeded" or any(said in error.message for said in _TOO_LONG)
        ):
            return CaptionFailed("prompt_too_long")
        after = _retry_after(error.response.headers)
        if (status in AGAIN or status >= 500) and (after or 0.0) <= _MAX_RETRY_AFTER_S:
            raise _Again(f"http_{status}", after, is_charged=status in _COSTLY)
        return CaptionFailed(f"http_{status}")


def read_key(key_env: str | None) -> SecretStr:
    """From the variable of this name, or the file that it names. Raises EndpointError."""
    if key_env is None:
        return SecretStr("none")  # the client insists on one; a server without keys ignores it
    key, place = os.environ.get(key_env, "").strip(), os.environ.get(f"{key_env}_FILE")
    if not key and place:
        try:
            key = Path(place).read_text().strip()
        except (OSError, ValueError) as error:
            what = type(error).__name__  # its text may hold what the file holds
            raise EndpointError(f"{key_env}_FILE: {place} can't be read ({what})") from None
    if not key:
        raise EndpointError(
            f"no API key: set the environment variable {key_env}, or {key_env}_FILE to a file with "
            "it, name another one in `key_env`, or set `key_env: null` for a server that asks for "
            "none"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        # Sent as a header, such a key would come back inside the HTTP library's exception.
        raise EndpointError(
            f"the environment variable {key_env} (`key_env`) holds blanks, control characters or "
            "letters outside ASCII: it is not an API key"
        )
    return SecretStr(key)


def _lost(backend: Backend, cause: BaseException | None) -> _Again:
    """No answer came. (The transport calls a connection that was closed a ConnectTimeout.)"""
    if isinstance(cause, httpx2.TimeoutException) and not isinstance(cause, httpx2.ConnectTimeout):
        return _Again("timeout", is_charged=True)
    backend.lost()
    return _Again("connection", is_charged=not isinstance(cause, httpx2.ConnectError))


_BACKOFF = wait_exponential_jitter(multiplier=0.5, max=8.0, jitter=0.5)


def _pause(state: RetryCallState) -> float:
    """Seconds until the next attempt: what the endpoint asks for, or longer each time."""
    assert state.outcome is not None
    failure = state.outcome.exception()
    if isinstance(failure, _Again) and failure.after:
        return failure.after
    return _BACKOFF(state)  # also for a server that says 0


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, from `retry-after-ms` or `Retry-After` (RFC 9110: seconds or a date)."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError):  # not there, or a date
            seconds = float(headers.get(name, "")) * unit
            if not math.isnan(seconds):
                return max(seconds, 0.0)
    try:
        at = email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp()
    except (ValueError, OverflowError):  # no date, or one that no clock will show
        return None
    return max(at - time.time(), 0.0)
