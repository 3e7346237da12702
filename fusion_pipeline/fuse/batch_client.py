"""The provider's files and batches, over the official `openai` client.

What comes back is validated here: identifiers that would not do in a URL, and times and counts that
are none, are as good as not there. The provider's own words are never repeated, for they may hold
the key.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any, TypeVar

import httpx2
import openai
from pydantic import AfterValidator, BaseModel, Field, TypeAdapter, ValidationError

from fusion_pipeline.errors import FusionError
from fusion_pipeline.fuse.batch_books import Entry
from fusion_pipeline.fuse.batch_config import BatchConfig
from fusion_pipeline.fuse.endpoint import EndpointError, read_key

TOO_MANY_TOKENS = "token_limit_exceeded"
"""The provider's code for a batch that the limit of enqueued tokens has no room for."""
_NAME = "fusion_batch"
"""Of the metadata that a batch carries: the name of its file in the books."""
_TIMEOUT_S = 600.0
_PAGE = 100
_MOST_PAGES = 1000
_CHUNK = 2**16
_CLOCKS_S = 86_400.0
"""That the provider's clock may be behind this one."""
_Model = TypeVar("_Model", bound=BaseModel)
_Answer = TypeVar("_Answer")
_ENDED = ("completed", "failed", "expired", "cancelled")
_UNDER_WAY = ("validating", "in_progress", "finalizing", "cancelling")
_CODES = {
    TOO_MANY_TOKENS,
    "billing_hard_limit_reached",
    "duplicate_custom_id",
    "empty_file",
    "file_too_large",
    "insufficient_quota",
    "invalid_json_line",
    "invalid_method",
    "invalid_request",
    "invalid_url",
    "mismatched_model",
    "model_not_found",
    "request_limit_exceeded",
    "too_many_tasks",
}
"""Why a batch is refused as a whole. Other words of the provider are not passed on."""


class BatchError(FusionError):
    """The provider refused, or did not answer. What was sent before is in the books."""


class UnknownOutcomeError(BatchError):
    """Whether the provider did what it was asked for is not known."""


