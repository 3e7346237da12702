"""What detectors on transformers share: images as a model takes them, and its boxes as evidence."""

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from fusion_pipeline.dataset.evidence import Box, DetectedObject
from fusion_pipeline.dataset.images import RGB

_THIN = 48
"""Pixels that the short edge of the model's input has at least. 900 queries, as Grounding DINO has,
need about as many cells in the feature maps; other models need one cell of 32 pixels."""


class ImageInput:
    """The image processor of a checkpoint."""

    def __init__(self, folder: Any) -> None:
        from transformers import AutoImageProcessor

        self._processor = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        self._size = dict(self._processor.size) if self._processor.do_resize else {}
        self.post_process = self._processor.post_process_object_detection

    @property
    def short_edge(self) -> int | None:
        """Pixels of the short edge that it keeps at most; None: all of them."""
        sides = [pixels for name, pixels in self._size.items() if name != "longest_edge"]
        return max(sides, default=None)

    def __call__(self, image: RGB) -> dict[str, Any]:
        """Tensors of a batch of one. `image`: uint8 [height, width, 3]."""
        # As a Pillow image: of an array with a side of 3 pixels or of 1 it would have to guess
        # which axis holds the channels.
        picture = Image.fromarray(self._thickened(image))
        return dict(self._processor(images=[picture], return_tensors="pt"))

    def _thickened(self, image: RGB) -> RGB:
        """A strip so thin that nothing would be left of its short edge, with each line repeated:
        fractions of the frame stay what they are."""
        longest = self._size.get("longest_edge") or self._size.get("max_width")
        if longest is None:
            return image
        height, width = image.shape[:2]
        times = -(-max(height, width) * _THIN // (min(height, width) * longest))
        return np.repeat(image, times, axis=0 if height < width else 1) if times > 1 else image


def stacked(
    inputs: Sequence[Mapping[str, Any]], model: Any
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Batches of inputs of one shape, with their numbers, as the model wants them.

    Images are never padded to each other's size: padding changes what a model sees at the border.
    """
    import torch

    groups: dict[torch.Size, list[int]] = {}
    for number, one in enumerate(inputs):
        groups.setdefault(one["pixel_values"].shape, []).append(number)
    for numbers in groups.values():
        batch = {
            name: torch.cat([inputs[number][name] for number in numbers]).to(model.device)
            for name in inputs[numbers[0]]
        }
        batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
        yield numbers, batch


def on_cpu(outputs: Any) -> SimpleNamespace:
    """`logits` and `pred_boxes` in float32 on the CPU. Raises ValueError when one is no number."""
    logits, boxes = outputs.logits.float().cpu(), outputs.pred_boxes.float().cpu()
    if logits.isnan().any() or boxes.isnan().any():
        raise ValueError("not_finite: the model's answer holds values that are no numbers")
    return SimpleNamespace(logits=logits, pred_boxes=boxes)


def best_objects(
    labels: Sequence[str], scores: Any, boxes: Any, size: tuple[int, ...], limit: int
) -> list[DetectedObject]:
    """At most `limit` objects, best first, none without a label or without area in the frame.

    `scores` [n] and `boxes` [n, 4] (x1, y1, x2, y2, in pixels) are tensors, `size` is the frame's
    (height, width).
    """
    height, width = size
    fractions = (boxes / boxes.new_tensor([width, height, width, height])).clamp(0, 1).tolist()
    values = scores.tolist()
    found: list[DetectedObject] = []
    for number in scores.argsort(descending=True, stable=True).tolist():
        x1, y1, x2, y2 = fractions[number]
        if labels[number] and x1 < x2 and y1 < y2:
            box: Box = (x1, y1, x2, y2)
            found.append(DetectedObject(labels[number], values[number], box))
    return found[:limit]
