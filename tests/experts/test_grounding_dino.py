"""Against the library's own pipeline and processor, on tiny checkpoints."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from experts.base import Hardware
from experts.checkpoint import CheckpointError
from experts.detection.grounding_dino import GroundingDino, GroundingDinoConfig
from fusion_pipeline.dataset.evidence import DetectedObject
from fusion_pipeline.dataset.images import RGB, decode
from tests.experts import tiny_detectors
from tests.experts.tiny_detectors import assert_close, assert_same, context

Photo = Callable[[str], RGB]
EVERYTHING = {"box_threshold": 0.01, "text_threshold": 0.0, "max_objects": 1000}


@pytest.fixture(scope="module")
def grounding_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grounding-dino")
    tiny_detectors.grounding_dino(folder)
    return folder


@pytest.fixture(scope="module")
def mm_grounding_dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mm-grounding-dino")
    tiny_detectors.mm_grounding_dino(folder)
    return folder


@pytest.fixture(scope="module", params=["grounding_dino", "mm_grounding_dino"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def load(folder: Path, **settings: Any) -> GroundingDino:
    config = GroundingDinoConfig(model=str(folder), **{**EVERYTHING, **settings})
    return GroundingDino(config, Hardware())


def look(expert: GroundingDino, image: RGB, *tags: str) -> list[DetectedObject]:
    [objects] = expert([image], [context(image, *tags)])
    return objects


def reference(folder: Path, image: RGB, label: str) -> list[dict[str, Any]]:
    """The pipeline takes a label as a whole caption, which ends with a dot."""
    from transformers import pipeline

    detect = pipeline("zero-shot-object-detection", model=str(folder))
    said = detect(Image.fromarray(image), candidate_labels=[f"{label}."], threshold=0.01)
    return [{**item, "label": label} for item in said]


@pytest.mark.parametrize("label", ["cat", "coffee cup"])
def test_says_what_the_pipeline_says(checkpoint: Path, photo: Photo, label: str) -> None:
    coffee = photo("coffee.png")
    for image in (coffee, coffee.transpose(1, 0, 2), photo("chelsea.png")[:100]):
        objects = look(load(checkpoint), image, label)
        assert_same(objects, reference(checkpoint, image, label), image)
        assert [o.score for o in objects] == sorted((o.score for o in objects), reverse=True)
        assert len(objects) >= 10


def test_several_labels_as_the_processor_has_them(checkpoint: Path, photo: Photo) -> None:
    """It strings all words together that a box matches, "cat coffee"; where these are one label,
    ours is that one, and else one of those."""
    import torch
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    labels = ["cat", "coffee cup", "person"]
    image = photo("coffee.png")
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForZeroShotObjectDetection.from_pretrained(checkpoint).eval()
    inputs = processor(images=Image.fromarray(image), text=[labels], return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
    [theirs] = processor.post_process_grounded_object_detection(
        outputs, threshold=0.5, text_threshold=0.5, target_sizes=[image.shape[:2]]
    )
    objects = look(load(checkpoint, box_threshold=0.5, text_threshold=0.5), image, *labels)
    boxes = (theirs["boxes"] / torch.tensor([600, 400, 600, 400])).clamp(0, 1).numpy()
    alike = 0
    for score, box, words in zip(
        theirs["scores"].tolist(), boxes, theirs["text_labels"], strict=True
    ):
        ours = [o for o in objects if abs(o.score - score) < 1e-5 and np.allclose(o.box, box)]
        named = set(re.findall(r"[a-z]+", words))
        assert len(ours) == (1 if named else 0)
        for item in ours:
            alike += named <= set(item.label.split())
            assert named & set(item.label.split())
    assert alike >= 5
    assert len({o.label for o in objects}) >= 2


def test_captions_are_what_the_tokenizer_makes_of_the_text(grounding_dino: Path) -> None:
    expert = load(grounding_dino)
    [caption] = expert._captions(["Cat", "coffee cup", "cats"])
    assert list(caption.tokens) == expert._tokenizer("cat. coffee cup. cats.")["input_ids"]
    words = {
        label: expert._tokenizer.convert_ids_to_tokens(list(caption.tokens[place]))
        for label, place in caption.places
    }
    assert words == {"Cat": ["cat"], "coffee cup": ["coffee", "cup"], "cats": ["cat", "##s"]}


def test_labels_that_do_not_fit_get_captions_of_their_own(
    grounding_dino: Path, photo: Photo
) -> None:
    expert = load(grounding_dino, max_queries=100)
    labels = ["cat", "coffee cup", "dog", "person", "a photo of sky", "cats", "a dog", "sky"]
    captions = list(expert._captions(labels))
    assert len(captions) == 2
    assert [label for caption in captions for label, _ in caption.places] == labels
    assert max(len(caption.tokens) for caption in captions) <= 16

    image = photo("coffee.png")
    parts = [look(expert, image, *(label for label, _ in c.places)) for c in captions]
    both = look(expert, image, *labels)
    assert all(parts)
    assert sorted(both, key=repr) == sorted(parts[0] + parts[1], key=repr)
    assert [o.score for o in both] == sorted((o.score for o in both), reverse=True)


def test_a_label_stays_one_phrase(grounding_dino: Path, photo: Photo) -> None:
    expert = load(grounding_dino)
    captions = expert._captions(["St. Cat?", ".dog", "cup " * 30])
    assert [expert._tokenizer.decode(list(caption.tokens)) for caption in captions] == [
        "[CLS] st cat. dog. [SEP]",
        "[CLS] " + "cup " * 12 + "cup. [SEP]",
    ]
    image = photo("coffee.png")
    assert {o.label for o in look(expert, image, "St. Cat?")} == {"St. Cat?"}


def test_what_the_model_cannot_read_is_not_looked_for(grounding_dino: Path, photo: Photo) -> None:
    image = photo("coffee.png")
    expert = load(grounding_dino)
    assert look(expert, image, "🐈", "?") == []
    assert look(expert, image, "🐈", "dog") == look(expert, image, "dog")
    assert look(expert, image) == []
    with pytest.raises(CheckpointError, match="knows no part of 🐈"):
        load(grounding_dino, queries=["cat", "🐈"])


def test_sizes_and_captions_may_be_mixed_in_a_batch(checkpoint: Path, photo: Photo) -> None:
    coffee = photo("coffee.png")
    images = [coffee, coffee[:, ::-1], photo("chelsea.png"), coffee.transpose(1, 0, 2)]
    tags = (("cat",), ("coffee cup", "person", "sky"), (), ("dog", "cats"))
    contexts = [context(image, *own) for image, own in zip(images, tags, strict=True)]
    alone = load(checkpoint)(images, contexts)
    together = load(checkpoint, batch_size=4)(images, contexts)
    assert [len(objects) > 0 for objects in alone] == [True, True, False, True]
    for one, other in zip(alone, together, strict=True):
        assert_close(one, other)


def test_rotated_jpeg_is_seen_upright(grounding_dino: Path, photo: Photo) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    data = io.BytesIO()
    Image.fromarray(photo("coffee.png")).save(data, "JPEG", exif=exif)
    upright = np.asarray(Image.open(data))[::-1, ::-1]
    pixels = decode(data.getvalue())
    expected = reference(grounding_dino, np.ascontiguousarray(upright), "cat")
    assert_same(look(load(grounding_dino), pixels, "cat"), expected, upright)


def test_strips(grounding_dino: Path) -> None:
    expert = load(grounding_dino)
    for shape in ((3000, 1, 3), (1, 3000, 3)):
        assert look(expert, np.zeros(shape, np.uint8), "cat")


def test_limits(grounding_dino: Path, photo: Photo) -> None:
    image, labels = photo("coffee.png"), ("cat", "coffee cup", "dog")
    everything = look(load(grounding_dino), image, *labels)
    assert look(load(grounding_dino, max_objects=3), image, *labels) == everything[:3]
    middle = everything[len(everything) // 2].score
    sure = look(load(grounding_dino, box_threshold=middle), image, *labels)
    assert sure == [o for o in everything if o.score > middle]
    assert look(load(grounding_dino, text_threshold=0.9999), image, *labels) != everything


def test_another_kind_of_checkpoint_is_refused(tmp_path: Path) -> None:
    tiny_detectors.owlvit(tmp_path)
    with pytest.raises(CheckpointError, match="of owlvit, not of Grounding DINO"):
        load(tmp_path)
