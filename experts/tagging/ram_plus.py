"""RAM++ (Huang et al., arXiv 2310.15200): 4,585 everyday tags, each with a threshold of its own.

Weights, tags and thresholds are the authors', github.com/xinyu1205/recognize-anything (Apache-2.0).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field, model_validator

from experts.base import Context, Hardware
from experts.checkpoint import (
    CheckpointConfig,
    CheckpointError,
    checkpoint_folder,
    checkpoint_revision,
)
from experts.scores import ranked
from experts.tagging.clip import DETAIL
from experts.torch_models import device_of, require, use_threads
from fusion_pipeline.dataset.evidence import EvidenceKind, Tag
from fusion_pipeline.dataset.images import RGB
from fusion_pipeline.dataset.weights import file_hash

Float32 = npt.NDArray[np.float32]

SIZE = 384
"""Images are squeezed to this square, as in training."""
MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)
TAGS, THRESHOLDS = "ram_tag_list.txt", "ram_tag_list_threshold.txt"


class RamPlusConfig(CheckpointConfig):
    """`model`: a folder or repository with RAM++'s weights in one safetensors file (docs/tagging.md
    says how to make it of the authors')."""

    tags: Path
    """A folder with `ram_tag_list.txt` and `ram_tag_list_threshold.txt`: `ram/data` of the authors'
    repository."""
    threshold_share: float = Field(default=1, gt=0, le=1)
    """A tag is kept over this share of its own threshold (0.65 for most). 1: what RAM++ itself
    answers; less keeps near misses for later steps to weigh."""
    max_tags: int = Field(default=100, ge=1, le=10_000)
    """Most tags an image, the best ones."""

    @model_validator(mode="before")
    @classmethod
    def _is_installed(cls, settings: Any) -> Any:
        require("transformers", "torch", "timm", "safetensors")
        return settings

    def fingerprint_fields(self) -> dict[str, Any]:
        """Without the folder of the lists, whose contents are part of the revision."""
        return {name: v for name, v in super().fingerprint_fields().items() if name != "tags"}


class RamPlus:
    """Tags, best first. Each score is the tag's own probability, and tags differ in what counts as
    much: which are kept is decided by a threshold a tag."""

    kind: ClassVar[EvidenceKind] = EvidenceKind.TAGS
    version: ClassVar[int] = 1
    uses_tags: ClassVar[bool] = False
    min_short_edge: ClassVar[int | None] = DETAIL * SIZE
    Config: ClassVar[type[RamPlusConfig]] = RamPlusConfig

    @classmethod
    def revision(cls, config: RamPlusConfig) -> str:
        """Of weights, tags and thresholds. Raises CheckpointError."""
        lists = [file_hash(_existing(config, name))[:16] for name in (TAGS, THRESHOLDS)]
        return "+".join([checkpoint_revision(config), *lists])

    def __init__(self, config: RamPlusConfig, hardware: Hardware) -> None:
        """Raises CheckpointError for files that are not there or not RAM++'s."""
        import torch
        from safetensors.torch import load_file

        from experts.tagging.ram_plus_model import RamPlusModel

        use_threads(hardware)
        self.batch_size = config.batch_size
        self._max_tags = config.max_tags
        self._tags = _existing(config, TAGS).read_text("utf-8").splitlines()
        self._floors = _thresholds(config, len(self._tags)) * np.float32(config.threshold_share)
        files = sorted(checkpoint_folder(config, ("*.safetensors",)).glob("*.safetensors"))
        if len(files) != 1:
            raise CheckpointError(f"{config.model}: {len(files)} safetensors files there, not one")
        model = RamPlusModel(load_file(files[0]), len(self._tags))
        self._model = model.to(device_of(hardware), getattr(torch, config.dtype)).eval()

    def __call__(self, images: Sequence[RGB], context: Sequence[Context]) -> list[list[Tag]]:
        starts = range(0, len(images), self.batch_size)
        batches = (images[start : start + self.batch_size] for start in starts)
        above = np.nextafter(self._floors, np.float32(np.inf))  # the authors': over, not at it
        rows = (row for batch in batches for row in self.scores(batch))
        return [ranked(self._tags, row, self._max_tags, above) for row in rows]

    def scores(self, images: Sequence[RGB]) -> Float32:
        """Probabilities, float32 [n, tags], in the order of the list of tags."""
        import torch

        batch = torch.from_numpy(np.stack([prepare(image) for image in images]))
        with torch.inference_mode():
            scale = self._model.reweight_scale  # on the model's device, in its number format
            logits = self._model(batch.to(scale.device, scale.dtype))
            scores: Float32 = logits.float().sigmoid().cpu().numpy()
        return scores


def prepare(image: RGB) -> Float32:
    """float32 [3, 384, 384]."""
    small = Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    values = (np.asarray(small, np.float32) / 255 - MEAN) / STD
    return values.transpose(2, 0, 1).astype(np.float32)


def _thresholds(config: RamPlusConfig, tags: int) -> Float32:
    path = _existing(config, THRESHOLDS)
    try:
        found = np.array([*map(float, path.read_text("utf-8").split())], np.float32)
    except ValueError as error:
        raise CheckpointError(f"{path}: not one number a line: {error}") from error
    if not tags or len(found) != tags:
        raise CheckpointError(f"{path}: {len(found)} thresholds for the {tags} tags beside it")
    return found


def _existing(config: RamPlusConfig, name: str) -> Path:
    path = config.tags.expanduser() / name
    if not path.is_file():
        raise CheckpointError(
            f"tags: {path} is no file; fetch ram/data of github.com/xinyu1205/recognize-anything"
        )
    return path
