"""What the demo set holds: originals, planted copies, odd and bad files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from . import documents, edits, graphics, illustrations, oddities, photos, screens
from .canvas import Picture

MIN_SHORT_EDGE = 256

# How many originals of each kind, beside the photos and the slides.
RENDERED: tuple[tuple[str, Callable[[Random, int], Picture], int], ...] = (
    ("poster", graphics.poster, 12),
    ("sign", graphics.sign, 12),
    ("label", graphics.label, 10),
    ("illustration", illustrations.illustration, 8),
    ("chart", documents.chart, 12),
    ("table", documents.table, 12),
    ("screenshot", screens.screenshot, 12),
)
TEMPLATES, SLIDES_EACH = 3, 5


@dataclass(frozen=True)
class CopyRule:
    """How often a kind of copy is planted, and of what."""

    kind: str
    photos: int
    rendered: int
    least_edge: int = 0  # of the source's short edge, so that the copy isn't undersized


COPIES = (
    CopyRule("jpeg_q30", 4, 4),
    CopyRule("crop90", 4, 4, 285),
    CopyRule("mirror", 4, 2),
    CopyRule("half", 2, 4, 2 * MIN_SHORT_EDGE),
    CopyRule("format", 3, 4),
    CopyRule("semantic:crop70", 3, 2, 366),
    CopyRule("semantic:color", 3, 2),
    CopyRule("semantic:banner", 2, 2),
    CopyRule("semantic:border", 2, 1),
)


@dataclass(eq=False)
class Item:
    """One row before it has a place. `picture` is None where nothing can be decoded."""

    content: str
    kind: str
    data: bytes | None
    extension: str
    format: str | None
    picture: Picture | None
    source: Item | None = None
    copy_kind: str | None = None
    oddity: str | None = None
    reason: str | None = None


def _original(content: str, picture: Picture, rng: Random) -> Item:
    format, quality = rng.choice(
        (("jpeg", 92), ("jpeg", 86), ("jpeg", 80), ("jpeg", 90), ("png", 100), ("webp", 85))
    )
    if picture.kind in ("photo", "sign", "label") and format == "png":
        format, quality = "jpeg", 95  # noise makes PNGs needlessly large
    data = edits.encode(picture.image, format, quality)
    return Item(content, picture.kind, data, edits.EXTENSIONS[format], format, picture)


def originals(seed: str) -> list[tuple[Item, photos.Photo | None]]:
    """Photos (each with its record) and rendered pictures, each content once."""
    found: list[tuple[Item, photos.Photo | None]] = []
    for photo, picture in photos.load_all(photos.PHOTOS, seed):
        name = f"photo/{photo.file.rsplit('.', 1)[0]}"
        found.append((_original(name, picture, Random(f"{seed}/{name}/file")), photo))
    for number in range(TEMPLATES):
        template = documents.slide_template(Random(f"{seed}/template/{number}"), number)
        for i in range(1, SLIDES_EACH + 1):
            name = f"slide/{number}-{i}"
            picture = documents.slide(template, Random(f"{seed}/{name}"), i)
            found.append((_original(name, picture, Random(f"{seed}/{name}/file")), None))
    for kind, draw, count in RENDERED:
        for i in range(count):
            name = f"{kind}/{i}"
            picture = draw(Random(f"{seed}/{name}"), i)
            found.append((_original(name, picture, Random(f"{seed}/{name}/file")), None))
    return found


def _copied(source: Item, kind: str, rng: Random) -> Item:
    assert source.picture is not None
    picture, format, quality = source.picture, "jpeg", 88
    match kind:
        case "jpeg_q30":
            quality = 30
        case "crop90":
            picture = edits.crop_share(picture, 0.9, rng)
        case "mirror":
            picture = edits.mirror(picture)
        case "half":
            picture = edits.half(picture)
        case "format":
            format = rng.choice([f for f in ("png", "webp") if f != source.format])
        case "semantic:crop70":
            picture = edits.crop_share(picture, 0.7, rng)
        case "semantic:color":
            picture = edits.grade(picture, rng)
        case "semantic:banner":
            picture = edits.banner(picture, rng)
        case "semantic:border":
            picture = edits.border(picture, rng)
        case _:
            raise ValueError(f"unknown kind of copy {kind!r}")
    data = edits.encode(picture.image, format, quality)
    extension = edits.EXTENSIONS[format]
    return Item(source.content, source.kind, data, extension, format, picture, source, kind)


def _fits(rule: CopyRule, item: Item, photo: photos.Photo | None) -> bool:
    assert item.picture is not None
    if rule.kind == "mirror":
        return not item.picture.texts and (photo is None or photo.mirror)
    return item.picture.short_edge >= rule.least_edge


def copies(found: list[tuple[Item, photos.Photo | None]], seed: str) -> list[Item]:
    """Edited copies by `COPIES`; which original gets which copy depends on the seed."""
    made = []
    for rule in COPIES:
        rng = Random(f"{seed}/copies/{rule.kind}")
        for wanted, of_photos in ((rule.photos, True), (rule.rendered, False)):
            pool = [
                item
                for item, photo in found
                if (photo is not None) == of_photos and _fits(rule, item, photo)
            ]
            made += [_copied(source, rule.kind, rng) for source in rng.sample(pool, wanted)]
    return made


def twins(found: list[Item], seed: str) -> tuple[Item, Item]:
    """The same bytes again, twice: for the source's own tar, and for another tar."""
    rng = Random(f"{seed}/twins")
    a, b = (
        Item(s.content, s.kind, s.data, s.extension, s.format, s.picture, s, kind)
        for s, kind in zip(rng.sample(found, 2), ("exact:same_tar", "exact:other_tar"), strict=True)
    )
    return a, b


def odd_items(seed: str) -> list[Item]:
    """Odd, undersized and bad files."""
    files = [*oddities.good_files(seed), *oddities.undersized_files(seed)]
    items = [
        Item(
            f"odd/{file.name}",
            file.picture.kind if file.picture else "bad",
            file.data,
            file.extension,
            file.format,
            file.picture,
            oddity=file.name,
            reason=file.reason,
        )
        for file in [*files, *oddities.bad_files(seed)]
    ]
    for photo, picture in photos.load_all(photos.SMALL_PHOTOS, seed):
        name = photo.file.rsplit(".", 1)[0]
        data = edits.encode(picture.image, "jpeg", 92)
        items.append(
            Item(f"photo/{name}", "photo", data, "jpg", "jpeg", picture, oddity=f"small_{name}")
        )
    return items
