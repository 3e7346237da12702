"""Caption engine behind any OpenAI-compatible endpoint: a provider, `vllm serve`, a local server.

One chat completion a sample, over the official `openai` client, which also does the retries. Two
rules shape the module: one bad sample ends in one typed outcome, and the key never reaches a log,
a repr or an exception (providers echo it in error messages, so their text is never repeated).
"""

import asyncio
import base64
import io
import os
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

import openai
from openai.types.chat import ChatCompletionUserMessageParam
from openai.types.chat.chat_completion_content_part_image_param import ImageURL
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError

from fusion_pipeline.dataset.images import DecodeError, decode, inspect
from fusion_pipeline.fuse.base import (
    Captioned,
    CaptionFailed,
    CaptionOutcome,
    CaptionRequest,
    Finish,
)

# The longest `Retry-After` that the client obeys; a longer one ends the attempts.
_MAX_RETRY_AFTER_S = 120
_JPEG_QUALITY = 90
_SENDABLE_FORMATS = {"jpeg", "png", "webp"}
# Pixel types that every decoder reads alike. Transparency, palettes, CMYK and 16 bits are
# flattened by our own decoder, so that the engine sees the pixels the experts saw.
_SENDABLE_MODES = {"RGB", "L"}
_FINISHES = {"stop": Finish.STOP, "length": Finish.LENGTH}
# OpenAI's code and Azure's code for a prompt that the content filter refused.
_BLOCKED_CODES = {"content_policy_violation", "content_filter", "moderation_blocked"}
_UNSUPPORTED_CODES = {"unsupported_parameter", "unsupported_value", "unknown_parameter"}
_NOT_OUTPUT = {"url", "key_env", "concurrency", "timeout_s", "max_retries"}


class EndpointError(Exception):
    """The engine itself is misconfigured or refused: every sample would fail. Stops the run."""


def _base_url(url: str) -> str:
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


