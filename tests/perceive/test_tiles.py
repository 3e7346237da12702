"""Tiles: what is small in a large image is found, once, and where it is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experts.base import Context, Hardware
from experts.detection.nanodet import NanoDet, NanoDetConfig
from fusion_pipeline.dataset.evidence import Box, DetectedObject, iou
from fusion_pipeline.dataset.images import RGB
from fusion_pipeline.perceive.tiles import Tiled, TilesConfig, tiles_of


class Squares:
    """Finds what is white, but nothing that is less than a 32nd of what it is shown."""

    min_short_edge = 32

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(
        self, images: Sequence[RGB], context: Sequence[Context]
    ) -> list[list[DetectedObject]]:
        self.calls.append(len(images))
        assert [(c.height, c.width) for c in context] == [image.shape[:2] for image in images]
        return [self._look(image) for image in images]

    def _look(self, image: RGB) -> list[DetectedObject]:
        height, width = image.shape[:2]
        _, _, stats, _ = cv2.connectedComponentsWithStats((image[..., 0] > 99).astype(np.uint8))
        return [
            DetectedObject(
                "square", 0.5, (x / width, y / height, (x + w) / width, (y + h) / height)
            )
            for x, y, w, h, _ in stats[1:].tolist()
            if max(w, h) >= max(width, height) / 32
        ]


def look(image: RGB, detector: Any = None, **settings: Any) -> list[DetectedObject]:
    tiled = Tiled(detector or Squares(), TilesConfig(**settings))
    context = Context(image.shape[1], image.shape[0], key="k")
    [found] = tiled(image, context, 2, lambda: None)
    return list(found)


@given(
    width=st.integers(1, 5000), height=st.integers(1, 5000), edge=st.integers(64, 900),
    overlap=st.floats(0, 0.5), most=st.integers(2, 40), data=st.data(),
)  # fmt: skip
def test_tiles_cover_the_image_and_hold_small_things_whole(
    width: int, height: int, edge: int, overlap: float, most: int, data: st.DataObject
) -> None:
    config = TilesConfig(edge=edge, overlap=overlap, most=most)
    tiles = tiles_of(width, height, config)
    if max(width, height) < 1.25 * edge:
        assert tiles == []
    if not tiles:
        return
    assert len(tiles) > 1  # else the whole image would be looked at twice
    assert len(set(tiles)) == len(tiles) <= most
    for tile in tiles:
        assert 0 <= tile.x <= tile.x + tile.width <= width
        assert 0 <= tile.y <= tile.y + tile.height <= height
    side = max(1, int(edge * overlap) - 1)
    w, h = min(side, width), min(side, height)
    x, y = data.draw(st.integers(0, width - w)), data.draw(st.integers(0, height - h))
    assert any(
        t.x <= x and t.y <= y and x + w <= t.x + t.width and y + h <= t.y + t.height for t in tiles
    )


def test_small_and_large_things_are_found_once_where_they_are() -> None:
    """Everything from 20 pixels to half of the frame, many of them across the tiles' edges."""
    random, boxes = np.random.default_rng(7), list[Box]()
    image = np.zeros((1500, 2000, 3), np.uint8)
    taken = np.zeros((1500, 2000), bool)
    for side in [800, 400, 200, *[20 + 3 * n for n in range(40)]]:
        while True:
            x, y = int(random.integers(0, 2000 - side)), int(random.integers(0, 1500 - side))
            around = np.s_[max(0, y - 4) : y + side + 4, max(0, x - 4) : x + side + 4]
            if not taken[around].any():
                break
        taken[around] = True
        image[y : y + side, x : x + side] = 255
        boxes.append((x / 2000, y / 1500, (x + side) / 2000, (y + side) / 1500))
    found = look(image, edge=600)
    assert sorted(o.box for o in found) == [pytest.approx(box, abs=1e-9) for box in sorted(boxes)]
    alone = look(image, edge=2000)  # no tiles
    assert len(alone) < 0.7 * len(boxes)


def test_tiles_come_in_batches_and_each_is_a_sign_of_life() -> None:
    squares, ticks = Squares(), list[int]()
    tiled, context = Tiled(squares, TilesConfig(edge=600)), Context(1200, 900, key="k")
    image = np.zeros((900, 1200, 3), np.uint8)
    count = 1 + len(tiles_of(1200, 900, TilesConfig(edge=600)))
    tiled(image, context, 4, lambda: ticks.append(1))
    assert squares.calls == [4] * (count // 4) + [count % 4] * (count % 4 > 0)
    assert len(ticks) == len(squares.calls)


def test_images_without_tiles_are_looked_at_as_before() -> None:
    """Boxes that lie upon each other are the detector's own business there."""

    class Twins(Squares):
        def _look(self, image: RGB) -> list[DetectedObject]:
            return [DetectedObject("cat", s, (0, 0, 1, 1)) for s in (0.5, 0.9)]

    twins = Twins()
    found = look(np.zeros((400, 700, 3), np.uint8), twins, edge=600)
    assert [o.score for o in found] == [0.5, 0.9]
    assert twins.calls == [1]


def test_only_images_with_tiles_are_decoded_in_full() -> None:
    tiled = Tiled(Squares(), TilesConfig(edge=600))
    assert tiled.min_short_edge(Context(700, 700)) == 32
    assert tiled.min_short_edge(Context(800, 700)) is None


def test_boxes_that_are_no_numbers_fail_their_row() -> None:
    """A box less would be a wrong answer."""

    class Broken(Squares):
        def _look(self, image: RGB) -> list[DetectedObject]:
            return [DetectedObject("cat", 0.5, (float("nan"),) * 4)]

    with pytest.raises(ValueError, match="not_finite"):
        look(np.zeros((900, 1200, 3), np.uint8), Broken(), edge=600)


def test_nanodet_finds_small_people_in_six_megapixels() -> None:
    """Twelve portraits of 260 pixels."""
    data = Path(skimage.__file__).parent / "data"
    portrait = Image.open(data / "astronaut.png").resize((260, 260))
    detector = NanoDet(NanoDetConfig(score_floor=0.35), Hardware())
    [[person]] = detector([np.asarray(portrait)], [])
    canvas, truth = Image.new("RGB", (3000, 2000), (150, 120, 90)), list[Box]()
    for number in range(12):
        x, y = 60 + number % 4 * 720, 90 + number // 4 * 640
        canvas.paste(portrait, (x, y))
        x1, y1, x2, y2 = (260 * corner for corner in person.box)
        truth.append(((x + x1) / 3000, (y + y1) / 2000, (x + x2) / 3000, (y + y2) / 2000))

    def people(edge: int) -> list[Box]:
        found = look(np.asarray(canvas), detector, edge=edge)
        return [one.box for one in found if one.label == "person"]

    assert len(people(edge=3000)) <= 1
    found = people(edge=700)
    assert sum(any(iou(box, one) > 0.5 for one in found) for box in truth) >= 11
    assert len(found) <= 16
