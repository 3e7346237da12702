"""The caption engines a config can name, and how the stage gets the one it names."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

from pydantic import Field, model_validator

from fusion_pipeline.config_model import ConfigModel
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.engine.stage import CPU_WORKER, Resources
from fusion_pipeline.fuse.base import CaptionEngine
from fusion_pipeline.fuse.batch.books import Books
from fusion_pipeline.fuse.batch.config import BatchConfig
from fusion_pipeline.fuse.batch.engine import Batches
from fusion_pipeline.fuse.composer import Composer, ComposerConfig
from fusion_pipeline.fuse.endpoint import Endpoint, EndpointConfig
from fusion_pipeline.fuse.journal import Journal
from fusion_pipeline.fuse.vllm import Vllm, VllmConfig

_OPEN_SHARDS = 4
"""That captions of an endpoint are asked for at a time: so none is waited for at a shard's end."""
_HOSTED = Resources(workers=1, is_free=False, lanes=_OPEN_SHARDS)
"""One process keeps the books."""
_MARGIN_S = 120.0
_KINDS = ("composer", "endpoint", "vllm", "batch")


class EngineChoice(ConfigModel):
    """The caption engine: `composer`, `{endpoint: {url: ..., model: ...}}`, `{vllm: MODEL}`,
    `{batch: {model: ...}}`."""

    composer: ComposerConfig | None = None
    endpoint: EndpointConfig | None = None
    vllm: VllmConfig | None = None
    batch: BatchConfig | None = None
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")] = ""
    """Of the table `captions/<name>`; by default `composer`, or the model's own name."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        if value == "composer":
            value = {"composer": {}}
        if isinstance(value, str):
            raise ValueError(
                f"no engine {value!r} is listed under caption.engines. Name composer, or "
                "{endpoint: {url: ..., model: ...}}, {vllm: MODEL}, {batch: {model: ...}}"
            )
        if not isinstance(value, dict):
            return value
        if not value.get("name"):
            kind = next((kind for kind in _KINDS if value.get(kind) is not None), "composer")
            engine = value.get(kind)
            model = engine.get("model", kind) if isinstance(engine, dict) else engine or kind
            last = str(model).rstrip("/").split("/")[-1].lower()
            slug = re.sub(r"[^a-z0-9._-]+", "-", last).strip("-._")
            value = {**value, "name": slug or "engine"}
        return value

    @model_validator(mode="after")
    def _one_engine(self) -> "EngineChoice":
        if sum(getattr(self, kind) is not None for kind in _KINDS) != 1:
            raise ValueError(f"name exactly one engine: {', '.join(_KINDS)}")
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
    batch: BatchConfig | None = None
    books: Books | None = None
    """Of an engine that answers what was asked in batches."""
    can_repair: bool = False
    """Whether it may answer better when it is asked once more."""
    resources: Resources = CPU_WORKER
    captions_per_second: float | None = None
    """The most it was measured to make."""


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
            resources=_HOSTED,
        )
    if choice.vllm is not None:
        served = choice.vllm
        journal = Journal(dataset, f"captions/{choice.name}")
        # Replicas beside the process use the GPUs that Ray gives to it.
        gpus = served.replicas * served.tensor_parallel
        is_here = served.device == "gpu" and not served.spread
        return Engine(
            partial(Vllm, served, journal),
            Vllm.version,
            served.fingerprint_fields(),
            journal,
            can_repair=True,
            resources=replace(
                _HOSTED,
                gpus=float(gpus if is_here else 0),
                start_s=served.startup_minutes * 60 + _MARGIN_S,
            ),
            captions_per_second=served.captions_per_second,
        )
    if choice.batch is not None:
        books = Books(dataset, f"captions/{choice.name}")
        return Engine(
            partial(Batches, choice.batch, books),
            Batches.version,
            choice.batch.fingerprint_fields(),
            batch=choice.batch,
            books=books,
            # A pool of its own: all answers are in the memory of its one process.
            resources=Resources(workers=1, is_free=False),
        )
    assert choice.composer is not None
    composer = choice.composer
    return Engine(partial(Composer, composer), Composer.version, composer.model_dump(mode="json"))
