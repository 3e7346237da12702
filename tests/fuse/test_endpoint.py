"""The endpoint engine over a real socket: what it sends, and how every answer is typed."""

import asyncio
import base64
import io
import json
import logging
import time
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from openai_server import (
    CAPTION,
    DROP,
    MODEL,
    OpenAIServer,
    Reply,
    completion,
    error_body,
    serve,
)
from PIL import Image
from pydantic import ValidationError

from fusion_pipeline.fuse.base import (
    Captioned,
    CaptionFailed,
    CaptionOutcome,
    CaptionRequest,
    Finish,
)
from fusion_pipeline.fuse.endpoint import Endpoint, EndpointConfig, EndpointError

KEY = "sk-test-5f2b9c7d1e8a4460"
PROMPT = 'Describe the picture.\nText: "Öl & Brot", <image>, {{ braces }}, 100 %, 日本語 🐎'


def encoded(size: tuple[int, int] = (64, 48), form: str = "JPEG", mode: str = "RGB") -> bytes:
    """A gradient: dark top left, bright bottom right, so that turning it shows."""
    width, height = size
    ramp = np.add.outer(np.linspace(0, 127, height), np.linspace(0, 127, width))
    out = io.BytesIO()
    Image.fromarray(ramp.astype(np.uint8)).convert(mode).save(out, form)
    return out.getvalue()


