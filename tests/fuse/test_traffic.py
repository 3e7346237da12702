"""Slots, rates and addresses: what is let out, when, and where to."""

import asyncio
import time

import pytest

from fusion_pipeline.fuse.endpoint import _retry_after
from fusion_pipeline.fuse.ledger import BudgetError, Ledger
from fusion_pipeline.fuse.traffic import Backends, Rate, Slots


async def load(
    slots: Slots, requests: int, room: int | None = None, refused_every: int = 0
) -> None:
    """The endpoint turns away what is more than its room, and every so-manieth request."""
    count = 0

    async def one() -> None:
        nonlocal count
        async with slots.one():
            count += 1
            refused = room is not None and slots.in_flight > room
            refused = refused or (refused_every > 0 and count % refused_every == 0)
            await asyncio.sleep(0.001)
            slots.count(refused)

    await asyncio.gather(*(one() for _ in range(requests)))
    assert slots.in_flight == 0


async def test_slots_grow_to_the_limit_when_nothing_is_refused() -> None:
    slots = Slots(200)
    assert slots.limit == 16
    await load(slots, 2000)
    assert slots.limit == 200


async def test_servers_of_our_own_get_all_at_once() -> None:
    slots = Slots(64, first=64)
    assert slots.limit == 64
    slots.allow(128)  # a second one is there
    assert slots.limit == 128
    slots.allow(64)
    assert slots.limit == 64


async def test_a_refusal_now_and_then_does_not_matter() -> None:
    slots = Slots(200)
    await load(slots, 3000, refused_every=5)
    assert slots.limit == 200


async def test_bad_luck_with_the_first_requests_is_none_of_a_share() -> None:
    """Chance of seven refusals of 18 where one of five is refused: 6 %."""
    slots = Slots(200)
    for is_refused in [True] * 7 + [False] * 11:
        async with slots.one():
            slots.count(is_refused)
    assert slots.limit == 16


async def test_slots_stay_near_the_room_there_is() -> None:
    slots = Slots(500)
    await load(slots, 5000, room=40)
    assert 15 <= slots.limit <= 150


async def test_slots_are_not_fewer_than_one() -> None:
    slots = Slots(4)
    await load(slots, 200, refused_every=1)
    assert slots.limit == 1


async def test_rates_are_kept_from_the_start() -> None:
    rate, started = Rate(requests=60 * 50, tokens=None), time.monotonic()
    await asyncio.gather(*(rate.wait(1.0) for _ in range(150)))
    assert time.monotonic() - started >= 1.0  # 100 at once, and 50 more in a second
    rate, started = Rate(requests=None, tokens=60 * 1000), time.monotonic()
    await asyncio.gather(*(rate.wait(500.0) for _ in range(6)))
    assert time.monotonic() - started >= 1.0


async def test_big_requests_take_their_turn_and_their_time() -> None:
    rate, done = Rate(requests=None, tokens=60 * 1000), list[float]()

    async def ask(tokens: float) -> None:
        await rate.wait(tokens)
        done.append(tokens)

    started = time.monotonic()
    await asyncio.gather(ask(2000), ask(2500), ask(10), ask(10))
    assert done == [2000, 2500, 10, 10]
    assert 2.0 <= time.monotonic() - started < 4.0


async def test_an_address_that_is_gone_rests_and_is_tried_by_one() -> None:
    backends = Backends(["a", "b"])
    gone, there = backends._all
    for _ in range(3):
        gone.lost()
    async with backends.one() as first, backends.one() as second:
        assert first is second is there
    gone.rests_until = 0.0  # it has rested
    there.in_flight = 1
    async with backends.one() as trying, backends.one() as other:
        assert trying is gone
        assert other is there
        gone.answered({})
    assert gone.rests == 0


async def test_one_lost_connection_is_no_reason_to_rest() -> None:
    backends = Backends(["a"])
    (only,) = backends._all
    only.lost()
    started = time.monotonic()
    async with backends.one():
        assert time.monotonic() - started < 0.1


async def test_what_the_endpoint_announces_is_waited_for() -> None:
    backends = Backends(["a"])
    (only,) = backends._all
    only.answered({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "250ms"})
    started = time.monotonic()
    async with backends.one():
        assert 0.2 <= time.monotonic() - started < 1.0
    only.answered({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "250ms"})
    only.answered({"x-ratelimit-remaining-tokens": "12", "x-ratelimit-reset-tokens": "6m0s"})
    assert only.rests_until > asyncio.get_running_loop().time()  # an older answer, come late
    await asyncio.sleep(0.3)
    started = time.monotonic()
    async with backends.one():
        assert time.monotonic() - started < 0.1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "20", "retry-after": "9"}, 0.02),
        ({"retry-after": "-1"}, 0.0),
        ({"retry-after": "Mon, 23 Nov 2020 00:00:00 GMT"}, 0.0),  # it is past
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after-ms": "soon", "retry-after": "2"}, 2.0),
        ({"retry-after": "Mon, 23 Nov 99999 00:00:00 GMT"}, None),
        ({}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert _retry_after(headers) == seconds


async def test_money_in_flight_is_waited_for() -> None:
    spent = 0.0
    ledger = Ledger(1.0, lambda: spent)
    await ledger.reserve(0.6)
    waiting = asyncio.create_task(ledger.reserve(0.6))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    spent = 0.1
    ledger.release(0.6)
    await waiting
    spent = 0.7
    ledger.release(0.6)
    with pytest.raises(BudgetError, match=r"\$1.00 is used up: \$0.7000 are spent"):
        await ledger.reserve(0.6)


async def test_who_gives_up_keeps_no_money() -> None:
    ledger = Ledger(1.0, lambda: 0.0)
    await ledger.reserve(0.9)
    waiting = [asyncio.create_task(ledger.reserve(0.9)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    ledger.release(0.9)  # the next one gets it
    waiting[1].cancel()  # granted, and given up in the same moment
    await waiting[2]
    ledger.release(0.9)
    await ledger.reserve(1.0)
