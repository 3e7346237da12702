"""Against the library's own pipeline, on tiny checkpoints whose answers differ with the picture."""

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from experts.base import Hardware
from experts.checkpoint import CheckpointError
from experts.detection.transformers_detector import (
    TransformersDetector,
    TransformersDetectorConfig,
    class_names,
)
from experts.detection.transformers_input import ImageInput
from fusion_pipeline.dataset.evidence import DetectedObject
from fusion_pipeline.dataset.images import RGB, decode
from tests.experts import tiny_detectors
from tests.experts.tiny_detectors import CLOSED_SET, assert_close, assert_same, context

Photo = Callable[[str], RGB]
EVERYTHING = {"score_floor": 0.01, "max_objects": 1000}


@pytest.fixture(scope="module", params=CLOSED_SET, ids=lambda maker: maker.__name__)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param(folder)
    return folder


@pytest.fixture(scope="module")
def detector(checkpoint: Path) -> TransformersDetector:
    return load(checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Callable[[RGB], list[dict[str, Any]]]:
    from transformers import pipeline

    detect = pipeline("object-detection", model=str(checkpoint))
    return lambda image: detect(Image.fromarray(image), threshold=EVERYTHING["score_floor"])


@pytest.fixture(scope="module")
def detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For what depends on its keeping an image's proportions."""
    folder = tmp_path_factory.mktemp("detr-for-odd-things")
    tiny_detectors.detr(folder)
    return folder


def load(folder: Path, **settings: Any) -> TransformersDetector:
    config = TransformersDetectorConfig(model=str(folder), **{**EVERYTHING, **settings})
    return TransformersDetector(config, Hardware())


def look(detector: TransformersDetector, *images: RGB) -> list[list[DetectedObject]]:
    return detector(images, [context(image) for image in images])


def test_says_what_the_pipeline_says(
    detector: TransformersDetector,
    reference: Callable[[RGB], list[dict[str, Any]]],
    photo: Photo,
) -> None:
    coffee = photo("coffee.png")
    images = [coffee, coffee.transpose(1, 0, 2), photo("chelsea.png")[:100], photo("astronaut.png")]
    found = look(detector, *images)
    for image, objects in zip(images, found, strict=True):
        assert_same(objects, reference(image), image)
        assert [o.score for o in objects] == sorted((o.score for o in objects), reverse=True)
    assert min(len(objects) for objects in found) >= 5
    assert len({o.label for objects in found for o in objects}) >= 2


def test_sizes_may_be_mixed_in_a_batch(
    checkpoint: Path, detector: TransformersDetector, photo: Photo
) -> None:
    cat, coffee = photo("chelsea.png"), photo("coffee.png")
    images = [cat, coffee, cat[:, ::-1], coffee.transpose(1, 0, 2), coffee[::2, ::2]]
    together = look(load(checkpoint, batch_size=4), *images)
    for one, other in zip(look(detector, *images), together, strict=True):
        assert_close(one, other)


def test_rotated_jpeg_is_seen_upright(
    detector: TransformersDetector,
    reference: Callable[[RGB], list[dict[str, Any]]],
    photo: Photo,
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    Image.fromarray(photo("coffee.png")).save(data, "JPEG", exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(data)))
    pixels = decode(data.getvalue())
    assert pixels.shape == (600, 400, 3)
    assert_same(look(detector, pixels)[0], reference(upright), upright)


def test_shrunken_jpegs_keep_what_the_model_sees(
    checkpoint: Path, detector: TransformersDetector, photo: Photo
) -> None:
    large = photo("astronaut.png").repeat(2, axis=0).repeat(3, axis=1)
    data = io.BytesIO()
    Image.fromarray(large).save(data, "JPEG", quality=95)
    small = decode(data.getvalue(), min_short_edge=detector.min_short_edge)
    assert 160 <= min(small.shape[:2]) < 320
    process = ImageInput(checkpoint)
    whole, kept = (process(image)["pixel_values"] for image in (large, small))
    assert whole.shape == kept.shape
    assert float((whole - kept).abs().mean()) < 0.03


def test_strips_are_seen_whole(detr: Path) -> None:
    """The library fails where less than half a pixel of the short edge would be left."""
    half = np.zeros((3000, 1, 3), np.uint8)
    half[:1500] = 255
    detector = load(detr)
    for strip in (half, half.transpose(1, 0, 2)):
        [objects] = look(detector, strip)
        assert len(objects) >= 5
        turned = look(detector, np.ascontiguousarray(strip[::-1, ::-1]))
        assert turned != [objects]


def test_limits(detr: Path, photo: Photo) -> None:
    image = photo("coffee.png")
    [everything] = look(load(detr), image)
    middle = everything[len(everything) // 2].score
    [sure] = look(load(detr, score_floor=middle), image)
    assert sure == [o for o in everything if o.score > middle]
    assert look(load(detr, max_objects=3), image) == [everything[:3]]
    assert look(load(detr, score_floor=0.999), image) == [[]]


def test_values_that_are_no_numbers_are_an_error(detr: Path, tmp_path: Path, photo: Photo) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(detr / "model.safetensors")
    weights["class_labels_classifier.bias"][0] = np.nan
    broken = shutil.copytree(detr, tmp_path / "broken")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no numbers"):
        look(load(broken), photo("coffee.png"))


def test_classes_without_a_name() -> None:
    labels = {0: "N/A", 1: "", 2: " traffic light ", 3: "LABEL_3", 4: None, 90: "toothbrush"}
    assert class_names(labels) == {2: "traffic light", 90: "toothbrush"}


def test_a_checkpoint_must_name_its_classes(detr: Path, tmp_path: Path) -> None:
    nameless = shutil.copytree(detr, tmp_path / "nameless")
    settings = json.loads((nameless / "config.json").read_text())
    settings["id2label"] = {str(number): f"LABEL_{number}" for number in range(6)}
    (nameless / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="names no class"):
        load(nameless)


def test_half_precision(detr: Path, photo: Photo) -> None:
    image = photo("coffee.png")
    for dtype in ("bfloat16", "float16"):
        [objects] = look(load(detr, dtype=dtype), image)
        assert len(objects) >= 5
        assert all(type(o.score) is float and 0 < o.score <= 1 for o in objects)


def test_a_machine_without_transformers_is_told_what_to_install(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    for expert in ("transformers-detector", "owlv2", "grounding-dino"):
        config.write_text(
            f"run: {tmp_path}/run\nsource: {{folder: {tmp_path}/photos}}\n"
            f"experts: [{expert}: {{model: {tmp_path}}}]\n"
        )
        code = (
            "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
            "from pathlib import Path; from fusion_pipeline.config import *\n"
            f"try: load_config(Path({str(config)!r}))\n"
            "except ConfigError as error: print(error)"
        )
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "pip install 'fusion-pipeline[transformers]'" in said.stdout, said.stderr
        assert f"{expert}." in said.stdout