def turned(size: tuple[int, int], orientation: int) -> bytes:
    image = Image.open(io.BytesIO(encoded(size)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif, quality=95)
    return out.getvalue()


def a_request(image: bytes | None = None, size: tuple[int, int] = (64, 48)) -> CaptionRequest:
    return CaptionRequest(
        key="0" * 32,
        image=encoded(size) if image is None else image,
        width=size[0],
        height=size[1],
        prompt=PROMPT,
        tags=(),
        objects=(),
        text=(),
        alt_texts=(),
    )


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setenv("CAPTION_KEY", KEY)
    with serve(KEY) as running:
        yield running


def engine(server: OpenAIServer, **changes: Any) -> Endpoint:
    fields = {"url": server.url, "model": MODEL, "key_env": "CAPTION_KEY", "max_retries": 0}
    return Endpoint(EndpointConfig.model_validate({**fields, "timeout_s": 20.0, **changes}))


async def ask(endpoint: Endpoint, request: CaptionRequest | None = None) -> CaptionOutcome:
    try:
        return await endpoint.caption(request or a_request())
    finally:
        await endpoint.close()


def sent_image(server: OpenAIServer) -> tuple[str, bytes]:
    head, data = server.requests[-1].image_url.url.split(",", 1)
    assert head.startswith("data:")
    assert head.endswith(";base64")
    return head.removeprefix("data:").removesuffix(";base64"), base64.b64decode(data, validate=True)


# What is sent


async def test_models_that_think_are_asked_in_their_own_way(server: OpenAIServer) -> None:
    changes = {"token_parameter": "max_completion_tokens", "temperature": None, "max_tokens": 4000}
    made = engine(server, **changes)
    await ask(made, a_request())
    (sent,) = server.requests
    assert (sent.max_tokens, sent.max_completion_tokens, sent.temperature) == (None, 4000, None)
    assert made.config.completion_fields()["token_parameter"] == "max_completion_tokens"


async def test_a_caption_and_the_request_behind_it(server: OpenAIServer) -> None:
    request = a_request()
    outcome = await ask(engine(server, max_tokens=300, seed=7, detail="high"), request)

    assert outcome == Captioned(CAPTION, Finish.STOP, prompt_tokens=1234, completion_tokens=56)
    (sent,) = server.requests
    assert sent.prompt == PROMPT
    assert (sent.model, sent.max_tokens, sent.temperature, sent.seed) == (MODEL, 300, 0.0, 7)
    assert sent.image_url.detail == "high"
    assert server.authorizations == [f"Bearer {KEY}"]
    assert sent_image(server) == ("image/jpeg", request.image)  # a small upright JPEG: untouched
    assert Image.open(io.BytesIO(sent_image(server)[1])).size == (64, 48)


async def test_optional_parameters_are_left_out(server: OpenAIServer) -> None:
    assert isinstance(await ask(engine(server, seed=None)), Captioned)
    (sent,) = server.requests
    assert "seed" not in sent.model_fields_set
    assert "detail" not in sent.image_url.model_fields_set


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
async def test_png_and_webp_go_as_they_are(server: OpenAIServer, form: str) -> None:
    original = encoded(form=form)
    await ask(engine(server), a_request(original))
    assert sent_image(server) == (f"image/{form.lower()}", original)


@pytest.mark.parametrize(
    ("image", "size", "expected"),
    [
        pytest.param(encoded((900, 300)), (900, 300), (256, 85), id="larger than allowed"),
        pytest.param(turned((64, 48), 6), (48, 64), (48, 64), id="turned by EXIF"),
        pytest.param(turned((900, 300), 8), (300, 900), (85, 256), id="larger and turned"),
        pytest.param(encoded(form="BMP"), (64, 48), (64, 48), id="a format APIs don't take"),
        pytest.param(encoded(form="GIF"), (64, 48), (64, 48), id="gif"),
        pytest.param(encoded(mode="CMYK"), (64, 48), (64, 48), id="cmyk"),
        pytest.param(encoded(form="PNG", mode="RGBA"), (64, 48), (64, 48), id="transparency"),
        pytest.param(encoded((900, 300)), (9, 3), (256, 85), id="recorded size wrong"),
    ],
)
async def test_other_images_arrive_as_upright_rgb_jpeg_of_the_same_picture(
    server: OpenAIServer, image: bytes, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    await ask(engine(server, image_max_edge=256), a_request(image, size))
    media_type, data = sent_image(server)
    with Image.open(io.BytesIO(data)) as arrived:
        assert (media_type, arrived.format, arrived.mode) == ("image/jpeg", "JPEG", "RGB")
        assert arrived.getexif().get(0x0112, 1) == 1
        assert arrived.size == expected
        got = np.asarray(arrived).astype(int)
    with Image.open(io.BytesIO(image)) as original:
        turn = {6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
        orientation = original.getexif().get(0x0112, 1)
        upright = original.transpose(turn[orientation]) if orientation in turn else original
        want = np.asarray(upright.convert("RGB").resize(expected)).astype(int)
    assert np.abs(got - want).mean() < 2.0


async def test_a_broken_image_fails_without_a_request(server: OpenAIServer) -> None:
    endpoint = engine(server)
    for broken in (b"", b"<html>404</html>", encoded((64, 48), "PNG")[:90]):
        assert await ask(endpoint, a_request(broken)) == CaptionFailed("undecodable")
        assert await ask(endpoint, a_request(broken, (5000, 5000))) == CaptionFailed("undecodable")
    assert server.arrivals == []


async def test_never_more_requests_in_flight_than_configured(server: OpenAIServer) -> None:
    server.always = Reply(delay_s=0.1)
    endpoint = engine(server, concurrency=3)
    started = time.monotonic()
    outcomes = await asyncio.gather(*(endpoint.caption(a_request()) for _ in range(12)))
    await endpoint.close()
    assert [type(o) for o in outcomes] == [Captioned] * 12
    assert server.most_in_flight == 3  # the limit, and all of it is used
    assert time.monotonic() - started >= 12 / 3 * 0.1


def test_one_engine_serves_several_event_loops(server: OpenAIServer) -> None:
    endpoint = engine(server)
    for _ in range(2):  # closed each time, as it should be
        assert isinstance(asyncio.run(ask(endpoint)), Captioned)
    for _ in range(2):  # not closed: the next loop starts afresh
        assert isinstance(asyncio.run(endpoint.caption(a_request())), Captioned)
    asyncio.run(endpoint.close())
    assert len(server.requests) == 4


# How answers are typed


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (Reply(body=completion("A red", "length")), Captioned("A red", Finish.LENGTH, 1234, 56)),
        (Reply(body=completion(" A. \n")), Captioned("A.", Finish.STOP, 1234, 56)),
        # The API sends no or partial content when its filter stops an answer.
        (Reply(body=completion(None, "content_filter")), Captioned(None, Finish.BLOCKED, 1234, 56)),
        (Reply(body=completion("A", "content_filter")), Captioned(None, Finish.BLOCKED, 1234, 56)),
        (
            Reply(body=completion(None, refusal="I can't.")),
            Captioned(None, Finish.BLOCKED, 1234, 56),
        ),
        (
            Reply(400, error_body("rejected", "content_policy_violation")),
            Captioned(None, Finish.BLOCKED),
        ),
        (Reply(400, error_body("filtered", "content_filter")), Captioned(None, Finish.BLOCKED)),
        # Azure's model inference: a completion under status 400.
        (Reply(400, completion("", "content_filter")), Captioned(None, Finish.BLOCKED, 1234, 56)),
        (Reply(400, error_body("no", "context_length_exceeded")), CaptionFailed("prompt_too_long")),
        (
            Reply(400, error_body("This model's maximum context length is 4096 tokens.", None)),
            CaptionFailed("prompt_too_long"),
        ),
        (Reply(400, error_body("no", None)), CaptionFailed("http_400")),
        (Reply(400, b"<html>"), CaptionFailed("http_400")),
        (Reply(413, b""), CaptionFailed("http_413")),
        (Reply(429, error_body("slow down", "rate_limit_exceeded")), CaptionFailed("http_429")),
        (Reply(body=completion("")), CaptionFailed("empty_answer")),
        (Reply(body=completion(" \n")), CaptionFailed("empty_answer")),
        (Reply(body=completion(None, "length")), CaptionFailed("empty_answer")),
        (Reply(body=completion("A.", "tool_calls")), CaptionFailed("bad_response")),
        (Reply(body=b"{'not': json"), CaptionFailed("bad_response")),
        (Reply(body=b""), CaptionFailed("bad_response")),
        (Reply(body=b"<html>log in</html>"), CaptionFailed("bad_response")),
        (Reply(body=b"[" * 100_000), CaptionFailed("bad_response")),
        (Reply(body=b'{"object": "chat.completion"}'), CaptionFailed("bad_response")),
        (Reply(body=b'{"choices": []}'), CaptionFailed("bad_response")),
        (Reply(body=b'{"choices": [{"finish_reason": "stop"}]}'), CaptionFailed("bad_response")),
        # Half of a surrogate pair is no text: no table could store it.
        (Reply(body=completion("A \ud83d")), CaptionFailed("bad_response")),
        (Reply(body=completion(), cut_at=40), CaptionFailed("connection")),
        (DROP, CaptionFailed("connection")),
        (Reply(delay_s=2.0), CaptionFailed("timeout")),
        (Reply(drip_s=0.05), CaptionFailed("timeout")),
    ],
)
async def test_every_answer_has_one_typed_outcome(
    server: OpenAIServer, reply: Reply, expected: CaptionOutcome
) -> None:
    server.script(reply)
    slow = reply.delay_s > 0 or reply.drip_s is not None
    endpoint = engine(server, timeout_s=0.4 if slow else 20.0)
    started = time.monotonic()
    assert await endpoint.caption(a_request()) == expected
    assert time.monotonic() - started < 2.0
    # One bad answer leaves the engine in working order.
    assert isinstance(await ask(endpoint), Captioned)


async def test_nobody_listens(server: OpenAIServer) -> None:
    with serve(None) as gone:
        url = gone.url
    assert await ask(engine(server, url=url)) == CaptionFailed("connection")


# Retries


async def test_a_429_is_tried_again_after_the_time_the_server_asks_for(
    server: OpenAIServer,
) -> None:
    busy = Reply(429, error_body("slow down", "rate_limit_exceeded"), {"Retry-After": "1.5"})
    server.script(busy)
    assert isinstance(await ask(engine(server, max_retries=2)), Captioned)
    first, second = server.arrivals
    # The client's own first pause would be 0.5 s at most.
    assert 1.5 <= second - first < 2.5


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Reply(500, b"oops", {"Retry-After": "0.01"}), CaptionFailed("http_500")),
        (Reply(503, b"", {"Retry-After": "0.01"}), CaptionFailed("http_503")),
        (DROP, CaptionFailed("connection")),
        (Reply(delay_s=1.5), CaptionFailed("timeout")),
    ],
)
async def test_lasting_faults_fail_after_the_retries(
    server: OpenAIServer, fault: Reply, expected: CaptionFailed
) -> None:
    server.always = fault
    assert await ask(engine(server, max_retries=1, timeout_s=1.0)) == expected
    assert len(server.arrivals) == 2


