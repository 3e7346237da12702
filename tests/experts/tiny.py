"""A config for every expert: those that load a checkpoint get a tiny one with random weights, made
on disk by the library that the real ones come from."""

import importlib
from pathlib import Path

from experts import load_expert
from experts.base import ExpertConfig

MAKERS: dict[str, str] = {
    "classifier": "tests.experts.tiny_scoring:classifier_config",
    "clip": "tests.experts.tiny_taggers:clip_config",
    "clip-classes": "tests.experts.tiny_scoring:clip_classes_config",
    "grounding-dino": "tests.experts.tiny_detectors:grounding_dino_config",
    "open-clip": "tests.experts.tiny_taggers:open_clip_config",
    "owlv2": "tests.experts.tiny_detectors:owlv2_config",
    "paddleocr": "tests.experts.tiny_paddleocr:paddleocr_config",
    **dict.fromkeys(
        ("parquet-objects", "parquet-scores", "parquet-tags", "parquet-text"),
        "tests.experts.test_parquet:one_row",
    ),
    "ram-plus": "tests.experts.tiny_taggers:ram_plus_config",
    "transformers-detector": "tests.experts.tiny_detectors:closed_set_config",
    "ultralytics": "tests.experts.tiny_ultralytics:closed_set",
    "ultralytics-open": "tests.experts.tiny_ultralytics:open_set",
}
"""Expert to `module:function`; the function writes a checkpoint into a folder and returns a config
whose score floor is so low that random weights find something."""


def tiny_config(expert: str, folder: Path) -> ExpertConfig:
    if expert not in MAKERS:
        return load_expert(expert).Config()
    module, _, function = MAKERS[expert].partition(":")
    folder.mkdir(parents=True, exist_ok=True)
    config: ExpertConfig = getattr(importlib.import_module(module), function)(folder)
    return config
