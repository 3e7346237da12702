"""Closed-set detection by any checkpoint that transformers' `AutoModelForObjectDetection` loads:
RT-DETR, RT-DETRv2, D-FINE, the DETR family, YOLOS and their kin.

Outputs are those of the library's own pipeline. Here are only the labels' names, fractions of the
frame and the care for odd shapes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

from pydantic import Field

from experts.base import Context, ExpertConfig, Hardware
from experts.checkpoint import CheckpointError, checkpoint_folder, checkpoint_revision
from experts.detection.transformers_input import ImageInput, best_objects, on_cpu, stacked
from experts.torch_models import TransformersConfig, load_model
from fusion_pipeline.dataset.evidence import DetectedObject, EvidenceKind
from fusion_pipeline.dataset.images import RGB

_NO_NAME = re.compile(r"|N/A|LABEL_\d+")
"""What stands in `id2label` for a class without a name; `LABEL_3` is the library's own filling."""


class TransformersDetectorConfig(TransformersConfig):
    score_floor: float = Field(default=0.15, ge=0.01, lt=1)
    """Objects score over it."""
    max_objects: int = Field(default=100, ge=1, le=1000)
    """Most objects an image, the best ones."""


class TransformersDetector:
    """Boxes of the checkpoint's own classes (COCO, Objects365, LVIS, ...), best first."""

    kind: ClassVar[EvidenceKind] = EvidenceKind.OBJECTS
    version: ClassVar[int] = 1
    uses_tags: ClassVar[bool] = False
    Config: ClassVar[type[ExpertConfig]] = TransformersDetectorConfig

    @classmethod
    def revision(cls, config: TransformersDetectorConfig) -> str:
        return checkpoint_revision(config)

    def __init__(self, config: TransformersDetectorConfig, hardware: Hardware) -> None:
        from transformers import AutoModelForObjectDetection

        folder = checkpoint_folder(config)
        self._config = config
        self._processor = ImageInput(folder)
        self._model = load_model(AutoModelForObjectDetection, folder, config, hardware)
        self._labels = class_names(self._model.config.id2label)
        if not self._labels:
            raise CheckpointError(f"{config.model}: id2label of its config.json names no class")
        self.batch_size = config.batch_size
        self.min_short_edge: int | None = self._processor.short_edge

    def __call__(
        self, images: Sequence[RGB], context: Sequence[Context]
    ) -> list[list[DetectedObject]]:
        import torch

        with torch.inference_mode():
            return [
                objects
                for start in range(0, len(images), self.batch_size)
                for objects in self._detect(images[start : start + self.batch_size])
            ]

    def _detect(self, images: Sequence[RGB]) -> list[list[DetectedObject]]:
        found: list[list[DetectedObject]] = [[] for _ in images]
        inputs = [self._processor(image) for image in images]
        for rows, batch in stacked(inputs, self._model):
            answers = on_cpu(self._model(**batch))
            sizes = [images[row].shape[:2] for row in rows]
            results = self._processor.post_process(answers, self._config.score_floor, sizes)
            for row, size, result in zip(rows, sizes, results, strict=True):
                labels = [self._labels.get(number, "") for number in result["labels"].tolist()]
                found[row] = best_objects(
                    labels, result["scores"], result["boxes"], size, self._config.max_objects
                )
        return found


def class_names(id2label: Mapping[int, str | None]) -> dict[int, str]:
    """Of a checkpoint's classes, those that have a name: COCO's numbers have gaps."""
    names = {number: (name or "").strip() for number, name in id2label.items()}
    return {number: name for number, name in names.items() if not _NO_NAME.fullmatch(name)}
