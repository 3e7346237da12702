"""The caption engines a config can name, and how the stage gets the one it names."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.engine.stage import CPU_WORKER, Resources
from fusion_pipeline.fuse.base import CaptionEngine
from fusion_pipeline.fuse.composer import Composer, ComposerConfig
from fusion_pipeline.fuse.endpoint import Endpoint, EndpointConfig
from fusion_pipeline.fuse.journal import Journal

_OPEN_SHARDS = 4
"""That captions of an endpoint are asked for at a time: so none is waited for at a shard's end."""


class EngineChoice(BaseModel):
    """The caption engine: `composer`, or `{endpoint: {url: ..., model: ...}}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    composer: ComposerConfig | None = None
    endpoint: EndpointConfig | None = None
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")] = ""
    """Of the table `captions/<name>`; by default `composer`, or the model's own name."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if value == "composer":
            value = {"composer": {}}
        if isinstance(value, str):
            raise ValueError("name an engine: composer, or {endpoint: {url: ..., model: ...}}")
        if not isinstance(value, dict):
            return value
        if not value.get("name"):
            endpoint = value.get("endpoint")
            model = endpoint.get("model", "") if isinstance(endpoint, dict) else "composer"
            slug = re.sub(r"[^a-z0-9._-]+", "-", str(model).split("/")[-1].lower()).strip("-._")
            value = {**value, "name": slug or "engine"}
        return value

    @model_validator(mode="after")
    def _one_engine(self) -> "EngineChoice":
        if (self.composer is None) == (self.endpoint is None):
            raise ValueError("name exactly one engine: composer or endpoint")
        return self


@dataclass(frozen=True)
class Engine:
    """What the caption stage needs of an engine."""

    make: Callable[[], CaptionEngine]
    """Picklable; called once a worker."""
    version: int
    settings: Mapping[str, Any]
    """What changes the captions: model, sampling, token limit; no addresses, no keys."""
    journal: Journal | None = None
    """In which it keeps its books, if it does."""
    can_repair: bool = False
    """Whether it may answer better when it is asked once more."""
    resources: Resources = CPU_WORKER


def engine_of(choice: EngineChoice, dataset: Dataset) -> Engine:
    """`dataset`: whose samples it is to caption."""
    if choice.endpoint is not None:
        config = choice.endpoint
        journal = Journal(dataset, f"captions/{choice.name}")
        return Engine(
            partial(Endpoint, config, journal),
            Endpoint.version,
            config.fingerprint_fields(),
            journal,
            can_repair=True,
            # One process keeps the books.
            resources=Resources(workers=1, is_free=False, lanes=_OPEN_SHARDS),
        )
    assert choice.composer is not None
    composer = choice.composer
    return Engine(partial(Composer, composer), Composer.version, composer.model_dump(mode="json"))
