"""RAM++ against numbers that a transcription of the authors' code gave for small random weights.

Their package can't be installed beside a transformers of today; docs/decisions/011 says how the
numbers were made.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from experts import torch_models
from experts.base import Hardware
from experts.checkpoint import CheckpointError
from experts.tagging.ram_plus import TAGS, THRESHOLDS, RamPlus, RamPlusConfig
from fusion_pipeline.dataset.images import RGB
from tests.experts.tiny_taggers import RAM_PLUS, ram_plus

Photo = Callable[[str], RGB]
WEIGHTS = "ram_plus.safetensors"
GOLDEN = json.loads(RAM_PLUS.read_text())["scores"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ram_plus")
    ram_plus(folder)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "ram_plus"))


def load(folder: Path, **settings: Any) -> RamPlus:
    return RamPlus(RamPlusConfig(model=str(folder), tags=folder, **settings), Hardware())


def test_scores_are_those_of_the_transcription(folder: Path, photo: Photo) -> None:
    found = load(folder).scores([photo(name) for name in GOLDEN])
    np.testing.assert_allclose(found, list(GOLDEN.values()), atol=1e-5)


def test_tags_are_those_above_their_own_thresholds(copy: Path, photo: Photo) -> None:
    truth = GOLDEN["page.png"]
    floors = [0.9 if n % 3 else 0.6 for n in range(len(truth))]
    (copy / THRESHOLDS).write_text("".join(f"{floor}\n" for floor in floors))
    for share in (1, 0.75):
        expected = [
            (f"tag {n}", score)
            for n, (score, floor) in enumerate(zip(truth, floors, strict=True))
            if score > share * floor
        ]
        assert 3 < len(expected) < len(truth)
        [tags] = load(copy, threshold_share=share)([photo("page.png")], [])
        assert [(tag.label, pytest.approx(tag.score, abs=1e-5)) for tag in tags] == sorted(
            expected, key=lambda pair: -pair[1]
        )
        [few] = load(copy, threshold_share=share, max_tags=3)([photo("page.png")], [])
        assert few == tags[:3]


def test_weights_as_the_authors_publish_them(copy: Path, photo: Photo) -> None:
    """With what only training needs, with tables that follow from sizes, under older names; made
    into safetensors as docs/tagging.md says."""
    weights = load_file(copy / WEIGHTS)
    older = {name.replace("tagging_head", "vision_multi"): w for name, w in weights.items()}
    older["visual_encoder.layers.0.blocks.1.attn_mask"] = torch.ones(64, 144, 144)
    older["visual_encoder.layers.0.blocks.0.attn.relative_position_index"] = torch.ones(
        144, 144, dtype=torch.long
    )
    older["text_proj.weight"] = torch.zeros(3)
    torch.save({"model": older}, copy / "ram_plus_swin_large_14m.pth")
    (copy / WEIGHTS).unlink()
    page = Path("docs/tagging.md").read_text("utf-8")
    [code] = re.findall(r"```python\n(import torch\n.*?)```", page, re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True)
    found = load(copy).scores([photo("coffee.png")])
    np.testing.assert_allclose(found, [GOLDEN["coffee.png"]], atol=1e-5)


def test_half_precision(folder: Path, photo: Photo) -> None:
    images = [photo("coffee.png")]
    full, half = (load(folder, dtype=kind).scores(images) for kind in ("float32", "bfloat16"))
    assert np.abs(half - full).max() < 0.05
    assert (half != full).any()


def test_an_answer_without_numbers_is_no_answer(copy: Path, photo: Photo) -> None:
    weights = load_file(copy / WEIGHTS)
    weights["fc.bias"][0] = torch.nan
    save_file(weights, copy / WEIGHTS)
    with pytest.raises(ValueError, match="not_finite"):
        load(copy)([photo("coffee.png")], [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("label_embed"), "not the weights of RAM.*no label_embed"),
        (lambda w: w.pop("wordvec_proj.bias"), r"1 missing, such as wordvec_proj\.bias"),
        (lambda w: w.pop("visual_encoder.norm.bias"), r"1 missing, such as norm\.bias"),
        (lambda w: w.pop("visual_encoder.patch_embed.proj.weight"), "no Swin Transformer"),
        (lambda w: w.update(label_embed=w["label_embed"][:-1].clone()), "do not fit 20 tags"),
        (lambda w: w.update({"fc.bias": torch.zeros(2)}), r"fc\.bias"),
    ],
)
def test_weights_of_another_model_are_refused(
    copy: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    weights = load_file(copy / WEIGHTS)
    change(weights)
    save_file(weights, copy / WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (TAGS, "cat\ndog\n", "20 thresholds for the 2 tags"),
        (THRESHOLDS, "0.5\n" * 19, "19 thresholds for the 20 tags"),
        (THRESHOLDS, "much\n" * 20, "not one number a line.*much"),
    ],
)
def test_lists_that_do_not_fit_are_refused(copy: Path, name: str, text: str, message: str) -> None:
    (copy / name).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load(copy)


def test_files_that_are_not_there_are_named(copy: Path) -> None:
    (copy / TAGS).unlink()
    with pytest.raises(CheckpointError, match=r"ram_tag_list\.txt is no file; fetch ram/data of"):
        RamPlus.revision(RamPlusConfig(model=str(copy), tags=copy))


def test_pickles_are_not_loaded(copy: Path) -> None:
    (copy / WEIGHTS).rename(copy / "ram_plus_swin_large_14m.pth")
    with pytest.raises(CheckpointError, match=r"no \*.safetensors there"):
        load(copy)


def test_lists_are_part_of_the_revision_wherever_they_lie(folder: Path, copy: Path) -> None:
    here, there = (RamPlusConfig(model=str(f), tags=f) for f in (folder, copy))
    assert RamPlus.revision(here) == RamPlus.revision(there)
    assert here.fingerprint_fields() == there.fingerprint_fields()
    for name in (TAGS, THRESHOLDS):
        before = RamPlus.revision(there)
        (copy / name).write_text((copy / name).read_text() + "9\n")
        assert RamPlus.revision(there) != before


def test_what_is_missing_is_said_with_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_models, "find_spec", lambda name: None if name == "timm" else 1)
    with pytest.raises(ValidationError, match=r"needs timm.*fusion-pipeline\[transformers\]"):
        RamPlusConfig(model=str(folder), tags=folder)
