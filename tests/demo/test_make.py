"""The demo set as a whole: every claim of truth.json is checked against the bytes in the tars."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from rapidfuzz import fuzz
from rapidocr import RapidOCR

from fusion_pipeline.demo import DemoSummary, make_demo_data

Row = dict[str, Any]


@dataclass
class Demo:
    folder: Path
    summary: DemoSummary
    rows: list[Row]
    data: dict[str, bytes | None]  # image bytes by row name
    extension: dict[str, str]
    alt: dict[str, str]
    meta: dict[str, Any]

    def decoded(self, row: Row) -> Image.Image:
        """The row's image: upright, 8-bit RGB, on white."""
        data = self.data[row["name"]]
        assert data is not None
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            if opened.mode == "I;16":
                return Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8)).convert("RGB")
            upright = ImageOps.exif_transpose(opened).convert("RGBA")
        white = Image.new("RGBA", upright.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, upright).convert("RGB")


def read(folder: Path, summary: DemoSummary) -> Demo:
    truth = json.loads((folder / "truth.json").read_text())
    demo = Demo(folder, summary, truth["rows"], {}, {}, {}, {})
    tars = sorted(str(p) for p in (folder / "shards").iterdir())
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        name = sample["__key__"]
        images = [k for k in sample if k not in ("txt", "json") and not k.startswith("__")]
        assert len(images) <= 1
        demo.data[name] = sample[images[0]] if images else None
        demo.extension[name] = images[0] if images else ""
        demo.alt[name] = sample["txt"].decode()
        demo.meta[name] = json.loads(sample["json"])
        assert Path(sample["__url__"]).name == _row(demo, name)["tar"]
    return demo


def _row(demo: Demo, name: str) -> Row:
    (row,) = [r for r in demo.rows if r["name"] == name]
    return row


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    folder = tmp_path_factory.mktemp("demo")
    return read(folder, make_demo_data(folder, seed=5))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_content(
    demo: Demo, tmp_path: Path
) -> None:
    make_demo_data(tmp_path, seed=6)
    six = _files(tmp_path)
    other = read(tmp_path, make_demo_data(tmp_path, seed=5))  # over the files of seed 6
    assert _files(tmp_path) == _files(demo.folder) == _files(other.folder)

    five = _files(demo.folder)
    assert set(six) == set(five)
    assert all(six[name] != five[name] for name in five)
    rows = json.loads(six["truth.json"])["rows"]
    assert len(rows) == len(demo.rows)

    def plan(rows: list[Row]) -> set[tuple[str, str]]:
        return {(r["content"], r["copy_kind"]) for r in rows if r["copy_kind"]}

    def words(rows: list[Row]) -> set[str]:
        return {line["text"] for r in rows for line in r["texts"] if len(line["text"]) > 12}

    assert plan(rows) != plan(demo.rows)
    assert [r["content"] for r in rows] != [r["content"] for r in demo.rows]
    assert len(words(rows) & words(demo.rows)) < 0.3 * len(words(rows))


def test_webdataset_reads_every_row_and_the_alt_text_is_the_truths(demo: Demo) -> None:
    assert len(demo.rows) >= 160
    assert [r["name"] for r in demo.rows] == list(demo.data)
    assert demo.summary.rows == len(demo.rows)
    assert demo.summary.tars == len({r["tar"] for r in demo.rows}) >= 8
    assert demo.summary.bytes < 25_000_000
    for row in demo.rows:
        assert demo.alt[row["name"]] == row["alt"] == demo.meta[row["name"]]["caption"]
        assert (row["alt"] == "") == (row["alt_kind"] == "empty")