async def test_passing_faults_cost_nothing(server: OpenAIServer) -> None:
    oops = Reply(500, b"oops", {"Retry-After": "0.01"})
    server.script(oops, Reply(body=completion(), cut_at=40), oops)
    assert isinstance(await ask(engine(server, max_retries=3)), Captioned)
    assert len(server.arrivals) == 4


# Errors of the engine itself


@pytest.mark.parametrize(
    ("reply", "changes", "names"),
    [
        (Reply(403, error_body("no", None)), {}, ["CAPTION_KEY", "key_env", "403"]),
        (None, {"model": "captioner-8b"}, ["'captioner-8b'", "`model`", "404"]),
        (None, {"url": "/v2"}, ["/v2", "`url`", "404"]),
        (None, {"key_env": None}, ["401", "`key_env`"]),
        (
            Reply(429, error_body("pay", "insufficient_quota"), {"Retry-After": "0.01"}),
            {"max_retries": 1},
            ["quota", "CAPTION_KEY"],
        ),
        (
            Reply(400, error_body("no", "unsupported_parameter", "max_tokens")),
            {},
            [MODEL, "`token_parameter: max_completion_tokens`"],
        ),
        (
            Reply(400, error_body("no", "unsupported_value", "temperature")),
            {},
            [MODEL, "`temperature: null`"],
        ),
    ],
)
async def test_what_would_fail_for_every_sample_stops_the_run(
    server: OpenAIServer, reply: Reply | None, changes: dict[str, Any], names: list[str]
) -> None:
    server.always = reply
    if "url" in changes:  # the port is known only now
        changes = {"url": server.url.removesuffix("/v1") + changes["url"]}
    with pytest.raises(EndpointError) as caught:
        await ask(engine(server, **changes))
    for name in names:
        assert name in str(caught.value)


