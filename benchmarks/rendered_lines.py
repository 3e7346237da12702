"""Pages of rendered text lines in known places: what reading is measured on and fitted to.

A page is drawn as a mask of ink, bent by one perspective map, laid over a ground, and worn by
shade, blur, noise and JPEG. Lengths are pixels of the finished page.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from fusion_pipeline.dataset.images import RGB

Colour = tuple[int, int, int]
Quad = npt.NDArray[np.float32]
"""float32 [4, 2]: corners in pixels."""
Mask = npt.NDArray[np.uint8]
"""uint8 [height, width]: ink, 0 to 255."""
Matrix = npt.NDArray[np.float64]
"""float64 [3, 3]: a perspective map."""

MARGIN = 24
"""Empty pixels around the lines of a page."""
PITCH = 1.15
"""From one character of a column to the next, in em."""
PLAIN = ImageFont.Layout.BASIC
"""Characters one after the other, as every machine can set them; no joined letters."""


@dataclass(frozen=True)
class Line:
    """A line to draw. A column is set in upright characters, one below the other."""

    text: str
    font: Path
    px: int
    """Em size."""
    script: str = ""
    face: int = 0
    """Index in a collection of fonts."""
    column: bool = False
    tracking: float = 0
    """More space after each character, em; then letters are not joined."""


@dataclass(frozen=True)
class Look:
    angle: float = 0
    """Degrees, counter-clockwise."""
    tilt: float = 0
    """Perspective: by how much of its length a side may differ from the opposite one."""
    stretch: float = 1
    """Width of the letters in times of the font's own."""
    ground: Colour = (255, 255, 255)
    ink: Colour = (0, 0, 0)
    photo: RGB | None = None
    """Shines through the ground by a third."""
    shadow: int = 0
    """Pixels that a dark copy of the ink is moved to the lower right."""
    shade: float = 0
    """How much darker one side of the page is, 0..1."""
    blur: float = 0
    """Standard deviation, pixels."""
    smear: int = 0
    """Length of a motion blur to the right, pixels."""
    noise: float = 0
    """Standard deviation, grey levels."""
    jpeg: int | None = None
    """Quality."""
    scale: float = 1
    """At most 1: the page is drawn larger by its inverse and shrunk, as a camera would."""


@dataclass(frozen=True)
class DrawnLine:
    line: Line
    quad: Quad
    """Around the ink, clockwise from the top left of the line as it was set."""


@dataclass(frozen=True)
class Page:
    image: RGB
    lines: list[DrawnLine]

    def line_at(self, quad: Quad) -> tuple[int, float] | None:
        """The line on which a found quad lies: its index, and how far along it the quad's middle
        stands, 0 at the start and 1 at the end of the drawn quad's upper side."""
        middle = quad.mean(axis=0)
        for index, drawn in enumerate(self.lines):
            origin, right, _, below = drawn.quad
            along = _share(middle - origin, right - origin)
            down = _share(middle - origin, below - origin)
            slack = 0.3 * drawn.line.px / max(1.0, float(np.linalg.norm(below - origin)))
            if -0.02 <= along <= 1.02 and -slack <= down <= 1 + slack:
                return index, along
        return None

    def texts(self, found: Sequence[tuple[Quad, str]]) -> list[str]:
        """What was read of each drawn line: its pieces from left to right, joined by blanks."""
        pieces: list[list[tuple[float, str]]] = [[] for _ in self.lines]
        for quad, text in found:
            if place := self.line_at(quad):
                pieces[place[0]].append((place[1], text))
        return [" ".join(text for _, text in sorted(of_line)) for of_line in pieces]


def _share(vector: Quad, side: Quad) -> float:
    """How far a vector reaches along a side, in lengths of that side."""
    return float(vector @ side) / max(float(side @ side), 1e-6)


def draw_page(
    lines: Sequence[Line], look: Look, rng: Random, layout: ImageFont.Layout = PLAIN
) -> Page:
    """Lines go from the top down, columns from left to right; a page holds only one of the two."""
    mask, boxes = _draw(lines, look.scale, rng, layout)
    bend, size = _bend(mask.shape[1], mask.shape[0], look, rng)
    mask = cv2.warpPerspective(mask, bend, size, flags=cv2.INTER_CUBIC)
    if look.scale < 1:
        small = round(size[0] * look.scale), round(size[1] * look.scale)
        mask = cv2.resize(mask, small, interpolation=cv2.INTER_AREA)
    quads = [
        cv2.perspectiveTransform(np.array([[[x1, y1], [x2, y1], [x2, y2], [x1, y2]]]), bend)[0]
        for x1, y1, x2, y2 in boxes
    ]
    drawn = [
        DrawnLine(line, (quad * look.scale).astype(np.float32))
        for line, quad in zip(lines, quads, strict=True)
    ]
    return Page(_worn(_laid(mask, look, rng), look, rng), drawn)


@lru_cache(maxsize=512)
def load_font(
    path: Path, face: int, px: int, layout: ImageFont.Layout = PLAIN
) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), px, index=face, layout_engine=layout)


def length_of(line: Line, layout: ImageFont.Layout = PLAIN) -> float:
    """Pixels from the start of a line (not of a column) to its end."""
    font = load_font(line.font, line.face, line.px, layout)
    return font.getlength(line.text) + line.tracking * line.px * len(line.text)


