"""Detectors of a few 10,000 random weights, saved by the library that the real ones come from.

Weights as models are initialised with give every place the same score; `_stirred` ones differ with
what is in the picture, so that a test sees a wrong colour, label or frame.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experts import load_expert
from experts.base import Context, ExpertConfig
from fusion_pipeline.dataset.evidence import DetectedObject, Tag
from fusion_pipeline.dataset.images import RGB

NAMES = {0: "cat", 1: "N/A", 2: "coffee cup", 3: "dog", 4: "", 5: "person"}
"""Of the closed-set models: two classes have no name."""

WORDS = ("cat", "dog", "coffee", "cup", "a", "photo", "of", "person", "sky", "##s", "##man", "st")
"""Of the tokenizers."""


def _stirred(model: Any, seed: int, gain: float = 2.5) -> Any:
    """With large weights; seeds were chosen for answers of several classes that colour changes."""
    import torch

    random = torch.Generator().manual_seed(seed)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, weights in model.named_parameters():
            noise = torch.randn(weights.shape, generator=random)
            if id(weights) in embeddings or weights.dim() == 3:
                weights.copy_(noise)
            elif weights.dim() > 1:
                own_gain = gain / 3 if "box" in name else gain
                weights.copy_(noise * own_gain / weights[0].numel() ** 0.5)
            elif name.endswith("bias"):
                weights.copy_(noise * 0.1)
            elif name.endswith("weight"):  # of a normalisation
                weights.fill_(1)
            elif name.endswith("embedding"):
                weights.copy_(noise)
    return model.eval()


def _settled(model: Any) -> Any:
    """With batch normalisation fit to its activations: else an image changes next to nothing."""
    import torch

    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = None
    pictures = torch.rand((4, 3, 6, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(torch.nn.functional.interpolate(pictures, (160, 160), mode="bilinear"))
    return model.eval()


def _save(folder: Path, *parts: Any) -> None:
    for part in parts:
        part.save_pretrained(folder)


def _resnet() -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


SMALL_DETR = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
}  # fmt: skip
SMALL_RT_DETR = {
    **SMALL_DETR, "encoder_hidden_dim": 32, "encoder_in_channels": [8, 16, 16],
    "decoder_in_channels": [32, 32, 32], "num_queries": 30, "num_denoising": 0,
    "hidden_expansion": 0.5, "freeze_backbone_batch_norms": False,
}  # fmt: skip
EDGES = {"shortest_edge": 160, "longest_edge": 288}
NORM = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def rt_detr_v2(folder: Path) -> None:
    from transformers import (
        RTDetrImageProcessor,
        RTDetrResNetConfig,
        RTDetrV2Config,
        RTDetrV2ForObjectDetection,
    )

    backbone = RTDetrResNetConfig(**_resnet().to_diff_dict())
    config = RTDetrV2Config(backbone_config=backbone, id2label=NAMES, **SMALL_RT_DETR)
    processor = RTDetrImageProcessor(size={"height": 128, "width": 160})
    _save(folder, _settled(_stirred(RTDetrV2ForObjectDetection(config), 6, gain=1.5)), processor)


def d_fine(folder: Path) -> None:
    from transformers import (
        DFineConfig,
        DFineForObjectDetection,
        HGNetV2Config,
        RTDetrImageProcessor,
    )

    backbone = HGNetV2Config(
        stem_channels=[3, 8, 8], stage_in_channels=[8, 8, 8, 16], stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 8, 16, 16], stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"],
        hidden_sizes=[8, 8, 16, 16], embedding_size=8,
    )  # fmt: skip
    config = DFineConfig(backbone_config=backbone, id2label=NAMES, **SMALL_RT_DETR)
    processor = RTDetrImageProcessor(size={"height": 160, "width": 160})
    _save(folder, _settled(_stirred(DFineForObjectDetection(config), 5, gain=1.5)), processor)


def detr(folder: Path) -> None:
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor

    backbone = _resnet()
    backbone.out_features = ["stage4"]
    config = DetrConfig(backbone_config=backbone, num_queries=20, id2label=NAMES, **SMALL_DETR)
    processor = DetrImageProcessor(size=EDGES, **NORM)
    _save(folder, _stirred(DetrForObjectDetection(config), 5), processor)


def deformable_detr(folder: Path) -> None:
    from transformers import (
        DeformableDetrConfig,
        DeformableDetrForObjectDetection,
        DeformableDetrImageProcessor,
    )

    config = DeformableDetrConfig(
        backbone_config=_resnet(), num_queries=20, id2label=NAMES, num_feature_levels=3,
        two_stage=True, with_box_refine=True, two_stage_num_proposals=20, **SMALL_DETR,
    )  # fmt: skip
    processor = DeformableDetrImageProcessor(size=EDGES, **NORM)
    _save(folder, _stirred(DeformableDetrForObjectDetection(config), 6, gain=1.5), processor)


def yolos(folder: Path) -> None:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=[160, 224], num_detection_tokens=20, id2label=NAMES,
        use_mid_position_embeddings=False,
    )  # fmt: skip
    processor = YolosImageProcessor(size=EDGES, **NORM)
    _save(folder, _stirred(YolosForObjectDetection(config), 7), processor)


CLOSED_SET = (rt_detr_v2, d_fine, detr, deformable_detr, yolos)


def _clip_tokenizer() -> Any:
    """Bytes, and a merge for each prefix of each word."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in (word for word in WORDS if word.isalpha() and len(word) > 1):
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token="!")


