"""OWLv2 (Minderer et al., arXiv 2306.09683) and OWL-ViT: open-set detection of an image's tags.

Image and text meet only in the last layer, so each image is embedded once however many queries it
has, and each query once for all images.
"""

from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, ClassVar

import cv2
from pydantic import Field, field_validator

from experts.base import Context, ExpertConfig, Hardware
from experts.checkpoint import CheckpointError, checkpoint_folder, checkpoint_revision
from experts.detection.queries import TagQueries, plain
from experts.detection.transformers_input import ImageInput, best_objects, on_cpu, stacked
from experts.torch_models import TransformersConfig, load_model
from fusion_pipeline.dataset.evidence import DetectedObject, EvidenceKind
from fusion_pipeline.dataset.images import RGB

_KNOWN_QUERIES = 20_000
"""Embeddings that are kept; 60 MB on the largest model."""


class Owlv2Config(TransformersConfig, TagQueries):
    score_floor: float = Field(default=0.1, ge=0.01, lt=1)
    """Objects score over it."""
    max_objects: int = Field(default=100, ge=1, le=1000)
    """Most objects an image, the best ones."""
    template: str = "a photo of a {label}"
    """The text of a query."""

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        if "{label}" not in value:
            raise ValueError("has no {label} in it, such as 'a photo of a {label}'")
        return value


class Owlv2:
    """Boxes of whatever the tags name, best first. One place may have several labels: a cat is
    found as "cat" and as "tabby"."""

    kind: ClassVar[EvidenceKind] = EvidenceKind.OBJECTS
    version: ClassVar[int] = 1
    uses_tags: ClassVar[bool] = True
    Config: ClassVar[type[ExpertConfig]] = Owlv2Config

    @classmethod
    def revision(cls, config: Owlv2Config) -> str:
        return checkpoint_revision(config)

    def __init__(self, config: Owlv2Config, hardware: Hardware) -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoTokenizer

        folder = checkpoint_folder(config)
        cv2.setNumThreads(hardware.threads)
        self._config = config
        self._processor = ImageInput(folder)
        self._tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        self._model = load_model(AutoModelForZeroShotObjectDetection, folder, config, hardware)
        kind = self._model.config.model_type
        if kind not in ("owlv2", "owlvit"):
            raise CheckpointError(f"{config.model}: a checkpoint of {kind}, not of OWLv2")
        self._pads = kind == "owlv2"
        self._embedded = lru_cache(_KNOWN_QUERIES)(self._embed)
        self.batch_size = config.batch_size
        self.min_short_edge: int | None = self._processor.short_edge

    def __call__(
        self, images: Sequence[RGB], context: Sequence[Context]
    ) -> list[list[DetectedObject]]:
        import torch

        wanted = [self._config.labels(c.tags) for c in context]
        found: list[list[DetectedObject]] = [[] for _ in images]
        asked = [row for row, labels in enumerate(wanted) if labels]
        with torch.inference_mode():
            for start in range(0, len(asked), self.batch_size):
                self._look(asked[start : start + self.batch_size], images, wanted, found)
        return found

    def _look(
        self,
        rows: list[int],
        images: Sequence[RGB],
        wanted: Sequence[Sequence[str]],
        found: list[list[DetectedObject]],
    ) -> None:
        """Writes into `found` what a batch of rows shows."""
        pictures = [self._shrunk(images[row]) for row in rows]
        for places, batch in stacked([self._processor(p) for p in pictures], self._model):
            maps = self._model.image_embedder(**batch)[0]
            features = maps.flatten(1, 2)
            boxes = self._model.box_predictor(features, maps)
            for place, own_features, own_boxes in zip(places, features, boxes, strict=True):
                row, size = rows[place], pictures[place].shape[:2]
                found[row] = self._matches(own_features, own_boxes, wanted[row], size)

    def _matches(
        self, features: Any, boxes: Any, labels: Sequence[str], size: tuple[int, ...]
    ) -> list[DetectedObject]:
        """Of one image: `features` [patches, width], `boxes` [patches, 4]."""
        import torch

        queries = torch.stack([self._embedded(plain(label)) for label in labels])
        logits = self._model.class_predictor(features[None], queries[None])[0][0]
        answers = on_cpu(SimpleNamespace(logits=logits.T[:, :, None], pred_boxes=boxes))
        # To the library each query is an image of one class, with the same boxes.
        answers.pred_boxes = answers.pred_boxes.expand(len(labels), -1, -1)
        sizes = [size] * len(labels)
        results = self._processor.post_process(answers, self._config.score_floor, sizes)
        names = [n for n, r in zip(labels, results, strict=True) for _ in range(len(r["scores"]))]
        scores = torch.cat([result["scores"] for result in results])
        places = torch.cat([result["boxes"] for result in results])
        return best_objects(names, scores, places, size, self._config.max_objects)

    def _embed(self, label: str) -> Any:
        """Embedding [width] of a plain label, alone: no other query can change its last bits."""
        tokens = self._tokenizer(
            self._config.template.replace("{label}", label),
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._model.device)
        embedding = self._model.base_model.get_text_features(**tokens).pooler_output[0]
        return embedding / embedding.norm()

    def _shrunk(self, image: RGB) -> RGB:
        """An image much larger than OWLv2's input, made smaller by a whole factor: the library's
        processor blurs all pixels first, with 4 GB of memory for 20 megapixels."""
        edge = self._processor.short_edge
        factor = max(image.shape[:2]) // (2 * edge) if self._pads and edge else 1
        if factor < 2:
            return image
        height, width = (max(1, round(side / factor)) for side in image.shape[:2])
        small: RGB = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
        return small
