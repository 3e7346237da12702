"""Rendered screenshots: a web article, a settings list, a weather app and a calendar."""

from __future__ import annotations

from random import Random

from . import words
from .canvas import Canvas, Color, Palette, Picture, Sketch, mix, palette

WHITE: Color = (255, 255, 255)


def _landscape(
    sketch: Sketch, box: tuple[float, float, float, float], colors: Palette, rng: Random
) -> None:
    """A small drawn picture, such as a page's lead image."""
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    sketch.rect(box, mix(colors.second, WHITE, 0.55))
    sun = x1 + w * rng.uniform(0.2, 0.8)
    sketch.ellipse((sun - h * 0.12, y1 + h * 0.15, sun + h * 0.12, y1 + h * 0.39), WHITE)
    peak = rng.uniform(0.25, 0.7)
    ridge = [(x1, y2), (x1, y1 + h * 0.7), (x1 + w * peak, y1 + h * 0.35), (x2, y1 + h * 0.8)]
    sketch.polygon([*ridge, (x2, y2)], mix(colors.accent, colors.ink, 0.3))
    sketch.polygon([(x1, y2), (x1, y1 + h * 0.85), (x2, y1 + h * 0.65), (x2, y2)], colors.accent)


def web_page(rng: Random) -> Picture:
    """A browser window with an article: address, menu, headline, picture, text, side box."""
    width, height = size = rng.choice(((960, 640), (900, 680), (860, 620)))
    colors = palette(rng)
    paper, ink = (252, 252, 250), (34, 36, 42)
    sketch = Sketch(size, paper)
    sketch.rect((0, 0, width, 52), (222, 225, 230))
    for i, dot in enumerate(((226, 96, 84), (236, 186, 70), (98, 190, 96))):
        sketch.ellipse((18 + 22 * i, 20, 31 + 22 * i, 33), dot)
    sketch.rect((110, 11, width - 24, 41), WHITE, radius=14)
    sketch.rect((0, 52, width, 100), colors.accent)
    side = width - 270
    _landscape(sketch, (40, 216, side - 30, height - 190), colors, rng)
    sketch.rect((side, 126, width - 30, height - 40), mix(paper, colors.second, 0.16), radius=8)
    canvas = sketch.canvas()
    town = words.place(rng)
    canvas.text((128, 26), f"https://{town.lower()}.example/news", "sans", 15, (70, 74, 82), "lm")
    x = 40.0
    for item in (f"{town} News", "Weather", "Culture", "Contact"):
        face = "sans-bold" if x == 40.0 else "sans"
        x = canvas.text((x, 76), item, face, 17, colors.on_accent, "lm")[2] + 40
    title = words.headline(rng)
    canvas.paragraph((40, 122), title, "serif-bold", 27, ink, side - 80, 206)
    body = words.sentences(rng, 5)
    canvas.paragraph((40, height - 176), body, "serif", 17, ink, side - 70, height - 20)
    canvas.text((side + 18, 142), "Most read", "sans-bold", 19, ink)
    y = 184.0
    for _ in range(4):
        y = (
            canvas.paragraph((side + 18, y), words.headline(rng), "sans", 14, ink, 206, height - 50)
            + 14
        )
    return canvas.picture("screenshot", ["web page"], [f"News page: {title}", title])


def settings_app(rng: Random) -> Picture:
    """A telephone screen with switches."""
    width = 480
    size = (width, 854)
    colors = palette(rng)
    dark = rng.random() < 0.4
    paper: Color = (22, 24, 28) if dark else (246, 247, 249)
    ink: Color = (236, 238, 242) if dark else (30, 32, 36)
    items = rng.sample(
        ["Notifications", "Dark mode", "Offline maps", "Location", "Auto backup", "Large text",
         "Battery saver", "Quiet hours", "Sync photos", "Vibration", "Read aloud", "Metric units"],
        8,
    )  # fmt: skip
    states = [rng.random() < 0.5 for _ in items]
    sketch = Sketch(size, paper)
    sketch.rect((0, 0, width, 118), colors.accent)
    for i, on in enumerate(states):
        y = 140 + 84 * i
        sketch.line([(24, y + 76), (width - 24, y + 76)], mix(paper, ink, 0.18))
        track = colors.second if on else mix(paper, ink, 0.35)
        sketch.rect((width - 86, y + 20, width - 30, y + 50), track, radius=15)
        knob = width - 46 if on else width - 70
        sketch.ellipse((knob - 12, y + 23, knob + 12, y + 47), WHITE)
    canvas = sketch.canvas()
    canvas.text((20, 10), words.clock(rng), "sans", 16, colors.on_accent)
    canvas.text((width - 20, 10), f"{rng.randint(12, 99)} %", "sans", 16, colors.on_accent, "ra")
    canvas.text((24, 58), "Settings", "sans-bold", 32, colors.on_accent)
    for i, (item, on) in enumerate(zip(items, states, strict=True)):
        y = 140 + 84 * i
        canvas.text((28, y + 10), item, "sans", 22, ink)
        canvas.text((28, y + 42), "On" if on else "Off", "sans", 15, mix(ink, paper, 0.3))
    captions = ["Settings screen of a phone app", f"App settings: {items[0]} and {items[1]}"]
    return canvas.picture("screenshot", ["phone screen"], captions)


