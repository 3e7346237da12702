"""Classes of your own that exclude each other, by CLIP or SigLIP: which of them an image is.

By default kinds of pictures. Scores are those of the library's pipeline
"zero-shot-image-classification" for models that were trained with a softmax, like CLIP.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field, field_validator

from experts.base import Context, ExpertConfig, Hardware
from experts.checkpoint import checkpoint_revision
from experts.scores import ranked, softmax
from experts.tagging.clip import ClipModel
from experts.tagging.vocabulary import check_templates, embed_labels
from experts.torch_models import TransformersConfig
from fusion_pipeline.dataset.evidence import EvidenceKind, Tag
from fusion_pipeline.dataset.images import RGB

KINDS = (
    "photo",
    "painting or drawing",
    "poster or graphic design",
    "infographic or chart",
    "screenshot",
    "scanned document",
)


class ClipClassesConfig(TransformersConfig):
    """`model`: a transformers checkpoint of CLIP, SigLIP or SigLIP 2."""

    classes: tuple[str, ...] = Field(default=KINDS, min_length=2)
    """In words that a caption would use."""
    templates: tuple[str, ...] = Field(default=("this is a {label}.", "a {label}."), min_length=1)
    """Texts that a class is put into; of several, the mean of their embeddings is used."""

    _have_a_place = field_validator("templates")(check_templates)

    @field_validator("classes")
    @classmethod
    def _differ(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not name.strip() or value.count(name) > 1:
                raise ValueError(f"{name!r} is {'there twice' if name.strip() else 'no class'}")
        return value


class ClipClasses:
    """All classes, best first; their scores sum to 1 whatever the model was trained with."""

    kind: ClassVar[EvidenceKind] = EvidenceKind.SCORES
    version: ClassVar[int] = 1
    uses_tags: ClassVar[bool] = False
    Config: ClassVar[type[ExpertConfig]] = ClipClassesConfig

    @classmethod
    def revision(cls, config: ClipClassesConfig) -> str:
        return checkpoint_revision(config)

    def __init__(self, config: ClipClassesConfig, hardware: Hardware) -> None:
        self._classes = config.classes
        self._model = ClipModel(config, hardware)
        self._texts = embed_labels(self._model, config.classes, config.templates)
        self.batch_size = config.batch_size
        self.min_short_edge: int | None = self._model.short_edge

    def __call__(self, images: Sequence[RGB], context: Sequence[Context]) -> list[list[Tag]]:
        starts = range(0, len(images), self.batch_size)
        batches = (images[start : start + self.batch_size] for start in starts)
        seen = (image for batch in batches for image in self._model.embed_images(batch))
        # One by one: a product with several columns rounds in another way.
        logits = (self._model.scale * np.einsum("td,d->t", self._texts, image) for image in seen)
        return [ranked(self._classes, softmax(row), len(self._classes)) for row in logits]
