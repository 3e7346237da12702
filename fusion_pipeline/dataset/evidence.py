"""Evidence: what an expert says of an image, and the Arrow types it is stored in.

Coordinates are fractions of the EXIF-upright frame: x grows to the right, y downwards, both in
0..1, so that evidence found on a scaled decode needs no conversion. Scores are the model's own,
in 0..1, kept down to a low floor: thresholds belong to later, cheap steps (score and decide are
separate).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pyarrow as pa

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 with x1 <= x2 and y1 <= y2, fractions of the upright frame."""


def area(box: Box) -> float:
    """Share of the frame that a box covers; 0 for one turned inside out."""
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def shared_area(a: Box, b: Box) -> float:
    """Share of the frame that both boxes cover."""
    return area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))


def iou(a: Box, b: Box) -> float:
    """Intersection over union, 0..1."""
    shared = shared_area(a, b)
    return shared / (area(a) + area(b) - shared) if shared else 0.0


class EvidenceKind(StrEnum):
    """Prefix of an evidence table's name (`objects/nanodet`) and name of its column."""

    TAGS = "tags"
    OBJECTS = "objects"
    TEXT = "text"
    SCORES = "scores"
    """Of the whole image, for choosing among images (NSFW, kind of picture); never in a prompt."""


MERGED = "merged"
MERGED_TAGS = f"{EvidenceKind.TAGS}/{MERGED}"
MERGED_OBJECTS = f"{EvidenceKind.OBJECTS}/{MERGED}"
"""Tables that hold the evidence of all experts of a kind (`perceive.merge`)."""

ALT_TEXTS = "alt_texts"
"""The table of cleaned alt texts, and its column."""

CLEANED = pa.list_(
    pa.struct([pa.field(name, pa.string()) for name in ("text", "reason", "language")])
)
"""Its type: what became of each text."""

RELEVANCE = "relevance/"
"""Before a model's name: the table of its scores of them."""

RELEVANT_ALT_TEXTS = f"{ALT_TEXTS}/relevant"
"""The same, the most fitting first, where a model scores them (`perceive.relevance`)."""


LOOK = "look"
"""The table of what is measured on images (`perceive.look`)."""


@dataclass(frozen=True, slots=True)
class Tag:
    label: str
    score: float


@dataclass(frozen=True, slots=True)
class DetectedObject:
    label: str
    score: float
    box: Box


@dataclass(frozen=True, slots=True)
class TextLine:
    """One line of text. `quad` holds its four corners, clockwise from the text's own top left.

    A line that the recogniser found but can't read is `unread`: its text is empty.
    """

    text: str
    score: float
    """Of the text; of an unread line, that it can't be read."""
    quad: tuple[float, float, float, float, float, float, float, float]
    script: str = ""
    """ISO 15924 code of most of its letters (Latn, Hani, ...); of an unread line a guess. Empty
    without letters, and when there is no guess."""
    block: int = 0
    """Lines of one number are one paragraph or column; blocks are numbered in reading order."""

    @property
    def unread(self) -> bool:
        return not self.text

    @property
    def box(self) -> Box:
        xs, ys = self.quad[0::2], self.quad[1::2]
        return min(xs), min(ys), max(xs), max(ys)


Evidence = Sequence[Tag] | Sequence[DetectedObject] | Sequence[TextLine]
"""What one expert says of one image; an empty sequence is a valid answer."""

_label_score = [pa.field("label", pa.string()), pa.field("score", pa.float32())]

ARROW_TYPES: dict[EvidenceKind, pa.DataType] = {
    EvidenceKind.TAGS: pa.list_(pa.struct(_label_score)),
    EvidenceKind.SCORES: pa.list_(pa.struct(_label_score)),
    EvidenceKind.OBJECTS: pa.list_(
        pa.struct([*_label_score, pa.field("box", pa.list_(pa.float32(), 4))])
    ),
    EvidenceKind.TEXT: pa.list_(
        pa.struct(
            [
                pa.field("text", pa.string()),
                pa.field("score", pa.float32()),
                pa.field("quad", pa.list_(pa.float32(), 8)),
                pa.field("script", pa.string()),
                pa.field("block", pa.int32()),
            ]
        )
    ),
}


def to_arrow(kind: EvidenceKind, rows: Sequence[Evidence | None]) -> pa.Array:
    """One list a row; None (a row that is not ok) becomes null."""
    names = [field.name for field in ARROW_TYPES[kind].value_type]
    plain = [
        None if row is None else [{n: getattr(item, n) for n in names} for item in row]
        for row in rows
    ]
    return pa.array(plain, type=ARROW_TYPES[kind])


def tags_from(cell: Sequence[dict[str, Any]] | None) -> list[Tag]:
    """A cell of a `tags/…` or `scores/…` table, as `to_pylist` has it; null reads as none."""
    return [Tag(item["label"], item["score"]) for item in cell or ()]


def objects_from(cell: Sequence[dict[str, Any]] | None) -> list[DetectedObject]:
    """A cell of an `objects/…` table; null reads as no evidence."""
    return [DetectedObject(i["label"], i["score"], tuple(i["box"])) for i in cell or ()]


def text_from(cell: Sequence[dict[str, Any]] | None) -> list[TextLine]:
    """A cell of a `text/…` table; null reads as no evidence. Tables that were written before lines
    had scripts and blocks are read, too."""
    return [TextLine(**{**item, "quad": tuple(item["quad"])}) for item in cell or ()]