class EndpointConfig(BaseModel):
    """Where captions come from, and how they are asked for."""

    # Inputs stay out of validation errors: a key pasted into the wrong field must not be printed.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    url: Annotated[str, AfterValidator(_base_url)]
    """Base URL, such as `https://api.openai.com/v1` or `http://localhost:8000/v1`."""
    model: str = Field(min_length=1)
    """Name under which the endpoint serves the model."""
    key_env: str | None = Field(default="OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the key; null for a local server that asks for none."""
    max_tokens: int = Field(default=512, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=2)
    seed: int | None = 0
    """Sent with every request; null leaves it out, for an endpoint that refuses the parameter."""
    concurrency: int = Field(default=16, ge=1, le=1000)
    """Requests in flight; 1000 is the most connections that the client opens."""
    timeout_s: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """Seconds that one attempt may take to connect, to send or to stay silent."""
    max_retries: int = Field(default=5, ge=0, le=100)
    """Attempts after the first on 408, 409, 429, 5xx, timeouts and lost connections."""
    image_max_edge: int = Field(default=1024, ge=32, le=16_384)
    """Long edge in pixels of the image sent; larger images are scaled down."""
    detail: Literal["auto", "low", "high"] | None = None
    """The API's `image_url.detail`; null leaves it out."""

    def fingerprint_fields(self) -> dict[str, Any]:
        """The fields that change captions. A field is one unless it is known not to be."""
        return self.model_dump(exclude=_NOT_OUTPUT)


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str


class _Usage(BaseModel):
    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int = Field(default=0, ge=0)


class _Completion(BaseModel):
    """What is used of a chat completion. The client library builds its types unvalidated."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


@dataclass(frozen=True, slots=True)
class _Session:
    """What belongs to one event loop."""

    loop: asyncio.AbstractEventLoop
    client: openai.AsyncOpenAI
    slots: asyncio.Semaphore


class Endpoint:
    """Caption engine (see `CaptionEngine`) that asks an OpenAI-compatible endpoint.

    The client is made inside the running event loop at the first caption, so one engine serves
    several `asyncio.run` calls, one loop at a time; `await close()` at the end of each.

    Failure reasons of a sample: `undecodable`, `timeout`, `connection`, `http_<status>`,
    `bad_response` (no chat completion in the answer) and `empty_answer`.

    Raises EndpointError, at construction for a missing key, later when the endpoint refuses the
    key, the model, a parameter or the account.
    """

    version: ClassVar[int] = 1

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self._key = _read_key(config.key_env)
        self._session: _Session | None = None

    async def caption(self, request: CaptionRequest) -> CaptionOutcome:
        """Caption one sample; at most `concurrency` samples are decoded or asked for at a time."""
        session = self._session_of_this_loop()
        async with session.slots:
            try:
                # Decoding takes milliseconds a megapixel, which the event loop must not wait for.
                url = await asyncio.to_thread(_data_url, request, self.config.image_max_edge)
            except DecodeError:
                return CaptionFailed("undecodable")
            return await self._ask(session.client, request.prompt, url)

    async def close(self) -> None:
        """Close the connections. A later `caption` opens new ones."""
        session, self._session = self._session, None
        # Connections of a loop that has ended can't be closed from another one.
        if session is not None and session.loop is asyncio.get_running_loop():
            await session.client.close()

    def _session_of_this_loop(self) -> _Session:
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.loop is not loop:
            client = openai.AsyncOpenAI(
                base_url=self.config.url,
                api_key=self._key.get_secret_value(),
                timeout=self.config.timeout_s,
                max_retries=self.config.max_retries,
            )
            self._session = _Session(loop, client, asyncio.Semaphore(self.config.concurrency))
        return self._session

    async def _ask(self, client: openai.AsyncOpenAI, prompt: str, image_url: str) -> CaptionOutcome:
        config = self.config
        # The client's timeout restarts with every byte: a server that sends blanks to keep the
        # connection alive (some do) would hold its slot for ever without this second limit.
        limit_s = (config.max_retries + 1) * config.timeout_s
        limit_s += config.max_retries * _MAX_RETRY_AFTER_S
        try:
            async with asyncio.timeout(limit_s):
                answer = await client.chat.completions.with_raw_response.create(
                    model=config.model,
                    messages=[_message(prompt, image_url, config.detail)],
                    max_tokens=config.max_tokens,
                    temperature=config.temperature,
                    seed=openai.omit if config.seed is None else config.seed,
                )
        except (TimeoutError, openai.APITimeoutError):
            return CaptionFailed("timeout")
        except openai.APIConnectionError:
            return CaptionFailed("connection")
        except openai.APIStatusError as error:
            refused = error
        else:
            return _outcome(answer.content)
        # Outside the `except`: an EndpointError must not carry the provider's text as its context.
        return self._refused(refused)

    def _refused(self, error: openai.APIStatusError) -> CaptionOutcome:
        config, status, code = self.config, error.status_code, error.code
        if status in (401, 403):
            hint = (
                "set `key_env` to the environment variable that holds a key"
                if config.key_env is None
                else f"check the key in the environment variable {config.key_env} (`key_env`) "
                f"and that it may use model {config.model!r}"
            )
            raise EndpointError(f"{config.url} refused access (HTTP {status}): {hint}")
        if status == 404:
            raise EndpointError(
                f"{config.url} answered HTTP 404: it serves no model {config.model!r} (`model`), "
                "or `url` is not the base URL of its API (it often ends in /v1)"
            )
        if status == 429 and code == "insufficient_quota":
            raise EndpointError(
                f"{config.url} reports that the account's quota is used up (insufficient_quota): "
                f"raise its limit, or use another key in {config.key_env} (`key_env`)"
            )
        if status == 400 and code in _UNSUPPORTED_CODES:
            field = error.param if error.param in EndpointConfig.model_fields else "model"
            raise EndpointError(
                f"model {config.model!r} at {config.url} refuses a parameter ({code}): "
                f"change `{field}`"
            )
        if status == 400 and code in _BLOCKED_CODES:
            return Captioned(None, Finish.BLOCKED)
        if status == 400:
            # Azure's model inference reports filtered output as a completion with status 400.
            outcome = _outcome(error.response.content)
            if isinstance(outcome, Captioned) and outcome.finish is Finish.BLOCKED:
                return outcome
        return CaptionFailed(f"http_{status}")


def _read_key(key_env: str | None) -> SecretStr:
    if key_env is None:
        return SecretStr("none")  # the client insists on one; a server without keys ignores it
    key = os.environ.get(key_env, "").strip()
    if not key:
        raise EndpointError(
            f"no API key: set the environment variable {key_env}, name another one in `key_env`, "
            "or set `key_env: null` for a server that asks for none"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        # Sent as a header, such a key would come back inside the HTTP library's exception.
        raise EndpointError(
            f"the environment variable {key_env} (`key_env`) holds blanks, control characters or "
            "letters outside ASCII: it is not an API key"
        )
    return SecretStr(key)


def _message(
    prompt: str, image_url: str, detail: Literal["auto", "low", "high"] | None
) -> ChatCompletionUserMessageParam:
    # The image comes first, as in the `<image>\n…` turns that open models are trained on.
    image: ImageURL = {"url": image_url}
    if detail is not None:
        image["detail"] = detail
    return {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": image},
            {"type": "text", "text": prompt},
        ],
    }


def _data_url(request: CaptionRequest, max_edge: int) -> str:
    media_type, data = _image_to_send(request, max_edge)
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def _image_to_send(request: CaptionRequest, max_edge: int) -> tuple[str, bytes]:
    """Media type and bytes: the original where the endpoint can be trusted to read it as we do."""
    short, long = sorted((request.width, request.height))
    if long <= max_edge:
        info = inspect(request.image)
        if (
            info.format in _SENDABLE_FORMATS
            and info.mode in _SENDABLE_MODES
            and info.orientation == 1
            and not info.animated
            and max(info.width, info.height) <= max_edge
        ):
            return f"image/{info.format}", request.image
        pixels = decode(request.image)
    else:
        # Rounded up, so that the decoder's cheap scaling never goes below what is sent.
        pixels = decode(request.image, min_short_edge=-(-short * max_edge // long))
    image = Image.fromarray(pixels)
    image.thumbnail((max_edge, max_edge), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_JPEG_QUALITY)
    return "image/jpeg", out.getvalue()


def _outcome(body: bytes) -> CaptionOutcome:
    try:
        completion = _Completion.model_validate_json(body)
    except ValidationError:
        return CaptionFailed("bad_response")
    choice, usage = completion.choices[0], completion.usage or _Usage()
    tokens = usage.prompt_tokens, usage.completion_tokens
    if choice.finish_reason == "content_filter" or choice.message.refusal:
        return Captioned(None, Finish.BLOCKED, *tokens)
    finish = _FINISHES.get(choice.finish_reason)
    if finish is None:  # tool calls, an aborted request
        return CaptionFailed("bad_response")
    caption = (choice.message.content or "").strip()
    if not caption:
        return CaptionFailed("empty_answer")
    return Captioned(caption, finish, *tokens)
