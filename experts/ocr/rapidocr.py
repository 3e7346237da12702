"""PP-OCRv6 text recognition by RapidOCR, with the weights inside its wheel.

Source: github.com/RapidAI/RapidOCR (Apache-2.0) and PaddleOCR's models (Apache-2.0, see
`experts/assets/NOTICE.txt`). RapidOCR's parts (detector, direction classifier, recogniser) are
called one by one, as its own `RapidOCR.__call__` does, because the latter hides which lines it
turned, prepares images in float64 and rescales crops that nobody reads.
"""

import hashlib
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np
import numpy.typing as npt
import rapidocr
from pydantic import Field
from rapidocr.ch_ppocr_cls import TextClassifier
from rapidocr.ch_ppocr_det import TextDetector
from rapidocr.ch_ppocr_rec import TextRecInput, TextRecognizer
from rapidocr.utils.process_img import get_rotate_crop_image

from experts.base import Context, ExpertConfig, Hardware
from fusion_pipeline.dataset.evidence import EvidenceKind, TextLine
from fusion_pipeline.dataset.images import RGB

Quad = npt.NDArray[np.float32]
"""float32 [4, 2]: corners in pixels, from the top left clockwise."""

MODELS = Path(rapidocr.__file__).parent / "models"
WEIGHTS = {
    "Det": MODELS / "PP-OCRv6_det_small.onnx",
    "Cls": MODELS / "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
    "Rec": MODELS / "PP-OCRv6_rec_small.onnx",
}
GRID = 32
"""The detector's input sides are multiples of this."""
TALL = 1.5
"""RapidOCR turns a crop that is this many times higher than wide by 90 degrees."""
MAX_ASPECT = 64
"""Crops longer than this many times their height are squeezed: the recogniser's memory grows
with the length, and a hairline across a hostile image would need gigabytes."""
TURNED_SCORE = 0.9
"""Confidence over which the direction classifier's "upside down" is believed."""


@cache
def _revision() -> str:
    digest = hashlib.sha256()
    for path in WEIGHTS.values():
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"rapidocr-{metadata.version('rapidocr')}+sha256:{digest.hexdigest()[:16]}"


class RapidOcrConfig(ExpertConfig):
    score_floor: float = Field(default=0.3, ge=0, le=1)
    """Lines are dropped below this mean confidence of their characters."""
    detection_long_side: int = Field(default=960, ge=GRID, le=4096)
    """Lines are searched for in a copy with at most this long side, and read in the
    original. 1280 finds 12-px text in 1600-px images at twice the detector's time."""
    box_score: float = Field(default=0.5, ge=0, le=1)
    """Least mean text probability inside a detected box."""


