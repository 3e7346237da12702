"""The provider's files and batches, over the official `openai` client.

What comes back is validated (`remote`). The provider's own words are never repeated, for they
may hold the key.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import httpx2
import openai
from pydantic import BaseModel, ValidationError

from fusion_pipeline.errors import FusionError
from fusion_pipeline.fuse.batch.books import Entry
from fusion_pipeline.fuse.batch.config import BatchConfig
from fusion_pipeline.fuse.batch.remote import (
    NAME,
    Dated,
    Page,
    Remote,
    RemoteFile,
    name_in,
    read_as,
)
from fusion_pipeline.fuse.endpoint import EndpointError, read_key

_TIMEOUT_S = 600.0
_PAGE = 100
_MOST_PAGES = 1000
_CHUNK = 2**16
_CLOCKS_S = 86_400.0
"""That the provider's clock may be behind this one."""
_NO_FILE = (403, 404, 410)
"""Statuses of a result file that is not there yet, or no more."""
_Model = TypeVar("_Model", bound=BaseModel)
_Answer = TypeVar("_Answer")


class BatchError(FusionError):
    """The provider refused, or did not answer. What was sent before is in the books."""


class UnknownOutcomeError(BatchError):
    """Whether the provider did what it was asked for is not known."""


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
        for fields in self._list("files", entry.at - _CLOCKS_S):
            file = read_as(RemoteFile, fields)
            if file and file.filename == _filename(entry.name) and file.bytes == entry.bytes:
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
        return self._validated(RemoteFile, content).id

    def forget(self, file: str) -> None:
        """Remove a file that was read whole; it does no harm where it is."""
        files = self._client.files.with_raw_response
        self._ask(lambda: files.delete(file).content, lacking=(404,))

    def chunks(self, file: str) -> Iterator[bytes]:
        """The bytes of a file; none when the provider does not have it (yet)."""
        response = self._client.files.with_streaming_response
        opened = response.content(file)
        answer = self._ask(opened.__enter__, lacking=_NO_FILE)
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
                    metadata={NAME: name},
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
        """Batches that carry the names of these entries or were made of their files, oldest first.

        Raises BatchError for one of them that can't be read: it is not to be asked for again.
        """
        found: dict[str, list[Remote]] = {}
        files = {entry.file: name for name, entry in entries.items() if entry.file is not None}
        since = min((entry.at for entry in entries.values()), default=0.0) - _CLOCKS_S
        for fields in self._list("batches", since):
            name, file = name_in(fields.get("metadata")), fields.get("input_file_id")
            if name not in entries:
                name = files.get(file) if isinstance(file, str) else None
            if name is not None:
                remote = read_as(Remote, fields)
                if remote is None:
                    raise BatchError(self._no_api())
                found.setdefault(name, []).insert(0, remote)
        return found

    # Means

    def _list(self, what: str, since: float) -> Iterator[dict[str, Any]]:
        """All of them, newest first, as far back as this time; those of others among them."""
        after: Any = openai.omit
        for _ in range(_MOST_PAGES):
            page = self._validated(Page, self._page(what, after))
            for fields in page.data:
                if not isinstance(fields, dict):
                    continue  # it carries no name
                made = read_as(Dated, fields)
                if made is not None and made.created_at < since:
                    return
                yield fields
            try:
                after = page.last if page.has_more else None
            except ValueError:
                break
            if after is None:
                return
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
            pass  # raised outside: no trace is to hold what came
        raise BatchError(self._no_api())

    def _no_api(self) -> str:
        return (
            f"{self._config.url} answered what the Batch API does not: `url` must be the base "
            "URL of an API with /files and /batches (it often ends in /v1)"
        )

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
