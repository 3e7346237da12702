"""NanoDet: closed-set detection of the 80 COCO classes.

Source: github.com/RangiLyu/nanodet (Apache-2.0); box regression by distributions is that of
generalised focal loss (Li et al., arXiv 2006.04388). Licence of the weights:
`experts/assets/NOTICE.txt`.
"""

from collections.abc import Sequence
from typing import ClassVar

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from experts.base import ASSETS, Context, ExpertConfig, Hardware, file_revision
from experts.onnx import session
from fusion_pipeline.dataset.evidence import Box, DetectedObject, EvidenceKind
from fusion_pipeline.dataset.images import RGB

Float32 = npt.NDArray[np.float32]

WEIGHTS = ASSETS / "nanodet_coco80.onnx"
LABELS = ASSETS / "coco80_labels.txt"
SIZE = 416
STRIDES = (8, 16, 32)
BINS = np.arange(11, dtype=np.float32)
MEAN_BGR = np.array([103.53, 116.28, 123.675])
STD_BGR = np.array([57.375, 57.12, 58.395])


def _cells() -> tuple[Float32, Float32]:
    """Centre [3549, 2] (x, y) and stride [3549, 1] of every cell, in pixels of the input."""
    centres, strides = [], []
    for stride in STRIDES:
        axis = (np.arange(SIZE // stride, dtype=np.float32) + 0.5) * stride
        x, y = np.meshgrid(axis, axis)
        centres.append(np.stack([x.ravel(), y.ravel()], axis=1))
        strides.append(np.full((x.size, 1), stride, np.float32))
    return np.concatenate(centres), np.concatenate(strides)


CENTRES, CELL_STRIDES = _cells()


def preprocess(image: RGB) -> Float32:
    """float32 [1, 3, 416, 416]: stretched (the model was trained so), BGR, normalised."""
    height, width = image.shape[:2]
    # Bilinear skips pixels when it shrinks by more than two.
    mode = cv2.INTER_AREA if min(height, width) > 2 * SIZE else cv2.INTER_LINEAR
    small = cv2.cvtColor(cv2.resize(image, (SIZE, SIZE), interpolation=mode), cv2.COLOR_RGB2BGR)
    blob: Float32 = cv2.dnn.blobFromImage(small, mean=MEAN_BGR.tolist())
    blob *= (1 / STD_BGR).astype(np.float32)[None, :, None, None]
    return blob


def decode_boxes(distributions: Float32, cells: npt.NDArray[np.intp]) -> Float32:
    """Corners [n, 4] (x1, y1, x2, y2) as fractions of the frame, clipped to it.

    `distributions` [n, 44] are logits over 11 bins for each of the four sides (left, top, right,
    bottom); a side's distance from the cell's centre is their expectation in strides.
    """
    bins = distributions.reshape(-1, 4, len(BINS))
    weights = np.exp(bins - bins.max(axis=2, keepdims=True))
    distances = (weights @ BINS) / weights.sum(axis=2) * CELL_STRIDES[cells]
    corners = np.concatenate(
        [CENTRES[cells] - distances[:, :2], CENTRES[cells] + distances[:, 2:]], axis=1
    )
    boxes: Float32 = (corners / SIZE).clip(0, 1)
    return boxes


class NanoDetConfig(ExpertConfig):
    score_floor: float = Field(default=0.15, ge=0.01, le=1)
    """Objects of at least this score are told."""
    nms_iou: float = Field(default=0.5, gt=0, le=1)
    """Overlap above which the lesser of two boxes of a class goes."""
    max_objects: int = Field(default=100, ge=1, le=1000)
    """Most objects an image, the best ones."""


class NanoDet:
    """Boxes of COCO classes, best first.

    Good on people, vehicles, cups and animals at normal scale; extreme close-ups are named
    wrongly (a cat's face becomes a person). Scores over about 0.35 are useful.
    """

    kind: ClassVar[EvidenceKind] = EvidenceKind.OBJECTS
    version: ClassVar[int] = 1
    uses_tags: ClassVar[bool] = False
    batch_size: int = 1
    min_short_edge: ClassVar[int | None] = SIZE
    Config: ClassVar[type[ExpertConfig]] = NanoDetConfig
    labels: ClassVar[tuple[str, ...]] = tuple(LABELS.read_text(encoding="utf-8").splitlines())

    @classmethod
    def revision(cls, config: NanoDetConfig) -> str:
        return file_revision(WEIGHTS)

    def __init__(self, config: NanoDetConfig, hardware: Hardware) -> None:
        cv2.setNumThreads(hardware.threads)
        self._config = config
        self._session = session(WEIGHTS, hardware)
        self._input = self._session.get_inputs()[0].name

    def __call__(
        self, images: Sequence[RGB], context: Sequence[Context]
    ) -> list[list[DetectedObject]]:
        return [self._detect(image) for image in images]

    def _detect(self, image: RGB) -> list[DetectedObject]:
        outputs = self._session.run(None, {self._input: preprocess(image)})
        scores = np.concatenate(outputs[:3], axis=1)[0]
        cells, classes = np.nonzero(scores >= self._config.score_floor)
        confidences = scores[cells, classes]
        boxes = decode_boxes(np.concatenate(outputs[3:], axis=1)[0][cells], cells)
        return [
            DetectedObject(self.labels[classes[i]], float(confidences[i]), _box(boxes[i]))
            for i in self._suppress(boxes, confidences, classes)
        ]

    def _suppress(
        self, boxes: Float32, scores: Float32, classes: npt.NDArray[np.intp]
    ) -> list[int]:
        """Indices that non-maximum suppression inside each class keeps, best first."""
        sizes = boxes[:, 2:] - boxes[:, :2]
        visible = np.flatnonzero((sizes > 0).all(axis=1))
        kept = cv2.dnn.NMSBoxesBatched(
            np.concatenate([boxes[:, :2], sizes], axis=1)[visible].astype(np.float64).tolist(),
            scores[visible].tolist(),
            classes[visible].tolist(),
            0.0,
            self._config.nms_iou,
        )
        # Without candidates OpenCV gives an empty tuple, which as an index would mean "all".
        survivors = visible[np.asarray(kept, np.intp)]
        order = np.argsort(-scores[survivors], kind="stable")
        best: list[int] = survivors[order][: self._config.max_objects].tolist()
        return best


def _box(corners: Float32) -> Box:
    x1, y1, x2, y2 = corners.tolist()
    return x1, y1, x2, y2
