"""Taggers of a few 10,000 random weights, saved by the libraries that the real ones come from.

Weights as models are initialised with give every text nearly the same cosine; these are larger, so
that a test sees a wrong colour, letter, token or number.
"""

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experts.base import ExpertConfig

TAGS = ("cat", "coffee cup", "Person", "sky", "motorcycle")
SIZE = 48
"""Pixels of an edge of their input."""
PATCH = 8
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "projection_dim": 16}  # fmt: skip
VISION = {**TEXT, "image_size": SIZE, "patch_size": PATCH}
SIGLIP = {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
NORM = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
LETTERS = string.ascii_letters + string.digits + string.punctuation


def _stirred(model: Any, seed: int, scale: float, bias: float | None = None) -> Any:
    import torch

    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if name.startswith("logit_"):
                continue
            noise = torch.randn(weights.shape, generator=random)
            if "embed" in name:
                weights.copy_(noise)
            elif weights.dim() > 1:
                weights.copy_(noise * 2 / weights[0].numel() ** 0.5)
            elif name.endswith("bias"):
                weights.copy_(noise * 0.1)
        model.logit_scale.fill_(scale)
        if bias is not None:
            model.logit_bias.fill_(bias)
    return model.eval()


def _save(folder: Path, *parts: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        part.save_pretrained(folder)


def clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    pieces = [letter + end for letter in LETTERS for end in ("", "</w>")]
    vocab = {p: n for n, p in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    ends = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1}
    text = {**TEXT, **ends, "vocab_size": len(vocab), "max_position_embeddings": 40}
    config = CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    edge = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=edge, **NORM)
    _save(folder, _stirred(CLIPModel(config), 0, 3.0), CLIPTokenizer(vocab, merges=[]), processor)


def _siglip_vocab() -> dict[str, int]:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    return {piece: number for number, piece in enumerate(pieces)}


def siglip(folder: Path) -> None:
    """SigLIP, with a tokenizer that keeps capitals, as SigLIP 2 of fixed resolution has it."""
    from transformers import GemmaTokenizer, SiglipConfig, SiglipImageProcessor, SiglipModel

    vocab = _siglip_vocab()
    config = SiglipConfig(
        text_config={**TEXT, **SIGLIP, "vocab_size": len(vocab)}, vision_config=VISION
    )
    _save(
        folder,
        _stirred(SiglipModel(config), 1, 3.0, bias=-2.0),
        GemmaTokenizer(vocab, merges=[], padding_side="right", model_input_names=["input_ids"]),
        SiglipImageProcessor(size={"height": SIZE, "width": SIZE}, **NORM),
    )


def siglip_1(folder: Path) -> None:
    """SigLIP as it came first, with its own tokenizer. Needs sentencepiece."""
    import sentencepiece
    from transformers import AutoTokenizer, SiglipTokenizer

    siglip(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TAGS, "this is a photo of it", " ".join(LETTERS)] * 20),
        model_prefix=str(folder / "spiece"), vocab_size=120, model_type="bpe",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, pad_piece="<pad>", character_coverage=1.0,
        hard_vocab_limit=False, add_dummy_prefix=False, minloglevel=2,
    )  # fmt: skip
    SiglipTokenizer(str(folder / "spiece.model"), model_input_names=["input_ids"]).save_pretrained(
        folder
    )
    assert type(AutoTokenizer.from_pretrained(folder)) is SiglipTokenizer


def siglip2_naflex(folder: Path) -> None:
    """SigLIP 2 for any resolution and shape, with the tokenizer that lower-cases."""
    from transformers import (
        Siglip2Config,
        Siglip2ImageProcessor,
        Siglip2Model,
        Siglip2Tokenizer,
    )

    vocab = _siglip_vocab()
    patches = (SIZE // PATCH) ** 2
    vision = {name: value for name, value in VISION.items() if name != "image_size"}
    config = Siglip2Config(
        text_config={**TEXT, **SIGLIP, "vocab_size": len(vocab), "projection_size": 32},
        vision_config={**vision, "num_patches": patches},
    )
    _save(
        folder,
        _stirred(Siglip2Model(config), 2, 3.0, bias=-2.0),
        Siglip2Tokenizer(vocab, merges=[], model_input_names=["input_ids"]),
        Siglip2ImageProcessor(patch_size=PATCH, max_num_patches=patches, **NORM),
    )


OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16,
                   "patch_size": PATCH},
    "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}  # fmt: skip