def weather_app(rng: Random) -> Picture:
    """A weather screen: town, large temperature, five days."""
    width, height = size = rng.choice(((540, 800), (560, 760)))
    top: Color = rng.choice(((38, 84, 150), (70, 60, 130), (20, 104, 120), (60, 70, 84)))
    panel = mix(top, WHITE, 0.12)
    sketch = Sketch(size, top)
    sketch.rect((24, 380, width - 24, height - 30), panel, radius=18)
    start = rng.randint(0, 6)
    days = [words.WEEKDAYS[(start + i) % 7] for i in range(5)]
    pitch = (height - 430) / 5
    for i in range(5):
        x, y = width - 220, 400 + pitch * (i + 0.5)
        if rng.random() < 0.5:
            sketch.ellipse((x - 15, y - 15, x + 15, y + 15), (255, 208, 80))
        else:
            sketch.ellipse((x - 20, y - 8, x + 4, y + 14), (220, 226, 236))
            sketch.ellipse((x - 10, y - 16, x + 20, y + 14), (220, 226, 236))
    sketch.ellipse((width / 2 + 96, 190, width / 2 + 176, 270), (255, 208, 80))
    canvas = sketch.canvas()
    town = words.place(rng)
    canvas.text((40, 40), town, "sans-bold", 40, WHITE)
    canvas.text((40, 100), words.date(rng), "sans", 20, WHITE)
    warm = rng.randint(-4, 31)
    canvas.text((width / 2 - 40, 190), f"{warm} C", "sans-bold", 64, WHITE, "ma")
    sky = rng.choice(("Partly cloudy", "Light rain", "Clear sky", "Fog until noon", "Strong wind"))
    canvas.text((width / 2, 310), sky, "sans", 24, WHITE, "ma")
    for i, day in enumerate(days):
        y = 400 + pitch * (i + 0.5)
        low = warm + rng.randint(-9, -2)
        canvas.text((50, y), day, "sans", 22, WHITE, "lm")
        canvas.text(
            (width - 50, y), f"{low} / {warm + rng.randint(-2, 3)}", "sans", 22, WHITE, "rm"
        )
    captions = [f"Weather forecast for {town}", f"Weather app showing {warm} C in {town}"]
    return canvas.picture("screenshot", ["phone screen"], captions)


def _calendar_grid(
    canvas: Canvas, box: tuple[float, float, float, float], first: int, days: int, ink: Color
) -> None:
    x1, y1, x2, y2 = box
    cell_w, cell_h = (x2 - x1) / 7, (y2 - y1) / 6
    for day in range(1, days + 1):
        slot = first + day - 1
        x, y = x1 + cell_w * (slot % 7 + 0.5), y1 + cell_h * (slot // 7 + 0.5)
        canvas.text((x, y), str(day), "sans", 20, ink, "mm")


def calendar(rng: Random) -> Picture:
    """A month view with a list of appointments beside it."""
    width, height = size = rng.choice(((920, 560), (880, 600)))
    colors = palette(rng)
    sketch = Sketch(size, colors.paper)
    split = width - 320
    sketch.rect((split, 0, width, height), mix(colors.paper, colors.accent, 0.14))
    notes = [
        (words.clock(rng), f"{rng.choice(words.VERBS)} {rng.choice(words.THINGS)}")
        for _ in range(4)
    ]
    notes.sort()
    for i in range(len(notes)):
        y = 104 + 104 * i
        sketch.rect((split + 24, y, split + 30, y + 76), colors.accent)
    canvas = sketch.canvas()
    month, year = rng.choice(words.MONTHS), rng.randint(2005, 2024)
    canvas.text((40, 30), f"{month} {year}", "sans-bold", 34, colors.ink)
    cell = (split - 60) / 7
    for i, day in enumerate(words.WEEKDAYS):
        canvas.text((30 + cell * (i + 0.5), 102), day[:3], "sans-bold", 17, colors.accent, "mm")
    days = 28 if month == "February" else 30
    grid = (30.0, 126.0, split - 30.0, height - 24.0)
    _calendar_grid(canvas, grid, rng.randint(0, 6), days, colors.ink)
    canvas.text((split + 24, 36), "Appointments", "sans-bold", 24, colors.ink)
    for i, (time, what) in enumerate(notes):
        canvas.text((split + 46, 108 + 104 * i), time, "sans-bold", 20, colors.ink)
        canvas.text((split + 46, 142 + 104 * i), what, "sans", 18, colors.ink, width=250)
    return canvas.picture("screenshot", ["calendar"], [f"Calendar for {month} {year}"])


def screenshot(rng: Random, variant: int) -> Picture:
    return (web_page, settings_app, weather_app, calendar)[variant % 4](rng)
