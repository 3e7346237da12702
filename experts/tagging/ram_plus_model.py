"""The network of RAM++ (Huang et al., arXiv 2310.15200), on timm's Swin Transformer.

Names of parts are those of the authors' checkpoint, github.com/xinyu1205/recognize-anything. Their
package needs a transformers of 2024 and can't be installed beside a newer one (decision 011).
"""

from collections.abc import Mapping

import timm.models.swin_transformer as swin
import torch
from torch import Tensor, nn
from torch.nn import functional

from experts.checkpoint import CheckpointError

SIZE = 384
"""Pixels of an edge of the images it was trained on."""
HEADS = 4
"""Attention heads of the decoder; all other sizes are those of the weights."""
_ENCODER = "visual_encoder."
_LAYER = "tagging_head.encoder.layer."
_INNER = f"{_LAYER}0.intermediate.dense.weight"
_BIAS = "relative_position_bias_table"


class RamPlusModel(nn.Module):  # type: ignore[misc]
    """A Swin Transformer sees the image; a decoder asks its patches for every tag.

    A tag is 51 sentences that a language model wrote of it, as embeddings; the image says how much
    each of them counts.
    """

    def __init__(self, weights: Mapping[str, Tensor], tags: int) -> None:
        """Raises CheckpointError for weights of another model, or for another number of tags."""
        super().__init__()
        # What the authors called it when the first weights were published.
        weights = {n.replace("vision_multi.", "tagging_head."): w for n, w in weights.items()}
        for name in ("image_proj.weight", "label_embed", "fc.weight", _INNER):
            if name not in weights:
                raise CheckpointError(f"not the weights of RAM++: no {name}")
        if len(weights["label_embed"]) % tags:
            raise CheckpointError(
                f"{len(weights['label_embed'])} sentences do not fit {tags} tags: other lists?"
            )
        seen = {n: w for n, w in weights.items() if n.startswith(_ENCODER)}
        self.visual_encoder = _backbone({n.removeprefix(_ENCODER): w for n, w in seen.items()})
        embedded, width = weights["image_proj.weight"].shape
        hidden = weights["fc.weight"].shape[1]
        self.image_proj = nn.Linear(width, embedded)
        sentences = len(weights["label_embed"]) // tags
        self.label_embed = nn.Parameter(torch.empty(tags, sentences, embedded))
        self.reweight_scale = nn.Parameter(torch.empty(()))
        self.wordvec_proj = nn.Linear(embedded, hidden)
        depth = len({name[len(_LAYER) :].split(".")[0] for name in weights if _LAYER in name})
        inner = len(weights[_INNER])
        layers = nn.ModuleList(_Layer(hidden, embedded, inner) for _ in range(depth))
        self.tagging_head = nn.ModuleDict({"encoder": nn.ModuleDict({"layer": layers})})
        self.fc = nn.Linear(hidden, 1)
        rest = {n: w for n, w in weights.items() if n not in seen}
        rest["label_embed"] = weights["label_embed"].unflatten(0, (tags, -1))
        _load(self, rest, loaded=_ENCODER)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, tags] of images [n, 3, 384, 384]."""
        patches = self.visual_encoder.forward_features(images).flatten(1, 2)
        seen = self.image_proj(torch.cat([patches.mean(1, keepdim=True), patches], 1))
        whole = functional.normalize(seen[:, 0], dim=-1)
        fit = torch.einsum("ne,tse->nts", self.reweight_scale.exp() * whole, self.label_embed)
        tags = torch.einsum("nts,tse->nte", fit.softmax(-1), self.label_embed)
        states = self.wordvec_proj(tags).relu()
        for layer in self.tagging_head["encoder"]["layer"]:
            states = layer(states, seen)
        return self.fc(states).squeeze(-1)


class _Layer(nn.Module):  # type: ignore[misc]
    """Tags look at the image's patches, and not at each other."""

    def __init__(self, hidden: int, embedded: int, inner: int) -> None:
        super().__init__()
        look = {"query": nn.Linear(hidden, hidden), "key": nn.Linear(embedded, hidden)}
        look["value"] = nn.Linear(embedded, hidden)
        self.crossattention = nn.ModuleDict({"self": nn.ModuleDict(look)})
        self.crossattention["output"] = _added(hidden, hidden)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden, inner)})
        self.output = _added(inner, hidden)

    def forward(self, states: Tensor, seen: Tensor) -> Tensor:
        look = self.crossattention["self"]
        query, key, value = (
            look[name](source).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name, source in (("query", states), ("key", seen), ("value", seen))
        )
        found = functional.scaled_dot_product_attention(query, key, value)
        states = _add(self.crossattention["output"], found.transpose(1, 2).flatten(2), states)
        return _add(self.output, functional.gelu(self.intermediate["dense"](states)), states)


def _added(width: int, hidden: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"dense": nn.Linear(width, hidden), "LayerNorm": nn.LayerNorm(hidden, eps=1e-12)}
    )


def _add(part: nn.ModuleDict, found: Tensor, states: Tensor) -> Tensor:
    result: Tensor = part["LayerNorm"](part["dense"](found) + states)
    return result


def _backbone(weights: dict[str, Tensor]) -> swin.SwinTransformer:
    """timm's model of the size that the weights have. Raises CheckpointError."""
    tables = [name for name in weights if name.endswith(_BIAS)]
    stages = sorted({int(name.split(".")[1]) for name in tables})
    firsts = [n for stage in stages if (n := f"layers.{stage}.blocks.0.attn.{_BIAS}") in weights]
    embed = weights.get("patch_embed.proj.weight")
    if embed is None or not stages or len(firsts) < len(stages):
        raise CheckpointError("not the weights of RAM++: no Swin Transformer in them")
    model = swin.SwinTransformer(
        img_size=SIZE,
        patch_size=embed.shape[-1],
        window_size=(round(len(weights[firsts[0]]) ** 0.5) + 1) // 2,
        embed_dim=embed.shape[0],
        depths=tuple(sum(n.startswith(f"layers.{stage}.") for n in tables) for stage in stages),
        num_heads=tuple(weights[first].shape[1] for first in firsts),
        num_classes=0,
    )
    _load(model, swin.checkpoint_filter_fn(weights, model))
    return model


def _load(model: nn.Module, weights: dict[str, Tensor], loaded: str = "nothing") -> None:
    """`loaded`: how the names of what is there already begin."""
    try:
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as error:  # sizes that do not fit, one a line
        reason = str(error).splitlines()[1].strip()
        raise CheckpointError(f"not the weights of RAM++: {reason}") from error
    lost = [name for name in missing if not name.startswith(loaded)]
    if lost:
        raise CheckpointError(f"not all weights of RAM++: {len(lost)} missing, such as {lost[0]}")
