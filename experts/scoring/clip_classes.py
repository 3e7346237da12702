"""Classes of your own that exclude each other, by CLIP or SigLIP: which of them an image is.

By default the kinds of pictures: photo, art, design, infographic, screenshot, document.
"""

from typing import ClassVar

from pydantic import Field

from experts.base import ASSETS, ExpertConfig
from experts.scores import Floats, softmax
from experts.tagging.clip import ClipConfig, ClipTagger
from experts.tagging.vocabulary import Float32
from fusion_pipeline.dataset.evidence import EvidenceKind

KINDS = ASSETS / "picture_kinds.txt"


class ClipClassesConfig(ClipConfig):
    """`vocabulary`: a text file with one class a line, in words that a caption would use."""

    vocabulary: str = Field(default=str(KINDS), min_length=1)
    templates: tuple[str, ...] = Field(default=("this is a {label}.", "a {label}."), min_length=1)
    score_floor: float = Field(default=0.0, ge=0, le=1)


class ClipClasses(ClipTagger):
    """Classes, best first; their scores sum to 1 whatever the model was trained with."""

    kind: ClassVar[EvidenceKind] = EvidenceKind.SCORES
    version: ClassVar[int] = 1
    Config: ClassVar[type[ExpertConfig]] = ClipClassesConfig

    def _scores(self, cosines: Float32) -> Floats:
        return softmax(self._model.scale * cosines)
