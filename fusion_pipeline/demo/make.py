"""Put the demo set together: alt texts, order, tars and the truth about every row."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import webdataset
from PIL import Image

from . import alt_text, plan
from .canvas import TextLine
from .plan import MIN_SHORT_EDGE, Item

ROWS_PER_TAR = 20


@dataclass(frozen=True)
class DemoSummary:
    """Counts of what was written. `bytes` is the size of all tars together."""

    tars: int
    rows: int
    ingest_ok: int
    ingest_failed: int
    resolution_filtered: int
    near_copies: int
    semantic_copies: int
    exact_copies: int
    bytes: int


@dataclass
class _Row:
    item: Item
    tar: str
    name: str
    alt_kind: str
    alt: str


def _ordered(items: list[Item], rng: Random) -> list[Item]:
    """A shuffled order in which the twins lie in the tars that their kind says."""
    order = list(items)
    rng.shuffle(order)
    pinned = {i for i in items if (i.copy_kind or "").startswith("exact:")}
    pinned |= {i.source for i in pinned if i.source}
    for twin in [i for i in order if (i.copy_kind or "").startswith("exact:")]:
        assert twin.source is not None
        here, home = order.index(twin), order.index(twin.source) // ROWS_PER_TAR
        same = twin.copy_kind == "exact:same_tar"
        if (here // ROWS_PER_TAR == home) == same:
            continue
        places = [
            at
            for at, item in enumerate(order)
            if item not in pinned and (at // ROWS_PER_TAR == home) == same
        ]
        there = rng.choice(places)
        order[here], order[there] = order[there], order[here]
    return order


def _alt(kind: str, item: Item, others: list[Item], hostile: Iterator[str], rng: Random) -> str:
    match kind:
        case "helpful":
            captions = item.picture.captions if item.picture else ["A picture of the harbour"]
            return alt_text.helpful(captions, rng)
        case "wrong":
            other = rng.choice([o for o in others if o.kind != item.kind])
            assert other.picture is not None
            return alt_text.helpful(other.picture.captions, rng)
        case "vague":
            return alt_text.vague(rng)
        case "spam":
            return alt_text.spam(rng)
        case "hostile":
            return next(hostile)
    return ""


def _rows(items: list[Item], seed: str) -> list[_Row]:
    order = _ordered(items, Random(f"{seed}/order"))
    rng = Random(f"{seed}/alt")
    hostile = iter(rng.sample(alt_text.HOSTILE, len(alt_text.HOSTILE)))
    others = [i for i in order if i.picture and i.picture.captions]
    rows = []
    for at, (item, kind) in enumerate(zip(order, alt_text.kinds(len(order), rng), strict=True)):
        tar, index = divmod(at, ROWS_PER_TAR)
        alt = _alt(kind, item, others, hostile, rng)
        rows.append(_Row(item, f"{tar:05d}.tar", f"{tar:05d}{index:04d}", kind, alt))
    return rows


def _stored_size(item: Item) -> tuple[int | None, int | None]:
    """Width and height as a crawler would report them: of the pixels as stored."""
    if item.picture is None or item.data is None:
        return None, None
    with Image.open(io.BytesIO(item.data)) as image:
        return image.size


def _metadata(row: _Row, rng: Random) -> dict[str, Any]:
    """The `.json` member, with the fields that img2dataset writes."""
    width, height = _stored_size(row.item)
    data = row.item.data
    page = f"{rng.choice(('media', 'img', 'cdn', 'static'))}{rng.randint(1, 9)}"
    missing = data is None
    return {
        "caption": row.alt,
        "url": f"https://{page}.example.com/{rng.getrandbits(40):010x}.{row.item.extension}",
        "key": row.name,
        "status": "failed_to_download" if missing else "success",
        "error_message": "HTTP Error 404: Not Found" if missing else None,
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "exif": "{}",
        "sha256": None if data is None else hashlib.sha256(data).hexdigest(),
    }


def _texts(lines: list[TextLine]) -> list[dict[str, Any]]:
    return [asdict(line) for line in lines]


def _truth(row: _Row, names: dict[Item, str]) -> dict[str, Any]:
    item, picture = row.item, row.item.picture
    if picture is None:
        resolution = None  # never gets that far
    else:
        resolution = "ok" if picture.short_edge >= MIN_SHORT_EDGE else "filtered"
    return {
        "tar": row.tar,
        "name": row.name,
        "content": item.content,
        "copy_of": names[item.source] if item.source else None,
        "copy_kind": item.copy_kind,
        "oddity": item.oddity,
        "kind": item.kind,
        "alt_kind": row.alt_kind,
        "alt": row.alt,
        "expected": {
            "ingest": "failed" if item.reason else "ok",
            "reason": item.reason,
            "resolution": resolution,
        },
        "upright_size": list(picture.image.size) if picture else None,
        "format": item.format,
        "texts": _texts(picture.texts) if picture else [],
        "cut_texts": _texts(picture.cut_texts) if picture else [],
        "objects": picture.objects if picture else [],
    }


def _tar(rows: list[_Row], seed: str) -> bytes:
    """A WebDataset tar; its headers hold no time and no user."""
    out = io.BytesIO()
    with webdataset.TarWriter(out, encoder=False, mtime=0, user="root", group="root") as writer:
        for row in rows:
            metadata = _metadata(row, Random(f"{seed}/metadata/{row.name}"))
            sample: dict[str, str | bytes] = {"__key__": row.name}
            if row.item.data is not None:
                sample[row.item.extension] = row.item.data
            sample["txt"] = row.alt.encode()
            sample["json"] = json.dumps(metadata).encode()
            writer.write(sample)
    return out.getvalue()


def _write(path: Path, data: bytes) -> None:
    """`data` under `path`, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def make_demo_data(out: Path, seed: int = 0) -> DemoSummary:
    """Write a small web-like data set to `out/shards/*.tar` and what is true of it.

    The tars are WebDatasets as img2dataset writes them: `NNNNNNNNN.<ext>`, `.txt` (alt text) and
    `.json`. Nothing is downloaded. The same seed gives the same bytes (with the same versions of
    Pillow, numpy, matplotlib and scikit-image); the number of rows is the same for every seed.

    `out/truth.json` is `{"seed", "min_short_edge", "rows"}`. Each row names its place (`tar`,
    `name`); its `content`, shared with all copies of it, `copy_of` (the source's `name`) and
    `copy_kind`: jpeg_q30, crop90, mirror, half, format (near-exact), exact:same_tar,
    exact:other_tar (same bytes), semantic:crop70, :color, :banner, :border; `oddity` (a file
    planted for what it is); `alt_kind` and `alt`; the `expected` outcomes `ingest` (ok, failed),
    its `reason` (no_image, empty, not_an_image, corrupt, truncated, too_many_pixels) and
    `resolution` (ok, filtered; null where ingest fails); `upright_size` [width, height] and the
    real `format`; `texts`, every wholly visible rendered line with its em size `px` and its ink
    `box` [x1, y1, x2, y2) in upright pixels; `cut_texts`, the lines that a crop has cut through,
    with their whole text and the box of what is left; `objects`, some of what is to be seen
    (a crop's are its source's and may lie outside it). Text inside real photos is not annotated.

    Raises FileExistsError where `out/shards` holds files that this function doesn't write, and
    ModuleNotFoundError where scikit-image or matplotlib (the `demo` extra) is missing.
    """
    base = f"demo/{seed}"
    found = plan.originals(base)
    items = [item for item, _ in found]
    items += plan.copies(found, base)
    items += plan.twins([item for item, _ in found], base)
    items += plan.odd_items(base)
    rows = _rows(items, base)
    by_tar: dict[str, list[_Row]] = {}
    for row in rows:
        by_tar.setdefault(row.tar, []).append(row)

    shards = out / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    foreign = sorted({p.name for p in shards.iterdir()} - set(by_tar))
    if foreign:
        raise FileExistsError(f"{shards} holds other files, such as {foreign[0]}")
    names = {row.item: row.name for row in rows}
    truths = [_truth(row, names) for row in rows]
    size = 0
    for tar, members in by_tar.items():
        data = _tar(members, base)
        _write(shards / tar, data)
        size += len(data)
    _write(out / "truth.json", _truth_file(seed, truths))
    return _summary(truths, len(by_tar), size)


def _truth_file(seed: int, truths: list[dict[str, Any]]) -> bytes:
    """JSON with one row a line."""
    rows = ",\n".join(json.dumps(truth) for truth in truths)
    head = f'{{"seed": {seed}, "min_short_edge": {MIN_SHORT_EDGE}, "rows": [\n'
    return f"{head}{rows}\n]}}\n".encode()


def _summary(truths: list[dict[str, Any]], tars: int, size: int) -> DemoSummary:
    kinds = [t["copy_kind"] for t in truths if t["copy_kind"]]
    semantic = sum(kind.startswith("semantic:") for kind in kinds)
    exact = sum(kind.startswith("exact:") for kind in kinds)
    expected = [t["expected"] for t in truths]
    failed = sum(e["ingest"] == "failed" for e in expected)
    return DemoSummary(
        tars=tars,
        rows=len(truths),
        ingest_ok=len(truths) - failed,
        ingest_failed=failed,
        resolution_filtered=sum(e["resolution"] == "filtered" for e in expected),
        near_copies=len(kinds) - semantic - exact,
        semantic_copies=semantic,
        exact_copies=exact,
        bytes=size,
    )
