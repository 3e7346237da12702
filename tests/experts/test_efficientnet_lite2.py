import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from experts.base import Hardware
from experts.tagging.efficientnet_lite2 import (
    LABELS,
    MIN_SHORT_EDGE,
    EfficientNetLite2,
    EfficientNetLite2Tagger,
    EfficientNetLite2TaggerConfig,
    preprocess,
)
from fusion_pipeline.dataset.images import RGB, decode

Photo = Callable[[str], RGB]


@pytest.fixture(scope="module")
def tagger() -> EfficientNetLite2Tagger:
    return EfficientNetLite2Tagger(EfficientNetLite2TaggerConfig(), Hardware())


@pytest.fixture(scope="module")
def network() -> EfficientNetLite2:
    return EfficientNetLite2(Hardware())


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a.ravel() @ b.ravel() / np.linalg.norm(a) / np.linalg.norm(b))


def test_labels_are_the_imagenet_classes_in_order() -> None:
    labels = LABELS.read_text(encoding="utf-8").splitlines()
    assert len(labels) == len(set(labels)) == 1000
    known = {0: "tench", 207: "golden retriever", 285: "egyptian cat", 504: "coffee mug",
             817: "sports car", 967: "espresso", 999: "toilet tissue"}  # fmt: skip
    assert {index: labels[index] for index in known} == known
    assert all(label == label.lower().strip() for label in labels)


@pytest.mark.parametrize(
    ("name", "top"),
    [
        ("chelsea.png", {"egyptian cat", "tabby", "tiger cat"}),
        ("coffee.png", {"espresso"}),
        ("camera.png", {"tripod"}),
        ("clock_motion.png", {"analog clock", "wall clock"}),
        ("motorcycle_right.png", {"moped", "motor scooter"}),
    ],
)
def test_best_tag_of_a_photo(
    tagger: EfficientNetLite2Tagger, photo: Photo, name: str, top: set[str]
) -> None:
    [tags] = tagger([photo(name)], [])
    assert tags[0].label in top


def test_tags_are_sorted_limited_and_over_the_floor(photo: Photo) -> None:
    config = EfficientNetLite2TaggerConfig(score_floor=0.05, max_tags=3)
    [tags] = EfficientNetLite2Tagger(config, Hardware())([photo("motorcycle_left.png")], [])
    scores = [tag.score for tag in tags]
    assert 1 <= len(tags) <= 3
    assert scores == sorted(scores, reverse=True)
    assert min(scores) >= 0.05


def test_preprocessing_is_the_published_one(photo: Photo) -> None:
    image = photo("coffee.png")  # 400 x 600: the crop is 356 x 356
    crop = Image.fromarray(image).crop((122, 22, 478, 378)).resize((260, 260), Image.BICUBIC)
    expected = ((np.asarray(crop, np.float32) - 127) / 128).transpose(2, 0, 1)[None]
    np.testing.assert_array_equal(preprocess(image), expected)


def test_embedding_knows_copies_from_strangers(network: EfficientNetLite2, photo: Photo) -> None:
    cat = photo("chelsea.png")
    vectors = network.embed([cat, cat[:, ::-1], cat[::2, ::2], photo("coffee.png")])
    assert vectors.shape == (4, 1280)
    assert vectors.dtype == np.float32
    assert cosine(vectors[0], vectors[1]) > 0.9
    assert cosine(vectors[0], vectors[2]) > 0.9
    assert cosine(vectors[0], vectors[3]) < 0.6


def test_no_images_have_no_embeddings(network: EfficientNetLite2) -> None:
    assert network.embed([]).shape == (0, 1280)


@pytest.mark.parametrize("name", ["astronaut.png", "motorcycle_left.png", "coffee.png"])
def test_the_smallest_scaled_decode_is_good_enough(
    network: EfficientNetLite2, photo: Photo, name: str
) -> None:
    image = Image.fromarray(photo(name))
    scale = (2 * MIN_SHORT_EDGE + 2) / min(image.size)
    large = image.resize((round(image.width * scale), round(image.height * scale)), Image.LANCZOS)
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", quality=92)
    full, scaled = (decode(buffer.getvalue(), min_short_edge=e) for e in (None, MIN_SHORT_EDGE))
    assert min(scaled.shape[:2]) < min(full.shape[:2]) / 1.9
    assert cosine(*network.embed([full, scaled])) > 0.99
