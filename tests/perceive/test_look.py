"""What is measured on pixels and files, on pictures made to have it."""

import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fusion_pipeline.dataset.images import RGB, DecodeError, decode, jpeg_tables, layout_of
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.engine.stage import ShardBlock, ShardImages
from fusion_pipeline.perceive.look import COLUMNS, Look, jpeg_quality, look_at, measure
from tests.toy import run_toy, toy_steps

Photo = Callable[[str], RGB]


@settings(max_examples=60, deadline=None)
@given(quality=st.integers(1, 100), mode=st.sampled_from(["RGB", "L"]))
def test_a_jpegs_quality_is_what_it_was_saved_with(quality: int, mode: str) -> None:
    sink = io.BytesIO()
    Image.new(mode, (16, 16), "gray").save(sink, "JPEG", quality=quality)
    assert jpeg_quality(jpeg_tables(sink.getvalue())) == quality


def test_other_formats_have_no_such_quality() -> None:
    sink = io.BytesIO()
    Image.new("RGB", (16, 16)).save(sink, "PNG")
    assert jpeg_quality(jpeg_tables(sink.getvalue())) is None
    with pytest.raises(DecodeError):
        jpeg_tables(b"<html>")


def test_blur_takes_sharpness_away_enlarging_does_not(photo: Photo) -> None:
    image = photo("astronaut.png")
    blurred = [cv2.GaussianBlur(image, (0, 0), sigma) for sigma in (1, 2, 4)]
    found = [measure(one)["sharpness"] for one in (image, *blurred)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 800 > 100 > found[1] > 15 > found[2]
    large = cv2.resize(image, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    assert measure(large)["sharpness"] > found[0] / 2


def test_a_file_says_the_same_in_any_format(photo: Photo) -> None:
    """A JPEG is decoded at a smaller scale, where that loses nothing."""
    image = cv2.resize(photo("astronaut.png"), (4200, 4200), interpolation=cv2.INTER_CUBIC)
    jpeg = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 97])[1].tobytes()
    png = cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
    found, expected = look_at(jpeg), look_at(png)
    assert (found["jpeg_quality"], expected["jpeg_quality"]) == (97, None)
    assert found["sharpness"] == pytest.approx(expected["sharpness"], rel=0.05)
    assert found["colours"][0]["name"] == expected["colours"][0]["name"]


def test_exposure(photo: Photo) -> None:
    image = photo("coffee.png").astype(np.float32)
    normal, under, over = (
        measure(one.clip(0, 255).astype(np.uint8)) for one in (image, image * 0.1, image * 3)
    )
    assert under["brightness"] < normal["brightness"] < over["brightness"]
    assert under["dark"] > 0.3 > normal["dark"]
    assert over["bright"] > 0.2 > 0.1 > normal["bright"]
    flat = measure(np.full((50, 50, 3), 128, np.uint8))
    assert (flat["contrast"], flat["sharpness"], flat["dark"], flat["bright"]) == (0, 0, 0, 0)


def test_colours_and_their_absence(photo: Photo) -> None:
    image = np.zeros((100, 200, 3), np.uint8)
    image[:, :150], image[:, 150:] = (200, 30, 30), (40, 90, 200)
    found = measure(image)
    assert [(c["name"], c["share"]) for c in found["colours"]] == [("red", 0.75), ("blue", 0.25)]
    assert not found["grey"]
    assert measure(photo("camera.png"))["grey"]
    sepia = photo("camera.png") * np.array([1, 0.85, 0.65])
    assert not measure(sepia.astype(np.uint8))["grey"]


def test_layout() -> None:
    sizes = [(300, 400), (400, 300), (400, 400), (400, 390), (1, 3000)]
    assert [layout_of(*size) for size in sizes] == [
        "portrait", "landscape", "square", "square", "portrait",
    ]  # fmt: skip


def test_any_size_is_measured(odd_images: list[RGB]) -> None:
    for image in odd_images:
        found = measure(image)
        assert all(np.isfinite(v) for v in found.values() if isinstance(v, float))


def test_a_row_for_every_image(tmp_path: Path) -> None:
    run_toy(tmp_path, range(1), toy_steps()[:1])
    dataset = Dataset.open(tmp_path)
    tables = {"samples": dataset.read_table("samples", 0)[0]}
    block = ShardBlock(dataset, 0, tables, ShardImages(dataset, 0))
    block.images[2] = block.images[2][:50]
    rows = Look().open()(block).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", *["ok"] * (len(rows) - 3)]
    assert rows[0].keys() == {"key", "status", "reason", *(field.name for field in COLUMNS)}
    assert decode(block.images[0]).shape[:2] == (8, 8)
    assert rows[0]["layout"] == "square"