def test_everything_that_should_be_planted_is_there(demo: Demo) -> None:
    copies = Counter(r["copy_kind"] for r in demo.rows if r["copy_kind"])
    for kind in ("jpeg_q30", "crop90", "mirror", "half", "format"):
        sources = [_row(demo, r["copy_of"])["kind"] for r in demo.rows if r["copy_kind"] == kind]
        assert len(sources) >= 3
        assert any(s == "photo" for s in sources)
        assert any(s != "photo" for s in sources)
    semantic = sum(n for kind, n in copies.items() if kind.startswith("semantic:"))
    assert semantic == demo.summary.semantic_copies >= 8
    assert copies["exact:same_tar"] == copies["exact:other_tar"] == 1

    alts = Counter(r["alt_kind"] for r in demo.rows)
    assert set(alts) == {"helpful", "vague", "wrong", "spam", "empty", "hostile"}
    assert min(alts.values()) >= 4

    reasons = Counter(r["expected"]["reason"] for r in demo.rows)
    assert reasons.pop(None) == demo.summary.ingest_ok
    vocabulary = "no_image empty not_an_image corrupt truncated too_many_pixels"
    assert set(reasons) == set(vocabulary.split())
    assert sum(reasons.values()) == demo.summary.ingest_failed
    filtered = sum(r["expected"]["resolution"] == "filtered" for r in demo.rows)
    assert filtered == demo.summary.resolution_filtered >= 4

    decks = Counter(r["content"].split("-")[0] for r in demo.rows if r["kind"] == "slide")
    assert min(n for deck, n in decks.items() if deck.startswith("slide/")) >= 5
    kinds = Counter(r["kind"] for r in demo.rows)
    for kind in ("photo", "poster", "slide", "chart", "sign", "screenshot", "label", "table"):
        assert kinds[kind] >= 8, kind


def test_good_images_decode_as_the_truth_says(demo: Demo) -> None:
    for row in demo.rows:
        if row["expected"]["ingest"] != "ok":
            continue
        image = demo.decoded(row)
        assert list(image.size) == row["upright_size"], row["name"]
        data = demo.data[row["name"]]
        assert data is not None
        with Image.open(io.BytesIO(data)) as opened:
            assert opened.format == row["format"].upper()
            stored = [demo.meta[row["name"]][k] for k in ("width", "height")]
            assert stored == list(opened.size)
        expected = "ok" if min(image.size) >= 256 else "filtered"
        assert row["expected"]["resolution"] == expected


def test_odd_files_are_as_odd_as_their_names(demo: Demo) -> None:
    odd = {r["oddity"]: r["name"] for r in demo.rows if r["oddity"]}

    def opened(oddity: str) -> Image.Image:
        data = demo.data[odd[oddity]]
        assert data is not None
        return Image.open(io.BytesIO(data))

    assert demo.extension[odd["png_named_jpg"]] == "jpg"
    assert opened("png_named_jpg").format == "PNG"
    assert demo.extension[odd["jpeg_named_png"]] == "png"
    assert opened("jpeg_named_png").format == "JPEG"
    assert getattr(opened("animated_gif"), "n_frames", 1) == 3
    assert opened("cmyk_jpeg").mode == "CMYK"
    assert opened("gray_jpeg").mode == "L"
    deep = opened("gray_16_bit_png")
    assert deep.mode == "I;16"
    assert len(np.unique(np.asarray(deep))) > 256
    palette = opened("palette_png_transparent")
    assert palette.mode == "P"
    assert np.asarray(palette.convert("RGBA"))[..., 3].min() == 0
    for orientation in (3, 6, 8):
        assert opened(f"exif_orientation_{orientation}").getexif()[0x0112] == orientation
    assert min(opened("short_edge_256").size) == 256
    assert min(opened("short_edge_255").size) == 255
    assert opened("one_pixel").size == (1, 1)


def test_bad_files_cannot_be_decoded_and_fail_for_their_own_reason(demo: Demo) -> None:
    for row in demo.rows:
        reason, data = row["expected"]["reason"], demo.data[row["name"]]
        if reason is None:
            continue
        assert row["upright_size"] is None
        assert row["expected"]["resolution"] is None
        if reason == "no_image":
            assert data is None
            assert demo.meta[row["name"]]["status"] != "success"
            continue
        assert data is not None
        assert (data == b"") == (reason == "empty")
        error = {
            "truncated": OSError,
            "corrupt": OSError,
            "too_many_pixels": Image.DecompressionBombError,
        }.get(reason, UnidentifiedImageError)
        with pytest.raises(error) as caught:
            Image.open(io.BytesIO(data)).load()
        assert ("truncated" in str(caught.value)) == (reason == "truncated")
        signed = data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF"))
        assert signed == (reason in ("corrupt", "truncated", "too_many_pixels"))
        assert len(data) < 300_000


