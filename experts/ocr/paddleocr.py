"""PaddleOCR 3: text lines by any of its PP-OCR models.

Source: github.com/PaddlePaddle/PaddleOCR and PaddleX (both Apache-2.0, the models as well). The
models run on ONNX Runtime; PaddlePaddle need not be installed.

Models come from a folder or, pinned to a commit, from the hub. PaddleX's own download, which takes
whatever is newest at the first host that answers, is never used.
"""

import logging
import os
import re
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar

import cv2
import numpy as np
import yaml
from pydantic import AfterValidator, Field, model_validator

from experts.base import Context, ExpertConfig, Hardware
from experts.checkpoint import CheckpointError, fetch, is_folder
from experts.ocr.lines import Quad, clean
from experts.ocr.scripts import script_of
from experts.onnx import session
from experts.torch_models import require
from fusion_pipeline.dataset.blocks import reading_order
from fusion_pipeline.dataset.evidence import EvidenceKind, TextLine
from fusion_pipeline.dataset.images import RGB
from fusion_pipeline.dataset.weights import weights_hash

TALL = 1.5
"""PaddleX turns a crop that is this many times higher than wide by 90 degrees."""
MAX_SIDE = 32_000
"""PaddleX keeps corners in 16 bits, and OpenCV can't cut crops from larger images."""
NUMBER = re.compile(r"[0-9.e-]+(/[0-9.]+)?")
WEIGHTS, SETTINGS = "inference.onnx", "inference.yml"


def _pinned(source: str) -> str:
    if is_folder(source) or re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", source):
        return source
    raise ValueError(f"no folder {source!r}, and not an id like owner/name@<commit, 40 hex digits>")


Source = Annotated[str, AfterValidator(_pinned)]
"""A folder, or `PaddlePaddle/PP-OCRv6_medium_det_onnx@<commit, 40 hex digits>` on the hub."""


class PaddleOcrConfig(ExpertConfig):
    detection: Source
    """Finds lines."""
    recognition: Source
    """Decides the languages: PP-OCRv6 reads Chinese, English, Japanese and most Latin scripts;
    `korean_PP-OCRv5_mobile_rec`, `arabic_…`, `cyrillic_…`, `devanagari_…`, `th_…` read others."""
    orientation: Source | None = None
    """Tells lines that stand upside down (`PP-LCNet_x1_0_textline_ori`); none: no line does."""
    score_floor: float = Field(default=0.3, ge=0, le=1)
    """Lines are dropped below this mean confidence of their characters."""
    detection_long_side: int = Field(default=960, ge=32, le=4000)
    """Lines are searched for in a copy with at most this long side, and read in the original."""
    box_score: float = Field(default=0.5, gt=0, le=1)
    """Least mean text probability inside a detected box."""

    @model_validator(mode="before")
    @classmethod
    def _is_installed(cls, settings: Any) -> Any:
        require("paddleocr", "paddleocr", "paddlex")
        return settings

    def fingerprint_fields(self) -> dict[str, Any]:
        """Without the models, which `PaddleOcr.revision` stands for."""
        return self.model_dump(mode="json", exclude=set(self.sources()))

    def sources(self) -> dict[str, str]:
        """Where each model is, by the name of its field."""
        found = {"detection": self.detection, "recognition": self.recognition}
        return found if self.orientation is None else {**found, "orientation": self.orientation}


