"""Vision experts: one file an expert, one line here.

`EXPERTS` maps the name used in configs and table names to `module:class`; the module is imported
when the expert is used, so that a heavy dependency costs nothing until then.
"""

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


def load_expert(name: str) -> "type[Expert]":
    """The class registered under a name. Raises ValueError for an unknown one."""
    if name not in EXPERTS:
        raise ValueError(f"no expert is called {name!r}; known: {', '.join(sorted(EXPERTS))}")
    module, _, attribute = EXPERTS[name].partition(":")
    loaded: type[Expert] = getattr(importlib.import_module(module), attribute)
    return loaded
