"""Precision and recall of detections against labelled boxes."""

from collections.abc import Sequence
from dataclasses import dataclass

from fusion_pipeline.dataset.evidence import DetectedObject, area, iou, shared_area
from tests.photos import Thing


@dataclass(frozen=True)
class Judged:
    score: float
    right: bool


@dataclass(frozen=True)
class Point:
    """Of all detections at or above a score."""

    score: float
    precision: float
    recall: float


def judge(
    found: Sequence[DetectedObject], things: Sequence[Thing], min_iou: float = 0.5
) -> list[Judged]:
    """Each detection of one photo, best first: right when it takes a labelled box of its class that
    none before it took. One that lies for the most part on an ignored box of its class is left out.
    """
    free = [thing for thing in things if not thing.ignore]
    judged = []
    for one in sorted(found, key=lambda o: -o.score):
        rivals = [t for t in free if t.label == one.label and iou(t.box, one.box) >= min_iou]
        if rivals:
            free.remove(max(rivals, key=lambda t: iou(t.box, one.box)))
        elif any(
            t.ignore and t.label == one.label and shared_area(t.box, one.box) >= 0.5 * area(one.box)
            for t in things
        ):
            continue
        judged.append(Judged(one.score, bool(rivals)))
    return judged


def curve(judged: Sequence[Judged], positives: int) -> list[Point]:
    """Precision and recall at every score, falling."""
    points, right = [], 0
    for count, one in enumerate(sorted(judged, key=lambda j: -j.score), start=1):
        right += one.right
        points.append(Point(one.score, right / count, right / positives))
    return points


def average_precision(points: Sequence[Point]) -> float:
    """Area under the precision envelope (all-point interpolation, as PASCAL VOC since 2010)."""
    total, best, recall = 0.0, 0.0, points[-1].recall if points else 0.0
    for point in reversed(points):
        total += best * (recall - point.recall)
        recall, best = point.recall, max(best, point.precision)
    return total + best * recall


def precision_at(points: Sequence[Point], recall: float) -> float:
    """Best precision at this recall or a higher one; 0 when it is not reached."""
    return max((p.precision for p in points if p.recall >= recall - 1e-9), default=0.0)
