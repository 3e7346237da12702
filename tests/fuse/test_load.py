"""The endpoint engine under thousands of requests, against a server that misbehaves."""

import asyncio
import contextlib
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from api_server import (
    COMPLETION_TOKENS,
    FAULTS,
    MODEL,
    PROMPT_TOKENS,
    ApiServer,
    caption_of,
    serve_api,
)
from test_endpoint import encoded

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.fuse.base import Captioned, CaptionOutcome, CaptionRequest, Finish
from fusion_pipeline.fuse.endpoint import Endpoint, EndpointConfig
from fusion_pipeline.fuse.journal import Journal
from fusion_pipeline.fuse.ledger import BudgetError

IMAGE = encoded()
TABLE = "captions/captioner-7b"
PRICES = {"input": 2.0, "output": 8.0}


def request_of(number: int) -> CaptionRequest:
    prompt = f"Describe the picture.\nsample {number}"
    return CaptionRequest(f"{number:032x}", IMAGE, 64, 48, prompt, (), (), (), (), number // 500)


def engine(server: ApiServer, root: Path, **changes: Any) -> Endpoint:
    fields = {"url": server.url, "model": MODEL, "key_env": None, "timeout_s": 2.0}
    config = EndpointConfig.model_validate({**fields, "max_retries": 20, **changes})
    return Endpoint(config, Journal(Dataset.create(root), TABLE))


Answered = list[tuple[CaptionOutcome | BaseException, float]]
"""Each outcome with the seconds it came after."""


def ask_all(endpoint: Endpoint, numbers: range) -> Answered:
    async def ask(number: int) -> tuple[CaptionOutcome | BaseException, float]:
        try:
            outcome: CaptionOutcome | BaseException = await endpoint.caption(request_of(number))
        except BudgetError as error:
            outcome = error
        return outcome, time.monotonic() - started

    async def ask_each() -> Answered:
        found = await asyncio.gather(*map(ask, numbers))
        await endpoint.close()
        return found

    started = time.monotonic()
    return asyncio.run(ask_each())


def right(number: int) -> Captioned:
    caption = caption_of(f"sample {number}")
    return Captioned(caption, Finish.STOP, PROMPT_TOKENS, COMPLETION_TOKENS)


def test_a_third_of_the_requests_fails_and_every_outcome_is_right(tmp_path: Path) -> None:
    count, per_second = 5000, 200
    with serve_api(ApiServer(FAULTS, latency_s=0.3, per_second=per_second)) as server:
        terms = {"prices": PRICES, "requests_per_minute": 60 * per_second}
        answered = ask_all(engine(server, tmp_path, **terms), range(count))
    assert [outcome for outcome, _ in answered] == [right(number) for number in range(count)]
    attempts = server.seen.total()
    faults = {kind: server.given[kind] / attempts for kind in FAULTS}
    assert faults == pytest.approx(FAULTS, abs=0.02)
    assert server.given["over the limit"] <= attempts / 100
    spent = started(tmp_path).spent
    assert spent.requests >= server.charged.total()
    assert (spent.prompt_tokens, spent.completion_tokens) == (
        count * PROMPT_TOKENS,
        count * COMPLETION_TOKENS,
    )


def test_what_the_limits_allow_is_used(tmp_path: Path) -> None:
    """Nine tenths of it, with the same faults. The median of five stretches, up to the last
    retries, and few requests a second: it holds on a machine that other work stops for seconds."""
    count, stretch, per_second = 1500, 280, 50
    with serve_api(ApiServer(FAULTS, latency_s=0.3, per_second=per_second)) as server:
        endpoint = engine(server, tmp_path, requests_per_minute=60 * per_second)
        answered = ask_all(endpoint, range(count))
    ends = sorted(seconds for _, seconds in answered)[::stretch]
    goodput = median(stretch / (end - start) for start, end in pairwise([0.0, *ends[1:]]))
    assert goodput >= 0.9 * per_second * server.given["caption"] / server.seen.total()


def started(root: Path) -> Journal:
    journal = Journal(Dataset.open(root), TABLE)
    journal.start()
    return journal


def test_a_budget_is_used_and_never_exceeded(tmp_path: Path) -> None:
    """Over two runs, the first one of which dies with its requests in flight."""
    count, budget = 1000, 1.5
    terms = {"prices": PRICES, "budget_dollars": budget}
    with serve_api(ApiServer(FAULTS, latency_s=0.05)) as server:
        first = engine(server, tmp_path, **terms)
        asyncio.run(abandoned(first, range(count), server, answers=150))
        second = engine(server, tmp_path, **terms)
        assert 0 < second.dollars() < budget
        answered = ask_all(second, range(count))
    bill = (
        sum(prices * tokens for prices, tokens in zip(PRICES.values(), server.tokens, strict=True))
        / 1e6
    )
    outcomes = [outcome for outcome, _ in answered]
    refused = [outcome for outcome in outcomes if isinstance(outcome, BudgetError)]
    assert refused
    assert "the budget of $1.50 is used up" in str(refused[0])
    captions = [(i, o) for i, o in enumerate(outcomes) if not isinstance(o, BudgetError)]
    assert all(outcome == right(number) for number, outcome in captions)
    assert bill <= second.dollars() <= budget
    assert second.dollars() >= 0.95 * budget
    assert engine(server, tmp_path, **terms).dollars() == pytest.approx(second.dollars())


async def abandoned(endpoint: Endpoint, numbers: range, server: ApiServer, answers: int) -> None:
    """Given up when the server has made so many answers: others are in flight."""
    asked = asyncio.gather(*(endpoint.caption(request_of(number)) for number in numbers))
    while server.charged.total() < answers:
        await asyncio.sleep(0.01)
    asked.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asked


def test_answers_that_no_table_holds_are_not_asked_for_again(tmp_path: Path) -> None:
    terms = {"timeout_s": 60.0}  # nothing hangs: a slow machine must not ask again
    with serve_api(ApiServer(latency_s=0.05)) as server:
        first = engine(server, tmp_path, **terms)
        asyncio.run(abandoned(first, range(1000), server, answers=300))
        before = Counter(server.charged)
        assert 300 <= before.total() < 1000
        answered = ask_all(engine(server, tmp_path, **terms), range(1000))
    assert [outcome for outcome, _ in answered] == [right(number) for number in range(1000)]
    assert max(server.seen.values()) <= 2
    # Of those in flight the server may have seen fewer at a time: some are on their way.
    assert sum(count == 2 for count in server.seen.values()) <= first.config.concurrency
