"""Scores of whole images, against the libraries' own pipelines."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experts.base import Hardware
from experts.checkpoint import CheckpointError
from experts.scoring.classifier import Classifier, ClassifierConfig
from experts.scoring.clip_classes import ClipClasses, ClipClassesConfig
from experts.scoring.nsfwjs import NsfwJs
from fusion_pipeline.dataset.evidence import EvidenceKind, Tag
from fusion_pipeline.dataset.images import RGB
from tests.experts import tiny_scoring, tiny_taggers

Photo = Callable[[str], RGB]
KINDS = ("vit", "vit_several", "convnext", "vit_one")


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
        if kind in ("vit", "convnext"):
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


def test_any_size(folders: Path, odd_images: Sequence[RGB]) -> None:
    assert len(load(folders / "vit")(odd_images, [])) == len(odd_images)


def test_kinds_of_pictures_by_clip(tmp_path: Path, photo: Photo) -> None:
    for kind in ("clip", "siglip"):  # exclusive whatever the model was trained with
        getattr(tiny_taggers, kind)(tmp_path / kind)
        config = ClipClassesConfig(model=str(tmp_path / kind))
        expert = ClipClasses(config, Hardware())
        [found] = expert([photo("coffee.png")], [])
        assert expert.kind is EvidenceKind.SCORES
        assert len(found) == 6
        assert {"photo", "screenshot", "infographic or chart"} < {tag.label for tag in found}
        assert sum(scores(found).values()) == pytest.approx(1, abs=1e-5)
        assert not np.allclose([tag.score for tag in found], 1 / 6, atol=1e-3)


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