@pytest.mark.parametrize("retries", [0, 1])
async def test_the_key_is_never_shown(
    server: OpenAIServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    retries: int,
) -> None:
    wrong = "sk-wrong-77aa11bb22cc33"
    monkeypatch.setenv("CAPTION_KEY", wrong)
    caplog.set_level(logging.DEBUG)
    server.script(Reply(500, b"", {"Retry-After": "0.01"}))
    endpoint = engine(server, max_retries=retries)
    with pytest.raises(EndpointError, match="CAPTION_KEY") as caught:
        await ask(endpoint)  # the server's 401 repeats the header, key included

    shown = [
        repr(endpoint),
        str(vars(endpoint)),
        repr(endpoint.config),
        json.dumps(endpoint.config.fingerprint_fields()),
        repr(caught.value),
        *traceback.format_exception(caught.value),  # chained exceptions too
        caplog.text,
        *(str(record.__dict__) for record in caplog.records),
    ]
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert caplog.records  # the libraries did log
    assert server.authorizations == [f"Bearer {wrong}"]
    assert [text for text in shown if wrong in text or "sk-wrong" in text] == []


def test_a_missing_or_unusable_key_is_an_error_before_any_request(
    monkeypatch: pytest.MonkeyPatch, server: OpenAIServer
) -> None:
    monkeypatch.delenv("CAPTION_KEY")
    with pytest.raises(EndpointError, match="set the environment variable CAPTION_KEY"):
        engine(server)
    for unusable in ("sk-a secret", "sk-a\nsecret", "sk-gehëim"):
        monkeypatch.setenv("CAPTION_KEY", unusable)
        with pytest.raises(EndpointError, match="CAPTION_KEY") as caught:
            engine(server)
        assert "sk-" not in str(caught.value)


async def test_a_trailing_newline_is_no_part_of_the_key(
    monkeypatch: pytest.MonkeyPatch, server: OpenAIServer
) -> None:
    monkeypatch.setenv("CAPTION_KEY", KEY + "\n")
    assert isinstance(await ask(engine(server)), Captioned)


async def test_a_server_without_keys_gets_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serve(None) as local:
        assert isinstance(await ask(engine(local, key_env=None)), Captioned)
        assert KEY not in str(local.authorizations)


# Configuration


def test_the_fingerprint_holds_what_changes_captions() -> None:
    config = EndpointConfig(url="http://localhost:8000/v1", model=MODEL)
    assert config.fingerprint_fields() == {
        "model": MODEL,
        "max_tokens": 512,
        "temperature": 0.0,
        "seed": 0,
        "image_max_edge": 1024,
        "detail": None,
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"url": "localhost:8000/v1"},
        {"url": "file:///etc/passwd"},
        {"url": "http://me:sk-secret@localhost/v1"},
        {"url": "http://localhost:99999/v1"},
        {"url": "http://localhost:8000/v1/chat/completions"},
        {"key_env": "sk-secret"},  # the key itself, pasted into the wrong field
        {"model": ""},
        {"concurrency": 0},
        {"timeout_s": float("inf")},
        {"api_key": "sk-secret"},
    ],
)
def test_mistakes_in_the_configuration_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        EndpointConfig.model_validate({"url": "http://localhost/v1", "model": MODEL, **wrong})
    assert next(iter(wrong)) in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_servers_of_our_own_come_and_go(
    server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):  # nobody listens there
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    config = EndpointConfig.model_validate(
        {"url": server.url, "model": MODEL, "key_env": None, "max_retries": 0}
    )
    endpoint = Endpoint(config, key=KEY)
    try:
        assert isinstance(await endpoint.caption(a_request()), Captioned)
        endpoint.use(())
        waiting = asyncio.create_task(endpoint.caption(a_request()))
        await asyncio.sleep(0.2)
        assert not waiting.done(), "none is there, and no attempt is used up"
        endpoint.use([server.url])
        assert isinstance(await waiting, Captioned)
        endpoint.use((), RuntimeError("all are given up"))
        with pytest.raises(RuntimeError, match="all are given up"):
            await endpoint.caption(a_request())
    finally:
        await endpoint.close()
