"""Tiled inference (slicing: Akyon et al., arXiv 2202.06934): small things in large images.

A detector sees an image scaled to its input, some hundred pixels wide; what is small in a large one
is gone by then. So it is asked for overlapping tiles, too, and what it says is put together.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from pydantic import Field

from experts.base import Context, Expert
from fusion_pipeline.config_model import ConfigModel
from fusion_pipeline.dataset.evidence import Box, DetectedObject, Evidence
from fusion_pipeline.dataset.images import RGB

VERSION = 1
"""Raised when the same tiles give another answer."""

_LARGER = 1.25
"""An image whose long edge is less than this many tiles is looked at as a whole alone."""
_BORDER = 0.01
"""Distance from a tile's edge, as a share of it, under which a thing may go on beyond it."""


class TilesConfig(ConfigModel):
    edge: int = Field(ge=64)
    """Pixels of a tile's edges in the stored image; one to two times the detector's input."""
    overlap: float = Field(default=0.25, ge=0, le=0.5)
    """Share of a tile that its neighbour sees as well: things up to this size are whole in one."""
    most: int = Field(default=36, ge=2)
    """Tiles an image; a larger image gets larger tiles."""
    same_iou: float = Field(default=0.5, gt=0, le=1)
    """Overlap from which boxes of one label from different tiles are one thing."""


@dataclass(frozen=True, slots=True)
class _Tile:
    """Of an image, in pixels; its edges inside of the image cut things off."""

    x: int
    y: int
    width: int
    height: int


def tiles_of(width: int, height: int, config: TilesConfig) -> list[_Tile]:
    """Tiles that cover an image of so many pixels, row by row; none for one that needs none."""
    edge = config.edge
    if max(width, height) < _LARGER * edge:
        return []
    while True:
        columns, rows = _count(width, edge, config), _count(height, edge, config)
        if columns * rows == 1:
            return []  # the whole image again
        if columns * rows <= config.most:
            break
        edge = math.ceil(edge * 1.1)
    return [
        _Tile(x, y, min(edge, width), min(edge, height))
        for y in _starts(height, edge, rows)
        for x in _starts(width, edge, columns)
    ]


def _count(length: int, edge: int, config: TilesConfig) -> int:
    return max(1, math.ceil((length - edge) / (edge * (1 - config.overlap)) + 1))


def _starts(length: int, edge: int, count: int) -> Iterator[int]:
    for number in range(count):
        yield round(number * (length - edge) / max(1, count - 1)) if length > edge else 0


class Tiled:
    """Looks with a detector at images and at their tiles."""

    def __init__(self, detector: Expert, config: TilesConfig) -> None:
        self._detector = detector
        self._config = config

    def min_short_edge(self, context: Context) -> int | None:
        """Of the image as it is to be decoded: in full where it has tiles."""
        has_tiles = tiles_of(context.width, context.height, self._config)
        return None if has_tiles else self._detector.min_short_edge

    def __call__(
        self, image: RGB, context: Context, batch: int, tick: Callable[[], None]
    ) -> Sequence[Evidence]:
        """One answer. The detector gets up to `batch` tiles at a time; `tick` is called after each
        batch, since an image may take as long as many."""
        width, height = context.width, context.height
        tiles = tiles_of(width, height, self._config)
        if not tiles:
            return self._detector([image], [context])
        parts = [_Tile(0, 0, width, height), *tiles]
        found: list[DetectedObject] = []
        for start in range(0, len(parts), batch):
            seen = parts[start : start + batch]
            views = [image[t.y : t.y + t.height, t.x : t.x + t.width] for t in seen]
            contexts = [replace(context, width=t.width, height=t.height) for t in seen]
            for tile, objects in zip(seen, self._detector(views, contexts), strict=True):
                found += _in_image(tile, objects, width, height)
            tick()
        return [_once(found, self._config.same_iou)]


def _in_image(tile: _Tile, objects: Evidence, width: int, height: int) -> Iterator[DetectedObject]:
    """What a tile shows whole, in shares of the image."""
    for found in objects:
        if isinstance(found, DetectedObject) and not _is_cut(found.box, tile, width, height):
            x1, y1, x2, y2 = found.box
            box = (
                (tile.x + x1 * tile.width) / width,
                (tile.y + y1 * tile.height) / height,
                (tile.x + x2 * tile.width) / width,
                (tile.y + y2 * tile.height) / height,
            )
            yield replace(found, box=box)


def _is_cut(box: Box, tile: _Tile, width: int, height: int) -> bool:
    """Whether it may go on beyond the tile: another one, or the whole image, sees more of it."""
    x1, y1, x2, y2 = box
    return (
        (x1 <= _BORDER and tile.x > 0)
        or (y1 <= _BORDER and tile.y > 0)
        or (x2 >= 1 - _BORDER and tile.x + tile.width < width)
        or (y2 >= 1 - _BORDER and tile.y + tile.height < height)
    )


def _once(found: Sequence[DetectedObject], same_iou: float) -> list[DetectedObject]:
    """Best first; of boxes of one label that are one thing, the best.

    Raises ValueError for boxes that are no numbers: of those nothing can be said.
    """
    boxes = np.array([one.box for one in found], np.float64).reshape(-1, 4)
    scores = [one.score for one in found]
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise ValueError("not_finite: a score or coordinate is no number")
    labels = sorted({one.label for one in found})
    kept = cv2.dnn.NMSBoxesBatched(
        np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist(),
        scores,
        [labels.index(one.label) for one in found],
        0.0,
        same_iou,
    )
    return sorted((found[i] for i in kept), key=lambda o: (-o.score, o.label, o.box))
