"""NSFWJS (github.com/infinitered/nsfwjs): how likely an image is pornographic.

A small model, the only one of its kind that comes with the package. Of its weights see
`experts/assets/NOTICE.txt`.
"""

from collections.abc import Sequence
from typing import ClassVar

import cv2
import numpy as np
import numpy.typing as npt

from experts.base import ASSETS, Context, ExpertConfig, Hardware, file_revision
from experts.onnx import session
from experts.scores import ranked
from fusion_pipeline.dataset.evidence import EvidenceKind, Tag
from fusion_pipeline.dataset.images import RGB

Float32 = npt.NDArray[np.float32]
Int = npt.NDArray[np.intp]

WEIGHTS = ASSETS / "nsfwjs.onnx"
LABELS = ("drawing", "hentai", "neutral", "porn", "sexy")
SIZE = 224


class NsfwJs:
    """The five classes of the model, best first; their scores sum to 1."""

    kind: ClassVar[EvidenceKind] = EvidenceKind.SCORES
    version: ClassVar[int] = 1
    uses_tags: ClassVar[bool] = False
    batch_size: int = 1
    min_short_edge: ClassVar[int | None] = None  # the library looks at single pixels
    Config: ClassVar[type[ExpertConfig]] = ExpertConfig

    @classmethod
    def revision(cls, config: ExpertConfig) -> str:
        return file_revision(WEIGHTS)

    def __init__(self, config: ExpertConfig, hardware: Hardware) -> None:
        cv2.setNumThreads(hardware.threads)
        self._session = session(WEIGHTS, hardware)

    def __call__(self, images: Sequence[RGB], context: Sequence[Context]) -> list[list[Tag]]:
        rows = [self._session.run(["scores"], {"image": preprocess(i)})[0][0] for i in images]
        return [ranked(LABELS, row, len(LABELS)) for row in rows]


def preprocess(image: RGB) -> Float32:
    """float32 [1, 3, 224, 224], 0..1: squeezed to a square by TensorFlow's bilinear rule with
    aligned corners, as the library does it. OpenCV has no such rule."""
    tops, bottoms, down = _neighbours(image.shape[0])
    lefts, rights, across = _neighbours(image.shape[1])
    corners = ((rows, columns) for rows in (tops, bottoms) for columns in (lefts, rights))
    a, b, c, d = (image[np.ix_(*corner)].astype(np.float32) for corner in corners)
    above, below = a + (b - a) * across[:, None], c + (d - c) * across[:, None]
    blob: Float32 = cv2.dnn.blobFromImage(above + (below - above) * down[:, None, None], 1 / 255)
    return blob


def _neighbours(side: int) -> tuple[Int, Int, Float32]:
    """Of each pixel of the result, along one side: the pixels before and after it, and its place
    between them, 0..1."""
    places = np.linspace(0, side - 1, SIZE, dtype=np.float32)
    before = places.astype(np.intp)
    return before, np.minimum(before + 1, side - 1), places - before
