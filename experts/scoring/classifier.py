"""Any image classifier of transformers, as scores: NSFW, kind of picture, watermark, ...

Scores are those of the library's pipeline "image-classification". They are for choosing images, and
never part of a prompt.
"""

from collections.abc import Sequence
from typing import ClassVar

from PIL import Image
from pydantic import Field

from experts.base import Context, ExpertConfig, Hardware
from experts.checkpoint import CheckpointError, checkpoint_folder, checkpoint_revision
from experts.scores import Floats, ranked
from experts.tagging.clip import DETAIL, middle
from experts.torch_models import TransformersConfig, load_model
from fusion_pipeline.dataset.evidence import EvidenceKind, Tag
from fusion_pipeline.dataset.images import RGB


class ClassifierConfig(TransformersConfig):
    """`model`: a checkpoint for image classification, such as `Falconsai/nsfw_image_detection`."""

    labels: tuple[str, ...] = ()
    """Classes that are told, by the checkpoint's names; none: all, best first."""
    max_scores: int = Field(default=1000, ge=1, le=100_000)
    """Most classes an image, the best ones."""


class Classifier:
    """Classes, best first. Scores of exclusive classes sum to 1; others each have their own."""

    kind: ClassVar[EvidenceKind] = EvidenceKind.SCORES
    version: ClassVar[int] = 1
    uses_tags: ClassVar[bool] = False
    Config: ClassVar[type[ExpertConfig]] = ClassifierConfig

    @classmethod
    def revision(cls, config: ClassifierConfig) -> str:
        return checkpoint_revision(config)

    def __init__(self, config: ClassifierConfig, hardware: Hardware) -> None:
        """Raises CheckpointError, also for labels that the checkpoint does not have."""
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        folder = checkpoint_folder(config)
        local = {"local_files_only": True, "trust_remote_code": False}
        self._config = config
        self._processor = AutoImageProcessor.from_pretrained(folder, **local)
        self._model = load_model(AutoModelForImageClassification, folder, config, hardware)
        names: dict[int, str] = self._model.config.id2label
        self._labels = [names[number] for number in sorted(names)]
        for label in config.labels:
            if label not in self._labels:
                raise CheckpointError(
                    f"labels: {config.model} has no class {label!r}; it has "
                    f"{', '.join(self._labels[:20])}"
                )
        if self._model.config.problem_type == "regression":
            raise CheckpointError(
                f"{config.model}: a model of regression, whose numbers are no scores of 0 to 1"
            )
        self.batch_size = config.batch_size
        # Timm's processor has no size, and its images are decoded in full.
        size = dict(getattr(self._processor, "size", None) or {})
        self.min_short_edge: int | None = DETAIL * max(size.values()) if size else None
        self._crops = "shortest_edge" in size

    def __call__(self, images: Sequence[RGB], context: Sequence[Context]) -> list[list[Tag]]:
        starts = range(0, len(images), self.batch_size)
        batches = (images[start : start + self.batch_size] for start in starts)
        return [self._told(row) for batch in batches for row in self._scores(batch)]

    def _scores(self, images: Sequence[RGB]) -> Floats:
        import torch

        pictures = [Image.fromarray(middle(i) if self._crops else i) for i in images]
        inputs = self._processor(images=pictures, return_tensors="pt")
        with torch.inference_mode():
            inputs = inputs.to(self._model.device, dtype=self._model.dtype)
            logits = self._model(**inputs).logits.float()
        several = self._model.config.problem_type == "multi_label_classification"
        if several or len(self._labels) == 1:
            found: Floats = logits.sigmoid().cpu().numpy()
        else:
            found = logits.softmax(-1).cpu().numpy()
        return found

    def _told(self, scores: Floats) -> list[Tag]:
        wanted = self._config.labels or self._labels
        told = [tag for tag in ranked(self._labels, scores, len(scores)) if tag.label in wanted]
        return told[: self._config.max_scores]
