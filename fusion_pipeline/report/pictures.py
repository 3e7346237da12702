"""Pictures inside the page: scaled JPEGs as data URIs, and the marks that are drawn over them."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from PIL import Image

from fusion_pipeline.dataset.evidence import Box, TextLine
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
    style: str
    """CSS classes: the kind, and of an object who found it."""
    label: str
    score: float
    points: str
    """Of an SVG polygon."""
    anchor: str
    """CSS position of the label, in percent of the picture."""


def marks_of(
    hints: Hints,
    width: int,
    height: int,
    styles: Mapping[tuple[str, Box], str] | None = None,
    unread: Sequence[TextLine] = (),
) -> list[Mark]:
    """Objects first, then text lines; a text line's label is its place in reading order, from 1,
    or, of lines that nobody could read, their script. `styles`: CSS class of an object, by label
    and box."""
    marks: list[Mark] = []
    taken: list[tuple[float, float]] = []
    for found in hints.objects:
        x1, y1, x2, y2 = found.box
        points = _points((x1, y1, x2, y1, x2, y2, x1, y2), width, height)
        anchor = _object_anchor(found.box, width, height, taken)
        style = f"objects {(styles or {}).get((found.label, found.box), '')}".rstrip()
        marks.append(Mark("objects", style, found.label, found.score, points, anchor))
    lines = [(str(place), "text", line) for place, line in enumerate(hints.text, start=1)]
    lines += [(line.script or "?", "text unread", line) for line in unread]
    for label, style, line in lines:
        points, anchor = _points(line.quad, width, height), _text_anchor(line, width, height)
        marks.append(Mark("text", style, label, line.score, points, anchor))
    return marks


def _points(corners: tuple[float, ...], width: int, height: int) -> str:
    pairs = zip(corners[0::2], corners[1::2], strict=True)
    return " ".join(f"{x * width:.1f},{y * height:.1f}" for x, y in pairs)


_LABEL_HEIGHT = 22
_LABEL_WIDTH = 60
"""Room that an object's label needs, in pixels of the picture."""


def _text_anchor(line: TextLine, width: int, height: int) -> str:
    """Before the line, where it hides no other one, or inside it at the picture's left edge."""
    x, y = line.quad[:2]
    across = f"right:{1 - x:.2%}" if x * width >= _LABEL_HEIGHT else f"left:{x:.2%}"
    return f"{across};top:{min(y, 1 - _LABEL_HEIGHT / height):.2%}"


def _object_anchor(box: Box, width: int, height: int, taken: list[tuple[float, float]]) -> str:
    """Where a label goes so that it stays in the picture: at an end of the box from which its
    width (at most 40 %, by the style) fits, and inside a box that reaches the top. Of these places
    the first that is free."""
    x1, y1, x2, y2 = box
    across = [(f"left:{x1:.2%}", x1)] if x1 <= 0.6 else []
    if x2 >= 0.4:
        across.append((f"right:{1 - x2:.2%}", x2 - _LABEL_WIDTH / width))
    above = (f"bottom:{1 - y1:.2%}", y1 - _LABEL_HEIGHT / height)
    inside, below = (f"top:{y1:.2%}", y1), (f"bottom:{1 - y2:.2%}", y2 - _LABEL_HEIGHT / height)
    down = (above, inside, below) if above[1] >= 0 else (inside, below)
    places = [(f"{h};{v}", (x, y)) for v, y in down for h, x in across]
    for css, (x, y) in places:
        if all(
            abs(x - a) * width > _LABEL_WIDTH or abs(y - b) * height > _LABEL_HEIGHT / 2
            for a, b in taken
        ):
            taken.append((x, y))
            return css
    return places[0][0]
