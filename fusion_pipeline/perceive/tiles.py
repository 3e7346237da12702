"""Tiled inference (slicing: Akyon et al., arXiv 2202.06934): small things in large images.

A detector sees an image scaled to its input, some hundred pixels wide; what is small in a large one
is gone by then. So it is asked for overlapping tiles, too, and what it says is put together.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pydantic import BaseModel, ConfigDict, Field

from experts.base import Context, Expert
from fusion_pipeline.dataset.evidence import DetectedObject, iou
from fusion_pipeline.dataset.images import RGB

_LARGER = 1.25
"""An image whose long edge is less than this many tiles is looked at as a whole alone."""
_BORDER = 0.01
"""Distance from a tile's edge, as a share of it, under which a thing may go on beyond it."""


class TilesConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

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
    while (columns := _count(width, edge, config)) * (rows := _count(height, edge, config)) > (
        config.most
    ):
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
    """A detector that looks at whole images and at their tiles (see `Expert`)."""

    min_short_edge: int | None = None

    def __init__(self, detector: Expert, config: TilesConfig) -> None:
        self._detector = detector
        self._config = config
        self.batch_size = detector.batch_size

    def __call__(
        self, images: Sequence[RGB], context: Sequence[Context]
    ) -> list[list[DetectedObject]]:
        # A call gets no more tiles than the worker thinks fit of images: after running out of
        # memory that is less than the batch size.
        size = len(images)
        return [self._look(i, c, size) for i, c in zip(images, context, strict=True)]

    def _look(self, image: RGB, context: Context, size: int) -> list[DetectedObject]:
        height, width = image.shape[:2]
        tiles = [_Tile(0, 0, width, height), *tiles_of(width, height, self._config)]
        parts = [image[t.y : t.y + t.height, t.x : t.x + t.width] for t in tiles]
        contexts = [replace(context, width=t.width, height=t.height) for t in tiles]
        seen = [
            objects
            for start in range(0, len(tiles), size)
            for objects in self._detector(
                parts[start : start + size], contexts[start : start + size]
            )
        ]
        found = [
            replace(o, box=_in_image(o, tile, width, height))
            for tile, objects in zip(tiles, seen, strict=True)
            for o in objects
            if isinstance(o, DetectedObject) and _is_whole(o, tile, width, height)
        ]
        return _once(found, self._config.same_iou)


def _is_whole(found: DetectedObject, tile: _Tile, width: int, height: int) -> bool:
    """Whether it ends inside of the tile, or with the image. Another tile, or the whole image, sees
    more of what does not."""
    x1, y1, x2, y2 = found.box
    return (
        (x1 > _BORDER or tile.x == 0)
        and (y1 > _BORDER or tile.y == 0)
        and (x2 < 1 - _BORDER or tile.x + tile.width == width)
        and (y2 < 1 - _BORDER or tile.y + tile.height == height)
    )


def _in_image(
    found: DetectedObject, tile: _Tile, width: int, height: int
) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = found.box
    return (
        (tile.x + x1 * tile.width) / width,
        (tile.y + y1 * tile.height) / height,
        (tile.x + x2 * tile.width) / width,
        (tile.y + y2 * tile.height) / height,
    )


def _once(found: Sequence[DetectedObject], same_iou: float) -> list[DetectedObject]:
    """Best first; of boxes of one label that are one thing, the best."""
    kept: list[DetectedObject] = []
    for one in sorted(found, key=lambda o: (-o.score, o.label, o.box)):
        if all(o.label != one.label or iou(o.box, one.box) < same_iou for o in kept):
            kept.append(one)
    return kept
