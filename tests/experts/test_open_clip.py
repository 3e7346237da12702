"""Against the use of open_clip that its documentation shows, on tiny checkpoints."""

import io
import json
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from experts import torch_models
from experts.base import Hardware
from experts.checkpoint import CheckpointError
from experts.tagging.open_clip import OpenClipConfig, OpenClipModel, OpenClipTagger
from fusion_pipeline.dataset.evidence import Tag
from fusion_pipeline.dataset.images import RGB, decode
from tests.experts import tiny_taggers
from tests.experts.tiny_taggers import TAGS

Photo = Callable[[str], RGB]
KINDS = ("open_clip", "open_clip_siglip", "eva_clip")


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


def load(checkpoint: Path, **settings: Any) -> OpenClipTagger:
    chosen = {"vocabulary": str(checkpoint.parent / "tags.txt"), "score_floor": 0, **settings}
    return OpenClipTagger(OpenClipConfig(model=str(checkpoint), **chosen), Hardware())


def scores(tags: Sequence[Tag]) -> dict[str, float]:
    return {tag.label: tag.score for tag in tags}


def reference(checkpoint: Path, image: RGB, bias: float | None) -> dict[str, float]:
    """Written out with the numbers that the tiny checkpoints are made with."""
    import open_clip

    model, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{checkpoint}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{checkpoint}")
    texts = [f"this is a photo of {tag}." for tag in TAGS]
    with torch.no_grad():
        pixels = model.encode_image(prepare(Image.fromarray(image)).unsqueeze(0))
        words = model.encode_text(tokenizer(texts))
        pixels /= pixels.norm(dim=-1, keepdim=True)
        words /= words.norm(dim=-1, keepdim=True)
        logits = (np.exp(3.0) * pixels @ words.T)[0]
        found = logits.softmax(dim=-1) if bias is None else torch.sigmoid(logits + bias)
    return dict(zip(TAGS, found.tolist(), strict=True))


def bias_of(checkpoint: Path) -> float | None:
    return -2.0 if checkpoint.name == "open_clip_siglip" else None


def test_says_what_the_documented_use_says(checkpoint: Path, photo: Photo) -> None:
    coffee, cat = photo("coffee.png"), photo("chelsea.png")
    images = [coffee, coffee.transpose(1, 0, 2), cat[:60], cat[:30, :20], photo("page.png")]
    for image, tags in zip(images, load(checkpoint)(images, []), strict=True):
        expected = reference(checkpoint, image, bias_of(checkpoint))
        assert scores(tags) == pytest.approx(expected, abs=1e-6, rel=1e-4)
        assert [tag.score for tag in tags] == sorted((t.score for t in tags), reverse=True)


def test_images_are_normalised_by_the_checkpoints_numbers(folders: Path) -> None:
    """The library's default numbers are CLIP's; these are of `open_clip_config.json`."""
    model = OpenClipModel(OpenClipConfig(model=str(folders / "open_clip")), Hardware())
    pixels = model._prepare(Image.new("RGB", (60, 60), (255, 128, 0)))
    mean, std = (np.array(tiny_taggers.NORM[f"image_{n}"]) for n in ("mean", "std"))
    np.testing.assert_allclose(pixels[:, 20, 20], ([1, 128 / 255, 0] - mean) / std, rtol=1e-5)


def test_embeddings_have_unit_length(checkpoint: Path, photo: Photo) -> None:
    """Else a long vector would count for more in the mean of several templates."""
    model = OpenClipModel(OpenClipConfig(model=str(checkpoint)), Hardware())
    for rows in (model.embed_images([photo("coffee.png")]), model.embed_texts(["cat", "dog"])):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)


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
    [tags] = load(checkpoint)([decode(data.getvalue())], [])
    expected = reference(checkpoint, upright, bias_of(checkpoint))
    assert scores(tags) == pytest.approx(expected, abs=1e-6)


def test_strips_and_large_images(folders: Path, photo: Photo, odd_images: Sequence[RGB]) -> None:
    checkpoint = folders / "open_clip"
    strip = photo("coffee.png")[180:190]
    tagger = load(checkpoint)
    assert tagger.min_short_edge == 2 * tiny_taggers.SIZE
    found = tagger([*odd_images, strip], [])
    assert [len(tags) for tags in found] == [len(TAGS)] * 8
    assert scores(found[-1]) == pytest.approx(reference(checkpoint, strip, None), abs=0.02)


def test_half_precision(checkpoint: Path, photo: Photo) -> None:
    images = [photo("coffee.png")]
    [full], [half] = (load(checkpoint, dtype=d)(images, []) for d in ("float32", "bfloat16"))
    assert scores(half) == pytest.approx(scores(full), abs=0.15)
    assert scores(half) != scores(full)


def test_a_folder_is_loaded_without_the_network(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load(checkpoint)


def test_a_pickle_beside_the_weights_is_not_looked_at(folders: Path, tmp_path: Path) -> None:
    """By themselves, the library and PyTorch would take it before any other *.safetensors."""
    folder = tmp_path / "model"
    shutil.copytree(folders / "open_clip", folder)
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    load(folder, vocabulary=str(folders / "tags.txt"))
    (folder / "open_clip_model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"no open_clip_model\.safetensors there"):
        OpenClipModel(OpenClipConfig(model=str(folder)), Hardware())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_cfg": {"hf_model_name": "x/y"}}, "built from another repository, x/y"),
        ({"vision_cfg": {"timm_model_name": "hf-hub:x/y"}}, "not one of timm's own: hf-hub:x/y"),
        (
            {"text_cfg": {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": 1}}},
            "unknown settings of the tokenizer: trust_remote_code",
        ),
        (None, "no usable open_clip_config.json"),
    ],
)
def test_checkpoints_that_would_bring_code_or_files_from_elsewhere_are_refused(
    folders: Path, tmp_path: Path, change: Mapping[str, Any] | None, message: str
) -> None:
    shutil.copytree(folders / "open_clip", tmp_path / "model")
    place = tmp_path / "model" / "open_clip_config.json"
    settings = json.loads(place.read_text())
    for part, values in (change or {}).items():
        settings["model_cfg"][part] |= values
    place.write_text("{}" if change is None else json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        OpenClipModel(OpenClipConfig(model=str(tmp_path / "model")), Hardware())


def test_without_open_clip_the_config_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_models, "find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"pip install 'fusion-pipeline\[open-clip\]'"):
        OpenClipConfig(model=".")