def test_every_text_line_has_its_own_place_with_ink_in_it(demo: Demo) -> None:
    seen = 0
    for row in demo.rows:
        if not row["texts"]:
            continue
        width, height = row["upright_size"]
        gray = np.asarray(demo.decoded(row).convert("L")).astype(int)
        taken = np.zeros((height, width), bool)
        for line in row["texts"]:
            x1, y1, x2, y2 = line["box"]
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            assert line["text"].isascii()
            if row["copy_kind"] != "half":  # halved boxes may share a pixel row
                assert 12 <= line["px"] <= 64
                assert not taken[y1:y2, x1:x2].any(), (row["name"], line)
                taken[y1:y2, x1:x2] = True
            ink = gray[y1:y2, x1:x2]
            assert ink.max() - ink.min() > 60, (row["name"], line)
            seen += 1
    assert seen > 1000


def test_text_of_turned_photos_is_read_where_the_truth_says(demo: Demo) -> None:
    ocr = RapidOCR(params={"Det.limit_type": "max", "Det.limit_side_len": 960})
    turned = [r for r in demo.rows if str(r["oddity"]).startswith("exif_orientation")]
    assert len(turned) == 3
    for row in turned:
        result = ocr(np.asarray(demo.decoded(row))[..., ::-1])
        centres = np.asarray(result.boxes).mean(axis=1)
        for line in row["texts"]:
            x1, y1, x2, y2 = line["box"]
            here = (centres > (x1, y1)).all(axis=1) & (centres < (x2, y2)).all(axis=1)
            (text,) = (t for t, inside in zip(result.txts, here, strict=True) if inside)
            assert fuzz.ratio(text.replace(" ", ""), line["text"].replace(" ", "")) > 80


def _gray(image: Image.Image, size: tuple[int, int] | None = None) -> NDArray[np.float32]:
    gray = image.convert("L")
    return np.asarray(gray.resize(size) if size else gray, np.float32)


def test_copies_show_what_their_sources_show(demo: Demo) -> None:
    for row in demo.rows:
        kind = row["copy_kind"]
        if kind is None:
            assert row["copy_of"] is None
            continue
        source = _row(demo, row["copy_of"])
        assert source["copy_of"] is None
        assert source["content"] == row["content"]
        assert row["expected"]["ingest"] == source["expected"]["ingest"] == "ok"
        assert row["expected"]["resolution"] == "ok"
        if kind.startswith("exact:"):
            assert demo.data[row["name"]] == demo.data[source["name"]]
            assert (row["tar"] == source["tar"]) == (kind == "exact:same_tar")
            continue
        assert demo.data[row["name"]] != demo.data[source["name"]]
        copy, origin = demo.decoded(row), demo.decoded(source)
        if kind in ("crop90", "semantic:crop70"):
            score = cv2.matchTemplate(_gray(origin), _gray(copy), cv2.TM_CCOEFF_NORMED).max()
            assert score > 0.9, (row["content"], kind)
            share = copy.width / origin.width
            assert share == pytest.approx(0.9 if kind == "crop90" else 0.7, abs=0.01)
        elif kind in ("jpeg_q30", "half", "format", "mirror"):
            like = ImageOps.mirror(copy) if kind == "mirror" else copy
            assert like.width == (origin.width // 2 if kind == "half" else origin.width)
            gap = np.abs(_gray(like, (128, 128)) - _gray(origin, (128, 128))).mean()
            assert gap < 3, (row["content"], kind)
        else:
            same = copy.size == origin.size
            assert same == (kind == "semantic:color")
            small = [np.asarray(i.resize((64, 64)), float) for i in (copy, origin)]
            assert np.abs(small[0] - small[1]).mean() > 8, (row["content"], kind)
    originals = [r["content"] for r in demo.rows if r["copy_of"] is None]
    assert len(set(originals)) == len(originals)


def test_a_folder_with_other_shards_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine.tar").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match=r"mine\.tar"):
        make_demo_data(tmp_path)
    assert _files(tmp_path) == {"shards/mine.tar": b"precious"}
