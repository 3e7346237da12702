"""What a provider says of its batches and files, validated.

Only identifiers and the status are required, for without them there is no batch. Whatever else is
not as published (an identifier that would not do in a URL, a count or a time that is none) is as
good as not there: nothing is charged or settled by it.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

NAME = "fusion_batch"
"""Of the metadata that a batch carries: the name of its file in the books."""
TOO_MANY_TOKENS = "token_limit_exceeded"
"""The provider's code for a batch that the limit of enqueued tokens has no room for."""
ACCOUNT_CODES = {
    TOO_MANY_TOKENS: "set `enqueued_tokens` to your account's limit",
    "billing_hard_limit_reached": "raise the account's limit",
    "insufficient_quota": "raise the account's limit",
    "request_limit_exceeded": "submit again when other batches have ended",
    "too_many_tasks": "submit again when other batches have ended",
}
"""Why the account takes no batch now, and what helps. Its requests were not tried."""
_CODES = {
    *ACCOUNT_CODES,
    "duplicate_custom_id",
    "empty_file",
    "file_too_large",
    "invalid_json_line",
    "invalid_method",
    "invalid_request",
    "invalid_url",
    "mismatched_model",
    "model_not_found",
}
"""Why a batch is refused as a whole. Other words of the provider are not passed on."""
MANY = 10**12
"""The most tokens or requests of a batch that are believed."""
_ENDED = ("completed", "failed", "expired", "cancelled")
_UNDER_WAY = ("validating", "in_progress", "finalizing", "cancelling")
_Model = TypeVar("_Model", bound=BaseModel)


def _name(value: str) -> str:
    """An identifier, as it may stand in a URL."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", value) or not value.strip("."):
        raise ValueError("no identifier")
    return value


def _status(value: str) -> str:
    """One that is not published means that the batch has not ended."""
    return value if value in (*_ENDED, *_UNDER_WAY) else "in_progress"


def _or_none(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    try:
        return validate(value)
    except ValidationError:
        return None


_LENIENT = WrapValidator(_or_none)
_Id = Annotated[str, AfterValidator(_name)]
_Count = Annotated[int, Field(ge=0, le=MANY)]
_Time = Annotated[float, Field(gt=0, lt=1e11, allow_inf_nan=False)]


class _Counts(BaseModel):
    completed: _Count
    failed: _Count


class _Usage(BaseModel):
    # Whoever was asked anything counted tokens: without any, nobody counted.
    input_tokens: Annotated[int, Field(ge=1, le=MANY)]
    output_tokens: _Count


class _Problem(BaseModel):
    code: Annotated[str | None, _LENIENT] = None


class _Problems(BaseModel):
    data: list[Annotated[_Problem | None, _LENIENT]] = []


class Remote(BaseModel):
    """A batch as the provider sees it."""

    id: _Id
    status: Annotated[str, AfterValidator(_status)]
    created_at: Annotated[_Time | None, _LENIENT] = None
    input_file_id: Annotated[_Id | None, _LENIENT] = None
    output_file_id: Annotated[_Id | None, _LENIENT] = None
    error_file_id: Annotated[_Id | None, _LENIENT] = None
    request_counts: Annotated[_Counts | None, _LENIENT] = None
    usage: Annotated[_Usage | None, _LENIENT] = None
    errors: Annotated[_Problems | None, _LENIENT] = None
    metadata: Any = None

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDED

    @property
    def code(self) -> str | None:
        """Of the first reason why the batch was refused as a whole."""
        for problem in self.errors.data if self.errors else ():
            code = problem.code if problem else None
            return code if code in _CODES else "another reason"
        return None

    @property
    def name(self) -> str | None:
        return name_in(self.metadata)

    def work(self, requests: int) -> tuple[int, int]:
        """Of so many requests: how many lines the result files are to hold, at least; how many
        answers were made, at most."""
        counts = self.request_counts
        if self.status == "completed":  # all were tried, whatever was counted
            failed = counts.failed if counts else 0
            return requests, max(counts.completed if counts else 0, requests - failed)
        if counts is not None:
            return min(counts.completed + counts.failed, requests), counts.completed
        return 0, 0 if self.status == "failed" else requests


class RemoteFile(BaseModel):
    id: _Id
    filename: Annotated[str | None, _LENIENT] = None
    bytes: Annotated[int | None, _LENIENT] = None
    created_at: Annotated[_Time | None, _LENIENT] = None


class Dated(BaseModel):
    created_at: _Time


class Page(BaseModel):
    data: list[Any]
    has_more: bool = False

    @property
    def last(self) -> str | None:
        """The identifier of the last item. Raises ValueError: it has none."""
        if not self.data:
            return None
        last = self.data[-1].get("id") if isinstance(self.data[-1], dict) else None
        return _name(last if isinstance(last, str) else "")


def read_as(kind: type[_Model], fields: object) -> _Model | None:
    """None: it is no such thing."""
    try:
        return kind.model_validate(fields)
    except ValidationError:
        return None


def name_in(metadata: object) -> str | None:
    """The name of a file of ours that a batch carries."""
    name = metadata.get(NAME) if isinstance(metadata, Mapping) else None
    return name if isinstance(name, str) else None
