"""Chat completions as they are sent and as they come back: the published API, for single requests
and for batch files."""

import base64
import json
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from fusion_pipeline.config_model import ConfigModel
from fusion_pipeline.fuse.base import (
    Captioned,
    CaptionFailed,
    CaptionOutcome,
    CaptionRequest,
    Finish,
)
from fusion_pipeline.fuse.images import image_to_send
from fusion_pipeline.fuse.ledger import Prices

_FINISHES = {"stop": Finish.STOP, "length": Finish.LENGTH}
_HERE = "@@image@@"
_SET_HERE = {"messages", "model", "max_tokens", "temperature", "seed", "stream", "n"}
_SET_HERE |= {"max_completion_tokens"}  # budgets go by `max_tokens`
_MOST_TOKENS = 10**7
"""Of one completion: more than any model reads. Bills and bounds go by the numbers."""


class CompletionConfig(ConfigModel):
    """What is asked for. Every field changes captions."""

    # Inputs stay out of validation errors: a key pasted into the wrong field must not be printed.
    model_config = ConfigDict(hide_input_in_errors=True)

    model: str = Field(min_length=1)
    """Name under which the endpoint serves the model."""
    max_tokens: int = Field(default=512, ge=1)
    """Of an answer; a longer one is cut off."""
    token_parameter: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """Under which name `max_tokens` is sent: newer models of OpenAI take the other one alone, and
    count what they think, too."""
    temperature: float | None = Field(default=0.0, ge=0, le=2)
    """Null leaves it out, for a model that takes only its own."""
    seed: int | None = 0
    """Sent with every request; null leaves it out, for an endpoint that refuses the parameter."""
    image_max_edge: int = Field(default=1024, ge=32, le=16_384)
    """Long edge in pixels of the image sent; larger images are scaled down."""
    detail: Literal["auto", "low", "high"] | None = None
    """The API's `image_url.detail`; null leaves it out."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Further fields of the request, such as `{repetition_penalty: 1.05}` of vLLM's API."""

    @field_validator("extra_body")
    @classmethod
    def _not_twice(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in _SET_HERE:
                raise ValueError(f"{name} has a setting of its own, or is not to be changed")
        return value

    def completion_fields(self) -> dict[str, Any]:
        """Those above, for the lineage: they change captions."""
        fields = self.model_dump(include=set(CompletionConfig.model_fields))
        if not self.extra_body:
            del fields["extra_body"]  # as it was before there was this field
        if self.token_parameter == "max_tokens":
            del fields["token_parameter"]  # likewise
        return fields


class PaidConfig(CompletionConfig):
    """Whose key pays for it, what it costs, and how much it may."""

    key_env: str | None = Field(default="OPENAI_API_KEY", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable that holds the key, or that with `_FILE` added to its name names a file
    which does; null for a server that asks for none."""
    prices: Prices | None = None
    """Dollars per million tokens: `{input: 2.5, output: 10}`."""
    budget_dollars: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """The most that the captions of this engine may cost, over all runs on this folder."""
    image_tokens: int = Field(default=3000, ge=0)
    """The most prompt tokens that an image counts; set aside with each request, so too much is safe
    and too little is not."""

    @model_validator(mode="after")
    def _payable(self) -> Self:
        if self.budget_dollars is not None and self.prices is None:
            raise ValueError("budget_dollars: prices are needed to keep it")
        return self

    def fingerprint_fields(self) -> dict[str, Any]:
        """The fields that change captions."""
        return self.completion_fields()


def request_body(request: CaptionRequest, config: CompletionConfig) -> bytes:
    """JSON of a chat completion. Raises DecodeError."""
    media_type, data = image_to_send(request, config.image_max_edge)
    image: dict[str, Any] = {"url": f"data:{media_type};base64,{_HERE}"}
    if config.detail is not None:
        image["detail"] = config.detail
    # The image comes first, as in the `<image>\n…` turns that open models are trained on.
    parts = [{"type": "image_url", "image_url": image}, {"type": "text", "text": request.prompt}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if request.correction is not None:
        earlier, complaint = request.correction
        messages.append({"role": "assistant", "content": earlier})
        messages.append({"role": "user", "content": complaint})
    fields: dict[str, Any] = {
        "messages": messages,
        "model": config.model,
        config.token_parameter: config.max_tokens,
    }
    if config.temperature is not None:
        fields["temperature"] = config.temperature
    if config.seed is not None:
        fields["seed"] = config.seed
    fields |= config.extra_body
    # Most of the bytes need no escapes: they are put in afterwards.
    before, _, after = json.dumps(fields).partition(_HERE)
    return b"".join((before.encode(), base64.b64encode(data), after.encode()))


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str


class Usage(BaseModel):
    prompt_tokens: int = Field(ge=0, le=_MOST_TOKENS)
    completion_tokens: int = Field(ge=0, le=_MOST_TOKENS)


class Completion(BaseModel):
    """What is used of a chat completion. The client library builds its types unvalidated."""

    choices: list[_Choice] = Field(min_length=1)
    usage: Usage | None = None

    @field_validator("usage", mode="wrap")
    @classmethod
    def _whole(cls, value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        """An incomplete one is none: half of a cost is no cost."""
        try:
            return validate(value)
        except ValidationError:
            return None

    @classmethod
    def parse(cls, body: bytes) -> "Completion | None":
        """None: this is no chat completion."""
        try:
            return cls.model_validate_json(body)
        except ValidationError:
            return None

    def outcome(self) -> CaptionOutcome:
        choice = self.choices[0]
        usage = self.usage or Usage(prompt_tokens=0, completion_tokens=0)
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
