"""Composer: a caption engine without a model. It writes down the evidence, and nothing else.

Every sentence is a `Statement` that holds the evidence it was made from, so a caption can't say
what nobody saw: counts and places come from boxes, colours from pixels, texts from recognised
lines, names from tags and boxes. It is the offline baseline for engines that look for themselves.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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

    tag_threshold: float = Field(default=0.5, ge=0, le=1)
    species_threshold: float = Field(default=0.8, ge=0, le=1)
    """For "golden retriever" where "dog" would do."""
    object_threshold: float = Field(default=0.55, ge=0, le=1)
    """0.1 more for a box that is tiny or fills the frame: most false alarms are such boxes."""
    agreed_threshold: float = Field(default=0.35, ge=0, le=1)
    """For an object that tags of its kind (sum of scores at least 0.2) confirm."""
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
        canvas = _color_names(decode(request.image, min_short_edge=128))
        lines = _believed_lines(request.text, self._config)
        things = _things(request, self._config, _colors(canvas, "background")[0].share >= 0.9)
        _name_from_alt_texts(things, request.alt_texts, lines)
        _paint(things, canvas)
        opening = _opening(request, things, lines, canvas)
        return [opening, *_others(things), *_palette(things, lines, canvas), *_texts(lines)]


# --- words ---------------------------------------------------------------------------------------

_NUMBERS = dict(enumerate(("two", "three", "four", "five", "six", "seven", "eight", "nine"), 2))
_IRREGULAR = {"person": "people", "man": "men", "woman": "women", "child": "children",
              "mouse": "mice", "knife": "knives", "wolf": "wolves", "goose": "geese",
              "sheep": "sheep", "fish": "fish", "deer": "deer", "skis": "skis"}  # fmt: skip
# Names of kinds, and the last words of labels that are of the kind.
_KINDS = {
    "cat": "cat kitten tabby cougar lynx leopard jaguar lion tiger cheetah",
    "dog": "dog puppy terrier hound foxhound wolfhound deerhound coonhound bloodhound retriever "
    "spaniel setter shepherd sheepdog collie poodle schnauzer corgi husky malamute bulldog boxer "
    "mastiff pug beagle chihuahua basset whippet greyhound weimaraner vizsla pointer rottweiler "
    "doberman pinscher dalmatian samoyed pomeranian chow malinois wolf fox coyote dingo",
    "bird": "bird cock hen ostrich goldfinch finch junco bunting robin bulbul jay magpie eagle owl "
    "chickadee vulture macaw cockatoo lorikeet hornbill hummingbird toucan drake goose swan stork "
    "flamingo heron egret pelican penguin albatross peacock quail partridge",
    "horse": "horse pony sorrel", "bear": "bear panda koala", "elephant": "elephant tusker",
    "sheep": "sheep lamb ram bighorn ibex", "cow": "cow bull ox bison buffalo",
    "animal": "monkey gorilla chimpanzee orangutan baboon macaque rabbit hare squirrel hamster "
    "otter badger snake lizard turtle frog butterfly monarch dragonfly bee ladybug zebra giraffe",
    "car": "car cab convertible limousine jeep minivan", "cup": "cup mug espresso",
    "boat": "boat canoe yawl schooner gondola catamaran", "airplane": "airplane airliner warplane",
    "train": "train locomotive", "motorcycle": "motorcycle moped scooter", "bus": "bus trolleybus",
    "tv": "tv television monitor", "bicycle": "bicycle bike", "truck": "truck pickup van",
}  # fmt: skip
_KIND_OF = {word: kind for kind, words in _KINDS.items() for word in words.split()}
_ANIMALS = list(_KINDS)[:9]
_PAINTABLE = {*_ANIMALS, "car", "boat", "airplane", "train", "bus", "truck", "couch", "umbrella",
              "suitcase", "backpack", "handbag", "tie", "frisbee", "ball", "surfboard"}  # fmt: skip


def _kind(label: str) -> str:
    """What two names must share to agree: "golden retriever" is a dog, "sports ball" a ball."""
    last = label.split(" ")[-1]
    return label if label in ("hot dog", "teddy bear", "sea lion") else _KIND_OF.get(last, last)


def _noun(name: str, count: int = 1) -> str:
    """ "an orange cat", "three people", "a cup of tea"."""
    head, of, rest = name.partition(" of ")
    start, _, last = head.rpartition(" ")
    if count == 1:
        if re.search(r"[^sui]s$|^(sky|water|grass|snow|sand|food|bread|broccoli|rice)$", head):
            return name
        vowel = re.match(r"(?i)[aeiou](?!ni[^nm]|se|uro|ne\b)|hour|honest", name)
        return f"{'an' if vowel else 'a'} {name}"
    last = re.sub(r"(?<=[^aeiou])y$", "ie", _IRREGULAR.get(last, last))
    ending = "" if last in _IRREGULAR.values() else "es" if re.search("(s|x|ch|sh)$", last) else "s"
    words = (_NUMBERS.get(count, str(count)), start, last + ending + of + rest)
    return " ".join(filter(None, words))


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
    if across and down:
        return f"in the {down} {across}"
    edge = {"upper": "at the top", "lower": "at the bottom", "": "in the middle"}
    return f"on the {across}" if across else edge[down]


# --- colours -------------------------------------------------------------------------------------

_PALETTE = {
    "black": "0c0c0c 1e1e1e", "dark grey": "3c3c3c 555555", "grey": "808080 999999",
    "light grey": "b8b8b8 d0d0d0", "white": "ececec ffffff", "red": "c81e1e e63c32",
    "dark red": "781419", "pink": "f0aabe e66ea0", "orange": "f08c1e e67832",
    "brown": "6e411e 8c5f3c 503728 8c4128", "beige": "e1cdaa c8af8c", "yellow": "f5dc32 ffff00",
    "olive green": "6e6928", "green": "328c3c 5aaa46 00c800", "dark green": "19461e",
    "light green": "aadc96", "teal": "148282", "light blue": "96c8eb 78aadc",
    "blue": "285ac8 4682be 0000ff", "dark blue": "0f1e50 1e3c78", "purple": "6e3296 961e96",
    "lilac": "bea0dc",
}  # fmt: skip
_CODES = [(name, bytes.fromhex(code)) for name, codes in _PALETTE.items() for code in codes.split()]
_GREYS = {"black", "dark grey", "grey", "light grey", "white"}


def _lab(rgb: RGB) -> npt.NDArray[np.float32]:
    """CIELAB, float32 [h, w, 3], where distances are close to what people see."""
    lab: npt.NDArray[np.float32] = cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    return lab


def _color_names(image: RGB) -> npt.NDArray[np.str_]:
    """The nearest palette name of each pixel of a small copy (long edge 128), str [h, w]."""
    scale = min(1.0, 128 / max(image.shape[:2]))
    size = [max(1, round(edge * scale)) for edge in image.shape[1::-1]]
    lab = _lab(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    codes = np.array([list(code) for _, code in _CODES], np.uint8)
    distance = np.linalg.norm(lab[:, :, None] - _lab(codes[None])[0], axis=-1)
    return np.array([name for name, _ in _CODES])[distance.argmin(-1)]


def _colors(
    canvas: npt.NDArray[np.str_], what: str, box: Box = (0, 0, 1, 1), least: float = 0.12
) -> list[Measured]:
    """Colours of a region with at least that share, largest first; "background" is the rim."""
    height, width = canvas.shape
    x, y = min(width - 1, int(box[0] * width)), min(height - 1, int(box[1] * height))
    region = canvas[y : max(y + 1, int(box[3] * height)), x : max(x + 1, int(box[2] * width))]
    if what == "background":
        margin = max(1, round(0.06 * min(height, width)))
        inside = np.zeros(region.shape, bool)
        inside[margin:-margin, margin:-margin] = True
        region = region[~inside]
    names, counts = np.unique(region, return_counts=True)
    found = [Measured(what, str(n), round(int(c) / region.size, 3)) for n, c in zip(names, counts, strict=True)]
    return sorted((m for m in found if m.share >= least), key=lambda m: (-m.share, m.value))


def _tone(canvas: npt.NDArray[np.str_]) -> list[Measured]:
    """Dark or bright, when most pixels are; black-and-white, when nearly all are grey."""
    shares = {m.value: m.share for m in _colors(canvas, "picture", least=0)}
    dark = sum(share for name, share in shares.items() if name.startswith(("dark", "black")))
    bright = sum(share for name, share in shares.items() if name.startswith(("light", "white")))
    grey = sum(share for name, share in shares.items() if name in _GREYS)
    tones = {"dark": dark > 0.8, "bright": bright > 0.8, "black-and-white": grey > 0.995}
    return [Measured("tone", name) for name, holds in tones.items() if holds]
