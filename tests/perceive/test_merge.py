"""Evidence of several experts made one."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_pipeline.dataset.evidence import Box, DetectedObject, Tag
from fusion_pipeline.perceive.merge import (
    MergeConfig,
    MergedTag,
    either,
    merge_objects,
    merge_tags,
    shifted,
)
from tests.photos import Thing
from tests.photos.scoring import Judged, curve, judge

CAT: Box = (0.2, 0.2, 0.6, 0.8)
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def tag(label: str, score: float) -> MergedTag:
    return MergedTag(label, score, ("tagger",))


def test_two_detectors_of_one_thing() -> None:
    a = DetectedObject("cat", 0.6, CAT)
    b = DetectedObject("cat", 0.3, (0.2, 0.2, 0.6, 0.74))
    [one] = merge_objects({"a": [a], "b": [b]}, [])
    assert one.label == "cat"
    assert one.score == pytest.approx(1 - 0.4 * 0.7)
    assert one.box == pytest.approx((0.2, 0.2, 0.6, 0.78))  # two parts a, one part b
    assert one.experts == ("a", "b")


def test_a_synonym_and_a_narrower_name_are_the_same_thing() -> None:
    couch, sofa = DetectedObject("couch", 0.5, CAT), DetectedObject("sofa", 0.4, CAT)
    tabby = DetectedObject("tabby", 0.9, WHOLE)
    cat = DetectedObject("cat", 0.2, WHOLE)
    merged = merge_objects({"a": [couch, cat], "b": [sofa, tabby]}, [])
    assert [one.label for one in merged] == ["tabby", "couch"]


def test_one_detector_twice_is_no_agreement() -> None:
    twice = [DetectedObject("cat", 0.6, CAT), DetectedObject("cat", 0.5, CAT)]
    [one] = merge_objects({"a": twice}, [])
    assert one.score == pytest.approx(0.6)
    assert one.experts == ("a",)


def test_apart_or_of_another_meaning_they_stay_two() -> None:
    left, right = (0.0, 0.0, 0.4, 1.0), (0.6, 0.0, 1.0, 1.0)
    cats = merge_objects(
        {"a": [DetectedObject("cat", 0.6, left)], "b": [DetectedObject("cat", 0.5, right)]}, []
    )
    assert [(one.box, one.score) for one in cats] == [(left, 0.6), (right, 0.5)]


def test_the_close_up_cat_that_is_called_a_person() -> None:
    """As the shipped models see the photo of a cat's face."""
    boxes = [
        DetectedObject("person", 0.59, (0.01, 0.0, 1.0, 1.0)),
        DetectedObject("cat", 0.4, (0.0, 0.0, 1.0, 0.99)),
        DetectedObject("dog", 0.4, (0.0, 0.0, 0.99, 1.0)),
    ]
    tags = [tag("egyptian cat", 0.62), tag("tiger cat", 0.12), tag("tabby", 0.1)]
    found = {one.label: one for one in merge_objects({"nanodet": boxes}, tags)}
    assert found["cat"].score > 0.6
    assert found["person"].score < 0.2
    assert found["dog"].score < 0.2
    assert found["cat"].experts == ("nanodet", "tagger")
    assert found["person"].experts == ("nanodet",)


def test_a_tag_does_not_speak_for_a_part_of_what_it_names() -> None:
    whole, muzzle, beside = (0.0, 0.0, 1.0, 1.0), (0.125, 0.5, 0.875, 1.0), (0.0, 0.0, 0.5, 0.5)

    def scores(first: Box, second: Box) -> list[float]:
        boxes = [DetectedObject("cat", 0.4, first), DetectedObject("cat", 0.2, second)]
        return [one.score for one in merge_objects({"a": boxes}, [tag("tabby", 0.9)])]

    cat, part = scores(whole, muzzle)
    assert cat > 0.75
    assert part == pytest.approx(0.2)
    cat, another = scores(muzzle, beside)
    assert 0.3 < another < cat


def test_a_tag_takes_nothing_from_a_small_thing_beside_what_it_names() -> None:
    boxes = [DetectedObject("person", 0.5, (0.1, 0.1, 0.2, 0.3))]
    [one] = merge_objects({"a": boxes}, [tag("tabby", 1.0)])
    assert one.score == pytest.approx(0.5, abs=0.02)


def test_what_a_person_wears_is_no_contradiction() -> None:
    [one] = merge_objects({"a": [DetectedObject("person", 0.5, WHOLE)]}, [tag("bow tie", 0.9)])
    assert one.score == 0.5