Box = tuple[float, float, float, float]
Glyphs = list[tuple[str, float, float, str]]
"""What is drawn at one go: text, where, and by which of its own points (an anchor of Pillow)."""


def _draw(
    lines: Sequence[Line], scale: float, rng: Random, layout: ImageFont.Layout
) -> tuple[Mask, list[Box]]:
    """The ink of all lines, and the box around each one's."""
    x = y = MARGIN / scale
    drawn: list[tuple[ImageFont.FreeTypeFont, Glyphs]] = []
    boxes: list[Box] = []
    for line in lines:
        font = load_font(line.font, line.face, round(line.px / scale), layout)
        at = (x, y + rng.uniform(0, 20)) if line.column else (x + rng.uniform(0, 40), y)
        glyphs, box = _set(line, font, *at)
        drawn.append((font, glyphs))
        boxes.append(box)
        if line.column:
            x = box[2] + 0.9 * font.size
        else:
            y = box[3] + 0.7 * font.size
    far = [max(box[side] for box in boxes) + MARGIN / scale for side in (2, 3)]
    page = Image.new("L", (math.ceil(far[0]), math.ceil(far[1])))
    drawing = ImageDraw.Draw(page)
    for font, glyphs in drawn:
        for text, left, top, anchor in glyphs:
            drawing.text((left, top), text, 255, font, anchor=anchor)
    return np.asarray(page), boxes


def _set(line: Line, font: ImageFont.FreeTypeFont, x: float, y: float) -> tuple[Glyphs, Box]:
    """A line's glyphs, so that the ink begins at (x, y), and the box around the ink."""
    em = font.size
    if line.column:
        middles = [y + (place + 0.5) * PITCH * em for place in range(len(line.text))]
        glyphs = [(c, x + em / 2, m, "mm") for c, m in zip(line.text, middles, strict=True)]
        return glyphs, (x, y, x + em, y + PITCH * em * len(line.text))
    left, top, right, bottom = font.getbbox(line.text)
    if not line.tracking:
        return [(line.text, x - left, y - top, "la")], (x, y, x + right - left, y + bottom - top)
    glyphs, end = [], x
    for character in line.text:
        glyphs.append((character, end, y - top, "la"))
        end += font.getlength(character) + line.tracking * em
    return glyphs, (x, y, end - line.tracking * em, y + bottom - top)


def _bend(width: int, height: int, look: Look, rng: Random) -> tuple[Matrix, tuple[int, int]]:
    """The map of the page, and the size of a page that holds all of it."""
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)
    tilts = [rng.uniform(1 - look.tilt, 1) for _ in range(8)]
    middle = corners.mean(axis=0)
    moved = (corners - middle) * np.array(tilts).reshape(4, 2) * (look.stretch, 1)
    cos, sin = math.cos(math.radians(look.angle)), math.sin(math.radians(look.angle))
    moved = moved @ np.array([[cos, -sin], [sin, cos]])
    moved -= moved.min(axis=0)
    right, bottom = np.ceil(moved.max(axis=0)).astype(int).tolist()
    bend = cv2.getPerspectiveTransform(corners.astype(np.float32), moved.astype(np.float32))
    return bend, (right, bottom)


def _laid(mask: Mask, look: Look, rng: Random) -> npt.NDArray[np.float32]:
    """The ink over the ground, float32 [height, width, 3]."""
    page = np.full((*mask.shape, 3), look.ground, np.float32)
    if look.photo is not None:
        # A part of the photo with the page's form, stretched over the page.
        part = min(look.photo.shape[1] / mask.shape[1], look.photo.shape[0] / mask.shape[0])
        part *= rng.uniform(0.5, 1)
        width, height = max(1, int(mask.shape[1] * part)), max(1, int(mask.shape[0] * part))
        x = rng.randrange(look.photo.shape[1] - width + 1)
        y = rng.randrange(look.photo.shape[0] - height + 1)
        cut = look.photo[y : y + height, x : x + width]
        page += (cv2.resize(cut, mask.shape[::-1]).astype(np.float32) - page) / 3
    share = mask[..., None].astype(np.float32) / 255
    if look.shadow:
        page *= 1 - 0.6 * np.roll(share, (look.shadow, look.shadow), axis=(0, 1))
    page += share * (np.array(look.ink, np.float32) - page)
    return page


def _worn(page: npt.NDArray[np.float32], look: Look, rng: Random) -> RGB:
    if look.shade:
        light = np.linspace(1 - look.shade, 1, page.shape[1], dtype=np.float32)
        page = page * (light if rng.random() < 0.5 else light[::-1])[:, None]
    if look.blur:
        page = cv2.GaussianBlur(page, (0, 0), look.blur)
    if look.smear > 1:
        page = cv2.blur(page, (look.smear, 1))
    if look.noise:
        grain = np.random.default_rng(rng.randrange(2**32)).normal(0, look.noise, page.shape[:2])
        page = page + grain[..., None].astype(np.float32)
    image: RGB = page.round().clip(0, 255).astype(np.uint8)
    if look.jpeg is not None:
        _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, look.jpeg])
        image = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
    return image
