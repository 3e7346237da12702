"""CLIP (Radford et al., arXiv 2103.00020), SigLIP (Zhai et al., arXiv 2303.15343) and SigLIP 2
(Tschannen et al., arXiv 2502.14786) from transformers, as taggers of any vocabulary.

Scores are those of the library's pipeline "zero-shot-image-classification".
"""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from experts.base import ExpertConfig, Hardware
from experts.checkpoint import CheckpointError, checkpoint_folder
from experts.tagging.vocabulary import Float32, VocabularyConfig, VocabularyTagger, unit
from experts.torch_models import TransformersConfig, device_of, load_model
from fusion_pipeline.dataset.images import RGB

_KINDS = ("clip", "siglip", "siglip2")
DETAIL = 2
"""Pixels that a scaled decode keeps for each pixel of the model's input. On 24 photos the inputs of
224 x 224 then differed from those of the full decode by 1.0 (CLIP) and 0.6 (SigLIP) of 255 in the
mean (root of squares), at 1 by 2.9 and 2.1."""
STRIP = 32
"""Largest ratio of the edges of an image that is scaled by its short edge and then cropped."""


class ClipConfig(TransformersConfig, VocabularyConfig):
    """`model`: a transformers checkpoint of CLIP, SigLIP or SigLIP 2 (NaFlex, too)."""


class ClipModel:
    """Both towers of a checkpoint."""

    def __init__(self, config: TransformersConfig, hardware: Hardware) -> None:
        import torch
        import transformers
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        folder = checkpoint_folder(config)
        local = {"local_files_only": True, "trust_remote_code": False}
        self._kind = AutoConfig.from_pretrained(folder, **local).model_type
        if self._kind not in _KINDS:
            raise CheckpointError(
                f"{config.model}: a checkpoint of {self._kind}; known here: {', '.join(_KINDS)}"
            )
        self._tokenizer = _tokenizer(config, folder)
        self._processor = AutoImageProcessor.from_pretrained(folder, **local)
        self._model = load_model(AutoModel, folder, config, hardware)
        self._max_tokens = self._model.config.text_config.max_position_embeddings
        bias = getattr(self._model, "logit_bias", None)
        self.scale: float = self._model.logit_scale.detach().float().exp().item()
        self.bias: float | None = None if bias is None else bias.item()
        self.short_edge = DETAIL * _input_edge(self._processor)
        self._crops = "shortest_edge" in dict(self._processor.size or {})
        libraries = (torch.__version__, transformers.__version__)
        self.identity: tuple[str, ...] = ("clip", config.dtype, device_of(hardware), *libraries)

    def embed_images(self, images: Sequence[RGB]) -> Float32:
        import torch

        pictures = [Image.fromarray(middle(i) if self._crops else i) for i in images]
        inputs = self._processor(images=pictures, return_tensors="pt")
        with torch.inference_mode():
            inputs = inputs.to(self._model.device, dtype=self._model.dtype)
            return _unit_rows(self._model.get_image_features(**inputs))

    def embed_texts(self, texts: Sequence[str]) -> Float32:
        import torch

        is_clip = self._kind == "clip"
        tokens = self._tokenizer(
            # SigLIP was trained on lower case. Not every checkpoint's tokenizer sees to it.
            list(texts) if is_clip else [text.lower() for text in texts],
            # And on texts of full length: its last token speaks for all, with no mask.
            padding="longest" if is_clip else "max_length",
            truncation=True,
            max_length=self._max_tokens,
            return_tensors="pt",
        )
        with torch.inference_mode():
            return _unit_rows(self._model.get_text_features(**tokens.to(self._model.device)))


class ClipTagger(VocabularyTagger):
    version: ClassVar[int] = 1
    Config: ClassVar[type[ExpertConfig]] = ClipConfig

    def __init__(self, config: ClipConfig, hardware: Hardware) -> None:
        super().__init__(config, ClipModel(config, hardware))


def middle(image: RGB) -> RGB:
    """The middle of a strip: a model that scales by the short edge makes of 1 x 3000 pixels
    224 x 672,000 and then cuts off nearly all of them."""
    height, width = image.shape[:2]
    longest = STRIP * min(height, width)
    top, left = (max(0, side - longest) // 2 for side in (height, width))
    return image[top : height - top, left : width - left]


def _tokenizer(config: TransformersConfig, folder: Path) -> Any:
    from transformers import AutoTokenizer

    settings = folder / "tokenizer_config.json"
    named = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    # Without the package another class would be taken, whose tokens are others, or an error told
    # that names every class there is.
    if named.get("tokenizer_class") == "SiglipTokenizer" and not find_spec("sentencepiece"):
        raise CheckpointError(
            f"{config.model}: the tokenizer of the first SigLIP needs a package more: "
            "pip install sentencepiece protobuf"
        )
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _input_edge(processor: Any) -> int:
    """Pixels of an edge of the model's input; of SigLIP 2 NaFlex, of a square one."""
    if hasattr(processor, "max_num_patches"):
        return int(processor.patch_size * processor.max_num_patches**0.5)
    return int(max(dict(processor.size).values()))


def _unit_rows(output: Any) -> Float32:
    features = output.pooler_output.float().cpu().numpy()
    return unit(np.asarray(features, np.float32))
