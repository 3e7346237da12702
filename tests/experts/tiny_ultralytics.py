"""Small checkpoints of ultralytics' own architectures, with random weights that tell places and
classes apart, and what the library's own `predict` finds with them.

The library is asked in a process of its own (`python -m tests.experts.tiny_ultralytics <folder>`):
it changes settings of OpenCV, NumPy and PyTorch for the whole process that imports it.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import numpy as np
import yaml

from experts.detection.ultralytics import UltralyticsConfig, UltralyticsOpenConfig
from experts.detection.ultralytics_export import exported
from fusion_pipeline.dataset.images import RGB

SIZE = 160
LABELS = ("cat", "dog", "coffee cup", "bus")
ARCHITECTURES = {
    "yolo11": "11/yolo11.yaml",
    "yolo12": "12/yolo12.yaml",
    "yolo26": "26/yolo26.yaml",
    "rtdetr": "rt-detr/rtdetr-l.yaml",
    "world": "v8/yolov8-worldv2.yaml",
    "yoloe": "11/yoloe-11.yaml",
    "yoloe-seg": "11/yoloe-11-seg.yaml",
}

Seen = list[tuple[str, float, tuple[float, float, float, float]]]
"""Label, score, box (x1, y1, x2, y2) in pixels of the image."""


def closed_set(folder: Path) -> UltralyticsConfig:
    return UltralyticsConfig(model=_exported(folder, "yolo11"), score_floor=0.1)


def open_set(folder: Path) -> UltralyticsOpenConfig:
    return UltralyticsOpenConfig(model=_exported(folder, "yoloe"), score_floor=0.1)


def _exported(folder: Path, name: str) -> str:
    ask_library(folder, make=[name])
    checkpoint = folder / f"{name}.pt"
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    with mock.patch.dict(os.environ, XDG_CACHE_HOME=str(folder)):
        return str(exported(checkpoint, sha256, SIZE))


def ask_library(
    folder: Path,
    make: Sequence[str] = (),
    export: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    images: Sequence[RGB] = (),
    predict: Sequence[Mapping[str, Any]] = (),
) -> list[list[Seen]]:
    """Make a checkpoint `<name>.pt` of each architecture in `make`, then export them to the names
    in `export`, then look at every image once for each item of `predict`.

    The items hold `model`, the file's name, and settings of the library's own function; `classes`
    makes these of a YOLOE's classes its only ones first.
    """
    for number, image in enumerate(images):
        np.save(folder / f"{number}.npy", image)
    plain = [dict(item) for item in predict]
    order = {"make": list(make), "export": {k: dict(v) for k, v in export.items()}}
    (folder / "order.json").write_text(
        json.dumps({**order, "images": len(images), "predict": plain})
    )
    environment = {
        **os.environ, "YOLO_CONFIG_DIR": str(folder), "YOLO_AUTOINSTALL": "false",
        "YOLO_OFFLINE": "true", "YOLO_VERBOSE": "false", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.experts.tiny_ultralytics", str(folder)]
    told = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-3000:]
    answer: list[list[Seen]] = json.loads((folder / "answer.json").read_text())
    return answer


def main(folder: Path) -> None:
    import torch
    import torchvision
    from ultralytics.utils.nms import TorchNMS

    torch.set_num_threads(1)
    # The library's own, which it says is the same; torchvision's is not in every build.
    torchvision.ops.nms = TorchNMS.nms
    order = json.loads((folder / "order.json").read_text())
    for name in order["make"]:
        torch.manual_seed(0)
        _make(name, folder)
    for name, asked in order["export"].items():
        _export(folder / name, **asked)
    images = [np.load(folder / f"{number}.npy") for number in range(order["images"])]
    answer = [_predict(folder, images, **asked) for asked in order["predict"]]
    (folder / "answer.json").write_text(json.dumps(answer))


def _make(name: str, folder: Path) -> None:
    import torch
    import ultralytics
    from ultralytics import RTDETR, YOLO, YOLOE, YOLOWorld

    source = Path(ultralytics.__file__).parent / "cfg/models" / ARCHITECTURES[name]
    plan = yaml.safe_load(source.read_text())
    plan["scales"] = {"n": [0.33, 0.25 if name == "yolo12" else 0.125, 1024]}
    plan["nc"] = 80 if name == "world" else len(LABELS)
    if name == "rtdetr":
        _shrink_rtdetr(plan)
    file = folder / f"tiny-{name}.yaml"
    file.write_text(yaml.safe_dump(plan))
    kinds: dict[str, Callable[[str], Any]] = {
        "rtdetr": RTDETR,
        "world": YOLOWorld,
        "yoloe": YOLOE,
        "yoloe-seg": lambda path: YOLOE(path, task="segment"),
    }
    model = kinds.get(name, YOLO)(str(file))
    texts = torch.nn.functional.normalize(torch.randn(1, len(LABELS), 512), dim=-1)
    if name == "world":  # as set_classes does it, whose text encoder would have to be fetched
        model.model.txt_feats, model.model.model[-1].nc = texts, len(LABELS)
        model.model.names = list(LABELS)
    elif "yoloe" in name:
        model.set_classes(list(LABELS), texts)
    else:
        model.model.names = dict(enumerate(LABELS))
    _liven(model.model)
    model.save(folder / f"{name}.pt")


def _shrink_rtdetr(plan: dict[str, Any]) -> None:
    """Its widths are written out; `scales` does not reach them."""
    for layer in plan["backbone"] + plan["head"]:
        kind, arguments = layer[2:]
        if kind in ("HGBlock", "Conv", "RepC3"):
            layer[1] = 1
        if kind == "HGStem":
            arguments[:] = [8, 6]
        elif kind == "HGBlock":
            arguments[:2] = [width // 8 for width in arguments[:2]]
        elif kind == "DWConv":
            arguments[0] //= 8
        elif kind in ("Conv", "RepC3"):
            arguments[0] = 32
        elif kind == "AIFI":
            arguments[:] = [64, 4]
        elif kind == "RTDETRDecoder":
            arguments[1:] = [32, 50, 4, 4, 2, 64]


def _liven(model: Any) -> None:
    """Normalise every layer for photos, and spread scores and sizes of boxes."""
    import cv2
    import skimage
    import torch

    photos = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    corners = [(photo, y, x) for photo in photos for y in (0, 90) for x in (0, 150)]
    pixels = np.stack([cv2.resize(photo[y:, x:], (SIZE, SIZE)) for photo, y, x in corners])
    batch = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    model.train()
    with torch.no_grad():
        model(batch)
    model.eval()
    head = model.model[-1]
    head.shapes = []  # saved, RT-DETR's anchors of this size would be rounded to float16
    with torch.no_grad():
        for name, weights in head.named_parameters():
            _spread(name, weights)


def _spread(name: str, weights: Any) -> None:
    """Scores from next to nothing to next to one; boxes of many sizes."""
    import torch

    if re.fullmatch(r"(one2one_)?cv2\.\d\.2\.weight", name):
        weights.mul_(2)
    elif re.fullmatch(r"(one2one_)?cv3\.\d\.2\.weight|dec_score_head\.\d\.weight", name):
        # Of text-guided heads these give features, which a normalisation follows.
        weights.mul_(2 if len(weights) == len(LABELS) else 1)
    elif re.fullmatch(r"(one2one_)?cv3\.\d\.2\.bias|dec_score_head\.\d\.bias", name):
        weights.fill_(-2 if len(weights) == len(LABELS) else 0)
    elif name.endswith("logit_scale"):
        weights.fill_(0)
    elif re.fullmatch(r"cv4\.\d\.bias", name):
        weights.fill_(-2)
    elif re.fullmatch(r"(enc|dec)_bbox_head\.(\d\.)?layers\.2\.weight", name):
        torch.nn.init.normal_(weights, std=0.2)


def _export(target: Path, model: str, **settings: Any) -> None:
    from ultralytics import YOLO

    checkpoint = YOLO(target.parent / model)
    written = checkpoint.export(format="onnx", imgsz=SIZE, simplify=False, **settings)
    os.replace(written, target)


def _predict(
    folder: Path, images: Sequence[RGB], model: str, classes: Sequence[int] = (), **settings: Any
) -> list[Seen]:
    from ultralytics import YOLO

    detector = YOLO(folder / model)
    if classes:
        labels = [detector.names[number] for number in classes]
        detector.set_classes(labels, detector.model.pe[:, list(classes)])
    found = []
    for image in images:
        [result] = detector.predict(image[..., ::-1], imgsz=SIZE, verbose=False, **settings)
        boxes = result.boxes
        rows = zip(boxes.cls.tolist(), boxes.conf.tolist(), boxes.xyxy.tolist(), strict=True)
        found.append([(result.names[int(n)], score, tuple(box)) for n, score, box in rows])
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
