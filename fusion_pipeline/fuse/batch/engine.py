"""Caption engine that answers from the books of batches: no network, no key."""

from functools import cached_property
from typing import ClassVar

from fusion_pipeline.errors import FusionError
from fusion_pipeline.fuse.base import CaptionOutcome, CaptionRequest
from fusion_pipeline.fuse.batch.books import Books
from fusion_pipeline.fuse.batch.config import BatchConfig
from fusion_pipeline.fuse.batch.files import id_of


class NotAnsweredError(FusionError):
    """A request of which the books know no outcome."""


class Batches:
    """See `CaptionEngine`. All outcomes are in memory, about 2.5 kB each.

    Failure reasons: those of an endpoint's requests, `request_too_large`, and after three sendings
    `batch_expired` and `batch_error`.
    """

    version: ClassVar[int] = 1
    """That of an endpoint, whose captions are the same."""

    def __init__(self, config: BatchConfig, books: Books) -> None:
        self.config = config
        self._unread = books

    @cached_property
    def _books(self) -> Books:
        return self._unread.load()

    async def caption(self, request: CaptionRequest) -> CaptionOutcome:
        """Raises NotAnsweredError."""
        outcome = self._books.outcomes.get(id_of(request.key, request.prompt, self.config))
        if outcome is None:
            raise NotAnsweredError(
                f"{self._books.table}: a caption is not there yet. `fusion meta submit` asks for "
                "it in a batch, `fusion meta collect` takes in the answers."
            )
        return outcome

    async def close(self) -> None:
        pass
