"""The stage that hosts any expert."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from experts import load_expert
from experts.base import Context, Expert, ExpertConfig, Hardware
from fusion_pipeline.dataset.evidence import (
    ARROW_TYPES,
    DetectedObject,
    Evidence,
    EvidenceKind,
    Tag,
    TextLine,
    tags_from,
    to_arrow,
)
from fusion_pipeline.dataset.images import RGB, DecodeError, decode
from fusion_pipeline.dataset.rows import NotOk, Ok, Outcome, build_table, failed
from fusion_pipeline.engine.errors import is_resource_error
from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardBlock, Worker
from fusion_pipeline.perceive.tiles import VERSION, Tiled, TilesConfig


@dataclass(frozen=True)
class Perceive:
    """Writes `<folder>/<label>`, for example `objects/nanodet`."""

    expert: str
    config: ExpertConfig
    reads: tuple[str, ...] = ()
    """Tables of tags, for an expert that uses them."""
    resources: Resources = CPU_WORKER
    label: str = ""
    """Name of its table, when that is not the expert's: two versions of one side by side."""
    tiles: TilesConfig | None = None
    """For a detector that is to look at parts of large images, too."""
    folder: str = ""
    """Of its table, when that is not the kind of its evidence."""

    @property
    def expert_class(self) -> type[Expert]:
        return load_expert(self.expert)

    @property
    def name(self) -> str:
        return f"{self.folder or self.expert_class.kind}/{self.label or self.expert}"

    @property
    def version(self) -> int:
        return self.expert_class.version

    @property
    def columns(self) -> Sequence[pa.Field]:
        kind = self.expert_class.kind
        return (pa.field(kind.value, ARROW_TYPES[kind]),)

    def settings(self) -> Mapping[str, Any]:
        # Threads may change a result's last bits; with one there is nothing to tell.
        threads = {"threads": self.resources.threads} if self.resources.threads > 1 else {}
        tiles = {"tiles": {**self.tiles.model_dump(), "version": VERSION}} if self.tiles else {}
        # The table's name tells the expert, unless it has a name of its own.
        expert = {} if self.label in ("", self.expert) else {"expert": self.expert}
        return {**self.config.fingerprint_fields(), **expert, **threads, **tiles}

    def revision(self) -> str:
        return self.expert_class.revision(self.config)

    def open(self) -> Worker:
        return _PerceiveWorker(self)


_Slice = tuple[Sequence[bytes], Sequence[Context]]


class _PerceiveWorker:
    def __init__(self, stage: Perceive) -> None:
        self._stage = stage
        resources = stage.resources
        hardware = Hardware(resources.threads, gpu=resources.gpus > 0)
        self._expert = stage.expert_class(stage.config, hardware)
        self._tiled = Tiled(self._expert, stage.tiles) if stage.tiles else None
        self._decoder = ThreadPoolExecutor(1) if hardware.gpu else None
        """Decodes the next slice while the GPU looks at one. On CPUs all cores have work anyway."""
        if hardware.gpu:
            # A GPU's first call takes seconds, and shows what does not fit its libraries.
            self._expert([np.zeros((448, 448, 3), np.uint8)], [Context(448, 448)])

    def __call__(self, block: ShardBlock) -> pa.Table:
        contexts = [
            Context(width, height, tuple(alt_texts), tags, key)
            for width, height, alt_texts, tags, key in zip(
                block.column("samples", "width"),
                block.column("samples", "height"),
                block.column("samples", "alt_texts"),
                _tags(block, self._stage.reads),
                block.keys,
                strict=True,
            )
        ]
        outcomes: list[Outcome] = []
        batch = max(1, self._expert.batch_size >> block.halvings)
        size = 1 if self._tiled else batch
        starts = range(0, len(block), size)
        slices = [(block.images[s : s + size], contexts[s : s + size]) for s in starts]
        for (images, own), decoded in zip(slices, self._decoded(slices), strict=True):
            block.tick()
            outcomes += self._look(images, own, decoded, batch, block.tick)
        return build_table(block.keys, outcomes, self._stage.columns)

    def _decoded(self, slices: Sequence[_Slice]) -> Iterator[Callable[[], list[RGB]]]:
        """What gives the images of each slice."""
        if self._decoder is None:
            yield from (partial(self._decode, *one) for one in slices)
            return
        ahead = deque[Future[list[RGB]]]()
        for one in slices:
            ahead.append(self._decoder.submit(self._decode, *one))
            if len(ahead) > 1:
                yield ahead.popleft().result
        yield from (last.result for last in ahead)

    def _decode(self, images: Sequence[bytes], contexts: Sequence[Context]) -> list[RGB]:
        tiled, edge = self._tiled, self._expert.min_short_edge
        return [
            decode(image, min_short_edge=tiled.min_short_edge(context) if tiled else edge)
            for image, context in zip(images, contexts, strict=True)
        ]

    def _look(
        self,
        images: Sequence[bytes],
        contexts: Sequence[Context],
        decoded: Callable[[], list[RGB]],
        batch: int,
        tick: Callable[[], None],
    ) -> list[Outcome]:
        """One outcome an image; an image that breaks its slice is found by going one by one."""
        try:
            if self._tiled:
                [image], [context] = decoded(), contexts
                found = self._tiled(image, context, batch, tick)
            else:
                found = self._expert(decoded(), contexts)
            return [self._ok(evidence) for evidence in found]
        except Exception as error:  # a model may raise anything on one odd image
            if is_resource_error(error):
                raise  # says nothing of the image
            if len(images) == 1:
                if isinstance(error, DecodeError):
                    return [NotOk("failed", str(error)[:200])]
                return [failed(error)]
            alone = [([i], [c]) for i, c in zip(images, contexts, strict=True)]
            return [
                outcome
                for one in alone
                for outcome in self._look(*one, partial(self._decode, *one), batch, tick)
            ]

    def _ok(self, evidence: Evidence) -> Outcome:
        if not all(_is_finite(item) for item in evidence):
            return NotOk("failed", "not_finite: a score or coordinate is no number")
        kind = self._expert.kind
        return Ok({kind.value: to_arrow(kind, [evidence]).to_pylist()[0]})


def _tags(block: ShardBlock, tables: Sequence[str]) -> list[tuple[Tag, ...]]:
    """Of each row, over all tables: every label once, at its best score, best first."""
    found: list[dict[str, Tag]] = [{} for _ in block.keys]
    for table in tables:
        for best, cell in zip(found, block.column(table, EvidenceKind.TAGS.value), strict=True):
            for tag in tags_from(cell):
                best[tag.label] = max(tag, best.get(tag.label, tag), key=lambda t: t.score)
    return [tuple(sorted(best.values(), key=lambda t: (-t.score, t.label))) for best in found]


def _is_finite(item: Tag | DetectedObject | TextLine) -> bool:
    place: tuple[float, ...] = ()
    if isinstance(item, DetectedObject):
        place = item.box
    elif isinstance(item, TextLine):
        place = item.quad
    return all(map(math.isfinite, (item.score, *place)))
