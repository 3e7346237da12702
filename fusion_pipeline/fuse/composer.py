"""Composer: a caption engine without a model. It writes down the evidence, and nothing else.

Every sentence is a `Statement` that holds the evidence it was made from, so a caption can't say
what nobody saw: counts and places come from boxes, colours from pixels, texts from recognised
lines, names from tags and boxes. It is the offline baseline for engines that look for themselves.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import ClassVar

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from fusion_pipeline.dataset.evidence import Box, DetectedObject, Tag, TextLine
from fusion_pipeline.dataset.images import RGB, DecodeError, decode
from fusion_pipeline.fuse import base
from fusion_pipeline.prompts.hints import MAX_LABEL_CHARS, area, clean, reading_order


class ComposerConfig(BaseModel):
    """Scores, 0..1, from which evidence is believed: higher than for hints, as nobody checks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tag_threshold: float = Field(default=0.6, ge=0, le=1)
    species_threshold: float = Field(default=0.8, ge=0, le=1)
    """For a tag's finer name ("golden retriever") in place of an object's ("dog")."""
    object_threshold: float = Field(default=0.7, ge=0, le=1)
    agreed_threshold: float = Field(default=0.35, ge=0, le=1)
    """For what a second source (tags of its kind, an alt text) names too."""
    text_threshold: float = Field(default=0.8, ge=0, le=1)


@dataclass(frozen=True, slots=True)
class Measured:
    """Read from pixels or size: `what` was measured, its value, the value's share of the region."""

    what: str
    value: str
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class AltText:
    text: str


Item = Tag | DetectedObject | TextLine | Measured | AltText


@dataclass(frozen=True, slots=True)
class Statement:
    """One sentence and what grounds it. Raises ValueError without evidence."""

    text: str
    evidence: tuple[Item, ...]

    def __post_init__(self) -> None:
        if not self.evidence:
            raise ValueError(f"a sentence without evidence: {self.text!r}")


class Composer:
    """CaptionEngine that needs no model, no network and no randomness."""

    version: ClassVar[int] = 1

    def __init__(self, config: ComposerConfig | None = None) -> None:
        self._config = config or ComposerConfig()

    async def caption(self, request: base.CaptionRequest) -> base.CaptionOutcome:
        try:
            caption = " ".join(statement.text for statement in self.statements(request))
        except DecodeError:
            return base.CaptionFailed("undecodable")
        return base.Captioned(caption, base.Finish.STOP)

    async def close(self) -> None:
        """Nothing is held open."""

    def statements(self, request: base.CaptionRequest) -> list[Statement]:
        """The caption's sentences in order. Raises DecodeError when the image is unusable."""
        image = _shrink(decode(request.image, min_short_edge=64))
        colours, config = _name_colours(image), self._config
        objects = _objects(request, config)
        scene = _scene_tags(request, config, objects)
        for thing in objects:
            _paint(thing, colours)
        lines = [TextLine(clean(line.text, 500), line.score, line.quad) for line in request.text
                 if round(line.score, 4) >= config.text_threshold]  # fmt: skip
        lines = [line for line in lines if any(map(str.isalnum, line.text))]
        picture, frame = _frame(request, image)
        opening = _objects_sentences(objects, picture, frame)
        of, items = ("", []) if opening else (f" of {picture}", frame)
        filled = any(_fills(thing) for thing in objects)
        looks = [_colour_sentence(colours, filled, of, items)]
        return [*opening, *_tag_sentence(scene), *looks, *_text_sentences(reading_order(lines))]


# --- words ---------------------------------------------------------------------------------------


def _table(text: str) -> dict[str, str]:
    """Lines of `name: word word` as {word: name}."""
    rows = (line.split(":") for line in text.strip().splitlines())
    return {word: name.strip() for name, words in rows for word in words.split()}


