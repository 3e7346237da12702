"""Rendered pictures without any text, so that they can be mirrored: landscapes and patterns."""

from __future__ import annotations

import math
from random import Random

from .canvas import Color, Picture, Sketch, gradient, mix, palette

BLACK: Color = (24, 24, 26)


def landscape(rng: Random, size: tuple[int, int]) -> Picture:
    """Hills, a sun or moon, trees and a house; no text."""
    width, height = size
    night = rng.random() < 0.3
    sky: tuple[Color, Color] = (
        ((16, 20, 50), (60, 60, 110)) if night else ((110, 170, 226), (246, 230, 200))
    )
    sketch = Sketch(size, gradient(size, *sky))
    x, r = rng.uniform(0.15, 0.85) * width, height * rng.uniform(0.06, 0.11)
    y = height * rng.uniform(0.14, 0.28)
    sketch.ellipse((x - r, y - r, x + r, y + r), (240, 240, 220) if night else (255, 214, 90))
    base = rng.choice(((70, 130, 70), (150, 130, 60), (80, 110, 130)))
    for i in range(3):
        phase, wave = rng.uniform(0, 6.28), rng.uniform(60, 160)
        high, swing = height * (0.45 + 0.16 * i), height * 0.07
        edge = [(px, high + swing * math.sin(px / wave + phase)) for px in range(0, width + 16, 16)]
        sketch.polygon(
            [(0, height), *edge, (width, height)], mix(base, BLACK, 0.15 * i + 0.3 * night)
        )
    for _ in range(rng.randint(4, 9)):
        tx, ty, th = rng.uniform(0, width), height * rng.uniform(0.72, 0.95), height * 0.16
        sketch.rect((tx - 4, ty - th * 0.3, tx + 4, ty), (90, 64, 44))
        sketch.polygon(
            [(tx - th * 0.28, ty - th * 0.25), (tx, ty - th), (tx + th * 0.28, ty - th * 0.25)],
            (30, 84, 50),
        )
    hx, hy, hw = width * rng.uniform(0.2, 0.7), height * 0.74, height * 0.16
    sketch.rect(
        (hx, hy - hw * 0.7, hx + hw * 1.3, hy), rng.choice(((226, 210, 180), (200, 110, 90)))
    )
    sketch.polygon(
        [
            (hx - 8, hy - hw * 0.7),
            (hx + hw * 0.65, hy - hw * 1.3),
            (hx + hw * 1.3 + 8, hy - hw * 0.7),
        ],
        (120, 50, 44),
    )
    sketch.rect((hx + hw * 0.5, hy - hw * 0.4, hx + hw * 0.8, hy), (80, 56, 40))
    body = "moon" if night else "sun"
    captions = [
        f"Drawing of a house and trees under the {body}",
        "Flat drawing of hills with a small house",
    ]
    return Picture(sketch.image(), "illustration", [], ["house", "tree", "hill", body], captions)


def pattern(rng: Random, size: tuple[int, int]) -> Picture:
    """Circles, squares and triangles on a grid; no text."""
    width, height = size
    colors = palette(rng)
    sketch = Sketch(size, colors.paper)
    cell = rng.choice((70, 90, 110, 130))
    for row in range(height // cell + 1):
        for col in range(width // cell + 1):
            x, y = col * cell, row * cell
            fill = rng.choice(
                (colors.accent, colors.second, colors.ink, mix(colors.accent, colors.paper, 0.5))
            )
            shape = rng.randrange(4)
            if shape == 0:
                sketch.ellipse((x + 8, y + 8, x + cell - 8, y + cell - 8), fill)
            elif shape == 1:
                sketch.rect((x + 8, y + 8, x + cell - 8, y + cell - 8), fill)
            elif shape == 2:
                sketch.polygon(
                    [(x + 6, y + cell - 6), (x + cell - 6, y + cell - 6), (x + 6, y + 6)], fill
                )
            else:
                sketch.pie((x, y, x + 2 * cell, y + 2 * cell), 180, 270, fill)
    captions = ["Geometric pattern of circles, squares and triangles", "Abstract tile pattern"]
    return Picture(sketch.image(), "illustration", [], ["pattern"], captions)


def illustration(rng: Random, variant: int) -> Picture:
    size = rng.choice(((760, 560), (800, 600), (640, 640)))
    return (landscape, pattern)[variant % 2](rng, size)
