from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

from experts.base import Hardware
from experts.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    checkpoint_folder,
    checkpoint_revision,
)
from experts.torch_models import device_of, load_model
from tests.experts import tiny_detectors

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"weights": np.arange(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def config(model: Path | str, **settings: Any) -> CheckpointConfig:
    return CheckpointConfig(model=str(model), **settings)


@pytest.mark.parametrize(
    ("model", "revision", "said"),
    [
        ("google/owlv2-base", None, "no folder 'google/owlv2-base'; of the hub"),
        ("google/owlv2-base", "main", "huggingface.co/google/owlv2-base/commits/main"),
        ("owlv2", COMMIT, "no folder 'owlv2'"),
        ("google/owlv2/base", COMMIT, "no folder"),
        ("./checkpoint", COMMIT, "is a folder and has none"),
    ],
)
def test_a_checkpoint_is_pinned(model: str, revision: str | None, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(model, revision=revision)


def test_revision_of_the_hub_is_its_commit() -> None:
    pinned = config("google/owlv2-base", revision=COMMIT)
    assert checkpoint_revision(pinned) == f"google/owlv2-base@{COMMIT}"


def test_revision_of_a_folder_is_its_content(folder: Path) -> None:
    before = checkpoint_revision(config(folder))
    moved = folder.rename(folder.with_name("moved"))
    assert checkpoint_revision(config(moved)) == before
    assert config(moved).fingerprint_fields() == {"batch_size": 1, "dtype": "float32"}

    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert checkpoint_revision(config(moved)) != before


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    gone = config(tmp_path / "gone")
    for find in (checkpoint_revision, checkpoint_folder):
        with pytest.raises(CheckpointError, match="no such folder"):
            find(gone)


def test_pickles_are_refused(folder: Path) -> None:
    assert checkpoint_folder(config(folder)) == folder
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="can run code, and are not loaded"):
        checkpoint_folder(config(folder))


def test_the_hub_is_not_asked_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=f"owner/model at {COMMIT} can't be fetched"):
        checkpoint_folder(config("owner/model", revision=COMMIT))


@pytest.fixture(scope="module")
def detr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detr")
    tiny_detectors.detr(folder)
    return folder


def test_weights_must_fill_the_model(detr: Path, tmp_path: Path) -> None:
    """transformers itself only warns, and fills the rest with random numbers."""
    from transformers import AutoModelForObjectDetection

    model = load_model(AutoModelForObjectDetection, detr, config(detr), Hardware())
    assert not model.training

    weights = load_file(detr / "model.safetensors")
    del weights["class_labels_classifier.bias"]
    (tmp_path / "config.json").write_bytes((detr / "config.json").read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"not in it, such as class_labels_classifier\.bias"):
        load_model(AutoModelForObjectDetection, tmp_path, config(tmp_path), Hardware())


def test_counters_of_training_may_be_missing(tmp_path: Path) -> None:
    from transformers import AutoModelForObjectDetection

    tiny_detectors.rt_detr_v2(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {n: w for n, w in weights.items() if not n.endswith("num_batches_tracked")}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert load_model(AutoModelForObjectDetection, tmp_path, config(tmp_path), Hardware())


def test_code_of_a_checkpoint_is_never_run(folder: Path) -> None:
    from transformers import AutoModelForObjectDetection

    (folder / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "code.Config", '
        '"AutoModelForObjectDetection": "code.Model"}}'
    )
    (folder / "code.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match=r"trust_remote_code|model type `own`"):
        load_model(AutoModelForObjectDetection, folder, config(folder), Hardware())


def test_a_gpu_that_is_not_there() -> None:
    import torch

    assert device_of(Hardware()) == "cpu"
    if torch.cuda.is_available():
        assert device_of(Hardware(gpu=True)) == "cuda"
    else:
        with pytest.raises(CheckpointError, match="PyTorch sees none"):
            device_of(Hardware(gpu=True))
