"""Grounding DINO (Liu et al., arXiv 2303.05499) and MM Grounding DINO: open-set detection of an
image's tags, which the model reads as one caption, "cat. coffee cup."
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from experts.base import Context, ExpertConfig, Hardware
from experts.checkpoint import CheckpointError, checkpoint_folder, checkpoint_revision
from experts.detection.queries import TagQueries, plain
from experts.detection.transformers_input import ImageInput, best_objects, on_cpu, stacked
from experts.torch_models import TransformersConfig, load_model
from fusion_pipeline.dataset.evidence import DetectedObject, EvidenceKind
from fusion_pipeline.dataset.images import RGB


class GroundingDinoConfig(TransformersConfig, TagQueries):
    max_objects: int = Field(default=100, ge=1, le=1000)
    """Most objects an image, the best ones."""
    box_threshold: float = Field(default=0.25, ge=0.01, lt=1)
    """Objects score over it: the best match of a box with any token of the caption."""
    text_threshold: float = Field(default=0.25, ge=0, lt=1)
    """A box has a label when it matches a token of that label better than this."""


@dataclass(frozen=True)
class Caption:
    """Queries as the model reads them."""

    tokens: tuple[int, ...]
    places: tuple[tuple[str, slice], ...]
    """Each label, and where its tokens are."""


class GroundingDino:
    """Boxes of whatever the tags name, best first, one label a box.

    The labels of a caption are seen together; an image with more of them than a caption holds is
    looked at several times.
    """

    kind: ClassVar[EvidenceKind] = EvidenceKind.OBJECTS
    version: ClassVar[int] = 1
    uses_tags: ClassVar[bool] = True
    Config: ClassVar[type[ExpertConfig]] = GroundingDinoConfig

    @classmethod
    def revision(cls, config: GroundingDinoConfig) -> str:
        return checkpoint_revision(config)

    def __init__(self, config: GroundingDinoConfig, hardware: Hardware) -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoTokenizer

        folder = checkpoint_folder(config)
        self._config = config
        self._processor = ImageInput(folder)
        self._tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        self._model = load_model(AutoModelForZeroShotObjectDetection, folder, config, hardware)
        kind = self._model.config.model_type
        if kind not in ("grounding-dino", "mm-grounding-dino"):
            raise CheckpointError(f"{config.model}: a checkpoint of {kind}, not of Grounding DINO")
        unknown = [label for label in config.queries if not self._read(label)]
        if unknown:
            raise CheckpointError(f"queries: {config.model} knows no part of {', '.join(unknown)}")
        self.batch_size = config.batch_size
        self.min_short_edge: int | None = self._processor.short_edge

    def __call__(
        self, images: Sequence[RGB], context: Sequence[Context]
    ) -> list[list[DetectedObject]]:
        import torch

        asked = [
            (row, caption)
            for row, (_, known) in enumerate(zip(images, context, strict=True))
            for caption in self._captions(self._config.labels(known.tags))
        ]
        found: list[list[DetectedObject]] = [[] for _ in images]
        with torch.inference_mode():
            for start in range(0, len(asked), self.batch_size):
                for row, objects in self._look(images, asked[start : start + self.batch_size]):
                    found[row] += objects
        # The passes of an image are each in order; a stable sort keeps equal scores so.
        return [
            sorted(objects, key=lambda o: -o.score)[: self._config.max_objects] for objects in found
        ]

    def _look(
        self, images: Sequence[RGB], asked: Sequence[tuple[int, Caption]]
    ) -> Iterator[tuple[int, list[DetectedObject]]]:
        """Rows and what a batch of captions finds in them."""
        for places, batch in stacked([self._processor(images[r]) for r, _ in asked], self._model):
            text = self._text([asked[place][1] for place in places])
            answers = on_cpu(self._model(**batch, **text))
            sizes = [images[asked[place][0]].shape[:2] for place in places]
            # Below every score: all boxes in the model's order, to be matched with the text.
            results = self._processor.post_process(answers, -1.0, sizes)
            tokens = answers.logits.sigmoid()
            for n, place in enumerate(places):
                row, caption = asked[place]
                yield row, self._matches(caption, tokens[n], results[n], sizes[n])

    def _matches(
        self, caption: Caption, tokens: Any, result: dict[str, Any], size: tuple[int, ...]
    ) -> list[DetectedObject]:
        """`tokens` [boxes, text length] are the probabilities of each box and token."""
        import torch

        of_labels = torch.stack([tokens[:, place].amax(1) for _, place in caption.places], dim=1)
        best, numbers = of_labels.max(1)
        kept = result["scores"] > self._config.box_threshold
        kept &= best > self._config.text_threshold
        labels = [caption.places[number][0] for number in numbers[kept].tolist()]
        scores, boxes = result["scores"][kept], result["boxes"][kept]
        return best_objects(labels, scores, boxes, size, self._config.max_objects)

    def _captions(self, labels: Sequence[str]) -> Iterator[Caption]:
        """As few captions as hold all labels, in their order."""
        room = self._model.config.max_text_len - 1  # the last token is [SEP]
        dot = self._tokenizer.convert_tokens_to_ids(".")
        tokens, places = [self._tokenizer.cls_token_id], list[tuple[str, slice]]()
        for label in labels:
            words = self._read(label)[: room - 2]
            if not words:
                continue
            if len(tokens) + len(words) + 1 > room:
                yield Caption((*tokens, self._tokenizer.sep_token_id), tuple(places))
                tokens, places = tokens[:1], []
            places.append((label, slice(len(tokens), len(tokens) + len(words))))
            tokens += [*words, dot]
        if places:
            yield Caption((*tokens, self._tokenizer.sep_token_id), tuple(places))

    def _read(self, label: str) -> list[int]:
        """Tokens of a label, none when the model knows no part of it. A dot or question mark inside
        ("st. bernard") is left out: to the model it ends the phrase."""
        ends = self._tokenizer.convert_tokens_to_ids([".", "?"])
        tokens = self._tokenizer(plain(label), add_special_tokens=False)["input_ids"]
        kept = [token for token in tokens if token not in ends]
        return kept if set(kept) - {self._tokenizer.unk_token_id} else []

    def _text(self, captions: Sequence[Caption]) -> dict[str, Any]:
        """The model's text inputs [captions, length of the longest]."""
        import torch

        longest = max(len(caption.tokens) for caption in captions)
        ids = torch.full((len(captions), longest), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, caption in enumerate(captions):
            ids[row, : len(caption.tokens)] = torch.tensor(caption.tokens)
            mask[row, : len(caption.tokens)] = 1
        device = self._model.device
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