OPEN_CLIP_NORM = {"mean": NORM["image_mean"], "std": NORM["image_std"]}


EVA = {"image_size": 224, "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token",
       "timm_proj": None}  # fmt: skip
"""The smallest image tower of EVA-CLIP's kind: 5.5 million weights."""


def open_clip(folder: Path, **changes: Any) -> None:
    """An OpenCLIP model with the tokenizer that comes with the library."""
    import safetensors.torch
    from open_clip import CLIP, CustomTextCLIP
    from open_clip.model import set_model_preprocess_cfg
    from open_clip.push_to_hf_hub import save_config_for_hf

    settings = {**OPEN_CLIP, **changes}
    own_text = settings.get("custom_text", False)
    kind = CustomTextCLIP if own_text else CLIP
    model = kind(**{name: value for name, value in settings.items() if name != "custom_text"})
    _stirred(model, 3, 3.0, -2.0 if model.logit_bias is not None else None)
    size = settings["vision_cfg"]["image_size"]
    set_model_preprocess_cfg(
        model, {"size": size, "interpolation": "bicubic", "resize_mode": "shortest",
                "fill_color": 0, "mode": "RGB", **OPEN_CLIP_NORM},
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(weights, folder / "open_clip_model.safetensors")
    save_config_for_hf(model, folder / "open_clip_config.json", settings)


def open_clip_siglip(folder: Path) -> None:
    """Trained with a sigmoid."""
    open_clip(folder, init_logit_bias=0.0)


def eva_clip(folder: Path) -> None:
    open_clip(folder, vision_cfg=EVA, custom_text=True)


def _settings(folder: Path) -> dict[str, Any]:
    vocabulary = folder / "vocabulary.txt"
    vocabulary.write_text("\n".join(TAGS) + "\n", encoding="utf-8")
    return {"model": str(folder / "model"), "vocabulary": str(vocabulary), "score_floor": 0.0}


def clip_config(folder: Path) -> ExpertConfig:
    from experts.tagging.clip import ClipConfig

    clip(folder / "model")
    return ClipConfig(**_settings(folder))


def open_clip_config(folder: Path) -> ExpertConfig:
    from experts.tagging.open_clip import OpenClipConfig

    open_clip(folder / "model")
    return OpenClipConfig(**_settings(folder))


RAM_PLUS = Path(__file__).parent / "golden" / "ram_plus.json"
"""Names and shapes of the parameters of a small RAM++, and what the authors' code says with the
weights below."""


def ram_plus_weights(
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, npt.NDArray[np.float32]]:
    """The same numbers with every version of NumPy, and lively scores."""
    weights = {}
    for seed, (name, shape) in enumerate(sorted(shapes.items())):
        noise = np.random.RandomState(seed).standard_normal(tuple(shape))
        if name == "label_embed":
            noise *= 4  # else the tags are much alike
        elif len(shape) > 1:
            noise *= 1.5 / np.prod(shape[1:]) ** 0.5
        elif name.lower().endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            noise = 1 + 0.3 * noise
        elif len(shape) == 1:
            noise *= 0.3
        weights[name] = np.asarray(noise, np.float32)
    return weights


def ram_plus(folder: Path) -> None:
    """Weights, tags and thresholds, all in one folder."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    golden = json.loads(RAM_PLUS.read_text())
    weights = ram_plus_weights(golden["shapes"])
    tensors = {name: torch.from_numpy(values) for name, values in weights.items()}
    save_file(tensors, folder / "ram_plus.safetensors")
    count = len(next(iter(golden["scores"].values())))
    (folder / "ram_tag_list.txt").write_text("".join(f"tag {n}\n" for n in range(count)))
    (folder / "ram_tag_list_threshold.txt").write_text("0.5\n0.25\n" * (count // 2))


def ram_plus_config(folder: Path) -> ExpertConfig:
    from experts.tagging.ram_plus import RamPlusConfig

    ram_plus(folder)
    return RamPlusConfig(model=str(folder), tags=folder, threshold_share=0.01)
