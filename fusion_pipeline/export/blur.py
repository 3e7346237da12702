"""Faces, or whatever a detector finds, made unrecognisable in exported images."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain

import cv2
import numpy as np

from fusion_pipeline.dataset.evidence import Box, DetectedObject, objects_from
from fusion_pipeline.dataset.images import RGB
from fusion_pipeline.dataset.layout import Dataset

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
    """In any case; none: all that they find."""
    score: float
    """Of a box, 0..1, from which it is blurred."""

    def hides(self, found: DetectedObject) -> bool:
        named = not self.labels or _folded(found.label) in map(_folded, self.labels)
        return named and round(found.score, 4) >= self.score

    def boxes(self, dataset: Dataset, shard: int) -> dict[str, list[Box]]:
        """Of each image in which all detectors have looked, by key. Of others nobody knows."""
        looks = defaultdict[str, list[list[Box]]](list)
        for name in self.tables:
            for row in dataset.read_table(name, shard)[0].to_pylist():
                if row["status"] == "ok":
                    found = objects_from(row["objects"])
                    looks[row["key"]].append([one.box for one in found if self.hides(one)])
        complete = len(self.tables)
        return {key: [*chain(*found)] for key, found in looks.items() if len(found) == complete}

    def missing(self, dataset: Dataset, shards: Collection[int]) -> dict[str, int]:
        """Of each table, how many of these shards it lacks."""
        lacking = {name: len(set(shards) - dataset.shards_of(name)) for name in self.tables}
        return {name: count for name, count in lacking.items() if count}

    def idle_labels(self, dataset: Dataset) -> tuple[list[str], list[str]]:
        """The named labels that no box has, and those that boxes have. Reads the tables."""
        if not self.labels:
            return [], []
        tables = (table for name in self.tables for _, table in dataset.iterate(name))
        cells = (cell for table in tables for cell in table["objects"].to_pylist())
        there = {found.label for cell in cells for found in objects_from(cell)}
        folded = {_folded(label) for label in there}
        return [one for one in self.labels if _folded(one) not in folded], sorted(there)


def _folded(label: str) -> str:
    return label.strip().casefold()


def blur(image: RGB, boxes: Sequence[Box]) -> RGB:
    """A copy in which each box is a smooth blend of 5 x 5 averages: nothing else can be won back,
    as it can from a Gaussian blur."""
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