def _owl(folder: Path, kind: str, seed: int) -> None:
    import transformers

    tokenizer = _clip_tokenizer()
    config = getattr(transformers, f"{kind}Config")(
        projection_dim=16,
        text_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 128,
        },
    )  # fmt: skip
    model = _stirred(getattr(transformers, f"{kind}ForObjectDetection")(config), seed, gain=1.5)
    size = {"height": 128, "width": 128}
    _save(folder, model, tokenizer, getattr(transformers, f"{kind}ImageProcessor")(size=size))


def owlv2(folder: Path) -> None:
    _owl(folder, "Owlv2", seed=3)


def owlvit(folder: Path) -> None:
    _owl(folder, "OwlViT", seed=0)


def _bert_tokenizer() -> Any:
    """The model knows the separators of its captions by their numbers in BERT's vocabulary."""
    from transformers import BertTokenizer

    tokens = [f"[unused{number}]" for number in range(1040)]
    tokens[0], tokens[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens[1012], tokens[1029] = ".", "?"
    tokens[200 : 200 + len(WORDS)] = WORDS
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)})


def _grounding_dino(folder: Path, kind: str) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        backbone_config=transformers.SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, patch_size=4,
            image_size=160, out_indices=[2, 3, 4],
        ),
        text_config=transformers.BertConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            vocab_size=1040,
        ),
        num_queries=30, max_text_len=16, **SMALL_DETR,
    )  # fmt: skip
    model = _stirred(getattr(transformers, f"{kind}ForObjectDetection")(config), 5)
    if kind == "GroundingDino":  # its scores would all be 1: they are products that nothing scales
        model.model.decoder.layer_norm.weight.data *= 0.3
    processor = transformers.GroundingDinoProcessor(
        transformers.GroundingDinoImageProcessor(size=EDGES, **NORM), _bert_tokenizer()
    )
    _save(folder, model, processor)


def grounding_dino(folder: Path) -> None:
    _grounding_dino(folder, "GroundingDino")


def mm_grounding_dino(folder: Path) -> None:
    _grounding_dino(folder, "MMGroundingDino")


def closed_set_config(folder: Path) -> ExpertConfig:
    rt_detr_v2(folder)
    return _config("transformers-detector", folder, score_floor=0.01)


def owlv2_config(folder: Path) -> ExpertConfig:
    owlv2(folder)
    return _config("owlv2", folder, score_floor=0.01)


def grounding_dino_config(folder: Path) -> ExpertConfig:
    grounding_dino(folder)
    return _config("grounding-dino", folder, box_threshold=0.01, text_threshold=0.01)


def _config(expert: str, folder: Path, **settings: float) -> ExpertConfig:
    return load_expert(expert).Config.model_validate({"model": str(folder), **settings})


def context(image: RGB, *tags: str) -> Context:
    """Of an image with these tags, the best one first."""
    found = tuple(Tag(label, 0.9 - number / 100) for number, label in enumerate(tags))
    return Context(width=image.shape[1], height=image.shape[0], tags=found)


def assert_same(found: Sequence[DetectedObject], said: list[dict[str, Any]], image: RGB) -> None:
    """`said` is what a pipeline of transformers says of the image: boxes in whole pixels, not cut
    at the frame, classes without a name among them."""
    height, width = image.shape[:2]
    left = list(found)
    for item in said:
        sides = (("xmin", width), ("ymin", height), ("xmax", width), ("ymax", height))
        box = [min(max(item["box"][side], 0), length) for side, length in sides]
        same = [
            other
            for other in left
            if other.label == item["label"]
            and abs(other.score - item["score"]) < 1e-5
            and all(
                pixel - 0.01 < fraction * length < pixel + 1.01
                for fraction, pixel, (_, length) in zip(other.box, box, sides, strict=True)
            )
        ]
        if same:
            left.remove(same[0])
        else:
            assert item["label"] in ("", "N/A") or box[0] == box[2] or box[1] == box[3], item
    assert left == []


def assert_close(one: Sequence[DetectedObject], other: Sequence[DetectedObject]) -> None:
    """The same but for rounding, which these models' large weights make larger, and for the order
    of objects that score nearly the same."""
    left = list(other)
    for item in one:
        same = [
            o
            for o in left
            if o.label == item.label
            and np.allclose([o.score, *o.box], [item.score, *item.box], atol=1e-3)
        ]
        assert same, item
        left.remove(same[0])
    assert left == []
