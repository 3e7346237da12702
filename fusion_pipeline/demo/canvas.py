"""Drawing with a record: every text line that is drawn is also noted with its place and size.

Shapes go to a `Sketch` (drawn at twice the size, so that their edges come out smooth), text to the
`Canvas` made from it. Pixels are those of the finished image, (0, 0) is its top-left corner.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]
Point = tuple[float, float]

MIN_PX = 12  # the smallest em size that is ever drawn

FACES = {
    "sans": "DejaVuSans.ttf",
    "sans-bold": "DejaVuSans-Bold.ttf",
    "sans-oblique": "DejaVuSans-Oblique.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif-bold": "DejaVuSerif-Bold.ttf",
    "serif-italic": "DejaVuSerif-Italic.ttf",
    "mono": "DejaVuSansMono.ttf",
    "mono-bold": "DejaVuSansMono-Bold.ttf",
    "times": "STIXGeneral.ttf",
    "times-bold": "STIXGeneralBol.ttf",
}


@dataclass(frozen=True)
class TextLine:
    """One drawn line: `px` is the em size, `box` the ink's [x1, y1, x2, y2) in upright pixels."""

    text: str
    px: float
    box: Box


@dataclass
class Picture:
    """An upright image and what is known of it.

    `captions` are true descriptions (helpful alt texts), `cut_texts` lines that a crop has cut
    through, so that only a part of each is visible.
    """

    image: Image.Image
    kind: str
    texts: list[TextLine] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    cut_texts: list[TextLine] = field(default_factory=list)

    @property
    def short_edge(self) -> int:
        return min(self.image.size)


@functools.cache
def font_folder() -> Path:
    """matplotlib's own fonts: DejaVu (Bitstream Vera licence) and STIX (OFL)."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@functools.lru_cache(maxsize=512)
def font(face: str, px: int) -> ImageFont.FreeTypeFont:
    # Basic layout: Raqm is not in every build of Pillow and would change the pixels.
    path = font_folder() / FACES[face]
    return ImageFont.truetype(str(path), px, layout_engine=ImageFont.Layout.BASIC)


def mix(a: Color, b: Color, share: float) -> Color:
    """The colour that lies `share` (0..1) of the way from `a` to `b`."""
    r, g, bl = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return (r, g, bl)


def gradient(size: tuple[int, int], top: Color, bottom: Color) -> Image.Image:
    """A vertical gradient, RGB."""
    width, height = size
    ramp = np.linspace(0.0, 1.0, height)[:, None]
    rows = np.asarray(top, float) * (1 - ramp) + np.asarray(bottom, float) * ramp
    pixels = np.repeat(np.rint(rows).astype(np.uint8)[:, None, :], width, axis=1)
    return Image.fromarray(pixels)


def grain(image: Image.Image, rng: Random, strength: float) -> Image.Image:
    """The image with Gaussian noise of `strength` grey levels, as a camera would add."""
    noise = np.random.default_rng(rng.getrandbits(64)).normal(
        0.0, strength, (image.height, image.width, 1)
    )
    pixels = np.clip(np.rint(np.asarray(image, float) + noise), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


class Sketch:
    """Shapes, drawn at `SCALE` times the final size."""

    SCALE = 2

    def __init__(self, size: tuple[int, int], background: Color | Image.Image) -> None:
        self.size = size
        big = (size[0] * self.SCALE, size[1] * self.SCALE)
        if isinstance(background, Image.Image):
            self._image = background.resize(big, Image.Resampling.BILINEAR)
        else:
            self._image = Image.new("RGB", big, background)
        self._draw = ImageDraw.Draw(self._image)

    def _up(self, points: Sequence[Point]) -> list[Point]:
        return [(x * self.SCALE, y * self.SCALE) for x, y in points]

    def _corners(self, box: Sequence[float]) -> list[Point]:
        x1, y1, x2, y2 = box
        return self._up([(x1, y1), (max(x1, x2), max(y1, y2))])

    def rect(
        self,
        box: Sequence[float],
        fill: Color | None = None,
        outline: Color | None = None,
        width: float = 1,
        radius: float = 0,
    ) -> None:
        self._draw.rounded_rectangle(
            self._corners(box),
            radius * self.SCALE,
            fill,
            outline,
            round(width * self.SCALE) if outline else 0,
        )

    def ellipse(
        self,
        box: Sequence[float],
        fill: Color | None = None,
        outline: Color | None = None,
        width: float = 1,
    ) -> None:
        pen = round(width * self.SCALE) if outline else 0
        self._draw.ellipse(self._corners(box), fill, outline, pen)

    def pie(self, box: Sequence[float], start: float, end: float, fill: Color) -> None:
        self._draw.pieslice(self._corners(box), start, end, fill)

    def polygon(self, points: Sequence[Point], fill: Color) -> None:
        self._draw.polygon(self._up(points), fill)

    def line(self, points: Sequence[Point], fill: Color, width: float = 1) -> None:
        pen = max(1, round(width * self.SCALE))
        self._draw.line(self._up(points), fill, pen, joint="curve")

    def star(self, centre: Point, radius: float, fill: Color, spikes: int = 5) -> None:
        points = []
        for i in range(2 * spikes):
            r = radius if i % 2 == 0 else radius * 0.45
            angle = math.pi * i / spikes - math.pi / 2
            points.append((centre[0] + r * math.cos(angle), centre[1] + r * math.sin(angle)))
        self.polygon(points, fill)

    def image(self) -> Image.Image:
        return self._image.resize(self.size, Image.Resampling.BOX)

    def canvas(self) -> Canvas:
        return Canvas(self.image())


class Canvas:
    """Text on an image; `lines` holds what was written."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.draw = ImageDraw.Draw(image)
        self.lines: list[TextLine] = []

    def text(
        self,
        at: Point,
        text: str,
        face: str,
        px: int,
        fill: Color,
        anchor: str = "la",
        width: float | None = None,
    ) -> Box:
        """Write one line and note it; return its ink box. `anchor` is Pillow's.

        With `width` (pixels) the line is made smaller, then shorter, until it fits.
        """
        text, px = fitted(text, face, px, width)
        shape = font(face, px)
        place = (round(at[0]), round(at[1]))
        box = _ink(text, shape, place, anchor)
        self.draw.text(place, text, fill, shape, anchor=anchor)
        self.lines.append(TextLine(text, px, box))
        return box

    def paragraph(
        self,
        at: Point,
        text: str,
        face: str,
        px: int,
        fill: Color,
        width: float,
        bottom: float,
        anchor: str = "la",
        leading: float = 1.35,
    ) -> float:
        """Write wrapped lines from `at` downwards; return the y below them.

        A line that would pass `bottom` is left out, with all after it.
        """
        y = at[1]
        for line in wrapped(text, face, px, width):
            if y + px * 1.2 > bottom:
                break
            self.text((at[0], y), line, face, px, fill, anchor)
            y += px * leading
        return y

    def picture(self, kind: str, objects: list[str], captions: list[str]) -> Picture:
        return Picture(self.image, kind, list(self.lines), objects, captions)


