"""Families of open multimodal models: what is the same for all sizes and quantisations of one.

One YAML file a family in `families/`, which names the published files that its values are from.
"""

from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

FAMILIES = Path(__file__).parent / "families"


class ServeSettings(BaseModel):
    """Options of `vllm serve`, by their names in its Python interface."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_model_len: int = Field(ge=1)
    """Tokens of image, prompt and answer together."""
    limit_mm_per_prompt: dict[str, int]
    mm_processor_cache_gb: float = Field(default=0, ge=0)
    """GiB kept of processed images; none, since no image is asked about twice."""
    mm_processor_kwargs: dict[str, Any] = {}
    trust_remote_code: bool = False


class Family(BaseModel):
    """A family of models with one chat format."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """The file's name without its ending."""
    models: tuple[str, ...] = Field(min_length=1)
    """Patterns (`*`) of the model's name on its hub, without the owner and in small letters."""
    special_tokens: tuple[str, ...] = Field(min_length=1)
    """Texts that its tokenizers turn into one token of their own, wherever they stand."""
    role_markers: tuple[str, ...] = Field(min_length=1)
    """Texts that open or close a turn."""
    image_placeholder: str = Field(min_length=1)
    """Text that the engine puts the image in the place of."""
    turn: str
    """The user's turn as the model's chat template renders it, with `{prompt}` for the text."""
    image_max_edge: int = Field(ge=32)
    """Long edge in pixels beyond which a picture of up to 2:1 shows the model no more."""
    max_image_tokens: int = Field(ge=1)
    """Most prompt tokens that one image takes, under these `serve` settings."""
    serve: ServeSettings


@cache
def families() -> tuple[Family, ...]:
    """All families, by name."""
    return tuple(_load(path) for path in sorted(FAMILIES.glob("*.yaml")))


def family_of(model: str) -> Family | None:
    """The family of a model, by its hub id or its folder; None when no file knows it."""
    name = model.rstrip("/").rpartition("/")[2].lower()
    for family in families():
        if any(fnmatchcase(name, pattern) for pattern in family.models):
            return family
    return None


def _load(path: Path) -> Family:
    return Family(name=path.stem, **yaml.safe_load(path.read_text(encoding="utf-8")))
