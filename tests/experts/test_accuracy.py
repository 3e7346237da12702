"""What the shipped models see of real photos, against labels made by eye (tests/photos).

The `final` half of the photos was not looked at while anything was built; docs/experts.md tells
these figures, and `pytest -s tests/experts/test_accuracy.py` prints them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from experts.base import Context, Hardware
from experts.detection.nanodet import NanoDet, NanoDetConfig
from experts.tagging.efficientnet_lite2 import (
    EfficientNetLite2Tagger,
    EfficientNetLite2TaggerConfig,
)
from fusion_pipeline.dataset.evidence import DetectedObject, Tag
from fusion_pipeline.perceive.merge import merge_objects, merge_tags
from tests.photos import Photo, load_photos
from tests.photos.scoring import Judged, Point, average_precision, curve, judge, precision_at

USEFUL = 0.35
"""Score from which boxes are believed (`hints.object_threshold`)."""


@dataclass(frozen=True)
class Seen:
    photo: Photo
    tags: list[Tag]
    objects: list[DetectedObject]


@pytest.fixture(scope="module", params=["development", "final"])
def half(request: pytest.FixtureRequest) -> list[Seen]:
    tagger = EfficientNetLite2Tagger(EfficientNetLite2TaggerConfig(), Hardware())
    detector = NanoDet(NanoDetConfig(), Hardware())
    print(f"\n{request.param}")
    seen = []
    for photo in load_photos(request.param):
        pixels = photo.pixels
        context = [Context(pixels.shape[1], pixels.shape[0])]
        [tags], [objects] = tagger([pixels], context), detector([pixels], context)
        seen.append(Seen(photo, tags, objects))
    return seen


def test_one_of_the_five_best_tags_is_right(half: Sequence[Seen]) -> None:
    """Of photos that show something ImageNet has a class for."""
    fits = [seen for seen in half if seen.photo.imagenet]
    first, five = (
        sum(any(tag.label in s.photo.imagenet for tag in s.tags[:n]) for s in fits) / len(fits)
        for n in (1, 5)
    )
    print(f"tags: {len(fits)} photos, best {first:.2f}, one of five {five:.2f}")
    assert five >= 0.6


def test_boxes_and_what_agreement_with_the_tagger_adds(half: Sequence[Seen]) -> None:
    alone: list[Judged] = []
    merged: list[Judged] = []
    for seen in half:
        tags = merge_tags({"tagger": seen.tags})
        alone += judge(seen.objects, seen.photo.objects)
        merged += judge(merge_objects({"nanodet": seen.objects}, tags), seen.photo.objects)
    positives = sum(not thing.ignore for seen in half for thing in seen.photo.objects)
    before, after = curve(alone, positives), curve(merged, positives)
    useful = [point for point in before if point.score >= USEFUL][-1]
    print(
        f"boxes: {positives}; at {USEFUL}: {useful.precision:.2f} right, {useful.recall:.2f} found"
    )
    print("recall            ", *(f"{r:5.2f}" for r in RECALLS))
    for name, points in (("detector", before), ("with the tagger", after)):
        row = [f"{precision_at(points, recall):5.2f}" for recall in RECALLS]
        print(f"precision {name:15s}", *row, f"  average {average_precision(points):.3f}")
    assert average_precision(after) > average_precision(before)
    # At the recall that the detector has at its useful scores.
    assert precision_at(after, useful.recall) >= precision_at(before, useful.recall)
    assert mean_precision(after) > mean_precision(before)


RECALLS = (0.1, 0.15, 0.2, 0.25, 0.3)


def mean_precision(points: Sequence[Point]) -> float:
    return sum(precision_at(points, recall) for recall in RECALLS) / len(RECALLS)
