"""Checkpoints of the library open_clip, as taggers of any vocabulary: OpenCLIP's own (Cherti et
al., arXiv 2212.07143), EVA-CLIP (Sun et al., arXiv 2303.15389), and others.

Images and texts are prepared and embedded by the library; scores are those of its documentation.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from pydantic import model_validator

from experts.base import ExpertConfig, Hardware
from experts.checkpoint import CheckpointError, checkpoint_folder
from experts.tagging.clip import DETAIL, middle
from experts.tagging.vocabulary import Float32, VocabularyConfig, VocabularyTagger
from experts.torch_models import device_of, require, use_threads
from fusion_pipeline.dataset.images import RGB

CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
"""Names that the library looks for before all others, pickles among them."""
_FILES = ("open_clip*.safetensors", "*.json", "*.txt", "*.model")
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_TOKENIZER_SETTINGS = ("clean", "strip_sep_token", "language")


class OpenClipConfig(VocabularyConfig):
    """`model`: a folder or repository with `open_clip_config.json`, which names the architecture,
    and `open_clip_model.safetensors`."""

    @model_validator(mode="before")
    @classmethod
    def _is_installed(cls, settings: Any) -> Any:
        require("open-clip", "torch", "open_clip")
        return settings


class OpenClipModel:
    """Both towers of a checkpoint."""

    def __init__(self, config: OpenClipConfig, hardware: Hardware) -> None:
        import open_clip
        import torch

        folder = checkpoint_folder(config, _FILES)
        settings = _settings(folder, config.model)
        use_threads(hardware)
        self._device = device_of(hardware)
        precision = _PRECISIONS[config.dtype]
        place = f"local-dir:{folder}"
        self._model, self._prepare = open_clip.create_model_from_pretrained(
            place, precision=precision, device=self._device
        )
        self._model.eval()
        self._tokenizer = open_clip.get_tokenizer(place)
        self._dtype = open_clip.get_input_dtype(precision) or torch.float32
        bias = self._model.logit_bias
        self.scale: float = self._model.logit_scale.detach().float().exp().item()
        self.bias: float | None = None if bias is None else bias.item()
        self.short_edge = DETAIL * int(np.max(self._model.visual.image_size))
        resizing = settings.get("preprocess_cfg", {}).get("resize_mode", "shortest")
        self._crops = resizing == "shortest"
        libraries = (torch.__version__, open_clip.__version__)
        self.identity: tuple[str, ...] = ("open-clip", config.dtype, self._device, *libraries)

    def embed_images(self, images: Sequence[RGB]) -> Float32:
        import torch

        pictures = [Image.fromarray(middle(i) if self._crops else i) for i in images]
        batch = torch.stack([self._prepare(picture) for picture in pictures])
        with torch.inference_mode():
            inputs = batch.to(self._device, dtype=self._dtype)
            return _rows(self._model.encode_image(inputs, normalize=True))

    def embed_texts(self, texts: Sequence[str]) -> Float32:
        import torch

        with torch.inference_mode():
            tokens = self._tokenizer(list(texts)).to(self._device)
            return _rows(self._model.encode_text(tokens, normalize=True))


class OpenClipTagger(VocabularyTagger):
    version: ClassVar[int] = 1
    Config: ClassVar[type[ExpertConfig]] = OpenClipConfig

    def __init__(self, config: OpenClipConfig, hardware: Hardware) -> None:
        super().__init__(config, OpenClipModel(config, hardware))


def _settings(folder: Path, name: str) -> Mapping[str, Any]:
    """Of `open_clip_config.json`. Raises CheckpointError for what would make the library load a
    pickle, code, or files from elsewhere."""
    if not any((folder / weights).is_file() for weights in WEIGHTS):
        raise CheckpointError(
            f"{name}: no {WEIGHTS[0]} there. Other formats are pickles, which can run code, and "
            "are not loaded"
        )
    try:
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        text, vision = (settings["model_cfg"][part] for part in ("text_cfg", "vision_cfg"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{name}: no usable {CONFIG}: {error}") from error
    if "hf_model_name" in text:
        raise CheckpointError(
            f"{name}: its text tower is built from another repository, {text['hf_model_name']}; "
            "such checkpoints are not supported"
        )
    tower = vision.get("timm_model_name", "")
    if not re.fullmatch(r"[\w.]*", tower):
        raise CheckpointError(f"{name}: its image tower is not one of timm's own: {tower}")
    odd = set(text.get("tokenizer_kwargs", {})) - set(_TOKENIZER_SETTINGS)
    if odd:
        raise CheckpointError(
            f"{name}: unknown settings of the tokenizer: {', '.join(sorted(odd))}"
        )
    return dict(settings)


def _rows(features: Any) -> Float32:
    return np.asarray(features.float().cpu().numpy(), np.float32)
