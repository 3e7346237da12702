"""Against the library's own pipeline, on tiny checkpoints."""

import io
import json
import shutil
import socket
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from PIL import Image
from pydantic import ValidationError

from experts import torch_models
from experts.base import Hardware
from experts.checkpoint import CheckpointError
from experts.tagging.clip import ClipConfig, ClipModel, ClipTagger
from experts.tagging.vocabulary import Calibration, relevance
from fusion_pipeline.dataset.evidence import Tag
from fusion_pipeline.dataset.images import RGB, decode
from tests.experts import tiny_taggers
from tests.experts.tiny_taggers import TAGS

Photo = Callable[[str], RGB]
KINDS = ("clip", "siglip", "siglip2_naflex")
TEMPLATE = "This is a photo of {label}."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taggers")
    for kind in KINDS:
        getattr(tiny_taggers, kind)(folder / kind)
    (folder / "tags.txt").write_text("\n".join(TAGS), encoding="utf-8")
    return folder


@pytest.fixture(params=KINDS)
def checkpoint(request: pytest.FixtureRequest, folders: Path) -> Path:
    return folders / str(request.param)


def load(checkpoint: Path, **settings: Any) -> ClipTagger:
    chosen = {"vocabulary": str(checkpoint.parent / "tags.txt"), "score_floor": 0, **settings}
    return ClipTagger(ClipConfig(model=str(checkpoint), **chosen), Hardware())


def scores(tags: Sequence[Tag]) -> dict[str, float]:
    return {tag.label: tag.score for tag in tags}


def reference(
    checkpoint: Path, images: Sequence[RGB], template: str = TEMPLATE
) -> list[dict[str, float]]:
    """The pipeline's scores of each image. Its texts are in lower case: SigLIP was trained so, but
    the pipeline leaves that to tokenizers, not all of which see to it."""
    from transformers import pipeline

    classify = pipeline("zero-shot-image-classification", model=str(checkpoint))
    lower = {tag.lower(): tag for tag in TAGS}
    said = classify(
        [Image.fromarray(image) for image in images], candidate_labels=list(lower),
        hypothesis_template=template.lower().replace("{label}", "{}"),
    )  # fmt: skip
    return [{lower[item["label"]]: item["score"] for item in items} for items in said]


def assert_same(found: Sequence[Sequence[Tag]], expected: Sequence[dict[str, float]]) -> None:
    for tags, others in zip(found, expected, strict=True):
        assert [tag.score for tag in tags] == sorted((t.score for t in tags), reverse=True)
        assert scores(tags) == pytest.approx(others, abs=1e-6, rel=1e-4)


def test_says_what_the_pipeline_says(checkpoint: Path, photo: Photo) -> None:
    coffee, cat = photo("coffee.png"), photo("chelsea.png")
    images = [coffee, coffee.transpose(1, 0, 2), cat[:60], cat[:30, :20], photo("page.png")]
    for template in (TEMPLATE, "{label}"):
        found = load(checkpoint, templates=(template,))(images, [])
        assert_same(found, reference(checkpoint, images, template))


@pytest.mark.skipif(not find_spec("sentencepiece"), reason="needs sentencepiece")
def test_first_siglip_says_what_the_pipeline_says(folders: Path, photo: Photo) -> None:
    tiny_taggers.siglip_1(folders / "siglip_1")
    images = [photo("coffee.png")]
    assert_same(
        load(folders / "siglip_1", templates=(TEMPLATE,))(images, []),
        reference(folders / "siglip_1", images),
    )


def test_first_siglip_names_the_package_it_needs(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folders / "siglip", tmp_path / "siglip")
    settings = tmp_path / "siglip" / "tokenizer_config.json"
    named = {**json.loads(settings.read_text()), "tokenizer_class": "SiglipTokenizer"}
    settings.write_text(json.dumps(named))
    monkeypatch.setattr("experts.tagging.clip.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install sentencepiece protobuf"):
        ClipModel(ClipConfig(model=str(tmp_path / "siglip")), Hardware())


def test_several_templates_are_averaged(checkpoint: Path, photo: Photo) -> None:
    """As the CLIP paper does it: unit vectors of each text, their mean, scaled to 1 again."""
    image = photo("coffee.png")
    templates = ("a photo of {label}", "{label} at night")
    model = ClipModel(ClipConfig(model=str(checkpoint)), Hardware())
    [pixels] = model.embed_images([image])
    parts = [model.embed_texts([t.replace("{label}", tag) for tag in TAGS]) for t in templates]
    for part in (*parts, pixels[None]):
        np.testing.assert_allclose(np.linalg.norm(part, axis=1), 1, rtol=1e-5)
    mean = (parts[0] + parts[1]) / 2
    expected = (mean / np.linalg.norm(mean, axis=1, keepdims=True)) @ pixels
    [found] = load(checkpoint, templates=templates).cosines([image])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_no_image_of_a_batch_changes_the_answer_to_another(checkpoint: Path, photo: Photo) -> None:
    images = [photo(n) for n in ("coffee.png", "chelsea.png", "page.png", "astronaut.png")]
    alone, together = (load(checkpoint, batch_size=n)(images, []) for n in (1, 4))
    for one, other in zip(alone, together, strict=True):
        assert scores(one) == pytest.approx(scores(other), abs=1e-5)


