"""The contract of a vision expert.

A new expert is one file under `experts/`, one line in `experts.EXPERTS` and one test
(docs/how-to/add-an-expert.md). The file holds a class that fits `Expert`: its `Config` lists the
settings that change the output, `revision` names the exact weights, `__init__` loads them,
`__call__` looks at images.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pydantic import ConfigDict

from fusion_pipeline.config_model import ConfigModel
from fusion_pipeline.dataset.evidence import Evidence, EvidenceKind, Tag
from fusion_pipeline.dataset.images import RGB

ASSETS = Path(__file__).parent / "assets"


class ExpertConfig(ConfigModel):
    """Base of every expert's settings: unknown fields are errors, values never change."""

    model_config = ConfigDict(protected_namespaces=())

    def fingerprint_fields(self) -> dict[str, Any]:
        """The settings that change the output, JSON-able; the weights are `Expert.revision`'s."""
        return self.model_dump(mode="json")


@dataclass(frozen=True, slots=True)
class Hardware:
    """What an expert may use. It gets no more than this, whatever the machine has."""

    threads: int = 1
    gpu: bool = False
    """Whether to run on the GPU that the process sees (Ray shows a worker its own)."""


@dataclass(frozen=True, slots=True)
class Context:
    """What else is known of an image when an expert looks at it."""

    width: int
    """Pixels of the stored image in the upright frame; the array may be a scaled decode."""
    height: int
    alt_texts: tuple[str, ...] = ()
    tags: tuple[Tag, ...] = ()
    """What the taggers say, best first, for an expert that `uses_tags`; else empty."""
    key: str = ""
    """The sample's key."""


class Expert(Protocol):
    """What the perceive stage needs of an expert."""

    kind: ClassVar[EvidenceKind]
    version: ClassVar[int]
    """Raised by hand when the output for the same weights and settings changes."""
    uses_tags: ClassVar[bool]
    """Whether it is told the image's tags (open-set detection), and so runs after the taggers."""
    Config: ClassVar[type[ExpertConfig]]

    @property
    def batch_size(self) -> int:
        """Images a call; the slices are cut in row order, so results never depend on workers."""
        ...

    @property
    def min_short_edge(self) -> int | None:
        """Short edge in pixels below which the expert loses detail; None: full resolution."""
        ...

    # `config` is an instance of this class's own `Config`, which a Protocol can't say.
    @classmethod
    def revision(cls, config: Any) -> str:
        """Identity of the weights (a content hash or a pinned hub commit), without loading them."""
        ...

    def __init__(self, config: Any, hardware: Hardware) -> None: ...

    def __call__(self, images: Sequence[RGB], context: Sequence[Context]) -> Sequence[Evidence]:
        """Evidence of each image, in order. An exception fails the rows of this call, only."""
        ...


@cache
def file_revision(path: Path) -> str:
    """`sha256:` and the first 16 hex digits of the file's hash."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()[:16]