def _name(value: str) -> str:
    """An identifier, as it may stand in a URL."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", value) or not value.strip("."):
        raise ValueError("no identifier")
    return value


def _status(value: str) -> str:
    """One that is not published means that the batch has not ended."""
    return value if value in (*_ENDED, *_UNDER_WAY) else "in_progress"


_Id = Annotated[str, AfterValidator(_name)]
_Time = Annotated[float, Field(gt=0, lt=1e11, allow_inf_nan=False)]


class _Counts(BaseModel):
    completed: int = Field(ge=0)
    failed: int = Field(ge=0)


class _Usage(BaseModel):
    input_tokens: int = Field(ge=0)
    output_tokens: int = Field(ge=0)


class _Problem(BaseModel):
    code: str | None = None


class _Problems(BaseModel):
    data: list[_Problem] | None = None


class Remote(BaseModel):
    """A batch as the provider sees it."""

    id: _Id
    status: Annotated[str, AfterValidator(_status)]
    created_at: _Time
    output_file_id: _Id | None = None
    error_file_id: _Id | None = None
    request_counts: _Counts | None = None
    usage: _Usage | None = None
    errors: _Problems | None = None
    metadata: dict[str, str] | None = None
    completed_at: _Time | None = None
    expired_at: _Time | None = None
    failed_at: _Time | None = None
    cancelled_at: _Time | None = None

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDED

    @property
    def ended_at(self) -> float | None:
        return self.completed_at or self.expired_at or self.failed_at or self.cancelled_at

    @property
    def code(self) -> str | None:
        """Of the first reason why the batch was refused as a whole."""
        for problem in (self.errors and self.errors.data) or ():
            return problem.code if problem.code in _CODES else "another reason"
        return None

    @property
    def name(self) -> str | None:
        return (self.metadata or {}).get(_NAME)


class _File(BaseModel):
    id: _Id
    filename: str = ""
    bytes: int = 0
    created_at: _Time


class _Page(BaseModel):
    data: list[Any]
    has_more: bool = False


_Listed = TypeVar("_Listed", _File, Remote)
_LAST = TypeAdapter(_Id)


class Provider:
    """Raises BatchError, at construction for a missing key."""

    def __init__(self, config: BatchConfig) -> None:
        self._config = config
        problem = ""
        try:
            key = read_key(config.key_env)
        except EndpointError as error:
            problem = str(error)
        if problem:
            raise BatchError(problem)
        self._client = openai.OpenAI(
            base_url=config.url,
            api_key=key.get_secret_value(),
            timeout=_TIMEOUT_S,
            max_retries=4,  # of all but `create`
        )

    def close(self) -> None:
        self._client.close()

    # Files

    def find_file(self, entry: Entry) -> str | None:
        """The provider's name of an entry's file, if it has it whole."""
        for file in self._list(_File, "files", entry.at - _CLOCKS_S):
            if file.filename == _filename(entry.name) and file.bytes == entry.bytes:
                return file.id
        return None

    def upload(self, name: str, data: bytes) -> str:
        """The provider's name of the file."""
        files = self._client.files.with_raw_response
        content = self._ask(
            lambda: (
                files.create(
                    file=(_filename(name), data, "application/jsonl"), purpose="batch"
                ).content
            )
        )
        return self._validated(_File, content).id

    def forget(self, file: str) -> None:
        """Remove a file that was read whole; it does no harm where it is."""
        files = self._client.files.with_raw_response
        self._ask(lambda: files.delete(file).content, lacking=(404,))

    def chunks(self, file: str) -> Iterator[bytes]:
        """The bytes of a file; none when the provider does not have it (yet)."""
        response = self._client.files.with_streaming_response
        opened = response.content(file)
        answer = self._ask(opened.__enter__, lacking=(404,))
        if answer is None:
            return
        try:
            parts = answer.iter_bytes(_CHUNK)
            while (chunk := self._ask(lambda: next(parts, b""))) is not None and chunk:
                yield chunk
        finally:
            opened.__exit__(None, None, None)

    # Batches

    def create(self, file: str, name: str) -> Remote:
        """Raises UnknownOutcomeError when the batch may exist all the same; never asks twice."""
        batches = self._client.with_options(max_retries=0).batches.with_raw_response
        content = self._ask(
            lambda: (
                batches.create(
                    input_file_id=file,
                    endpoint="/v1/chat/completions",
                    completion_window=self._config.window,  # type: ignore[arg-type]  # one is published
                    metadata={_NAME: name},
                    extra_headers={"Idempotency-Key": name},
                ).content
            ),
            is_creation=True,
        )
        try:
            return Remote.model_validate_json(content or b"")
        except ValidationError:
            problem = f"{self._config.url} answered what is no batch"
        raise UnknownOutcomeError(problem)

    def get(self, batch: str) -> Remote | None:
        """None: the provider has no such batch (any more)."""
        batches = self._client.batches.with_raw_response
        content = self._ask(lambda: batches.retrieve(batch).content, lacking=(404,))
        return None if content is None else self._validated(Remote, content)

    def cancel(self, batch: str) -> None:
        """Nothing happens when it has ended."""
        batches = self._client.batches.with_raw_response
        self._ask(lambda: batches.cancel(batch).content, lacking=(400, 404, 409))

    def named(self, entries: Mapping[str, Entry]) -> dict[str, list[Remote]]:
        """Batches that carry the names of these entries, oldest first."""
        found: dict[str, list[Remote]] = {}
        since = min((entry.at for entry in entries.values()), default=0.0) - _CLOCKS_S
        for remote in self._list(Remote, "batches", since):
            if remote.name is not None and remote.name in entries:
                found.setdefault(remote.name, []).insert(0, remote)
        return found

    # Means

    def _list(self, kind: type[_Listed], what: str, since: float) -> Iterator[_Listed]:
        """All of them, newest first, as far back as this time; those of others among them."""
        after: Any = openai.omit
        for _ in range(_MOST_PAGES):
            page = self._validated(_Page, self._page(what, after))
            for fields in page.data:
                try:
                    item = kind.model_validate(fields)
                except ValidationError:
                    continue  # none of ours: those were validated when they were made
                if item.created_at < since:
                    return
                yield item
            last = page.data[-1].get("id") if page.data and page.has_more else None
            if last is None:
                return
            after = _LAST.validate_python(last)
        raise BatchError(f"{self._config.url}: its list of {what} has no end")

    def _page(self, what: str, after: Any) -> bytes | None:
        if what == "files":
            files = self._client.files.with_raw_response
            return self._ask(
                lambda: files.list(purpose="batch", limit=_PAGE, order="desc", after=after).content
            )
        batches = self._client.batches.with_raw_response
        return self._ask(lambda: batches.list(limit=_PAGE, after=after).content)

    def _validated(self, kind: type[_Model], content: bytes | None) -> _Model:
        try:
            return kind.model_validate_json(content or b"")
        except ValidationError:
            problem = (
                f"{self._config.url} answered what the Batch API does not: `url` must be the base "
                "URL of an API with /files and /batches (it often ends in /v1)"
            )
        raise BatchError(problem)

    def _ask(
        self,
        work: Callable[[], _Answer],
        lacking: Collection[int] = (),
        is_creation: bool = False,
    ) -> _Answer | None:
        """What the work gives; None when the provider answers with one of the `lacking` statuses.

        Raises BatchError, which carries no text and no exception of the provider or the HTTP
        library.
        """
        status, code = 0, ""
        try:
            return work()
        except openai.APIStatusError as error:
            status, code = error.status_code, error.code or ""
        except (openai.OpenAIError, httpx2.HTTPError, OSError):
            pass  # no answer came, or half of one
        if status in lacking:
            return None
        problem = self._problem(status, code)
        is_refused = 400 <= status < 500 and status not in (408, 409)
        raise (UnknownOutcomeError if is_creation and not is_refused else BatchError)(problem)

    def _problem(self, status: int, code: str) -> str:
        url, key = self._config.url, self._config.key_env
        if not status:
            return f"{url} did not answer. What was sent is in the books; run the command again."
        if status in (401, 403):
            return (
                f"{url} refused access (HTTP {status}): check the key in the environment variable "
                f"{key} (`key_env`) and that it may use files and batches"
            )
        if status == 402 or code in ("insufficient_quota", "billing_hard_limit_reached"):
            return f"{url} reports that the account's quota is used up: raise its limit"
        if status == 404:
            return (
                f"{url} answered HTTP 404: `url` is not the base URL of an API with /files and "
                "/batches (it often ends in /v1)"
            )
        if status == 429:
            return f"{url} is asked too often (HTTP 429): run the command again later"
        return f"{url} answered HTTP {status}. What was sent is in the books; run it again later."


def _filename(name: str) -> str:
    return f"{name}.jsonl"
