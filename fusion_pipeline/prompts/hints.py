"""Hints: the evidence of one image, chosen, cleaned and ordered for a fusion prompt.

Experts store every score (score and decide are separate); this module decides. Boxes under their
threshold go, then a balanced draw favours small objects, since a multimodal model sees the large
ones anyway (DenseFusion, section 3.2). All of it is a pure function of evidence, key and config.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self, TypeVar

from pydantic import Field, model_validator

from fusion_pipeline.config_model import ConfigModel
from fusion_pipeline.dataset.blocks import reading_order
from fusion_pipeline.dataset.evidence import (
    Box,
    DetectedObject,
    Tag,
    TextLine,
    area,
    objects_from,
    tags_from,
    text_from,
)
from fusion_pipeline.prompts.untrusted import MAX_LABEL_CHARS, clean

T = TypeVar("T")


class HintConfig(ConfigModel):
    """Thresholds and budgets. Scores are 0..1, areas are shares of the frame, lengths characters.

    The budget is kept like this: every kind first takes items up to its own floor (a share of
    `max_chars`), so that no kind starves another; what is left over goes to text, then alt texts,
    then objects, then tags. So tags are cut first and text last. Inside a kind the cut falls on
    the end of: reading order (text), the given order (alt texts), the balanced draw (objects),
    falling score (tags).
    """

    tag_threshold: float = Field(default=0.3, ge=0, le=1)
    """Score from which a tag is told."""
    object_threshold: float = Field(default=0.35, ge=0, le=1)
    """Score from which an object is told."""
    text_threshold: float = Field(default=0.6, ge=0, le=1)
    """Score from which a line of text is told."""
    max_tags: int = Field(default=20, ge=0)
    """Most tags a prompt."""
    max_objects: int = Field(default=24, ge=0)
    """Most objects a prompt."""
    max_text: int = Field(default=120, ge=0)
    """Most lines of text a prompt."""
    max_alt_texts: int = Field(default=3, ge=0)
    """Most alt texts a prompt."""
    max_item_chars: int = Field(default=240, ge=2)
    """Longest alt text or text line after cleaning; labels are cut at 60."""
    small_area: float = Field(default=0.02, ge=0, le=1)
    """Boxes below this area are small."""
    small_share: float = Field(default=0.6, ge=0, le=1)
    """Share of the drawn objects that are small ones, as long as there are enough of both."""
    max_chars: int = Field(default=4000, ge=0)
    """Most characters that the hints add to a rendered prompt, headings included."""
    text_floor: float = Field(default=0.4, ge=0, le=1)
    """Share of `max_chars` that lines of text may always take."""
    alt_floor: float = Field(default=0.15, ge=0, le=1)
    """Share of `max_chars` that alt texts may always take."""
    objects_floor: float = Field(default=0.3, ge=0, le=1)
    """Share of `max_chars` that objects may always take."""
    tags_floor: float = Field(default=0.1, ge=0, le=1)
    """Share of `max_chars` that tags may always take."""

    @model_validator(mode="after")
    def _floors_fit(self) -> Self:
        if self.text_floor + self.alt_floor + self.objects_floor + self.tags_floor > 1 + 1e-9:
            raise ValueError(
                "text_floor + alt_floor + objects_floor + tags_floor must be 1 or less"
            )
        return self


@dataclass(frozen=True, slots=True)
class Hints:
    """What a prompt tells of an image. Scores have four decimals, coordinates three."""

    tags: tuple[Tag, ...] = ()
    """Falling score."""
    objects: tuple[DetectedObject, ...] = ()
    """Grouped by label, then top to bottom, left to right."""
    text: tuple[TextLine, ...] = ()
    """Reading order; unread lines are never among them."""
    alt_texts: tuple[str, ...] = ()
    counts: tuple[tuple[str, int], ...] = ()
    """Labels of which `objects` tells some, not all, and how many were found; by label."""

    def to_json(self) -> str:
        """Canonical: the same hints give the same string, on every machine."""
        return json.dumps(
            asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )

    @classmethod
    def from_json(cls, data: str) -> Self:
        """Inverse of `to_json`. Raises ValueError (also KeyError, TypeError) for anything else."""
        plain: dict[str, Any] = json.loads(data)
        return cls(
            tags=tuple(tags_from(plain["tags"])),
            objects=tuple(objects_from(plain["objects"])),
            text=tuple(text_from(plain["text"])),
            alt_texts=tuple(plain["alt_texts"]),
            counts=tuple((label, count) for label, count in plain.get("counts", ())),
        )


# --- draw ----------------------------------------------------------------------------------------


def _balanced(objects: Sequence[DetectedObject], key: str, config: HintConfig) -> Iterator[int]:
    """Indices of all objects in draw order: every prefix holds about `small_share` small ones.

    The draw is an order by hash of key, label and box: no generator, no dependence on the order in
    which the objects come.
    """

    def lot(index: int) -> tuple[bytes, float]:
        found = objects[index]
        drawn = hashlib.sha256(f"{key}\0{found.label}\0{found.box}".encode()).digest()
        return drawn, -found.score

    drawn = sorted(range(len(objects)), key=lot)
    small = [i for i in drawn if area(objects[i].box) < config.small_area]
    rest = [i for i in drawn if area(objects[i].box) >= config.small_area]
    taken_small = 0
    for taken in range(len(objects)):
        wants_small = taken_small < config.small_share * (taken + 1)
        if small and (wants_small or not rest):
            taken_small += 1
            yield small.pop(0)
        else:
            yield rest.pop(0)


# --- choice --------------------------------------------------------------------------------------

HEADING_CHARS = 150
"""Most characters that a template spends on a kind's heading and on opening its block."""


