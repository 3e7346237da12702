"""Vision experts: one file an expert, one line here.

`EXPERTS` maps the name used in configs and table names to `module:class`; the module is imported
when the expert is used, so that a heavy dependency costs nothing until then.
"""

import difflib
import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from experts.base import Expert

# ONNX Runtime reports its use over the network unless this is set before it is first imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

EXPERTS: dict[str, str] = {
    "centerface": "experts.detection.centerface:CenterFace",
    "classifier": "experts.scoring.classifier:Classifier",
    "clip": "experts.tagging.clip:ClipTagger",
    "clip-classes": "experts.scoring.clip_classes:ClipClasses",
    "efficientnet-lite2": "experts.tagging.efficientnet_lite2:EfficientNetLite2Tagger",
    "grounding-dino": "experts.detection.grounding_dino:GroundingDino",
    "nanodet": "experts.detection.nanodet:NanoDet",
    "nsfwjs": "experts.scoring.nsfwjs:NsfwJs",
    "open-clip": "experts.tagging.open_clip:OpenClipTagger",
    "owlv2": "experts.detection.owlv2:Owlv2",
    "paddleocr": "experts.ocr.paddleocr:PaddleOcr",
    "parquet-objects": "experts.parquet:ParquetObjects",
    "parquet-scores": "experts.parquet:ParquetScores",
    "parquet-tags": "experts.parquet:ParquetTags",
    "parquet-text": "experts.parquet:ParquetText",
    "ram-plus": "experts.tagging.ram_plus:RamPlus",
    "rapidocr": "experts.ocr.rapidocr:RapidOcr",
    "transformers-detector": "experts.detection.transformers_detector:TransformersDetector",
    "ultralytics": "experts.detection.ultralytics:Ultralytics",
    "ultralytics-open": "experts.detection.ultralytics:UltralyticsOpen",
}

SHIPPED = ("efficientnet-lite2", "nanodet", "rapidocr")
"""Experts whose weights come with the package: what a config without `experts` runs."""


_OF_A_CLASS = ("kind", "version", "uses_tags", "Config", "revision")


def load_expert(name: str) -> "type[Expert]":
    """The class registered under a name, or that of `module:Class`. Raises ValueError."""
    if name not in EXPERTS and ":" not in name:
        near = difflib.get_close_matches(name, EXPERTS, n=1)
        hint = f"did you mean {near[0]!r}? Known" if near else "known"
        raise ValueError(
            f"no expert is called {name!r}; {hint}: {', '.join(sorted(EXPERTS))}. One of your own "
            "is `module:Class`"
        )
    module, _, attribute = EXPERTS.get(name, name).partition(":")
    try:
        loaded: type[Expert] = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        if name in EXPERTS:
            raise
        raise ValueError(f"expert {name!r} can't be imported: {error}") from error
    for part in _OF_A_CLASS:
        if not hasattr(loaded, part):
            raise ValueError(f"{name!r} is no expert: it has no `{part}` (see experts/base.py)")
    return loaded
