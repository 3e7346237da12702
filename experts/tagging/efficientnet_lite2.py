"""EfficientNet-Lite2 (ImageNet-1k): tags, and the embedding that selection clusters on.

Source: Tan and Le, arXiv 1905.11946; the Lite variants and their pre-processing (centre crop of
size / (size + 32) of the short side, bicubic, (x - 127) / 128) are those of the TensorFlow TPU
models repository. Licences of weights and labels: `experts/assets/NOTICE.txt`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field

from experts.base import ASSETS, Context, ExpertConfig, Hardware, file_revision
from experts.onnx import session
from experts.scores import ranked, softmax
from fusion_pipeline.dataset.evidence import EvidenceKind, Tag
from fusion_pipeline.dataset.images import RGB

Float32 = npt.NDArray[np.float32]

WEIGHTS = ASSETS / "efficientnet_lite2.onnx"
LABELS = ASSETS / "imagenet1k_labels.txt"
SIZE = 260
CROP = SIZE / (SIZE + 32)
"""Share of the short side that the centre crop keeps (the models' own CROP_PADDING of 32)."""


MIN_SHORT_EDGE = 350
"""Short edge of a scaled decode that loses nothing that counts: cosine to the embedding of the
full decode at least 0.993 on photos (at 292, where the crop is 1:1, 0.985)."""


@dataclass(frozen=True, slots=True)
class Output:
    logits: Float32
    """float32 [n, 1000], in the order of `imagenet1k_labels.txt`."""
    embeddings: Float32
    """float32 [n, 1280], not normalised."""


def preprocess(image: RGB) -> Float32:
    """float32 [1, 3, 260, 260]: the centre of the image as the model was trained to see it."""
    height, width = image.shape[:2]
    side = max(1, round(min(height, width) * CROP))
    top, left = (height - side) // 2, (width - side) // 2
    crop = Image.fromarray(image[top : top + side, left : left + side])
    # Pillow's bicubic is anti-aliased, OpenCV's is not. The gap lets it shrink large crops with
    # a box filter first.
    small = crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC, reducing_gap=3.0)
    blob: Float32 = cv2.dnn.blobFromImage(np.asarray(small), 1 / 128, mean=(127, 127, 127))
    return blob


class EfficientNetLite2:
    """The network. Images run one at a time, so that a result never depends on its neighbours."""

    def __init__(self, hardware: Hardware) -> None:
        cv2.setNumThreads(hardware.threads)
        self._session = session(WEIGHTS, hardware)

    def run(self, images: Sequence[RGB]) -> Output:
        """Logits and embeddings of the images, in order."""
        rows = [self._session.run(["logits", "emb"], {"x": preprocess(i)}) for i in images]
        return Output(
            np.concatenate([np.empty((0, 1000), np.float32), *(row[0] for row in rows)]),
            np.concatenate([np.empty((0, 1280), np.float32), *(row[1] for row in rows)]),
        )

    def embed(self, images: Sequence[RGB]) -> Float32:
        """float32 [n, 1280], not normalised."""
        return self.run(images).embeddings


class EfficientNetLite2TaggerConfig(ExpertConfig):
    score_floor: float = Field(default=0.02, ge=0, le=1)
    """Tags of at least this score are told."""
    max_tags: int = Field(default=10, ge=1, le=1000)
    """Most tags an image, the best ones."""


class EfficientNetLite2Tagger:
    """Closed-set tags: the ImageNet class names an image resembles, best first.

    Top scores under about 0.3 are mostly noise, and the scores of one image sum to 1, so an
    image of several things spreads them: combine with other experts before use.
    """

    kind: ClassVar[EvidenceKind] = EvidenceKind.TAGS
    version: ClassVar[int] = 1
    uses_tags: ClassVar[bool] = False
    batch_size: int = 1
    min_short_edge: ClassVar[int | None] = MIN_SHORT_EDGE
    Config: ClassVar[type[ExpertConfig]] = EfficientNetLite2TaggerConfig

    @classmethod
    def revision(cls, config: EfficientNetLite2TaggerConfig) -> str:
        return file_revision(WEIGHTS)

    def __init__(self, config: EfficientNetLite2TaggerConfig, hardware: Hardware) -> None:
        self._config = config
        self._model = EfficientNetLite2(hardware)
        self._labels = LABELS.read_text(encoding="utf-8").splitlines()

    def __call__(self, images: Sequence[RGB], context: Sequence[Context]) -> list[list[Tag]]:
        most, floor = self._config.max_tags, self._config.score_floor
        rows = softmax(self._model.run(images).logits)
        return [ranked(self._labels, row, most, floor) for row in rows]
