"""Faces, or whatever a detector finds, made unrecognisable in exported images."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from fusion_pipeline.dataset.evidence import Box, DetectedObject
from fusion_pipeline.dataset.images import RGB

BLUR = "blur"
"""Folder of the tables of detectors that are asked for this alone."""
_MARGIN = 0.15
"""Of a box's sides, on each of them: hair and ears tell, too."""
_BLOCKS = 5
"""Averages that are left along each side; a face is told from about 16 on."""


@dataclass(frozen=True)
class Blur:
    """What is not to be recognised in exported images."""

    tables: tuple[str, ...]
    """Of detectors, such as `blur/centerface`."""
    labels: tuple[str, ...]
    """None: all that they find."""
    score: float
    """Of a box, 0..1, from which it is blurred."""

    def hides(self, found: DetectedObject) -> bool:
        named = not self.labels or found.label in self.labels
        return named and round(found.score, 4) >= self.score


def blur(image: RGB, boxes: Sequence[Box]) -> RGB:
    """A copy in which each box is a smooth wash of 5 x 5 averages. Nothing can be won back from it,
    as from a Gaussian blur."""
    height, width = image.shape[:2]
    blurred = image.copy()
    for x1, y1, x2, y2 in boxes:
        across, down = _MARGIN * (x2 - x1), _MARGIN * (y2 - y1)
        left, right = int(max(0, x1 - across) * width), int(np.ceil(min(1, x2 + across) * width))
        top, bottom = int(max(0, y1 - down) * height), int(np.ceil(min(1, y2 + down) * height))
        region = blurred[top:bottom, left:right]
        if region.size:
            blocks = cv2.resize(region, (_BLOCKS, _BLOCKS), interpolation=cv2.INTER_AREA)
            size = region.shape[1::-1]
            blurred[top:bottom, left:right] = cv2.resize(blocks, size)
    return blurred
