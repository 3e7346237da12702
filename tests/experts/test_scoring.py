"""Scores of whole images, against the libraries' own pipelines."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from experts.base import Hardware
from experts.checkpoint import CheckpointError
from experts.scoring.classifier import Classifier, ClassifierConfig
from experts.scoring.clip_classes import KINDS as KINDS_OF_PICTURES
from experts.scoring.clip_classes import ClipClasses, ClipClassesConfig
from experts.scoring.nsfwjs import NsfwJs
from fusion_pipeline.dataset.evidence import Tag
from fusion_pipeline.dataset.images import RGB, decode
from tests.experts import tiny_scoring, tiny_taggers
from tests.experts.tiny_taggers import SIZE

Photo = Callable[[str], RGB]
KINDS = ("vit", "vit_several", "convnext", "vit_one", "timm_vit")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifiers")
    for kind in KINDS:
        getattr(tiny_scoring, kind)(folder / kind)
    return folder


def load(folder: Path, **settings: Any) -> Classifier:
    return Classifier(ClassifierConfig(model=str(folder), **settings), Hardware())


def scores(tags: Sequence[Tag]) -> dict[str, float]:
    assert [t.score for t in tags] == sorted((t.score for t in tags), reverse=True)
    return {tag.label: tag.score for tag in tags}


@pytest.mark.parametrize("kind", KINDS)
def test_says_what_the_pipeline_says(kind: str, folders: Path, photo: Photo) -> None:
    from transformers import pipeline

    coffee, cat = photo("coffee.png"), photo("chelsea.png")
    images = [coffee, coffee.transpose(1, 0, 2), cat[:60], cat[:30, :20], photo("page.png")]
    classify = pipeline("image-classification", model=str(folders / kind), top_k=None)
    found = load(folders / kind)(images, [])
    assert len({str(scores(row)) for row in found}) == len(images)
    for row, said in zip(found, classify([Image.fromarray(i) for i in images]), strict=True):
        expected = {item["label"]: item["score"] for item in said}
        assert scores(row) == pytest.approx(expected, abs=1e-6, rel=1e-4)
        if kind in ("vit", "convnext", "timm_vit"):
            assert sum(scores(row).values()) == pytest.approx(1)


def test_some_classes_alone(folders: Path, photo: Photo) -> None:
    image = photo("coffee.png")
    [whole], [part] = (
        load(folders / "vit", labels=labels)([image], []) for labels in ((), ("nsfw", "art"))
    )
    assert scores(part) == {k: v for k, v in scores(whole).items() if k in ("nsfw", "art")}
    [best] = load(folders / "vit", max_scores=1)([image], [])
    assert best == whole[:1]


def test_a_class_that_is_not_there_is_named(folders: Path) -> None:
    with pytest.raises(CheckpointError, match="no class 'NSFW'; it has photo, art"):
        load(folders / "vit", labels=("NSFW",))


def test_numbers_that_are_no_scores_are_refused(tmp_path: Path) -> None:
    tiny_scoring.vit_regression(tmp_path)
    with pytest.raises(CheckpointError, match="regression, whose numbers are no scores"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["vit", "vit_crop"])
def test_any_size(kind: str, folders: Path, odd_images: Sequence[RGB], tmp_path: Path) -> None:
    if kind == "vit_crop":  # a strip, scaled by its short edge, would fill the memory
        tiny_scoring.vit_crop(tmp_path)
    expert = load(tmp_path if kind == "vit_crop" else folders / kind)
    images = [*odd_images, np.zeros((1, 60_000, 3), np.uint8)]
    assert len(expert(images, [])) == len(images)


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_a_scaled_decode_changes_little(kind: str, folders: Path, photo: Photo) -> None:
    expert = load(folders / kind)
    large = cv2.resize(photo("coffee.png"), None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC)
    data = cv2.imencode(".jpg", large[..., ::-1])[1].tobytes()
    full, scaled = decode(data), decode(data, min_short_edge=expert.min_short_edge)
    assert scaled.shape < full.shape
    assert expert.min_short_edge is not None
    assert expert.min_short_edge >= 2 * SIZE
    whole, part = (scores(row) for row in expert([full, scaled], []))
    assert part == pytest.approx(whole, abs=0.02)


def test_classes_by_clip_are_the_pipelines(tmp_path: Path, photo: Photo) -> None:
    from transformers import pipeline

    tiny_taggers.clip(tmp_path)
    names = ["photo", "screenshot", "scanned document"]
    settings = {"classes": tuple(names), "templates": ("this is a {label}.",)}
    images = [photo("coffee.png"), photo("page.png"), photo("chelsea.png")[:60]]
    found = ClipClasses(ClipClassesConfig(model=str(tmp_path), **settings), Hardware())(images, [])
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path))
    pictures = [Image.fromarray(image) for image in images]
    said = classify(pictures, candidate_labels=names, hypothesis_template="this is a {}.")
    for row, items in zip(found, said, strict=True):
        expected = {item["label"]: item["score"] for item in items}
        assert scores(row) == pytest.approx(expected, abs=1e-5)


def test_kinds_of_pictures_exclude_each_other_for_siglip_too(tmp_path: Path, photo: Photo) -> None:
    tiny_taggers.siglip(tmp_path)
    [found] = ClipClasses(ClipClassesConfig(model=str(tmp_path)), Hardware())(
        [photo("page.png")], []
    )
    assert {tag.label for tag in found} == set(KINDS_OF_PICTURES)
    assert sum(scores(found).values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": ("photo", "photo")}, "'photo' is there twice"),
        ({"classes": ("photo", " ")}, "' ' is no class"),
        ({"classes": ("photo",)}, "at least 2 items"),
        ({"templates": ("a photo",)}, r"no \{label\} in it"),
    ],
)
def test_classes_that_can_not_be_told_apart(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny_taggers.clip(tmp_path)
    with pytest.raises(ValidationError, match=message):
        ClipClassesConfig(model=str(tmp_path), **settings)


GOLDEN = json.loads((Path(__file__).parent / "golden" / "nsfwjs.json").read_text())
"""What nsfwjs 4.3.0 itself says (MobileNetV2Mid, TensorFlow.js 4.22 in Node)."""


@pytest.mark.parametrize("name", GOLDEN)
def test_nsfwjs_says_what_the_library_says(name: str, photo: Photo) -> None:
    [found] = NsfwJs(NsfwJs.Config(), Hardware())([photo(name)], [])
    assert scores(found) == pytest.approx(GOLDEN[name], abs=1e-4)


def test_nsfwjs_on_any_size(odd_images: Sequence[RGB]) -> None:
    wide = odd_images[3].repeat(1000, axis=1)  # OpenCV's limits are at 32,767 pixels
    found = NsfwJs(NsfwJs.Config(), Hardware())([*odd_images, wide], [])
    assert all(sum(scores(row).values()) == pytest.approx(1, abs=1e-5) for row in found)