class RapidOcr:
    """Text lines in reading order: rows from the top, left to right inside a row.

    The dictionary has Latin, Greek, Chinese and kana characters; lines of other scripts are found
    but misread. Lines are recognised one at a time, so that no line's text depends on another.
    """

    kind: ClassVar[EvidenceKind] = EvidenceKind.TEXT
    version: ClassVar[int] = 2
    uses_tags: ClassVar[bool] = False
    batch_size: int = 1
    min_short_edge: ClassVar[int | None] = None
    Config: ClassVar[type[ExpertConfig]] = RapidOcrConfig

    @classmethod
    def revision(cls, config: RapidOcrConfig) -> str:
        return _revision()

    def __init__(self, config: RapidOcrConfig, hardware: Hardware) -> None:
        cv2.setNumThreads(hardware.threads)
        self._config = config
        settings = rapidocr.RapidOCR(
            params={
                "Global.log_level": "critical",
                # With an explicit path RapidOCR never tries to download.
                **{f"{part}.model_path": str(path) for part, path in WEIGHTS.items()},
                "EngineConfig.onnxruntime.intra_op_num_threads": hardware.threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                "Det.box_thresh": config.box_score,
                "Cls.cls_thresh": TURNED_SCORE,
                # One line a batch: no padding to the longest of six, a fifth faster.
                "Rec.rec_batch_num": 1,
                "Rec.rec_img_shape": [3, 48, 160],
                "Rec.font_path": None,
            }
        ).cfg
        for part in WEIGHTS:
            settings[part].engine_cfg = settings.EngineConfig.onnxruntime
        self._detector = TextDetector(settings.Det)
        self._classifier = TextClassifier(settings.Cls)
        self._recogniser = TextRecognizer(settings.Rec)

    def __call__(self, images: Sequence[RGB], context: Sequence[Context]) -> list[list[TextLine]]:
        return [reading_order(self._read(image)) for image in images]

    def _read(self, image: RGB) -> list[TextLine]:
        height, width = image.shape[:2]
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        quads = self._detect(bgr)
        if not len(quads):
            return []
        crops = [_squeeze(get_rotate_crop_image(bgr, quad.copy())) for quad in quads]
        turns = self._classifier(crops)
        read = self._recogniser(TextRecInput(img=turns.img_list))
        lines = []
        for quad, turn, text, score in zip(
            quads, turns.cls_res, read.txts, read.scores, strict=True
        ):
            text = clean(text)
            if text and score >= self._config.score_floor:
                own = from_own_top_left(quad, turn[0] == "180" and turn[1] > TURNED_SCORE)
                corners = (own / (width, height)).clip(0, 1)
                lines.append(TextLine(text, float(score), tuple(corners.ravel().tolist())))
        return lines

    def _detect(self, bgr: RGB) -> npt.NDArray[np.float32]:
        """Quads of text lines, float32 [n, 4, 2], in pixels of `bgr`."""
        height, width = bgr.shape[:2]
        scale = min(1.0, self._config.detection_long_side / max(height, width))
        size = (_to_grid(width * scale), _to_grid(height * scale))
        # Bilinear skips pixels when it shrinks by more than two.
        mode = cv2.INTER_AREA if scale < 0.5 else cv2.INTER_LINEAR
        small = cv2.resize(bgr, size, interpolation=mode)
        blob = cv2.dnn.blobFromImage(small, 1 / 127.5, mean=(127.5, 127.5, 127.5))
        quads, _ = self._detector.postprocess_op(self._detector.session(blob), (height, width))
        return np.asarray(quads, np.float32).reshape(-1, 4, 2)


def _squeeze(crop: RGB) -> RGB:
    height, width = crop.shape[:2]
    if width <= MAX_ASPECT * height:
        return crop
    squeezed: RGB = cv2.resize(crop, (MAX_ASPECT * height, height), interpolation=cv2.INTER_AREA)
    return squeezed


def _to_grid(side: float) -> int:
    return max(GRID, round(side / GRID) * GRID)


def clean(text: str) -> str:
    """Without control, format, private and unassigned characters; single spaces."""
    visible = (c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    return " ".join("".join(visible).split())


def from_own_top_left(quad: Quad, upside_down: bool) -> Quad:
    """The corners in the order that starts at the text's own top left.

    RapidOCR turns tall crops counter-clockwise (so their text's top left is the frame's top
    right) and after that the ones its classifier calls upside down by 180 degrees.
    """
    top, right, bottom, left = (np.linalg.norm(quad - np.roll(quad, -1, axis=0), axis=1)).tolist()
    first = int(int(max(left, right)) / int(max(top, bottom)) >= TALL) + 2 * upside_down
    return np.roll(quad, -first, axis=0)


def reading_order(lines: Sequence[TextLine]) -> list[TextLine]:
    """Rows from the top, left to right inside a row.

    The highest line not yet placed opens a row; lines whose middle is less than half a line
    height (the lower of the two) below its middle join it.
    """

    def middle(line: TextLine) -> float:
        return (line.box[1] + line.box[3]) / 2

    def height(line: TextLine) -> float:
        return line.box[3] - line.box[1]

    waiting = sorted(lines, key=lambda line: (middle(line), line.quad, line.text))
    ordered: list[TextLine] = []
    while waiting:
        first, *others = waiting
        row, waiting = [first], []
        for line in others:
            near = middle(line) - middle(first) < min(height(line), height(first)) / 2
            (row if near else waiting).append(line)
        ordered += sorted(row, key=lambda line: (line.box[0], line.quad, line.text))
    return ordered
