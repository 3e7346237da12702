"""Labels compared by meaning."""

import pytest

from experts.base import ASSETS
from fusion_pipeline.perceive.labels import is_kind_of, meanings_of, similarity


@pytest.mark.parametrize(
    ("label", "other"),
    [
        ("tabby", "cat"),
        ("brambling", "bird"),
        ("ping-pong ball", "sports ball"),
        ("moped", "motorcycle"),
        ("women", "person"),  # plurals
        ("red sports cars", "car"),  # what the last words mean
        ("wall_clock", "Clock"),
    ],
)
def test_a_kind_of_something(label: str, other: str) -> None:
    assert is_kind_of(label, other)
    assert not is_kind_of(other, label)


@pytest.mark.parametrize(
    ("a", "b"), [("sofa", "couch"), ("motorcycle", "bike"), ("tv", "television sets")]
)
def test_synonyms(a: str, b: str) -> None:
    assert is_kind_of(a, b) or is_kind_of(b, a)
    assert similarity(a, b) > 0.85


def test_other_things_are_no_kinds_of_each_other_and_more_or_less_alike() -> None:
    pairs = [("cat", "dog"), ("cat", "person"), ("cat", "vase"), ("mouse", "keyboard")]
    assert not any(is_kind_of(a, b) or is_kind_of(b, a) for a, b in pairs)
    cat_dog, cat_person, cat_vase, _ = (similarity(*pair) for pair in pairs)
    assert cat_dog > cat_person > 0.55 > cat_vase
    assert all(similarity(a, b) == similarity(b, a) for a, b in pairs)


def test_data_sets_own_meanings() -> None:
    assert not is_kind_of("mouse", "rodent")  # COCO's and ImageNet's lies beside a keyboard
    assert is_kind_of("wine glass", "container")
    assert not is_kind_of("hot dog", "person")  # in WordNet first of all a daredevil


def test_every_label_of_the_shipped_experts_is_known() -> None:
    for file in ("coco80_labels.txt", "imagenet1k_labels.txt"):
        labels = (ASSETS / file).read_text(encoding="utf-8").splitlines()
        assert [label for label in labels if not meanings_of(label)] == []


@pytest.mark.parametrize("label", ["", "xyzzy", "猫", "  ", "0", "a" * 10_000])
def test_unknown_labels_are_like_nothing(label: str) -> None:
    assert meanings_of(label) == () or label == "0"
    assert similarity(label, "cat") < 0.6
    assert similarity(label, label) == 1
