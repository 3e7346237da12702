"""Whether an alt text belongs to its image: an image-text model scores each, and a cheap stage puts
the best first and drops what scores less than `alt_text.min_relevance`.

Texts of web pages often belong to another image, to the page or to the shop (docs/alt-text.md).
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from experts import load_expert
from experts.base import Hardware
from experts.checkpoint import CheckpointError, checkpoint_revision
from experts.tagging.vocabulary import ImageTextModel, VocabularyConfig, relevance
from fusion_pipeline.dataset.evidence import ALT_TEXTS, CLEANED, RELEVANCE, RELEVANT_ALT_TEXTS
from fusion_pipeline.dataset.images import DecodeError, decode
from fusion_pipeline.dataset.rows import NotOk, Ok, Outcome, build_table, failed
from fusion_pipeline.engine.errors import is_resource_error
from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardBlock, Worker

MODELS = {
    "clip": "experts.tagging.clip:ClipModel",
    "open-clip": "experts.tagging.open_clip:OpenClipModel",
}
"""Experts whose model scores texts."""


@dataclass(frozen=True)
class Relevance:
    """Writes `relevance/<label>`: for each alt text of a sample, in their order, how well it fits,
    0..1; null for one that was cleaned away."""

    expert: str
    config: VocabularyConfig
    label: str
    resources: Resources = CPU_WORKER

    version = 2
    reads: tuple[str, ...] = (ALT_TEXTS,)
    columns: Sequence[pa.Field] = (pa.field("relevance", pa.list_(pa.float32())),)

    @property
    def name(self) -> str:
        return f"{RELEVANCE}{self.label}"

    def settings(self) -> Mapping[str, Any]:
        model = {"expert": self.expert, "expert_version": load_expert(self.expert).version}
        # As for experts: threads and neighbours may change a result's last bits.
        threads = {"threads": self.resources.threads} if self.resources.threads > 1 else {}
        used = self.config.model_dump(mode="json", include={"calibration", "dtype"})
        batch = {"batch_size": self.config.batch_size} if self.config.batch_size > 1 else {}
        return {**model, **used, **threads, **batch}

    def revision(self) -> str:
        return checkpoint_revision(self.config)

    def open(self) -> Worker:
        resources = self.resources
        module, _, name = MODELS[self.expert].partition(":")
        loader = getattr(importlib.import_module(module), name)
        model = loader(self.config, Hardware(resources.threads, gpu=resources.gpus > 0))
        if model.bias is None and self.config.calibration is None:
            raise CheckpointError(
                f"relevance: {self.config.model} was trained with a softmax, which says nothing of "
                "a single text: fit a calibration on sentences (docs/tagging.md), or take a SigLIP"
            )
        return _RelevanceWorker(self, model)


class _RelevanceWorker:
    def __init__(self, stage: Relevance, model: ImageTextModel) -> None:
        self._stage = stage
        self._model = model

    def __call__(self, block: ShardBlock) -> pa.Table:
        texts = [[one["text"] for one in cell] for cell in block.column(ALT_TEXTS, ALT_TEXTS)]
        batch = max(1, self._stage.config.batch_size >> block.halvings)
        outcomes: list[Outcome] = []
        for start in range(0, len(block), batch):
            block.tick()
            rows = slice(start, start + batch)
            outcomes += self._look(block.images[rows], texts[rows])
        return build_table(block.keys, outcomes, self._stage.columns)

    def _look(self, images: Sequence[bytes], texts: Sequence[Sequence[str]]) -> list[Outcome]:
        """One outcome an image; an image that breaks its slice is found by going one by one."""
        told = [[text for text in own if text] for own in texts]
        asked = [row for row, own in enumerate(told) if own]
        try:
            scores = relevance(
                self._model,
                [decode(images[row], min_short_edge=self._model.short_edge) for row in asked],
                [told[row] for row in asked],
                self._stage.config.calibration,
            )
        except Exception as error:  # a model may raise anything on one odd image
            if is_resource_error(error):
                raise  # says nothing of the image
            if len(images) > 1:
                alone = zip(images, texts, strict=True)
                return [outcome for i, own in alone for outcome in self._look([i], [own])]
            return [
                NotOk("failed", str(error)[:200])
                if isinstance(error, DecodeError)
                else failed(error)
            ]
        found = dict(zip(asked, scores, strict=True))
        return [self._outcome(own, found.get(row, [])) for row, own in enumerate(texts)]

    def _outcome(self, texts: Sequence[str], scores: Sequence[float]) -> Outcome:
        if not np.isfinite(scores).all():
            return NotOk("failed", "not_finite: a score is no number")
        rest = iter(scores)
        return Ok({"relevance": [next(rest) if text else None for text in texts]})


_SCORED = pa.list_(pa.struct([*CLEANED.value_type, pa.field("relevance", pa.float32())]))


@dataclass(frozen=True)
class RelevantAltTexts:
    """Writes `alt_texts/relevant`, which reads like `alt_texts`: the best texts first, and those
    below the threshold without text, their reason `irrelevant`."""

    scores: str
    """Table of a `Relevance`."""
    threshold: float
    resources: Resources = CPU_WORKER

    name = RELEVANT_ALT_TEXTS
    version = 1
    columns: Sequence[pa.Field] = (pa.field(ALT_TEXTS, _SCORED),)

    @property
    def reads(self) -> tuple[str, ...]:
        return (ALT_TEXTS, self.scores)

    def settings(self) -> Mapping[str, Any]:
        return {"threshold": self.threshold}

    def revision(self) -> None:
        return None

    def open(self) -> Worker:
        return self._work

    def _work(self, block: ShardBlock) -> pa.Table:
        columns = (block.column(ALT_TEXTS, ALT_TEXTS), block.column(self.scores, "relevance"))
        outcomes = [
            Ok({ALT_TEXTS: self._ranked(cells, scores)})
            for cells, scores in zip(*columns, strict=True)
        ]
        return build_table(block.keys, outcomes, self.columns)

    def _ranked(
        self, cells: Sequence[Mapping[str, Any]], scores: Sequence[float | None]
    ) -> list[dict[str, Any]]:
        threshold = float(np.float32(self.threshold))  # scores were stored as float32
        found = [
            {**cell, "relevance": score}
            if score is None or score >= threshold
            else {**cell, "text": "", "reason": "irrelevant", "relevance": score}
            for cell, score in zip(cells, scores, strict=True)
        ]
        return sorted(found, key=lambda one: -(one["relevance"] or 0.0))
