"""Pictures inside the page: scaled JPEGs as data URIs, and the marks that are drawn over them."""

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from PIL import Image

from fusion_pipeline.dataset.evidence import Box
from fusion_pipeline.dataset.images import decode
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.prompts.hints import Hints

_JPEG_QUALITY = 80


@dataclass(frozen=True)
class Picture:
    uri: Markup
    """data:image/jpeg;base64,..."""
    width: int
    height: int


def read_picture(
    dataset: Dataset, shard: int, sample: Mapping[str, Any], long_side: int
) -> Picture:
    """The upright image of a row of `samples`, its long side at most so many pixels.

    Raises DecodeError; ingest decoded every sample once, so only a damaged shard does.
    """
    data = dataset.read_image(shard, sample["image_offset"], sample["image_bytes"])
    width, height = sample["width"], sample["height"]
    short_side = math.ceil(long_side * min(width, height) / max(width, height))
    # The limit of pixels was the source's to set: this image has passed it.
    pixels = decode(data, min_short_edge=max(short_side, 1), max_pixels=width * height)
    image = Image.fromarray(pixels)
    image.thumbnail((long_side, long_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=_JPEG_QUALITY)
    encoded = base64.b64encode(sink.getvalue()).decode()
    return Picture(Markup(f"data:image/jpeg;base64,{encoded}"), *image.size)


@dataclass(frozen=True)
class Mark:
    """A region over a picture: a polygon in the picture's pixels, and where its label goes."""

    kind: str
    """objects or text."""
    label: str
    score: float
    points: str
    """Of an SVG polygon."""
    anchor: str
    """CSS position of the label, in percent of the picture."""


def marks_of(hints: Hints, width: int, height: int) -> list[Mark]:
    """Objects first, then text lines; a text line's label is its place in reading order, from 1."""
    regions: list[tuple[str, str, float, tuple[float, ...], Box]] = []
    for found in hints.objects:
        x1, y1, x2, y2 = found.box
        corners = (x1, y1, x2, y1, x2, y2, x1, y2)
        regions.append(("objects", found.label, found.score, corners, found.box))
    for place, line in enumerate(hints.text, start=1):
        regions.append(("text", str(place), line.score, line.quad, line.box))
    marks = []
    taken: list[tuple[float, float]] = []
    for kind, label, score, corners, box in regions:
        points = _points(corners, width, height)
        marks.append(Mark(kind, label, score, points, _anchor(box, width, height, taken)))
    return marks


def _points(corners: tuple[float, ...], width: int, height: int) -> str:
    pairs = zip(corners[0::2], corners[1::2], strict=True)
    return " ".join(f"{x * width:.1f},{y * height:.1f}" for x, y in pairs)


_LABEL_HEIGHT = 22
_LABEL_WIDTH = 60
"""Room that a label needs, in pixels of the picture."""


def _anchor(box: Box, width: int, height: int, taken: list[tuple[float, float]]) -> str:
    """Where a label goes so that it stays in the picture: at the right end of a box that lies at
    the right, inside a box that reaches the top. Of the places left, the first that is free."""
    x1, y1, x2, y2 = box
    left, right = (f"left:{x1:.2%}", x1), (f"right:{1 - x2:.2%}", x2)
    across = (left, right) if x1 <= 0.6 else (right, left)
    above = (f"bottom:{1 - y1:.2%}", y1 - _LABEL_HEIGHT / height)
    inside, below = (f"top:{y1:.2%}", y1), (f"bottom:{1 - y2:.2%}", y2 - _LABEL_HEIGHT / height)
    down = (above, inside, below) if above[1] >= 0 else (inside, below)
    places = [(f"{h};{v}", (x, y)) for v, y in down for h, x in across[: 1 if x1 > 0.6 else 2]]
    for css, (x, y) in places:
        if all(
            abs(x - a) * width > _LABEL_WIDTH or abs(y - b) * height > _LABEL_HEIGHT / 2
            for a, b in taken
        ):
            taken.append((x, y))
            return css
    return places[0][0]
