import itertools
from collections.abc import Callable

import numpy as np
import pytest

from experts.base import Hardware
from experts.detection.nanodet import NanoDet, NanoDetConfig, decode_boxes, preprocess
from fusion_pipeline.dataset.evidence import Box, DetectedObject, iou
from fusion_pipeline.dataset.images import RGB

Photo = Callable[[str], RGB]


@pytest.fixture(scope="module")
def detector() -> NanoDet:
    return NanoDet(NanoDetConfig(), Hardware())


def best(objects: list[DetectedObject], label: str) -> DetectedObject:
    return next(item for item in objects if item.label == label)


# Boxes drawn by hand on the photos.
@pytest.mark.parametrize(
    ("name", "label", "box"),
    [
        ("astronaut.png", "person", (0.02, 0.0, 0.72, 1.0)),
        ("camera.png", "person", (0.0, 0.12, 0.62, 1.0)),
        ("coffee.png", "cup", (0.25, 0.05, 0.73, 0.93)),
        ("motorcycle_right.png", "motorcycle", (0.1, 0.12, 0.85, 0.92)),
    ],
)
def test_finds_the_object_and_its_place(
    detector: NanoDet, photo: Photo, name: str, label: str, box: Box
) -> None:
    [objects] = detector([photo(name)], [])
    found = best(objects, label)
    assert found.score > 0.4
    assert iou(found.box, box) > 0.75
    assert [o.score for o in objects] == sorted((o.score for o in objects), reverse=True)


def test_mirrored_photo_gives_mirrored_box(detector: NanoDet, photo: Photo) -> None:
    image = photo("astronaut.png")
    [[plain, *_], [mirrored, *_]] = detector([image, image[:, ::-1]], [])
    x1, y1, x2, y2 = mirrored.box
    assert plain.label == mirrored.label == "person"
    assert iou(plain.box, (1 - x2, y1, 1 - x1, y2)) > 0.9


def test_channels_are_bgr_and_normalised() -> None:
    blob = preprocess(np.full((50, 80, 3), (10, 20, 30), np.uint8))
    assert blob.shape == (1, 3, 416, 416)
    assert blob.dtype == np.float32
    expected = [(30 - 103.53) / 57.375, (20 - 116.28) / 57.12, (10 - 123.675) / 58.395]
    np.testing.assert_allclose(blob[0, :, 7, 7], expected, rtol=1e-5)


def test_boxes_are_expectations_around_the_cell() -> None:
    logits = np.full((2, 4, 11), -50, np.float32)
    for side, distance in enumerate((1, 2, 3, 4)):
        logits[0, side, distance] = 50
        logits[1, side, 10] = 50
    # First row, sixth cell of stride 8: centre (44, 4). Last cell of stride 32: centre (400, 400).
    boxes = decode_boxes(logits.reshape(2, 44), np.array([5, 3548]))
    expected = [[44 - 8, 0, 44 + 24, 4 + 32], [400 - 320, 400 - 320, 416, 416]]
    np.testing.assert_allclose(boxes * 416, expected, atol=1e-3)


@pytest.mark.parametrize("nms_iou", [0.3, 0.5])
def test_no_two_boxes_of_a_class_overlap_more_than_allowed(photo: Photo, nms_iou: float) -> None:
    detector = NanoDet(NanoDetConfig(score_floor=0.05, nms_iou=nms_iou), Hardware())
    [objects] = detector([photo("coins.png")], [])
    assert len(objects) > 20
    for a, b in itertools.combinations(objects, 2):
        if a.label == b.label:
            assert iou(a.box, b.box) <= nms_iou + 1e-6


def test_limits_are_kept(photo: Photo) -> None:
    image = photo("coins.png")
    [many] = NanoDet(NanoDetConfig(score_floor=0.05), Hardware())([image], [])
    [few] = NanoDet(NanoDetConfig(score_floor=0.05, max_objects=5), Hardware())([image], [])
    [sure] = NanoDet(NanoDetConfig(score_floor=0.4), Hardware())([image], [])
    assert few == many[:5]
    assert min(item.score for item in sure) >= 0.4
    assert [item for item in many if item.score >= 0.4] == sure
