"""Image classifiers of a few 10,000 random weights, saved by the library."""

from pathlib import Path
from typing import Any

from experts.base import ExpertConfig
from tests.experts.tiny_taggers import NORM, SIZE, _save

NAMES = {0: "photo", 1: "art", 2: "nsfw"}


def _classifier(folder: Path, model: Any, seed: int, processor: Any = None) -> None:
    """With weights large enough that images differ."""
    import torch
    from transformers import ViTImageProcessor

    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                noise = torch.randn(weights.shape, generator=random)
                weights.copy_(noise * 2 / weights[0].numel() ** 0.5)
    edge = {"height": SIZE, "width": SIZE}
    _save(folder, model.eval(), processor or ViTImageProcessor(size=edge, **NORM))


def _vit(folder: Path, names: dict[int, str], **more: Any) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = ViTConfig(
        num_attention_heads=2, image_size=SIZE, patch_size=8, **sizes,
        id2label=names, label2id={name: n for n, name in names.items()}, **more,
    )  # fmt: skip
    _classifier(folder, ViTForImageClassification(config), 0)


def vit(folder: Path) -> None:
    _vit(folder, NAMES)


def vit_several(folder: Path) -> None:
    _vit(folder, NAMES, problem_type="multi_label_classification")


def vit_regression(folder: Path) -> None:
    _vit(folder, NAMES, problem_type="regression")


def vit_crop(folder: Path) -> None:
    """Images are scaled by their short edge, and their middle is cut out."""
    from transformers import CLIPImageProcessor

    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    vit(folder)
    CLIPImageProcessor(**sizes, **NORM).save_pretrained(folder)


def timm_vit(folder: Path) -> None:
    """As on the hub: a config of timm, which transformers wraps."""
    import torch
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    torch.manual_seed(3)
    pretrained = {"input_size": [3, 160, 160], "mean": [0.5] * 3, "std": [0.5] * 3,
                  "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}  # fmt: skip
    config = TimmWrapperConfig.from_dict(
        {"architecture": "test_vit", "num_classes": 3, "label_names": [*NAMES.values()],
         "pretrained_cfg": pretrained}
    )  # fmt: skip
    TimmWrapperForImageClassification(config).eval().save_pretrained(folder)


def vit_one(folder: Path) -> None:
    _vit(folder, {0: "nsfw"})


def convnext(folder: Path) -> None:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], layer_scale_init_value=1.0,
        id2label=NAMES, label2id={name: n for n, name in NAMES.items()},
    )  # fmt: skip
    _classifier(folder, ConvNextForImageClassification(config), 1)


def classifier_config(folder: Path) -> ExpertConfig:
    from experts.scoring.classifier import ClassifierConfig

    vit(folder)
    return ClassifierConfig(model=str(folder))


def clip_classes_config(folder: Path) -> ExpertConfig:
    from experts.scoring.clip_classes import ClipClassesConfig
    from tests.experts.tiny_taggers import clip

    clip(folder)
    return ClipClassesConfig(model=str(folder))