def _ink(text: str, shape: ImageFont.FreeTypeFont, at: tuple[int, int], anchor: str) -> Box:
    """Where drawing `text` leaves ink: Pillow's own box also holds the side bearing."""
    around = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox(at, text, shape, anchor=anchor)
    left, top = math.floor(around[0]) - 4, math.floor(around[1]) - 4
    mask = Image.new("L", (math.ceil(around[2]) + 4 - left, math.ceil(around[3]) + 4 - top))
    ImageDraw.Draw(mask).text((at[0] - left, at[1] - top), text, 255, shape, anchor=anchor)
    found = mask.getbbox()
    if found is None:
        raise ValueError(f"{text!r} leaves no ink")
    return (found[0] + left, found[1] + top, found[2] + left, found[3] + top)


def fitted(text: str, face: str, px: int, width: float | None) -> tuple[str, int]:
    """`text` and the largest em size up to `px` at which it is at most `width` pixels wide; at
    `MIN_PX`, without the last words where it is still too wide."""
    if width is None:
        return text, px
    while px > MIN_PX and font(face, px).getlength(text) > width:
        px -= 1
    while " " in text and font(face, px).getlength(text) > width:
        text = text.rsplit(" ", 1)[0].rstrip(" -,:")
    return text, px


def wrapped(text: str, face: str, px: int, width: float) -> list[str]:
    """`text` in lines of whole words, each at most `width` pixels wide."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font(face, px).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@dataclass(frozen=True)
class Palette:
    """Colours that go together: `ink` reads well on `paper`, `on_accent` on `accent`."""

    paper: Color
    ink: Color
    accent: Color
    second: Color
    on_accent: Color = (255, 255, 255)


_PALETTES = (
    Palette((250, 247, 240), (34, 34, 44), (176, 44, 46), (230, 168, 60)),
    Palette((240, 246, 250), (20, 40, 66), (24, 92, 150), (240, 130, 60)),
    Palette((245, 250, 240), (30, 48, 30), (44, 110, 62), (206, 176, 60)),
    Palette((252, 244, 246), (66, 20, 48), (150, 36, 96), (90, 150, 170)),
    Palette((24, 30, 44), (236, 240, 248), (250, 196, 70), (96, 160, 220), (30, 30, 30)),
    Palette((38, 28, 48), (246, 238, 250), (236, 120, 150), (120, 200, 180), (36, 20, 40)),
    Palette((255, 252, 224), (50, 44, 24), (60, 60, 60), (220, 110, 40)),
    Palette((232, 244, 242), (16, 56, 56), (10, 116, 116), (230, 96, 86)),
    Palette((244, 236, 226), (62, 40, 26), (134, 78, 40), (88, 122, 92)),
    Palette((236, 236, 240), (28, 28, 34), (84, 60, 160), (240, 180, 60)),
    Palette((14, 44, 40), (232, 246, 238), (150, 216, 140), (240, 190, 110), (12, 40, 24)),
    Palette((255, 255, 255), (32, 32, 32), (200, 70, 20), (40, 120, 190)),
)


def palette(rng: Random) -> Palette:
    """A palette, each colour shifted a little, so that no two pictures share all their colours."""
    chosen = rng.choice(_PALETTES)

    def shifted(color: Color) -> Color:
        r, g, b = (min(255, max(0, c + rng.randint(-10, 10))) for c in color)
        return (r, g, b)

    return Palette(
        shifted(chosen.paper),
        shifted(chosen.ink),
        shifted(chosen.accent),
        shifted(chosen.second),
        chosen.on_accent,
    )
