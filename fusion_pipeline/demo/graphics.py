"""Rendered graphics: posters, street signs and product labels."""

from __future__ import annotations

import math
from random import Random

from . import words
from .canvas import Color, Palette, Picture, Sketch, gradient, grain, mix, palette

WHITE: Color = (255, 255, 255)
BLACK: Color = (24, 24, 26)


def _poster_art(sketch: Sketch, colors: Palette, rng: Random, top: float, bottom: float) -> str:
    """Fill the band from `top` to `bottom` with drawn shapes; return what they show."""
    width = sketch.size[0]
    style = rng.choice(("rings", "bunting", "hills", "stars", "stripes"))
    if style == "rings":
        cx, cy = width * rng.uniform(0.35, 0.65), (top + bottom) / 2
        for i in range(5, 0, -1):
            r = (bottom - top) / 2 * i / 5
            fill = (colors.accent, colors.second, colors.paper)[i % 3]
            sketch.ellipse((cx - r, cy - r, cx + r, cy + r), fill)
    elif style == "bunting":
        for row in range(2):
            base = top + (bottom - top) * (0.15 + 0.45 * row)
            sketch.line([(0, base), (width, base)], colors.ink, 2)
            for i in range(9):
                x = width * (i + 0.5 * row) / 8
                fill = colors.accent if i % 2 else colors.second
                tip = base + (bottom - top) * 0.32
                sketch.polygon([(x - 30, base), (x + 30, base), (x, tip)], fill)
    elif style == "hills":
        sketch.rect((0, top, width, bottom), mix(colors.paper, colors.second, 0.35))
        for i in range(3):
            shade = mix(colors.accent, colors.paper, 0.5 - 0.25 * i)
            phase = rng.uniform(0, 6.28)
            high = top + (bottom - top) * (0.3 + 0.22 * i)
            edge = [(x, high + 22 * math.sin(x / 70 + phase)) for x in range(0, width + 20, 20)]
            sketch.polygon([(0, bottom), *edge, (width, bottom)], shade)
    elif style == "stars":
        for _ in range(14):
            at = (rng.uniform(30, width - 30), rng.uniform(top + 25, bottom - 25))
            fill = rng.choice((colors.accent, colors.second))
            sketch.star(at, rng.uniform(10, 26), fill)
    else:
        for i in range(12):
            x = width * i / 12
            fill = (colors.accent, colors.second)[i % 2]
            sketch.rect((x, top, x + width / 24, bottom), fill)
    return style


def poster(rng: Random, variant: int) -> Picture:
    """An event poster: art, a large title, when, where and what it costs."""
    width, height = size = rng.choice(((600, 840), (640, 880), (620, 800), (680, 680)))
    colors = palette(rng)
    sketch = Sketch(size, colors.paper)
    art_first = variant % 2 == 0
    band = (0.0, height * 0.42) if art_first else (height * 0.38, height * 0.72)
    style = _poster_art(sketch, colors, rng, *band)
    foot = height - 74
    sketch.rect((0, foot, width, height), colors.accent)
    canvas = sketch.canvas()
    title = words.event(rng)
    face = rng.choice(("sans-bold", "serif-bold", "times-bold"))
    y = band[1] + 24 if art_first else 36.0
    if not art_first or height < 700:
        canvas.text((width / 2, y), title, face, 52, colors.ink, "ma", width - 70)
        y += 76
    else:
        px = rng.choice((44, 50, 56))
        y = canvas.paragraph(
            (width / 2, y), title, face, px, colors.ink, width - 80, y + 2.8 * px, "ma", 1.25
        )
        y += 8
    place = rng.choice(words.VENUES)
    body = rng.choice(("sans", "serif"))
    canvas.text((width / 2, y + 8), words.date(rng), body, 30, colors.ink, "ma", width - 80)
    canvas.text((width / 2, y + 58), words.hours(rng), body, 24, colors.ink, "ma")
    y = y + 102 if art_first else band[1] + 20
    where = f"{place}, {words.street(rng)}"
    canvas.text((width / 2, y), where, f"{body}-bold", 24, colors.ink, "ma", width - 80)
    entry = rng.choice(("Free entry", f"Tickets {words.price(rng)}", "Everybody welcome"))
    canvas.text((width / 2, foot + 37), entry, body, 28, colors.on_accent, "mm")
    art = {"rings": "circles", "bunting": "flags", "hills": "hills", "stars": "stars"}
    captions = [f"Poster for the {title} at the {place}", f"{title}, {where}"]
    return canvas.picture("poster", ["poster", art.get(style, "stripes")], captions)


