"""Faces: found where they are, and nowhere else."""

from collections.abc import Callable

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
