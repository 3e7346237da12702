"""PP-OCRv6 text recognition by RapidOCR, with the weights inside its wheel.

Source: github.com/RapidAI/RapidOCR (Apache-2.0) and PaddleOCR's models (Apache-2.0, see
`experts/assets/NOTICE.txt`). RapidOCR's parts (detector, direction classifier, recogniser) are
called one by one, as its own `RapidOCR.__call__` does, because the latter hides which lines it
turned, prepares images in float64 and rescales crops that nobody reads.
"""

import hashlib
from collections.abc import Iterator, Sequence
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
from rapidocr.utils.process_img import get_rotate_crop_image

from experts.base import Context, ExpertConfig, Hardware
from experts.checkpoint import CheckpointError
from experts.ocr.lines import Quad, clean
from experts.ocr.recogniser import Recognised, Recogniser
from experts.ocr.scripts import WEIGHTS as SCRIPT_WEIGHTS
from experts.ocr.scripts import Guess, ScriptGuess, features, kind_of, script_of
from fusion_pipeline.dataset.blocks import reading_order
from fusion_pipeline.dataset.evidence import EvidenceKind, TextLine
from fusion_pipeline.dataset.images import RGB

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
SURE_SCORE = 0.95
"""Score from which a line counts as read with confidence."""


@cache
def _revision() -> str:
    digest = hashlib.sha256()
    for path in (*WEIGHTS.values(), SCRIPT_WEIGHTS):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"rapidocr-{metadata.version('rapidocr')}+sha256:{digest.hexdigest()[:16]}"


class RapidOcrConfig(ExpertConfig):
    score_floor: float = Field(default=0.3, ge=0, le=1)
    """Lines are dropped below this mean confidence of their characters."""
    unread_score: float = Field(default=0.4, ge=0, le=1)
    """Lines are recorded as unread from this probability that their script can't be read."""
    unread_score_sure: float = Field(default=0.8, ge=0, le=1)
    """The same for lines that are read with confidence: most of them are Latin or Chinese."""
    detection_long_side: int = Field(default=960, ge=GRID, le=4096)
    """Lines are searched for in a copy with at most this long side, and read in the
    original. 1280 finds 12-px text in 1600-px images at twice the detector's time."""
    box_score: float = Field(default=0.5, ge=0, le=1)
    """Least mean text probability inside a detected box."""

    def is_unread(self, guess: Guess, score: float) -> bool:
        """`score`: of what the recogniser wrote."""
        sure = score >= SURE_SCORE
        return guess.unreadable >= (self.unread_score_sure if sure else self.unread_score)


class RapidOcr:
    """Text lines in reading order.

    Latin, Chinese and Japanese are read. Lines of other scripts are recorded as unread, with a
    guess of their script (`scripts.py`); a few words that look like Latin ones slip through. Lines
    are recognised one at a time, so that no line's text depends on another.
    """

    kind: ClassVar[EvidenceKind] = EvidenceKind.TEXT
    version: ClassVar[int] = 3
    uses_tags: ClassVar[bool] = False
    batch_size: int = 1
    min_short_edge: ClassVar[int | None] = None
    Config: ClassVar[type[ExpertConfig]] = RapidOcrConfig

    @classmethod
    def revision(cls, config: RapidOcrConfig) -> str:
        return _revision()

    def __init__(self, config: RapidOcrConfig, hardware: Hardware) -> None:
        self._config = config
        self._reader = LineReader(config, hardware)
        self._kinds = np.array([kind_of(character) for character in self._reader.characters])
        self._guess = ScriptGuess.load()

    def __call__(self, images: Sequence[RGB], context: Sequence[Context]) -> list[list[TextLine]]:
        return [reading_order(list(self._lines(image))) for image in images]

    def _lines(self, image: RGB) -> Iterator[TextLine]:
        height, width = image.shape[:2]
        for quad, read in self._reader(image):
            corners = tuple((quad / (width, height)).clip(0, 1).ravel().tolist())
            guess = self._guess(features(read, self._kinds))
            if self._config.is_unread(guess, read.score):
                yield TextLine("", guess.unreadable, corners, guess.script)
            elif (text := clean(read.text)) and read.score >= self._config.score_floor:
                yield TextLine(text, float(read.score), corners, script_of(text))


class LineReader:
    """Finds lines and recognises each, whatever its script."""

    def __init__(self, config: RapidOcrConfig, hardware: Hardware) -> None:
        if hardware.gpu:
            raise CheckpointError("rapidocr runs on CPUs alone: set `gpus: 0`, or take paddleocr")
        cv2.setNumThreads(hardware.threads)
        self._long_side = config.detection_long_side
        settings = rapidocr.RapidOCR(
            params={
                "Global.log_level": "critical",
                # With an explicit path RapidOCR never tries to download.
                **{f"{part}.model_path": str(path) for part, path in WEIGHTS.items()},
                "EngineConfig.onnxruntime.intra_op_num_threads": hardware.threads,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                "Det.box_thresh": config.box_score,
            }
        ).cfg
        for part in ("Det", "Cls"):
            settings[part].engine_cfg = settings.EngineConfig.onnxruntime
        self._detector = TextDetector(settings.Det)
        self._classifier = TextClassifier(settings.Cls)
        self._recogniser = Recogniser(WEIGHTS["Rec"], hardware.threads)

    @property
    def characters(self) -> list[str]:
        """What the recogniser can write, by index."""
        return self._recogniser.characters

    def __call__(self, image: RGB) -> Iterator[tuple[Quad, Recognised]]:
        """Each line's corners, from the text's own top left clockwise, and what was read."""
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        quads = self._detect(bgr)
        if not len(quads):
            return
        crops = [_squeeze(get_rotate_crop_image(bgr, quad.copy())) for quad in quads]
        turns = self._classifier(crops).cls_res
        for quad, crop, (turn, _) in zip(quads, crops, turns, strict=True):
            read, upside_down = self._recogniser(crop), False
            if turn == "180":
                # The classifier is often wrong of blurred lines; the surer of two readings seldom.
                turned = self._recogniser(cv2.rotate(crop, cv2.ROTATE_180))
                upside_down = turned.score > read.score
                read = turned if upside_down else read
            yield from_own_top_left(quad, upside_down), read

    def _detect(self, bgr: RGB) -> npt.NDArray[np.float32]:
        """Quads of text lines, float32 [n, 4, 2], in pixels of `bgr`."""
        height, width = bgr.shape[:2]
        scale = min(1.0, self._long_side / max(height, width))
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


def from_own_top_left(quad: Quad, upside_down: bool) -> Quad:
    """The corners in the order that starts at the text's own top left.

    RapidOCR turns tall crops counter-clockwise (so their text's top left is the frame's top
    right) and after that the ones its classifier calls upside down by 180 degrees.
    """
    top, right, bottom, left = (np.linalg.norm(quad - np.roll(quad, -1, axis=0), axis=1)).tolist()
    first = int(int(max(left, right)) / int(max(top, bottom)) >= TALL) + 2 * upside_down
    return np.roll(quad, -first, axis=0)
