"""CenterFace (Xu et al., arXiv 1911.03599): where faces are, not whose.

Source: github.com/Star-Clouds/CenterFace (MIT); of the weights see `experts/assets/NOTICE.txt`.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from experts.base import ASSETS, Context, ExpertConfig, Hardware, file_revision
from experts.onnx import session
from fusion_pipeline.dataset.evidence import DetectedObject, EvidenceKind
from fusion_pipeline.dataset.images import RGB

Float32 = npt.NDArray[np.float32]

WEIGHTS = ASSETS / "centerface.onnx"
GRID = 32
"""Sides of the input are multiples of this."""
STRIDE = 4
"""Pixels of the input for a cell of the outputs."""
MIN_SIDE = 4
"""Smallest side of a face in pixels of the input."""


class CenterFaceConfig(ExpertConfig):
    score_floor: float = Field(default=0.3, ge=0.05, le=1)
    """Objects of at least this score are told."""
    long_side: int = Field(default=768, ge=GRID, le=4096)
    """Pixels of the input's long side; of faces under about 10 of them some are missed."""
    nms_iou: float = Field(default=0.3, gt=0, le=1)
    """Overlap above which the lesser of two faces goes."""
    max_objects: int = Field(default=300, ge=1, le=10_000)
    """Most objects an image, the best ones."""


class CenterFace:
    """Boxes of faces, labelled `face`, best first."""

    kind: ClassVar[EvidenceKind] = EvidenceKind.OBJECTS
    version: ClassVar[int] = 1
    uses_tags: ClassVar[bool] = False
    labels: ClassVar[tuple[str, ...]] = ("face",)
    batch_size: int = 1
    Config: ClassVar[type[ExpertConfig]] = CenterFaceConfig

    @classmethod
    def revision(cls, config: CenterFaceConfig) -> str:
        return file_revision(WEIGHTS)

    def __init__(self, config: CenterFaceConfig, hardware: Hardware) -> None:
        cv2.setNumThreads(hardware.threads)
        self._config = config
        self._session = session(WEIGHTS, hardware)
        self.min_short_edge: int | None = config.long_side

    def __call__(
        self, images: Sequence[RGB], context: Sequence[Context]
    ) -> list[list[DetectedObject]]:
        return [self._detect(image) for image in images]

    def _detect(self, image: RGB) -> list[DetectedObject]:
        blob = preprocess(image, self._config.long_side)
        names = ["heatmap", "scale", "offset"]
        heat, scale, offset = (out[0] for out in self._session.run(names, {"image": blob}))
        rows, columns = np.nonzero(heat[0] >= self._config.score_floor)
        scores = heat[0, rows, columns]
        # Outputs tell rows before columns: heights before widths.
        sizes = np.exp(scale[::-1, rows, columns].T) * STRIDE
        cells = np.stack([columns, rows], axis=1)
        centres = (cells + offset[::-1, rows, columns].T + 0.5) * STRIDE
        boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], axis=1)
        height, width = blob.shape[2:]
        boxes = (boxes / (width, height, width, height)).clip(0, 1)
        return self._told(boxes, scores, MIN_SIDE / np.array([width, height]))

    def _told(
        self, boxes: Float32, scores: Float32, smallest: npt.NDArray[np.float64]
    ) -> list[DetectedObject]:
        visible = np.flatnonzero((boxes[:, 2:] - boxes[:, :2] >= smallest).all(axis=1))
        corners = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)[visible]
        kept = cv2.dnn.NMSBoxes(
            corners.astype(np.float64).tolist(), scores[visible].tolist(), 0.0, self._config.nms_iou
        )
        best = visible[np.asarray(kept, np.intp)]
        best = best[np.argsort(-scores[best], kind="stable")][: self._config.max_objects]
        return [DetectedObject("face", min(1.0, float(scores[i])), _box(boxes[i])) for i in best]


def preprocess(image: RGB, long_side: int) -> Float32:
    """float32 [1, 3, height, width], RGB, 0..255: scaled down to about the long side, and stretched
    to the next multiples of 32."""
    scale = min(1.0, long_side / max(image.shape[:2]))
    height, width = (math.ceil(side * scale / GRID) * GRID for side in image.shape[:2])
    mode = cv2.INTER_AREA if scale < 0.5 else cv2.INTER_LINEAR
    small = cv2.resize(image, (width, height), interpolation=mode)
    blob: Float32 = cv2.dnn.blobFromImage(small)
    return blob


def _box(corners: Float32) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = corners.tolist()
    return x1, y1, x2, y2
