"""Real weights, in folders as the hub has them: the PP-OCR models of RapidOCR's wheel."""

import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import yaml

from experts.base import ExpertConfig
from experts.ocr.rapidocr import WEIGHTS

DET, REC, ORI = "PP-OCRv6_small_det", "PP-OCRv6_small_rec", "PP-LCNet_x0_25_textline_ori"


def _write(folder: Path, name: str, weights: Path, before: list[Any], after: Any) -> None:
    folder.mkdir(parents=True)
    shutil.copy(weights, folder / "inference.onnx")
    settings = {
        "Global": {"model_name": name},
        "PreProcess": {"transform_ops": before},
        "PostProcess": after,
    }
    (folder / "inference.yml").write_text(yaml.safe_dump(settings, allow_unicode=True), "utf-8")


def write_models(root: Path) -> None:
    """The direction classifier is older than its name says (by which PaddleX only picks the code
    that runs it), and fails on lines far longer than high."""
    decode = {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}}
    scale = {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "scale": "1./255.",
        "order": "hwc",
    }
    _write(
        root / f"{DET}_onnx",
        DET,
        WEIGHTS["Det"],
        [decode, {"DetResizeForTest": None}, {"NormalizeImage": scale}, {"ToCHWImage": None}],
        {"name": "DBPostProcess", "thresh": 0.2, "box_thresh": 0.45, "unclip_ratio": 1.4},
    )
    recogniser = onnxruntime.InferenceSession(WEIGHTS["Rec"])
    characters = recogniser.get_modelmeta().custom_metadata_map["character"].split("\n")
    _write(
        root / f"{REC}_onnx",
        REC,
        WEIGHTS["Rec"],
        [decode, {"RecResizeImg": {"image_shape": [3, 48, 320]}}],
        {"name": "CTCLabelDecode", "character_dict": characters},
    )
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "scale": 1 / 255, "order": "", "channel_num": 3}
    _write(
        root / f"{ORI}_onnx",
        ORI,
        WEIGHTS["Cls"],
        [{"ResizeImage": {"size": [192, 48]}}, {"NormalizeImage": half}, {"ToCHWImage": None}],
        {"Topk": {"topk": 1, "label_list": ["0_degree", "180_degree"]}},
    )


def paddleocr_config(folder: Path) -> ExpertConfig:
    from experts.ocr.paddleocr import PaddleOcrConfig

    write_models(folder)
    return PaddleOcrConfig(
        detection=str(folder / f"{DET}_onnx"), recognition=str(folder / f"{REC}_onnx")
    )