# Last words of labels, by what detectors call the thing: "golden retriever" is a dog.
_KIND_OF = _table("""
    cat: cat kitten tabby
    dog: dog puppy terrier hound foxhound wolfhound deerhound coonhound bloodhound retriever spaniel
    dog: setter shepherd sheepdog collie poodle schnauzer corgi husky malamute bulldog boxer mastiff
    dog: pug beagle chihuahua basset whippet greyhound weimaraner vizsla rottweiler doberman samoyed
    bird: bird cock hen finch goldfinch robin jay magpie eagle owl vulture macaw goose swan stork
    bird: flamingo heron egret pelican penguin peacock
    horse: horse pony sorrel
    sheep: sheep lamb ram bighorn
    cow: cow ox bull
    bear: bear
    car: car cab convertible limousine jeep minivan
    cup: cup mug espresso
    boat: boat canoe yawl schooner gondola catamaran
    airplane: airplane airliner warplane
    motorcycle: motorcycle motorbike moped scooter
    tv: tv television monitor
    bicycle: bicycle bike
    truck: truck pickup
""")
_ANIMALS = {"cat", "dog", "bird", "horse", "sheep", "cow", "bear", "elephant", "zebra", "giraffe",
            "lion", "tiger", "leopard", "monkey", "gorilla", "chimpanzee", "baboon"}  # fmt: skip
_COLOURABLE = {*_ANIMALS, "car", "boat", "airplane", "bus", "truck", "train", "couch", "umbrella",
               "suitcase", "backpack", "surfboard"}  # fmt: skip
# What a tagger trained on photos calls pages, slides and screens.
_PAPER = {"web site", "envelope", "book jacket", "menu", "packet", "comic book", "screen"}
_PLURALS = {"person": "people", "man": "men", "woman": "women", "child": "children",
            "mouse": "mice", "knife": "knives", "sheep": "sheep", "skis": "skis"}  # fmt: skip
_NATIONS = re.compile(r"\b(american|egyptian|english|french|german|irish|persian|siamese)\b")
_NUMBERS = "no one two three four five six seven eight nine".split()


def _kind(label: str) -> str:
    """What two names must share to agree: "golden retriever" is a dog, "sports ball" a ball."""
    last = label.split(" ")[-1]
    return label if label in ("hot dog", "teddy bear", "sea lion") else _KIND_OF.get(last, last)


def _number(count: int) -> str:
    return _NUMBERS[count] if count < len(_NUMBERS) else str(count)


def _is_plural(name: str) -> bool:
    """Plural even when one: "scissors", "sunglasses"."""
    return re.search(r"[^sui]s$", name) is not None


def _noun(name: str, count: int) -> str:
    """ "an orange cat", "scissors", "three people"."""
    if count == 1:
        article = "an " if re.match(r"(?i)(?!uni|use|eu|one)[aeiou]", name) else "a "
        return name if _is_plural(name) else article + name
    start, space, last = name.rpartition(" ")
    ending = "" if _is_plural(last) else "es" if last.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{_number(count)} {start}{space}{_PLURALS.get(last, last + ending)}"


def _join(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _sentence(text: str, evidence: Iterable[Item]) -> Statement:
    end = "" if text.endswith((".", '."', ".”")) else "."
    return Statement(text[0].upper() + text[1:] + end, tuple(dict.fromkeys(evidence)))


def _place(box: Box) -> str:
    """ "in the upper left", "at the bottom"; a side is named when the box keeps to it."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    across = "" if box[2] - box[0] > 0.6 else ("left", "", "right")[(x > 0.38) + (x > 0.62)]
    down = "" if box[3] - box[1] > 0.6 else ("upper", "", "lower")[(y > 0.38) + (y > 0.62)]
    if across:
        return f"in the {down} {across}" if down else f"on the {across}"
    return {"upper": "at the top", "lower": "at the bottom", "": "in the middle"}[down]


# --- colours -------------------------------------------------------------------------------------

_COLOUR_OF = _table("""
    black: 0c0c0c 1e1e1e
    dark grey: 3c3c3c 555555
    grey: 808080 999999
    light grey: b8b8b8 d0d0d0
    white: ececec ffffff
    red: c81e1e e63c32
    dark red: 781419
    pink: f0aabe e66ea0
    orange: f08c1e e67832
    brown: 6e411e 8c5f3c 503728 8c4128
    beige: e1cdaa c8af8c
    yellow: f5dc32 ffff00
    green: 328c3c 5aaa46 00c800 6e6928
    dark green: 19461e
    light green: aadc96
    teal: 148282
    light blue: 96c8eb 78aadc
    blue: 285ac8 4682be 0000ff
    dark blue: 0f1e50 1e3c78
    purple: 6e3296 961e96 bea0dc
""")
ColourMap = npt.NDArray[np.str_]
"""The name of the nearest colour at each pixel of a small copy of the image, [h, w]."""