def _street(sketch: Sketch, rng: Random) -> None:
    """A street behind a sign: houses and a road on the gradient sky."""
    width, height = sketch.size
    x = -20.0
    while x < width:
        w, h = rng.uniform(70, 150), rng.uniform(0.22, 0.5) * height
        wall = mix((150, 140, 130), rng.choice(((190, 120, 90), (120, 130, 150), WHITE)), 0.5)
        floor = height * 0.86
        sketch.rect((x, floor - h, x + w, floor), wall)
        for i in range(int(w // 34)):
            for j in range(int(h // 50)):
                wx, wy = x + 10 + 34 * i, floor - h + 14 + 50 * j
                sketch.rect((wx, wy, wx + 16, wy + 24), mix(wall, BLACK, 0.5))
        x += w + rng.uniform(0, 24)
    sketch.rect((0, height * 0.86, width, height), (92, 94, 98))


def direction_sign(rng: Random, sketch: Sketch) -> Picture:
    """A board with places, distances and arrows."""
    width, height = sketch.size
    board: Color = rng.choice(((20, 84, 160), (16, 110, 66), (240, 240, 236), (236, 190, 40)))
    ink = BLACK if sum(board) > 420 else WHITE
    rows = [(words.place(rng), f"{rng.randint(1, 90)} km") for _ in range(rng.randint(2, 4))]
    top, bottom = 56.0, 56 + 84 * len(rows) + 20
    for x in (width * 0.25, width * 0.75):
        sketch.rect((x - 9, bottom, x + 9, height), (120, 124, 128))
    sketch.rect((70, top, width - 70, bottom), board, radius=14)
    sketch.rect((78, top + 8, width - 78, bottom - 8), outline=ink, width=3, radius=9)
    for i in range(len(rows)):
        y = top + 52 + 84 * i
        sketch.rect((104, y - 5, 142, y + 5), ink)
        sketch.polygon([(138, y - 18), (164, y), (138, y + 18)], ink)
    canvas = sketch.canvas()
    for i, (town, far) in enumerate(rows):
        y = top + 52 + 84 * i
        canvas.text((190, y), town, "sans-bold", 42, ink, "lm", width - 460)
        canvas.text((width - 104, y), far, "sans-bold", 36, ink, "rm")
    captions = [f"Road sign to {rows[0][0]} and {rows[1][0]}", "Direction sign beside a road"]
    return canvas.picture("sign", ["road sign", "building"], captions)


def name_sign(rng: Random, sketch: Sketch) -> Picture:
    """A street's name on a plate."""
    width, height = sketch.size
    plate: Color = rng.choice(((20, 60, 130), (18, 96, 60), (244, 244, 240), (130, 24, 30)))
    ink = BLACK if sum(plate) > 420 else WHITE
    y1, y2 = height * 0.24, height * 0.24 + 170
    sketch.rect((width / 2 - 8, y2, width / 2 + 8, height), (110, 112, 116))
    sketch.rect((60, y1, width - 60, y2), plate, radius=12)
    sketch.rect((70, y1 + 10, width - 70, y2 - 10), outline=ink, width=3, radius=8)
    canvas = sketch.canvas()
    name = words.street(rng)
    face = rng.choice(("sans-bold", "serif-bold"))
    canvas.text((width / 2, y1 + 64), name.upper(), face, 58, ink, "mm", width - 190)
    low = rng.randint(1, 60)
    note = rng.choice((f"{words.place(rng)} district", f"Numbers {low} to {low + 40}"))
    canvas.text((width / 2, y1 + 126), note, "sans", 26, ink, "mm", width - 190)
    return canvas.picture("sign", ["street sign", "building"], [f"Street sign: {name}"])


def warning_sign(rng: Random, sketch: Sketch) -> Picture:
    """A red triangle, or a red ring with a speed, over a plate with words."""
    width, height = sketch.size
    cx, cy, r = width / 2, height * 0.33, height * 0.24
    sketch.rect((cx - 8, cy, cx + 8, height), (120, 122, 126))
    speed = rng.choice(("", str(rng.choice((10, 20, 30, 40, 50, 60)))))
    if speed:
        sketch.ellipse((cx - r, cy - r, cx + r, cy + r), (200, 24, 32))
        sketch.ellipse((cx - r * 0.78, cy - r * 0.78, cx + r * 0.78, cy + r * 0.78), WHITE)
    else:
        for share, fill in ((1.2, (200, 24, 32)), (0.8, WHITE)):
            points = [
                (cx + share * r * math.sin(a), cy + r * 0.15 - share * r * math.cos(a))
                for a in (0.0, 2.094, 4.189)
            ]
            sketch.polygon(points, fill)
        sketch.rect((cx - 8, cy - r * 0.3, cx + 8, cy + r * 0.25), BLACK, radius=5)
        sketch.ellipse((cx - 9, cy + r * 0.33, cx + 9, cy + r * 0.33 + 18), BLACK)
    y1 = cy + r + 34
    sketch.rect((110, y1, width - 110, y1 + 128), WHITE, BLACK, 4, 10)
    canvas = sketch.canvas()
    if speed:
        canvas.text((cx, cy), speed, "sans-bold", 64, BLACK, "mm")
    what = rng.choice(
        ("Bridge closed", "Loose gravel", "Cattle crossing", "Road works", "Steep hill",
         "School zone", "Icy surface", "Tram crossing", "Soft verges", "Narrow lane")
    )  # fmt: skip
    second = rng.choice((f"Ahead {rng.randint(1, 9)}00 m", f"Until {rng.choice(words.MONTHS)}"))
    canvas.text((cx, y1 + 42), what, "sans-bold", 36, BLACK, "mm", width - 250)
    canvas.text((cx, y1 + 92), second, "sans", 28, BLACK, "mm", width - 250)
    captions = [f"Traffic sign: {what.lower()}", f"Warning sign in a street, {what.lower()}"]
    return canvas.picture("sign", ["traffic sign", "building"], captions)


def sign(rng: Random, variant: int) -> Picture:
    """A sign in front of a street, with a camera's noise."""
    size = rng.choice(((760, 560), (800, 600), (700, 580)))
    sky = gradient(
        size, rng.choice(((96, 150, 210), (150, 160, 176), (220, 150, 110))), (232, 236, 240)
    )
    sketch = Sketch(size, sky)
    _street(sketch, rng)
    picture = (direction_sign, name_sign, warning_sign)[variant % 3](rng, sketch)
    picture.image = grain(picture.image, rng, 4.0)
    return picture


def label(rng: Random, variant: int) -> Picture:
    """A jar or a bottle with a paper label on it."""
    width, height = size = rng.choice(((620, 760), (640, 800), (600, 720)))
    colors = palette(rng)
    jar = variant % 2 == 0
    wall = rng.choice(((236, 232, 226), (206, 214, 220), (226, 216, 200)))
    sketch = Sketch(size, gradient(size, mix(wall, WHITE, 0.4), mix(wall, BLACK, 0.12)))
    sketch.rect((0, height - 90, width, height), mix(wall, (110, 80, 50), 0.6))
    glass = mix(colors.accent, colors.second, rng.random())
    cx, base = width / 2, height - 50
    if jar:
        sketch.rect((cx - 150, 60, cx + 150, 130), mix(colors.second, BLACK, 0.2), radius=12)
        sketch.rect((cx - 210, 120, cx + 210, base), glass, radius=50)
        half, y1, y2 = 190.0, 220.0, base - 80.0
    else:
        sketch.rect((cx - 46, 30, cx + 46, 90), BLACK, radius=8)
        sketch.rect((cx - 40, 80, cx + 40, 240), glass)
        sketch.rect((cx - 180, 190, cx + 180, base), glass, radius=70)
        half, y1, y2 = 172.0, 280.0, base - 50.0
    sketch.rect((cx - half, y1, cx + half, y2), (252, 249, 240), radius=6)
    sketch.rect((cx - half + 8, y1 + 8, cx + half - 8, y2 - 8), outline=colors.accent, width=2)
    ink: Color = (44, 36, 30)
    canvas = sketch.canvas()
    flavour = rng.choice(words.FLAVOURS)
    goods = rng.choice(
        ("Jam", "Honey", "Chutney", "Mustard") if jar else ("Syrup", "Soap", "Vinegar", "Oil")
    )
    room, face = 2 * half - 50, rng.choice(("serif", "times", "sans"))
    bold = f"{face}-bold"
    canvas.text((cx, y1 + 26), flavour, bold, 40, ink, "ma", room)
    canvas.text((cx, y1 + 82), goods, bold, 34, ink, "ma", room)
    from_where = f"Made in {words.place(rng)}"
    canvas.text((cx, y1 + 134), from_where, "serif-italic", 19, ink, "ma", room)
    parts = [
        flavour.lower(),
        rng.choice(("sugar", "water", "salt")),
        rng.choice(("lemon juice", "pectin")),
    ]
    text = f"Contains {', '.join(parts)}."
    canvas.paragraph((cx, y1 + 174), text, face, 16, ink, room, y2 - 66, "ma")
    amount = f"{rng.choice((120, 200, 250, 340, 450))} {'g' if jar else 'ml'}"
    canvas.text((cx - half + 26, y2 - 42), amount, bold, 22, ink, "lm")
    best = f"Best before {rng.randint(1, 12):02d}/{rng.randint(2015, 2029)}"
    canvas.text((cx + half - 26, y2 - 42), best, face, 15, ink, "rm", room - 100)
    name, vessel = f"{flavour} {goods}", "jar" if jar else "bottle"
    picture = canvas.picture(
        "label", [vessel], [f"{vessel.capitalize()} of {name}", f"{name} {amount}"]
    )
    picture.image = grain(picture.image, rng, 2.5)
    return picture
