"""The contract of a caption engine: request in, one typed outcome out."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from fusion_pipeline.dataset.evidence import DetectedObject, Tag, TextLine
from fusion_pipeline.dataset.images import ImageInfo


class Finish(StrEnum):
    """Why a caption ended."""

    STOP = "stop"
    LENGTH = "length"
    """Cut off at the token limit."""
    BLOCKED = "blocked"
    """Withheld by the provider's content filter; there is no caption."""


@dataclass(frozen=True, slots=True)
class CaptionRequest:
    """All that is known of one sample when its caption is written."""

    key: str
    image: bytes
    """Encoded bytes, as stored in the shard."""
    width: int
    """Pixels in the upright frame."""
    height: int
    prompt: str
    """The rendered fusion prompt."""
    tags: Sequence[Tag]
    objects: Sequence[DetectedObject]
    text: Sequence[TextLine]
    alt_texts: Sequence[str]
    shard: int = 0
    correction: tuple[str, str] | None = None
    """An earlier answer, and what was wrong with it: the next two turns of the conversation."""
    info: ImageInfo | None = None
    """What ingest found when it decoded the image whole; None: not known."""
    again: str = ""
    """Id of a request to write this caption once more: an earlier answer is not given again."""


@dataclass(frozen=True, slots=True)
class Captioned:
    """The engine answered. `caption` is None exactly when `finish` is BLOCKED."""

    caption: str | None
    finish: Finish
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CaptionFailed:
    """The engine could not answer this request, after its own retries."""

    reason: str
    """Typed, short, without secrets: `http_500`, `timeout`, `bad_response`, `undecodable`."""


CaptionOutcome = Captioned | CaptionFailed


class CaptionEngine(Protocol):
    """Anything that turns a request into an outcome.

    `caption` never raises for one bad sample; what it raises (a wrong key, no such model) is about
    the engine itself and stops the run.
    """

    async def caption(self, request: CaptionRequest) -> CaptionOutcome: ...

    async def close(self) -> None: ...
