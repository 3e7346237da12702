"""PP-OCRv6's recogniser, with what it saw just before it chose characters.

RapidOCR's own `TextRecognizer` returns text and score alone. This one runs the same graph on the
same pixels and decodes with RapidOCR's decoder, but returns the activations before the last layer,
too: from those `scripts.py` tells whether a line's script is one that the network can write.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from rapidocr.ch_ppocr_rec.utils import CTCLabelDecode

from experts.onnx import cpu_session
from fusion_pipeline.dataset.images import RGB

HEIGHT = 48
"""Pixels that a line is scaled to."""
MIN_WIDTH = 160
"""Narrower lines are filled up on the right."""
ACTIVATIONS = "p2o.pd_op.transpose.8.0"
"""The tensor that the graph's last linear layer takes, float32 [1, steps, 120]."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recognised:
    """A line as it was read. A step is a strip of the line, an eighth of its height wide or so."""

    text: str
    score: float
    """Mean probability of the characters; 0 without any."""
    best: npt.NDArray[np.int64]
    """[steps]: the likeliest character of each step; 0 is none."""
    sureness: Floats
    """[steps]: its probability."""
    blank: Floats
    """[steps]: the probability that no character is written."""
    activations: Floats
    """[steps, 120]."""


class Recogniser:
    def __init__(self, weights: Path, threads: int) -> None:
        self._session = cpu_session(weights.read_bytes() + _further_output(ACTIVATIONS), threads)
        stored = self._session.get_modelmeta().custom_metadata_map["character"]
        self._decode = CTCLabelDecode(character=stored.splitlines())

    @property
    def characters(self) -> list[str]:
        """What can be written, by index."""
        return list(self._decode.character)

    def __call__(self, crop: RGB) -> Recognised:
        """Of one line, uint8 [height, width, 3] in BGR, read from left to right."""
        filled, blob = _prepared(crop)
        probabilities, activations = self._session.run(None, {"x": blob})
        [(text, score)], _ = self._decode(probabilities)
        shown = math.ceil(probabilities.shape[1] * filled / blob.shape[3])
        steps = probabilities[0, :shown]
        best, sureness = steps.argmax(axis=1), steps.max(axis=1)
        return Recognised(text, score, best, sureness, steps[:, 0], activations[0, :shown])


def _prepared(crop: RGB) -> tuple[int, Floats]:
    """How many columns the line fills, and the graph's input [1, 3, 48, width], -1..1."""
    height, width = crop.shape[:2]
    blob = np.zeros((1, 3, HEIGHT, max(MIN_WIDTH, HEIGHT * width // height)), np.float32)
    filled = min(blob.shape[3], math.ceil(HEIGHT * width / height))
    scaled = cv2.resize(crop, (filled, HEIGHT))
    blob[..., :filled] = cv2.dnn.blobFromImage(scaled, 1 / 127.5, mean=(127.5, 127.5, 127.5))
    return filled, blob


def _further_output(name: str) -> bytes:
    """What makes a model return one more of its tensors when it stands behind the model's file.

    Protocol Buffers merge messages that follow one another. This is a model whose graph (field 7)
    holds nothing but an output (field 12) with that name (field 1).
    """
    return _field(7, _field(12, _field(1, name.encode())))


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of less than 128 bytes."""
    if len(content) > 127:
        raise ValueError(f"{len(content)} bytes need a longer length")
    return bytes([number << 3 | 2, len(content)]) + content