def test_rotated_jpeg_is_seen_upright(checkpoint: Path, photo: Photo) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    data = io.BytesIO()
    Image.fromarray(photo("coffee.png")).save(data, "JPEG", exif=exif)
    upright = np.asarray(Image.open(data).transpose(Image.Transpose.ROTATE_90))
    found = load(checkpoint, templates=(TEMPLATE,))([decode(data.getvalue())], [])
    assert_same(found, reference(checkpoint, [upright]))


def test_a_scaled_decode_loses_nothing_that_counts(checkpoint: Path, photo: Photo) -> None:
    model = ClipModel(ClipConfig(model=str(checkpoint)), Hardware())
    assert model.short_edge == 2 * tiny_taggers.SIZE
    data = io.BytesIO()
    large = Image.fromarray(photo("astronaut.png")).resize((400, 500), Image.Resampling.LANCZOS)
    large.save(data, "JPEG", quality=92)
    edges = (None, model.short_edge, model.short_edge // 2)
    images = [decode(data.getvalue(), min_short_edge=edge) for edge in edges]
    assert [image.shape[1] for image in images] == [400, 100, 50]
    full, scaled, smaller = model.embed_images(images)
    assert full @ scaled > 0.98
    assert full @ scaled > full @ smaller


def test_strips_and_large_images(checkpoint: Path, photo: Photo, odd_images: Sequence[RGB]) -> None:
    """Of a strip the library makes an image of gigabytes, and crops it."""
    strip = photo("coffee.png")[180:190]  # 10 x 600: cut to 10 x 320
    for tags in load(checkpoint)([*odd_images, strip], []):
        assert len(tags) == len(TAGS)
    found = load(checkpoint, templates=(TEMPLATE,))([strip], [])
    [expected] = reference(checkpoint, [strip])
    assert scores(found[0]) == pytest.approx(expected, abs=0.02)


def test_only_what_is_cropped_anyway_is_cut_from_a_strip(folders: Path) -> None:
    """The library would scale 1 x 9000 pixels to 48 x 432,000."""
    strip = np.zeros((1, 9000, 3), np.uint8)
    seen = []
    for kind in KINDS:
        model = ClipModel(ClipConfig(model=str(folders / kind)), Hardware())
        prepare = model._processor

        def spy(images: Sequence[Image.Image], prepare: Any = prepare, **settings: Any) -> Any:
            seen.append(images[0].size)
            return prepare(images=images, **settings)

        model._processor = spy
        model.embed_images([strip])
    assert seen == [(32, 1), (9000, 1), (9000, 1)]


def test_relevance_of_texts(folders: Path, photo: Photo) -> None:
    """SigLIP's own score of each text; CLIP has none."""
    images = [photo("coffee.png"), photo("chelsea.png"), photo("page.png")]
    siglip = ClipModel(ClipConfig(model=str(folders / "siglip")), Hardware())
    texts = [[TEMPLATE.replace("{label}", tag) for tag in TAGS], [], ["a " * 200, "cat"]]
    found = relevance(siglip, images, texts)
    assert [len(row) for row in found] == [5, 0, 2]
    [expected] = reference(folders / "siglip", images[:1])
    assert dict(zip(TAGS, found[0], strict=True)) == pytest.approx(expected, abs=1e-6)

    clip = ClipModel(ClipConfig(model=str(folders / "clip")), Hardware())
    with pytest.raises(ValueError, match="fit a calibration"):
        relevance(clip, images, texts)
    calibration = Calibration(scale=5.0, bias=-1.0)
    [row, _, _] = relevance(clip, images, texts, calibration)
    cosines = clip.embed_texts(texts[0]) @ clip.embed_images(images[:1])[0]
    np.testing.assert_allclose(row, 1 / (1 + np.exp(1 - 5 * cosines)), atol=1e-6)


def test_half_precision(checkpoint: Path, photo: Photo) -> None:
    images = [photo("coffee.png")]
    [full], [half] = (load(checkpoint, dtype=d)(images, []) for d in ("float32", "bfloat16"))
    assert scores(half) == pytest.approx(scores(full), abs=0.1)
    assert scores(half) != scores(full)


def test_a_folder_is_loaded_without_the_network(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load(checkpoint)


def test_unfit_checkpoints_are_refused(folders: Path, tmp_path: Path) -> None:
    for name, change, message in (
        ("other", {"model_type": "clip_vision_model"}, "a checkpoint of clip_vision_model"),
        ("less", {}, "1 weights of CLIPModel are not in it, such as visual_projection.weight"),
        ("pickle", {}, "no \\*.safetensors there"),
    ):
        folder = tmp_path / name
        shutil.copytree(folders / "clip", folder)
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**settings, **change}))
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        if name == "less":
            del weights["visual_projection.weight"]
            safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
        if name == "pickle":
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=message):
            ClipModel(ClipConfig(model=str(folder)), Hardware())


def test_without_transformers_the_config_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_models, "find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"pip install 'fusion-pipeline\[transformers\]'"):
        ClipConfig(model=".")
