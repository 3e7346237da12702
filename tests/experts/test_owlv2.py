"""Against the library's own pipeline, which asks one label at a time, on tiny checkpoints."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from experts.base import Context, Hardware
from experts.checkpoint import CheckpointError
from experts.detection.owlv2 import Owlv2, Owlv2Config
from experts.detection.queries import TagQueries
from fusion_pipeline.dataset.evidence import DetectedObject, Tag
from fusion_pipeline.dataset.images import RGB, decode
from tests.experts import tiny_detectors
from tests.experts.tiny_detectors import assert_close, assert_same, context

Photo = Callable[[str], RGB]
LABELS = ("cat", "coffee cup", "Person")
EVERYTHING = {"score_floor": 0.01, "max_objects": 1000}


@pytest.fixture(scope="module")
def owlv2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("owlv2")
    tiny_detectors.owlv2(folder)
    return folder


@pytest.fixture(scope="module")
def owlvit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("owlvit")
    tiny_detectors.owlvit(folder)
    return folder


@pytest.fixture(scope="module", params=["owlv2", "owlvit"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def load(folder: Path, **settings: Any) -> Owlv2:
    return Owlv2(Owlv2Config(model=str(folder), **{**EVERYTHING, **settings}), Hardware())


def reference(folder: Path, image: RGB, labels: Sequence[str]) -> list[dict[str, Any]]:
    """The pipeline's answer to the rendered labels, under the labels' own names."""
    from transformers import pipeline

    texts = {f"a photo of a {label}": label for label in labels}
    detect = pipeline("zero-shot-object-detection", model=str(folder))
    said = detect(Image.fromarray(image), candidate_labels=list(texts), threshold=0.01)
    return [{**item, "label": texts[item["label"]]} for item in said]


def test_says_what_the_pipeline_says(checkpoint: Path, photo: Photo) -> None:
    coffee = photo("coffee.png")[:, :500]
    images = [coffee, coffee.transpose(1, 0, 2), photo("chelsea.png")[:60]]
    found = load(checkpoint)(images, [context(image, *LABELS) for image in images])
    for image, objects in zip(images, found, strict=True):
        assert_same(objects, reference(checkpoint, image, LABELS), image)
        assert [o.score for o in objects] == sorted((o.score for o in objects), reverse=True)
        assert {o.label for o in objects} == set(LABELS)


def test_rotated_jpeg_is_seen_upright(owlv2: Path, photo: Photo) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    data = io.BytesIO()
    Image.fromarray(photo("coffee.png")[::2, ::2]).save(data, "JPEG", exif=exif)
    upright = np.asarray(Image.open(data).transpose(Image.Transpose.ROTATE_90))
    pixels = decode(data.getvalue())
    [objects] = load(owlv2)([pixels], [context(pixels, "cat")])
    assert_same(objects, reference(owlv2, upright, ["cat"]), upright)


def test_no_image_and_no_query_changes_another(checkpoint: Path, photo: Photo) -> None:
    coffee, cat, page = photo("coffee.png"), photo("chelsea.png"), photo("page.png")
    alone = [
        load(checkpoint)([image], [context(image, *tags)])[0]
        for image, tags in ((coffee, ["coffee cup"]), (cat, ["cat", "dog"]), (page, []))
    ]
    owl = load(checkpoint)
    contexts = [context(coffee, "coffee cup"), context(cat, "cat", "dog"), context(page)]
    assert owl([coffee, cat, page], contexts) == alone
    assert owl([page, cat, coffee], contexts[::-1]) == alone[::-1]
    assert alone[2] == []

    [more] = owl([cat], [context(cat, "sky", "dog", "person", "cat")])
    for label in ("cat", "dog"):
        one, other = ([o for o in objects if o.label == label] for objects in (alone[1], more))
        np.testing.assert_allclose([o.score for o in one], [o.score for o in other], atol=1e-6)


def test_each_image_and_each_query_is_embedded_once(owlv2: Path, photo: Photo) -> None:
    owl = load(owlv2, queries=["sky"])
    model, seen = owl._model.base_model, {"images": 0, "texts": 0}
    model.vision_model.register_forward_hook(lambda *_: seen.update(images=seen["images"] + 1))
    model.text_model.register_forward_hook(lambda *_: seen.update(texts=seen["texts"] + 1))
    image = photo("coffee.png")
    owl([image, image], [context(image, "cat", "dog"), context(image, "dog", "Sky", "cat")])
    assert seen == {"images": 2, "texts": 3}
    owl([image], [context(image, "sky", "person")])
    assert seen == {"images": 3, "texts": 4}


def test_sizes_and_queries_may_be_mixed_in_a_batch(owlv2: Path, photo: Photo) -> None:
    images = [photo(n) for n in ("coffee.png", "chelsea.png", "page.png", "astronaut.png")]
    contexts = [context(i, *LABELS[:n]) for i, n in zip(images, (1, 3, 0, 2), strict=True)]
    alone = load(owlv2)(images, contexts)
    together = load(owlv2, batch_size=4)(images, contexts)
    assert [len(objects) > 0 for objects in alone] == [True, True, False, True]
    for one, other in zip(alone, together, strict=True):
        assert_close(one, other)


def test_large_images_are_seen_as_the_library_sees_them(owlv2: Path, photo: Photo) -> None:
    """Its own way needs minutes for what the next test does; here the input is a seventh."""
    owl = load(owlv2)
    image = photo("astronaut.png").repeat(2, axis=0).repeat(2, axis=1)[:700, :900]
    small = owl._shrunk(image)
    assert small.shape == (233, 300, 3)
    theirs, ours = (owl._processor(i)["pixel_values"] for i in (image, small))
    assert float((theirs - ours).abs().mean()) < 0.05


def test_20_megapixels(owlv2: Path, photo: Photo) -> None:
    image = np.kron(photo("astronaut.png"), np.ones((8, 10, 1), np.uint8))
    [objects] = load(owlv2)([image], [context(image, "cat")])
    assert len(objects) >= 20


def test_tags_become_queries() -> None:
    config = TagQueries(tag_threshold=0.5, max_queries=3, queries=("  traffic sign ", "CAT"))
    tags = [Tag("Cat", 0.9), Tag("cat", 0.8), Tag("coffee  cup", 0.7), Tag("dog", 0.6)]
    assert config.labels(tags) == ["Cat", "coffee  cup", "traffic sign"]
    assert config.labels([Tag("dog", 0.5), Tag("sky", 0.49)]) == ["dog", "traffic sign", "CAT"]
    assert TagQueries().labels([Tag(" ", 0.9)]) == []


def test_the_template_is_what_the_model_reads(owlv2: Path, photo: Photo) -> None:
    image = photo("coffee.png")
    as_noun = load(owlv2, template="{label}")([image], [context(image, "a photo of a cat")])
    as_photo = load(owlv2)([image], [context(image, "cat")])
    assert [o.score for o in as_noun[0]] == [o.score for o in as_photo[0]]
    with pytest.raises(ValidationError, match=r"no \{label\} in it"):
        Owlv2Config(model=str(owlv2), template="a photo")


def test_a_query_longer_than_the_model_reads_is_cut(owlv2: Path, photo: Photo) -> None:
    image = photo("coffee.png")
    label = "coffee cup " * 20
    [objects] = load(owlv2)([image], [context(image, label)])
    assert {o.label for o in objects} == {label}


def test_limits(owlv2: Path, photo: Photo) -> None:
    image = photo("coffee.png")
    known: list[Context] = [context(image, *LABELS)]
    [everything] = load(owlv2)([image], known)
    few: list[list[DetectedObject]] = load(owlv2, max_objects=3)([image], known)
    assert few == [everything[:3]]
    middle = everything[20].score
    [sure] = load(owlv2, score_floor=middle)([image], known)
    assert sure == [o for o in everything if o.score > middle]


def test_another_kind_of_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny_detectors.grounding_dino(tmp_path)
    with pytest.raises(CheckpointError, match="of grounding-dino, not of OWLv2"):
        load(tmp_path)