def test_tags_of_two_taggers() -> None:
    merged = merge_tags(
        {
            "a": [Tag("sofa", 0.5), Tag("tabby", 0.4), Tag("egyptian cat", 0.3)],
            "b": [Tag("couch", 0.6), Tag("animal", 0.5), Tag("beach", 0.2)],
        }
    )
    assert [(t.label, round(t.score, 3), t.experts) for t in merged] == [
        ("couch", 0.8, ("a", "b")),
        ("animal", 0.5, ("b",)),  # a tabby is one, and says more
        ("tabby", 0.4, ("a",)),
        ("egyptian cat", 0.3, ("a",)),
        ("beach", 0.2, ("b",)),
    ]


def test_no_evidence_merges_to_none() -> None:
    assert merge_tags({}) == []
    assert merge_objects({"a": []}, []) == []


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["cat", "tabby", "dog", "person", "xyzzy"]),
            st.just(0.0) | st.floats(0.01, 1),
            st.floats(0, 0.5),
            st.floats(0.05, 0.5),
            st.sampled_from("abc"),
        ),
        max_size=12,
    ),
    st.randoms(use_true_random=False),
)
def test_any_evidence_merges_to_valid_evidence_in_any_order(rows: list, random: object) -> None:
    def merged(rows: list) -> list:
        found: dict[str, list[DetectedObject]] = {}
        for label, score, at, size, expert in rows:
            box = (at, at, at + size, at + size)
            found.setdefault(expert, []).append(DetectedObject(label, score, box))
        return merge_objects(found, merge_tags({"t": [Tag("tabby", 0.7), Tag("dog", 0.2)]}))

    things = merged(rows)
    assert len(things) <= len(rows)
    assert {one.label for one in things} <= {row[0] for row in rows}
    for one in things:
        assert 0 <= one.score <= 1
        assert 0 <= one.box[0] < one.box[2] <= 1
    expected = {expert for *_, expert in rows} | {"t"}
    assert {name for one in things for name in one.experts} <= expected


def test_either_and_shifted() -> None:
    assert either([]) == 0
    assert either([0.5, 0.5]) == 0.75
    assert shifted(0.5, 0) == 0.5
    assert shifted(0.3, 2) == pytest.approx(0.76, abs=0.01)
    assert shifted(0.3, -2) == pytest.approx(0.055, abs=0.01)
    assert (shifted(0.0, 5), shifted(1.0, -5)) == (0.0, 1.0)


# --- boxes with known noise ----------------------------------------------------------------------

LABELS = ("cat", "dog", "car", "chair", "bottle")


def noisy(things: Sequence[Thing], random: np.random.Generator) -> list[DetectedObject]:
    """What a detector with known faults sees: a quarter missed, corners off by 6 % of the size, as
    many false boxes as a third of the things, scores that hardly tell right from wrong."""
    found = []
    for thing in things:
        if random.random() < 0.25:
            continue
        x1, y1, x2, y2 = thing.box
        off = random.normal(0, 0.06, 4) * (x2 - x1, y2 - y1, x2 - x1, y2 - y1)
        box = np.clip(np.array(thing.box) + off, 0, 1)
        found.append(
            DetectedObject(thing.label, float(random.uniform(0.3, 0.9)), tuple(box.tolist()))
        )
    for _ in range(random.poisson(len(things) / 3)):
        found.append(
            DetectedObject(
                str(random.choice(LABELS)), float(random.uniform(0.2, 0.8)), place(random)
            )
        )
    return found


def place(random: np.random.Generator) -> Box:
    width, height = random.uniform(0.08, 0.4, 2)
    x, y = random.uniform(0, 1 - width), random.uniform(0, 1 - height)
    return float(x), float(y), float(x + width), float(y + height)


def best_f1(judged: Sequence[Judged], positives: int) -> float:
    return max(
        2 * p.precision * p.recall / (p.precision + p.recall)
        for p in curve(judged, positives)
        if p.precision + p.recall
    )


def test_merged_boxes_are_better_than_every_single_input() -> None:
    random = np.random.default_rng(7)
    judged: dict[str, list[Judged]] = {name: [] for name in ("a", "b", "c", "merged", "all")}
    positives = 0
    for _ in range(300):
        things = [
            Thing(str(random.choice(LABELS)), place(random)) for _ in range(random.integers(1, 6))
        ]
        positives += len(things)
        found: Mapping[str, list[DetectedObject]] = {
            n: noisy(things, random) for n in ("a", "b", "c")
        }
        for name, boxes in found.items():
            judged[name] += judge(boxes, things)
        judged["merged"] += judge(merge_objects(found, [], MergeConfig(rival=0)), things)
        judged["all"] += judge([box for boxes in found.values() for box in boxes], things)
    f1 = {name: best_f1(points, positives) for name, points in judged.items()}
    print({name: round(value, 3) for name, value in f1.items()})
    single = max(f1["a"], f1["b"], f1["c"])
    assert f1["merged"] > single + 0.05
    assert f1["merged"] > f1["all"] + 0.1
