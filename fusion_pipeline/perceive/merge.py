"""Evidence of several experts made one: whose boxes are the same thing, and who agrees on what.

Boxes are fused by weighted averages (weighted box fusion: Solovyev et al., arXiv 1910.13302) over
all detectors, labels compared by meaning (`perceive.labels`). Then scores move: two experts that
agree are surer than one; a box whose label the taggers name gains, one that fills the frame with
another kind of thing than the taggers name loses, and of two labels at one place the weaker loses.

Nothing is dropped here: what to believe is decided by the thresholds of `hints`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import Field

from fusion_pipeline.config_model import ConfigModel
from fusion_pipeline.dataset.evidence import Box, DetectedObject, Tag, area, iou, shared_area
from fusion_pipeline.perceive.labels import is_kind_of, similarity

_ALIKE, _COMPARABLE = 0.85, 0.55
"""Similarities of labels: from the first on hardly two things (moped, motorbike), from the second
on things of one sort, of which a place holds one (a cat, a person)."""


_PART = 0.8
"""Share of a box inside another one from which it is a part of it."""


class MergeConfig(ConfigModel):
    """How evidence moves scores. Weights are in log-odds: 2 takes 0.3 to 0.76, -2 to 0.05."""

    same_iou: float = Field(default=0.55, gt=0, le=1)
    """Overlap (intersection over union) from which boxes of one meaning are one thing."""
    rival_iou: float = Field(default=0.7, gt=0, le=1)
    """Overlap from which boxes of different meanings are rivals for one place."""
    support: float = Field(default=2.0, ge=0)
    """What a certain tag adds to a box of its meaning."""
    conflict: float = Field(default=3.0, ge=0)
    """What a certain tag of another thing of that sort takes from a box that fills the frame; less
    for smaller boxes, beside which there is room for what the tag means."""
    rival: float = Field(default=2.0, ge=0)
    """What a certain rival takes."""


@dataclass(frozen=True, slots=True)
class MergedTag(Tag):
    experts: tuple[str, ...]
    """Who said so, by the names of their tables."""


@dataclass(frozen=True, slots=True)
class MergedObject(DetectedObject):
    experts: tuple[str, ...]
    """Detectors that found it, and taggers whose tags support it, by the names of their tables."""


@dataclass(slots=True)
class _Thing:
    """Boxes that are one thing: of each expert the best one's score."""

    parts: list[tuple[str, DetectedObject]] = field(default_factory=list)
    box: Box = (0.0, 0.0, 0.0, 0.0)

    def add(self, expert: str, found: DetectedObject) -> None:
        self.parts.append((expert, found))
        self.box = _mean_box([part for _, part in self.parts])

    @property
    def label(self) -> str:
        """The one with the most votes (sums of scores); of equal ones the first found."""
        votes: dict[str, float] = {}
        for _, part in self.parts:
            votes[part.label] = votes.get(part.label, 0.0) + part.score
        return max(votes, key=lambda label: votes[label])

    @property
    def scores(self) -> dict[str, float]:
        best: dict[str, float] = {}
        for expert, part in self.parts:
            best[expert] = max(part.score, best.get(expert, 0.0))
        return best


def merge_tags(found: Mapping[str, Sequence[Tag]]) -> list[MergedTag]:
    """One tag a meaning, best first. Equal labels and synonyms of different taggers are one tag,
    under the name that scored best, and surer together. `found`: by expert."""
    groups: list[list[tuple[str, Tag]]] = []
    for expert, tag in _best_first(found):
        for group in groups:
            named = group[0][1].label
            if expert not in _names(group) and _means(tag.label, named):
                group.append((expert, tag))
                break
        else:
            groups.append([(expert, tag)])
    merged = [
        MergedTag(group[0][1].label, either(tag.score for _, tag in group), _names(group))
        for group in groups
    ]
    return sorted(merged, key=lambda tag: (-tag.score, tag.label))


