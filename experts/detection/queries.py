"""What open-set detectors look for."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, StringConstraints

from experts.base import ExpertConfig
from fusion_pipeline.dataset.evidence import Tag


class TagQueries(ExpertConfig):
    """An image's tags, and a list that is the same for all images."""

    tag_threshold: float = Field(default=0.1, ge=0, le=1)
    """Tags that score at least so much are queries."""
    max_queries: int = Field(default=20, ge=0, le=1000)
    """Tags of an image at most, the best ones."""
    queries: tuple[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)], ...] = ()
    """Looked for in every image, beside its tags."""

    def labels(self, tags: Sequence[Tag]) -> list[str]:
        """What to look for in an image with these tags (best first), each once."""
        chosen = [tag.label for tag in tags if tag.score >= self.tag_threshold][: self.max_queries]
        once: dict[str, str] = {}
        for label in (*chosen, *self.queries):
            once.setdefault(plain(label), label)
        return [label for text, label in once.items() if text]


def plain(label: str) -> str:
    """A label as a model reads it: lower case, single spaces."""
    return " ".join(label.lower().split())