class PaddleOcr:
    """Text lines in reading order: rows from the top, left to right inside a row."""

    kind: ClassVar[EvidenceKind] = EvidenceKind.TEXT
    version: ClassVar[int] = 1
    uses_tags: ClassVar[bool] = False
    batch_size: int = 1
    min_short_edge: ClassVar[int | None] = None
    Config: ClassVar[type[PaddleOcrConfig]] = PaddleOcrConfig

    @classmethod
    def revision(cls, config: PaddleOcrConfig) -> str:
        """Versions of the code around the models, and each model's folder hash or commit.

        Raises CheckpointError for a folder that is not there.
        """
        return "+".join([_code(), *map(_identity, config.sources().values())])

    def __init__(self, config: PaddleOcrConfig, hardware: Hardware) -> None:
        """Raises CheckpointError for models that are not there or not to be trusted, and when a GPU
        was asked for and ONNX Runtime can't use it."""
        cv2.setNumThreads(hardware.threads)
        self._config = config
        folders = {field: _folder(source) for field, source in config.sources().items()}
        if hardware.gpu:
            session(folders["detection"] / WEIGHTS, hardware)  # PaddleX falls back in silence
        models = {}
        for field, part in PARTS.items():
            if field in folders:
                models[f"{part}_model_dir"] = str(folders[field])
                models[f"{part}_model_name"] = model_name(folders[field] / SETTINGS, field)
        # PaddlePaddle, where it is there, warns of a compiler that inference never needs.
        with warnings.catch_warnings(action="ignore"):
            self._ocr = _library()(
                **models,
                # These two would change the frame that corners are told in.
                use_doc_orientation_classify=False,
                use_doc_unwarping=False,
                use_textline_orientation=config.orientation is not None,
                # One line a batch: no padding to the longest, so no line depends on another.
                text_recognition_batch_size=1,
                textline_orientation_batch_size=1,
                text_det_limit_side_len=config.detection_long_side,
                text_det_limit_type="max",
                text_det_box_thresh=config.box_score,
                device="gpu:0" if hardware.gpu else "cpu",
                engine="onnxruntime",
                engine_config={
                    "intra_op_num_threads": hardware.threads,
                    "inter_op_num_threads": 1,
                    "log_severity_level": 4,
                    # Without it, memory stays at what the widest line of all took.
                    "enable_cpu_mem_arena": False,
                },
            )

    def __call__(self, images: Sequence[RGB], context: Sequence[Context]) -> list[list[TextLine]]:
        return [reading_order(self._read(image)) for image in images]

    def _read(self, image: RGB) -> list[TextLine]:
        if (shrink := MAX_SIDE / max(image.shape)) < 1:
            size = [max(1, int(side * shrink)) for side in image.shape[1::-1]]
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        height, width = image.shape[:2]
        [page] = self._ocr.predict(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        lines = []
        for quad, text, score, angle in zip(
            page["rec_polys"],
            page["rec_texts"],
            page["rec_scores"],
            page.get("textline_orientation_angles", ()),  # missing where no line was found
            strict=True,
        ):
            text = clean(text)
            if text and score >= self._config.score_floor:
                # The angle is 0 or 1 (180 degrees), or -1 without a model that tells.
                own = from_own_top_left(np.asarray(quad, np.float32), upside_down=angle == 1)
                corners = tuple((own / (width, height)).clip(0, 1).ravel().tolist())
                lines.append(TextLine(text, min(1.0, score), corners, script_of(text)))
        return lines


PARTS = {
    "detection": "text_detection",
    "recognition": "text_recognition",
    "orientation": "textline_orientation",
}
"""Our settings, by the library's names for the same models."""
KINDS = {"detection": "_det", "recognition": "_rec", "orientation": "textline_ori"}
"""What the names of their models have."""


def from_own_top_left(quad: Quad, upside_down: bool) -> Quad:
    """The corners in the order that starts at the text's own top left.

    PaddleX cuts the smallest rectangle around the quad, turns it counter-clockwise when it is tall
    (so its text's top left is the frame's top right), and by 180 degrees when it is upside down.
    """
    corners = cv2.boxPoints(cv2.minAreaRect(quad.astype(np.int32)))
    by_x = corners[np.argsort(corners[:, 0], kind="stable")]
    left, right = (pair[np.argsort(pair[:, 1], kind="stable")] for pair in (by_x[:2], by_x[2:]))
    width = int(np.linalg.norm(right - left, axis=1).max())
    height = int(max(np.linalg.norm(left[1] - left[0]), np.linalg.norm(right[1] - right[0])))
    return np.roll(quad, -(int(height >= TALL * width) + 2 * upside_down), axis=0)


def model_name(settings: Path, field: str) -> str:
    """By which PaddleX picks the code for a model. Raises CheckpointError for settings of another
    kind of model, and for some that hold code: PaddleX gives their `scale` to `eval`."""
    try:
        content = yaml.safe_load(settings.read_text(encoding="utf-8"))
        name = str(content["Global"]["model_name"])
        steps = [pair for step in content["PreProcess"]["transform_ops"] for pair in step.items()]
        scales = [(operator, (values or {}).get("scale")) for operator, values in steps]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{settings}: not the settings of a PaddleX model ({type(error).__name__}: {error})"
        ) from error
    if KINDS[field] not in name:
        raise CheckpointError(
            f"{settings}: {name!r} is no model for `{field}`, whose names have {KINDS[field]!r}"
        )
    for operator, scale in scales:
        if isinstance(scale, str) and not NUMBER.fullmatch(scale):
            raise CheckpointError(f"{settings}: {operator}.scale is no number: {scale!r}")
    return name


def _folder(source: str) -> Path:
    """Where a model lies, after it was fetched if need be. Raises CheckpointError."""
    repository, _, commit = source.partition("@")
    if is_folder(source) or not commit:
        folder = Path(source).expanduser()
    else:
        folder = fetch(repository, commit, ("inference.*",))
    for file in (WEIGHTS, SETTINGS):
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{source}: no {file} there. Models for ONNX Runtime are needed; on the hub their "
                "names end in `_onnx`, and `paddlex --paddle2onnx` makes them of others"
            )
    return folder


def _identity(source: str) -> str:
    if not is_folder(source) and "@" in source:
        return source
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{source}: no such folder")
    return "folder:" + weights_hash(folder)


@cache
def _code() -> str:
    return "+".join(f"{name}-{metadata.version(name)}" for name in ("paddleocr", "paddlex"))


def _library() -> Any:
    # Read when PaddleX is imported: no look at model hosts, no set-up of training tools, no
    # handlers for log messages.
    os.environ.setdefault("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")
    os.environ.setdefault("PADDLE_PDX_EAGER_INIT", "False")
    os.environ.setdefault("PADDLEOCR_DISABLE_AUTO_LOGGING_CONFIG", "1")
    from paddleocr import PaddleOCR

    logging.getLogger("paddlex").setLevel(logging.ERROR)
    return PaddleOCR