def merge_objects(
    found: Mapping[str, Sequence[DetectedObject]],
    tags: Sequence[MergedTag],
    config: MergeConfig | None = None,
) -> list[MergedObject]:
    """One object a thing, best first. `found`: by expert; `tags`: of `merge_tags`."""
    config = config or MergeConfig()
    merged: list[MergedObject] = []
    better: dict[str, list[DetectedObject]] = {}
    for thing in _things(found, config.same_iou):
        label, score = thing.label, either(thing.scores.values())
        speaking = [tag for tag in tags if _support(tag.label, label) > 0]
        support = either(tag.score * _support(tag.label, label) for tag in speaking)
        against = either(t.score for t in tags if t not in speaking and _excludes(t.label, label))
        # A tag says that there is such a thing: it speaks for the best box, less for others, and
        # not for a part of a better one.
        rank = _rank(thing.box, score, better.setdefault(label, []))
        better[label].append(DetectedObject(label, score, thing.box))
        change = config.support * support * rank
        change -= config.conflict * against * area(thing.box)
        experts = {*thing.scores, *(name for tag in speaking for name in tag.experts)}
        merged.append(
            MergedObject(label, shifted(score, change), thing.box, tuple(sorted(experts)))
        )
    merged.sort(key=_order)
    return sorted(_without_rivals(merged, config), key=_order)


def _rank(box: Box, score: float, better: Sequence[DetectedObject]) -> float:
    """How far a box may be the one that a tag means, 0..1, beside better ones of its label."""
    if any(shared_area(box, one.box) > _PART * area(box) for one in better):
        return 0.0
    return min([1.0, *(score / one.score for one in better if one.score)])


def _things(found: Mapping[str, Sequence[DetectedObject]], same_iou: float) -> list[_Thing]:
    """Each box joins the thing of its meaning that it overlaps most, best boxes first."""
    things: list[_Thing] = []
    for expert, one in _best_first(found):
        near = [(iou(one.box, t.box), t) for t in things if _same(one.label, t.parts[0][1].label)]
        overlap, thing = max(near, key=lambda pair: pair[0], default=(0.0, _Thing()))
        if overlap < same_iou:
            thing = _Thing()
            things.append(thing)
        thing.add(expert, one)
    return things


def _without_rivals(ranked: Sequence[MergedObject], config: MergeConfig) -> list[MergedObject]:
    """Scores lowered by the best object of another meaning at the same place."""
    lowered: list[MergedObject] = []
    for one in ranked:
        rivals = [
            better.score * iou(better.box, one.box)
            for better in lowered
            if iou(better.box, one.box) >= config.rival_iou and not _same(better.label, one.label)
        ]
        score = shifted(one.score, -config.rival * max(rivals, default=0.0))
        lowered.append(MergedObject(one.label, score, one.box, one.experts))
    return lowered


def _means(a: str, b: str) -> bool:
    return is_kind_of(a, b) and is_kind_of(b, a)


def _same(a: str, b: str) -> bool:
    """Whether a thing can have both names: a tabby is a cat."""
    return is_kind_of(a, b) or is_kind_of(b, a)


def _support(tag: str, label: str) -> float:
    """How far a tag speaks for a label, 0..1: a tabby for a cat wholly, a cat for a tabby half."""
    if is_kind_of(tag, label):
        return 1.0
    alike = similarity(tag, label)
    return 0.5 if alike >= _ALIKE or (alike >= _COMPARABLE and is_kind_of(label, tag)) else 0.0


def _excludes(tag: str, label: str) -> bool:
    return similarity(tag, label) >= _COMPARABLE


def shifted(score: float, change: float) -> float:
    """A score moved by log-odds; 0 and 1 stay."""
    if not 0 < score < 1:
        return score
    return 1 / (1 + math.exp(-math.log(score / (1 - score)) - change))


def either(scores: Iterable[float]) -> float:
    """How sure it is that at least one is right, were they independent: 1 - product (1 - score)."""
    return 1 - math.prod(1 - score for score in scores)


def _mean_box(parts: Sequence[DetectedObject]) -> Box:
    """Corners averaged with scores as weights."""
    total = sum(part.score for part in parts)
    if not total:
        return parts[0].box
    x1, y1, x2, y2 = (sum(p.score * p.box[i] for p in parts) / total for i in range(4))
    return x1, y1, x2, y2


Item = TypeVar("Item", Tag, DetectedObject)


def _best_first(found: Mapping[str, Sequence[Item]]) -> list[tuple[str, Item]]:
    items = [(expert, item) for expert in sorted(found) for item in found[expert]]
    return sorted(items, key=lambda pair: -pair[1].score)


def _names(group: Sequence[tuple[str, Tag]]) -> tuple[str, ...]:
    return tuple(sorted({expert for expert, _ in group}))


def _order(one: MergedObject) -> tuple[float, str, Box]:
    return -one.score, one.label, one.box
