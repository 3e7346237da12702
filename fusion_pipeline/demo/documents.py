"""Rendered documents: slides of a template, charts, tables, menus and receipts."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from . import words
from .canvas import Color, Palette, Picture, Sketch, font, mix, palette


@dataclass(frozen=True)
class SlideTemplate:
    """What all slides of one deck share."""

    size: tuple[int, int]
    colors: Palette
    face: str
    layout: int  # 0 band on top, 1 bar at the left, 2 rule under the title
    footer: str
    bullet_px: int


def slide_template(rng: Random, layout: int) -> SlideTemplate:
    size = rng.choice(((800, 600), (896, 560), (960, 540)))
    face = rng.choice(("sans", "serif", "times"))
    footer = f"{rng.choice(words.SUBJECTS)} review, {rng.choice(words.MONTHS)}"
    return SlideTemplate(size, palette(rng), face, layout % 3, footer, rng.choice((22, 24, 26)))


def slide(template: SlideTemplate, rng: Random, number: int) -> Picture:
    """Slide `number` of the deck: only title, bullets and page number are its own."""
    width, height = template.size
    colors = template.colors
    sketch = Sketch(template.size, colors.paper)
    left, title_y, title_color = 56.0, 36.0, colors.ink
    if template.layout == 0:
        sketch.rect((0, 0, width, 100), colors.accent)
        title_color = colors.on_accent
    elif template.layout == 1:
        sketch.rect((0, 0, 40, height), colors.accent)
        sketch.rect((40, 0, 48, height), colors.second)
        left = 84.0
    else:
        sketch.line([(56, 98), (width - 56, 98)], colors.accent, 4)
        sketch.ellipse((width - 110, 20, width - 60, 70), colors.second)
    sketch.line(
        [(left, height - 56), (width - 56, height - 56)], mix(colors.paper, colors.ink, 0.4)
    )

    bullets = [words.bullet(rng) for _ in range(rng.randint(3, 5))]
    step = min(78.0, (height - 220) / len(bullets))
    tops = [150 + i * step for i in range(len(bullets))]
    size = template.bullet_px * 0.34
    for y in tops:
        middle = y + template.bullet_px * 0.62
        sketch.ellipse((left, middle - size / 2, left + size, middle + size / 2), colors.accent)

    canvas = sketch.canvas()
    title = f"{rng.choice(words.SUBJECTS)}: {rng.choice(words.ASPECTS).lower()}"
    bold = f"{template.face}-bold"
    canvas.text((left, title_y), title, bold, 36, title_color, width=width - left - 130)
    for y, text in zip(tops, bullets, strict=True):
        room = width - left - 90
        canvas.text((left + 28, y), text, template.face, template.bullet_px, colors.ink, width=room)
    canvas.text((left, height - 42), template.footer, template.face, 15, colors.ink)
    canvas.text((width - 56, height - 42), str(number), template.face, 15, colors.ink, "ra")
    return canvas.picture("slide", ["slide"], [f"Slide: {title}", f"{title} - {template.footer}"])


_MEASURES = (
    ("Rainfall", "mm"),
    ("Library loans", "books"),
    ("Bicycle trips", "trips"),
    ("Solar power", "kWh"),
    ("Ferry passengers", "people"),
    ("Apple harvest", "tons"),
    ("Snow depth", "cm"),
    ("Water use", "m3"),
)


def _scale(values: list[int]) -> tuple[int, list[int]]:
    """The top of an axis and its ticks."""
    step = next(s for s in (5, 10, 20, 25, 50, 100, 200, 500) if max(values) <= 5 * s)
    return 5 * step, [step * i for i in range(6)]


def _series_colors(colors: Palette, count: int) -> list[Color]:
    base = [colors.accent, colors.second]
    base += [mix(colors.accent, colors.second, 0.5), mix(colors.accent, colors.paper, 0.5)]
    base += [mix(colors.second, colors.paper, 0.5), mix(colors.ink, colors.paper, 0.4)]
    return base[:count]


def axis_chart(rng: Random, bars: bool) -> Picture:
    """A bar or line chart with labelled axes."""
    width, height = size = rng.choice(((720, 520), (800, 560), (680, 600), (860, 540)))
    colors = palette(rng)
    name, unit = rng.choice(_MEASURES)
    start = rng.randint(0, 4)
    labels = [m[:3] for m in words.MONTHS[start : start + rng.randint(5, 8)]]
    if rng.random() < 0.4:
        first = rng.randint(1998, 2014)
        labels = [str(first + i) for i in range(len(labels))]
    values = [rng.randint(8, rng.choice((40, 90, 190, 400))) for _ in labels]
    top, ticks = _scale(values)
    x1, y1, x2, y2 = 92, 100, width - 36, height - 74

    def y_of(value: float) -> float:
        return y2 - (y2 - y1) * value / top

    sketch = Sketch(size, colors.paper)
    for tick in ticks:
        sketch.line([(x1, y_of(tick)), (x2, y_of(tick))], mix(colors.paper, colors.ink, 0.18))
    pitch = (x2 - x1) / len(labels)
    middles = [x1 + pitch * (i + 0.5) for i in range(len(labels))]
    if bars:
        for x, value in zip(middles, values, strict=True):
            fill = colors.second if value == max(values) else colors.accent
            sketch.rect((x - pitch * 0.33, y_of(value), x + pitch * 0.33, y2), fill)
    else:
        points = [(x, y_of(v)) for x, v in zip(middles, values, strict=True)]
        sketch.line(points, colors.accent, 4)
        for x, y in points:
            sketch.ellipse((x - 6, y - 6, x + 6, y + 6), colors.second)
    sketch.line([(x1, y1), (x1, y2), (x2, y2)], colors.ink, 2)

    canvas = sketch.canvas()
    place = words.place(rng)
    title = f"{name} in {place}"
    canvas.text((width / 2, 24), title, "sans-bold", rng.choice((26, 28, 30)), colors.ink, "ma")
    canvas.text((x1, 68), f"Unit: {unit}", "sans", 15, colors.ink)
    for tick in ticks:
        canvas.text((x1 - 10, y_of(tick)), str(tick), "sans", 15, colors.ink, "rm")
    for x, label in zip(middles, labels, strict=True):
        canvas.text((x, y2 + 10), label, "sans", 16, colors.ink, "ma")
    source = f"Source: {rng.choice(words.VENUES)} survey"
    canvas.text((width - 36, height - 30), source, "sans-oblique", 13, colors.ink, "ra")
    sort = "bar chart" if bars else "line chart"
    captions = [f"{sort.capitalize()} of {name.lower()} in {place}", f"{title} ({unit})"]
    return canvas.picture("chart", [sort], captions)


def pie_chart(rng: Random) -> Picture:
    """A pie chart with a legend of shares that sum to 100 %."""
    width, height = size = rng.choice(((760, 500), (820, 540)))
    colors = palette(rng)
    names = rng.sample([t.capitalize() for t in words.THINGS], rng.randint(3, 5))
    cuts = sorted(rng.sample(range(8, 93, 6), len(names) - 1))
    shares = [b - a for a, b in zip([0, *cuts], [*cuts, 100], strict=True)]
    fills = _series_colors(colors, len(names))
    sketch = Sketch(size, colors.paper)
    radius = (height - 170) / 2
    cx, cy = 60 + radius, 110 + radius
    angle = -90.0
    for share, fill in zip(shares, fills, strict=True):
        end = angle + share * 3.6
        sketch.pie((cx - radius, cy - radius, cx + radius, cy + radius), angle, end, fill)
        angle = end
    if rng.random() < 0.5:
        hole = radius * 0.5
        sketch.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), colors.paper)
    x = cx + radius + 60
    tops = [cy - len(names) * 24 + i * 48 for i in range(len(names))]
    for y, fill in zip(tops, fills, strict=True):
        sketch.rect((x, y, x + 26, y + 26), fill, radius=4)
    canvas = sketch.canvas()
    subject = rng.choice(words.SUBJECTS)
    title = f"{subject}: share of spending"
    canvas.text((width / 2, 32), title, "serif-bold", 28, colors.ink, "ma", width - 60)
    for y, name, share in zip(tops, names, shares, strict=True):
        canvas.text((x + 40, y + 13), f"{name} {share} %", "serif", 20, colors.ink, "lm")
    return canvas.picture("chart", ["pie chart"], [f"Pie chart: {title.lower()}"])


def chart(rng: Random, variant: int) -> Picture:
    if variant % 3 == 2:
        return pie_chart(rng)
    return axis_chart(rng, bars=variant % 3 == 0)


def timetable(rng: Random) -> Picture:
    """A departure table with a coloured head row and striped rows."""
    colors = palette(rng)
    rows = [
        (words.clock(rng), words.place(rng), f"{rng.randint(1, 14)}{rng.choice('ABC')}",
         rng.choice(("On time", "Delayed", "Boarding", "5 min late", "Cancelled")))
        for _ in range(rng.randint(6, 9))
    ]  # fmt: skip
    rows.sort()
    width, row_h = rng.choice((760, 820)), 48
    height = 130 + row_h * (len(rows) + 1)
    xs = (40, 170, width - 320, width - 200)
    sketch = Sketch((width, height), colors.paper)
    sketch.rect((24, 96, width - 24, 96 + row_h), colors.accent)
    for i in range(len(rows)):
        if i % 2:
            top = 96 + row_h * (i + 1)
            sketch.rect((24, top, width - 24, top + row_h), mix(colors.paper, colors.ink, 0.08))
    canvas = sketch.canvas()
    where = words.place(rng)
    face = rng.choice(("sans", "serif", "mono"))
    canvas.text(
        (40, 28), f"Departures from {where}", f"{face}-bold", 34, colors.ink, width=width - 80
    )
    for x, head in zip(xs, ("Time", "Destination", "Stop", "Status"), strict=True):
        canvas.text((x, 96 + row_h / 2), head, f"{face}-bold", 20, colors.on_accent, "lm")
    for i, row in enumerate(rows):
        for x, cell in zip(xs, row, strict=True):
            y = 96 + row_h * (i + 1.5)
            canvas.text((x, y), cell, face, 20, colors.ink, "lm", width=160)
    captions = [f"Departure board at {where}", f"Timetable of departures from {where}"]
    return canvas.picture("table", ["table"], captions)


def price_list(rng: Random) -> Picture:
    """A menu: dishes at the left, dotted leaders, prices at the right."""
    colors = palette(rng)
    dishes = rng.sample(words.FOODS, rng.randint(7, 10))
    width, height = 600, 210 + 50 * len(dishes)
    sketch = Sketch((width, height), colors.paper)
    sketch.rect((16, 16, width - 16, height - 16), outline=colors.accent, width=3, radius=12)
    prices = [words.price(rng) for _ in dishes]
    face = rng.choice(("serif", "times", "sans"))
    tops = [150 + 50 * i for i in range(len(dishes))]
    for y, dish, cost in zip(tops, dishes, prices, strict=True):
        x = 70 + font(face, 22).getlength(dish)
        while x < width - 74 - font(face, 22).getlength(cost):
            sketch.ellipse((x, y + 19, x + 3, y + 22), mix(colors.paper, colors.ink, 0.5))
            x += 12
    canvas = sketch.canvas()
    name = f"{rng.choice(words.VENUES)} Kitchen"
    canvas.text((width / 2, 46), name, f"{face}-bold", 38, colors.accent, "ma", width - 90)
    canvas.text((width / 2, 102), f"Lunch {words.hours(rng)}", face, 18, colors.ink, "ma")
    for y, dish, cost in zip(tops, dishes, prices, strict=True):
        canvas.text((56, y), dish, face, 22, colors.ink)
        canvas.text((width - 56, y), cost, face, 22, colors.ink, "ra")
    return canvas.picture("table", ["menu"], [f"Lunch menu of the {name}", f"{name} menu"])


def receipt(rng: Random) -> Picture:
    """A till receipt whose sum is right, on a table top."""
    goods = rng.sample(words.GOODS, rng.randint(6, 10))
    cents = [rng.randint(30, 1500) for _ in goods]
    width, height = 560, 330 + 36 * len(goods)
    desk = rng.choice(((122, 90, 62), (70, 84, 92), (150, 140, 128)))
    ink: Color = (40, 40, 48)
    sketch = Sketch((width, height), desk)
    sketch.rect((66, 26, width - 54, height - 14), mix(desk, (0, 0, 0), 0.35))
    sketch.rect((60, 20, width - 60, height - 20), (252, 251, 246))
    for y in (170, 186 + 36 * len(goods)):
        for x in range(84, width - 84, 12):
            sketch.line([(x, y), (x + 7, y)], ink)
    canvas = sketch.canvas()
    shop = f"{rng.choice(words.STREET_STEMS)} Corner Shop"
    canvas.text((width / 2, 44), shop.upper(), "mono-bold", 26, ink, "ma", width - 170)
    canvas.text((width / 2, 86), f"{rng.randint(1, 99)} {words.street(rng)}", "mono", 18, ink, "ma")
    canvas.text((width / 2, 118), f"{words.date(rng)} {words.clock(rng)}", "mono", 16, ink, "ma")
    for i, (item, cost) in enumerate(zip(goods, cents, strict=True)):
        canvas.text((86, 184 + 36 * i), item, "mono", 18, ink)
        canvas.text((width - 86, 184 + 36 * i), f"{cost / 100:.2f}", "mono", 18, ink, "ra")
    y = 204 + 36 * len(goods)
    canvas.text((86, y), "TOTAL", "mono-bold", 24, ink)
    canvas.text((width - 86, y), f"{sum(cents) / 100:.2f}", "mono-bold", 24, ink, "ra")
    thanks = rng.choice(("Thank you, come again", "Please keep this slip", "Have a good day"))
    canvas.text((width / 2, y + 54), thanks, "mono", 16, ink, "ma")
    return canvas.picture("receipt", ["receipt"], [f"Receipt from {shop}", "Paper till receipt"])


def table(rng: Random, variant: int) -> Picture:
    return (timetable, price_list, receipt)[variant % 3](rng)
