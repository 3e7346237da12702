"""Edits that make copies; each carries the known text lines along. And the encoders."""

from __future__ import annotations

import io
from dataclasses import replace
from random import Random

import numpy as np
from PIL import Image, ImageOps

from .canvas import Box, Canvas, Picture, TextLine, mix, palette


def crop(picture: Picture, window: Box) -> Picture:
    """The region `window`; lines that its edge cuts through move to `cut_texts`."""
    left, top, right, bottom = window
    whole: list[TextLine] = []
    cut: list[TextLine] = []
    for line in picture.texts:
        x1, y1, x2, y2 = line.box
        seen = (max(x1, left), max(y1, top), min(x2, right), min(y2, bottom))
        if seen[0] >= seen[2] or seen[1] >= seen[3]:
            continue
        moved = (seen[0] - left, seen[1] - top, seen[2] - left, seen[3] - top)
        (whole if seen == line.box else cut).append(replace(line, box=moved))
    return replace(picture, image=picture.image.crop(window), texts=whole, cut_texts=cut)


def crop_share(picture: Picture, share: float, rng: Random) -> Picture:
    """`share` of each side, from the centre or from one of the corners."""
    full_w, full_h = picture.image.size
    width, height = round(full_w * share), round(full_h * share)
    at = rng.choice(((0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)))
    left, top = round((full_w - width) * at[0]), round((full_h - height) * at[1])
    return crop(picture, (left, top, left + width, top + height))


def half(picture: Picture) -> Picture:
    """Half of each side."""
    width, height = picture.image.width // 2, picture.image.height // 2
    small = picture.image.resize((width, height), Image.Resampling.LANCZOS)

    def halved(line: TextLine) -> TextLine:
        x1, y1, x2, y2 = line.box
        box = (x1 // 2, y1 // 2, min(width, -(-x2 // 2)), min(height, -(-y2 // 2)))
        return TextLine(line.text, line.px / 2, box)

    return replace(picture, image=small, texts=[halved(line) for line in picture.texts])


def mirror(picture: Picture) -> Picture:
    """Left and right swapped. Raises ValueError for a picture with known text."""
    if picture.texts:
        raise ValueError("mirrored text would no longer be the text that the truth names")
    return replace(picture, image=ImageOps.mirror(picture.image))


def grade(picture: Picture, rng: Random) -> Picture:
    """Other colours, same shapes: hues turned where there are hues, else a strong tint."""
    hsv = np.asarray(picture.image.convert("HSV")).copy()
    if hsv[..., 1].mean() > 40:
        hsv[..., 0] += np.uint8(rng.randint(70, 180))  # hue is a circle of 256 steps: wraps
        return replace(picture, image=Image.fromarray(hsv, "HSV").convert("RGB"))
    dark = rng.choice(((60, 20, 0), (0, 20, 70), (40, 0, 60)))
    light = rng.choice(((255, 214, 130), (160, 255, 220), (255, 180, 200)))
    return replace(picture, image=ImageOps.colorize(picture.image.convert("L"), dark, light))


def border(picture: Picture, rng: Random) -> Picture:
    """A wide frame around the picture."""
    edge = rng.randint(40, 70)
    image = ImageOps.expand(picture.image, edge, palette(rng).accent)
    texts = [replace(line, box=_shifted(line.box, edge)) for line in picture.texts]
    return replace(picture, image=image, texts=texts)


def banner(picture: Picture, rng: Random) -> Picture:
    """A strip with a line of text below the picture, as re-posting sites add."""
    words = rng.choice(
        ("Share if you agree", "Seen today near the station", "More pictures on our page",
         "This made my whole week", "Who remembers this place")
    )  # fmt: skip
    colors = palette(rng)
    width, height = picture.image.size
    strip = 84
    page = Image.new("RGB", (width, height + strip), mix(colors.accent, (0, 0, 0), 0.6))
    page.paste(picture.image, (0, 0))
    canvas = Canvas(page)
    middle = (width / 2, height + strip / 2)
    canvas.text(middle, words, "sans-bold", 34, (255, 255, 255), "mm", width - 24)
    return replace(picture, image=page, texts=[*picture.texts, *canvas.lines])


def _shifted(box: Box, by: int) -> Box:
    x1, y1, x2, y2 = box
    return (x1 + by, y1 + by, x2 + by, y2 + by)


EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp", "gif": "gif"}


def encode(image: Image.Image, format: str, quality: int = 88) -> bytes:
    """`image` as "jpeg", "png" or "webp"; `quality` (1..100) doesn't matter to PNG."""
    out = io.BytesIO()
    if format == "png":
        image.save(out, "PNG")
    else:
        image.save(out, format.upper(), quality=quality)
    return out.getvalue()