def choose_hints(
    tags: Sequence[Tag],
    objects: Sequence[DetectedObject],
    text: Sequence[TextLine],
    alt_texts: Sequence[str],
    key: str,
    config: HintConfig,
) -> Hints:
    """Apply thresholds, the balanced draw and the length budget (see HintConfig).

    Scores are compared at four decimals: 0.35 stored as float32 reads back a hair smaller.
    """
    cap = config.max_item_chars
    best: dict[str, Tag] = {}
    for tag in tags:
        tag = Tag(clean(tag.label, MAX_LABEL_CHARS), round(tag.score, 4))
        if tag.label and tag.score >= config.tag_threshold:
            best[tag.label] = max(tag, best.get(tag.label, tag), key=lambda t: t.score)
    kept = [
        DetectedObject(clean(o.label, MAX_LABEL_CHARS), round(o.score, 4), _round_box(o.box))
        for o in objects
    ]
    kept = [o for o in kept if o.label and o.score >= config.object_threshold]
    lines = [
        replace(t, text=clean(t.text, cap), score=round(t.score, 4), quad=_round_quad(t.quad))
        for t in text
    ]
    # Unread lines go here, too: they have no text.
    lines = [t for t in lines if t.text and t.score >= config.text_threshold]
    alts = list(dict.fromkeys(filter(None, (clean(alt, cap) for alt in alt_texts))))

    ranked_tags = sorted(best.values(), key=lambda t: (-t.score, t.label))[: config.max_tags]
    drawn = [kept[i] for i in _balanced(kept, key, config)][: config.max_objects]
    read = reading_order(lines)[: config.max_text]
    alts = alts[: config.max_alt_texts]

    floors = (config.text_floor, config.alt_floor, config.objects_floor, config.tags_floor)
    costs: tuple[list[int], ...] = (
        _costs(read, lambda line: _quoted_length(line.text)),
        _costs(alts, _quoted_length),
        _object_costs(drawn),
        _costs(ranked_tags, lambda tag: len(tag.label) + 2),
    )
    n_text, n_alt, n_objects, n_tags = _share(config.max_chars, costs, floors)
    by_place = sorted(
        drawn[:n_objects], key=lambda o: (o.label, o.box[1], o.box[0], o.box, -o.score)
    )
    told, found = Counter(o.label for o in by_place), Counter(o.label for o in kept)
    return Hints(
        tuple(ranked_tags[:n_tags]),
        tuple(by_place),
        tuple(read[:n_text]),
        tuple(alts[:n_alt]),
        tuple((label, found[label]) for label in sorted(told) if found[label] > told[label]),
    )


def _share(chars: int, costs: Sequence[Sequence[int]], floors: Sequence[float]) -> list[int]:
    """How many items of each kind fit, kinds in the order in which they get what is left over."""
    counts = [_prefix(cost, int(floor * chars)) for cost, floor in zip(costs, floors, strict=True)]
    for kind, cost in enumerate(costs):
        used = sum(sum(c[:n]) for c, n in zip(costs, counts, strict=True))
        counts[kind] = _prefix(cost, chars - used + sum(cost[: counts[kind]]))
    return counts


def _prefix(costs: Sequence[int], room: int) -> int:
    total = 0
    for count, cost in enumerate(costs):
        total += cost
        if total > room:
            return count
    return len(costs)


def _costs(items: Sequence[T], length: Callable[[T], int]) -> list[int]:
    """Characters of each item's line; the first pays for the heading."""
    return [length(item) + (0 if index else HEADING_CHARS) for index, item in enumerate(items)]


def _object_costs(drawn: Sequence[DetectedObject]) -> list[int]:
    """Of their lines; the first of a label pays for the line that may tell how many there are."""
    labels = set[str]()
    extra = []
    for found in drawn:
        extra.append(0 if found.label in labels else len(found.label) + len("- : 00000\n"))
        labels.add(found.label)
    lines = _costs(drawn, lambda o: len(o.label) + len("- : [0.000, 0.000, 0.000, 0.000]\n"))
    return [line + more for line, more in zip(lines, extra, strict=True)]


def _quoted_length(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False)) + 3


def _round_box(box: Box) -> Box:
    x1, y1, x2, y2 = (_coordinate(value) for value in box)
    return x1, y1, x2, y2


def _round_quad(
    quad: tuple[float, float, float, float, float, float, float, float],
) -> tuple[float, float, float, float, float, float, float, float]:
    a, b, c, d, e, f, g, h = (_coordinate(value) for value in quad)
    return a, b, c, d, e, f, g, h


def _coordinate(value: float) -> float:
    return round(min(max(value, 0.0), 1.0), 3)
