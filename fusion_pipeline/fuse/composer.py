"""Composer: a caption engine without a model. It writes down the evidence, and nothing else.

Every sentence is a `Statement` that holds the evidence it was made from, so a caption can't say
what nobody saw: counts and places come from boxes, colours from pixels, texts from recognised
lines, names from tags and boxes. It is the offline baseline for engines that look for themselves.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
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
        image = _small(decode(request.image, min_short_edge=128))
        canvas, lines = _canvas(image), _believed_lines(request.text, self._config)
        things = _things(request, self._config, bool(_ground(canvas)[0]))
        things = _name_from_alt_texts(things, request.alt_texts, lines)
        _paint(things, canvas)
        opening = _opening(request, things, lines, canvas, _tone(image, canvas))
        return [opening, *_others(things), *_palette(things, lines, canvas), *_texts(lines)]


# --- words ---------------------------------------------------------------------------------------

_NUMBERS = dict(
    enumerate(("one", "two", "three", "four", "five", "six", "seven", "eight", "nine"), 1)
)
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
_PROPER = re.compile(
    r"\b(english|scottish|welsh|irish|french|german|norwegian|siberian|tibetan|japanese|maltese"
    r"|egyptian|persian|siamese|american|african|indian|yorkshire|labrador|saint bernard)\b"
)
# What a tagger trained on photos calls pages and slides.
_PAPER = {"web site", "envelope", "book jacket", "menu", "packet", "comic book", "screen"}
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
Canvas = npt.NDArray[np.intp]
"""The nearest palette name of each pixel of a small copy: index into `_COLOURS`, [h, w]."""

_COLOURS = list(_PALETTE)
_CODES = [
    (_COLOURS.index(name), bytes.fromhex(code))
    for name, codes in _PALETTE.items()
    for code in codes.split()
]


def _lab(rgb: RGB) -> npt.NDArray[np.float32]:
    """CIELAB, float32 [h, w, 3], where distances are close to what people see."""
    lab: npt.NDArray[np.float32] = cv2.cvtColor(rgb.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    return lab


def _small(image: RGB) -> RGB:
    """Long edge of 128 at most."""
    scale = min(1.0, 128 / max(image.shape[:2]))
    size = [max(1, round(edge * scale)) for edge in image.shape[1::-1]]
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)


def _canvas(image: RGB) -> Canvas:
    lab = _lab(image)
    codes = _lab(np.array([list(code) for _, code in _CODES], np.uint8)[None])[0]
    distance = (codes**2).sum(-1) - 2 * lab @ codes.T  # squared, less what is the same for all
    canvas: Canvas = np.array([index for index, _ in _CODES])[distance.argmin(-1)]
    return canvas


def _colours(
    canvas: Canvas, what: str, box: Box = (0, 0, 1, 1), least: float = 0.12
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
    shares = np.bincount(region.ravel(), minlength=len(_COLOURS)) / region.size
    order = np.argsort(-shares, kind="stable")
    found = [Measured(what, _COLOURS[i], round(float(shares[i]), 3)) for i in order]
    return [measured for measured in found if measured.share >= least]


def _tone(image: RGB, canvas: Canvas) -> list[Measured]:
    """Dark or bright when most pixels are, black-and-white when hardly one has a hue."""
    names = _colours(canvas, "picture", least=0)
    dark = sum(m.share for m in names if m.value.startswith(("dark", "black")))
    bright = sum(m.share for m in names if m.value.startswith(("light", "white")))
    hue = float(np.mean(np.ptp(image, axis=2) > 16))
    tones = {"dark": dark > 0.8, "bright": bright > 0.8, "black-and-white": hue < 0.005}
    return [Measured("tone", name) for name, holds in tones.items() if holds]


# --- what is believed ----------------------------------------------------------------------------


@dataclass(slots=True)
class _Thing:
    """Things of one name, largest first, what grounds them; no box when only a tag names it."""

    name: str
    boxes: list[Box]
    evidence: list[Item]

    def noun(self) -> str:
        return _noun(self.name, max(1, len(self.boxes)))

    def verb(self) -> str:
        plural = self.noun().endswith("s") and not self.noun().startswith(("a ", "an "))
        return "are" if len(self.boxes) > 1 or plural else "is"

    def where(self) -> str:
        """After the noun, with its leading space or comma."""
        if len(self.boxes) != 1:
            places = Counter(_place(box) for box in sorted(self.boxes))
            counted = [f"{_NUMBERS.get(n, n)} {place}" for place, n in places.items()]
            if len(places) < 2:
                return "".join(f" {place}" for place in places)
            return f" ({_join(counted)})" if len(places) < 4 else " spread over the picture"
        x1, _, x2, y2 = self.boxes[0]
        if area(self.boxes[0]) > 0.7:
            return " filling most of the frame"
        if area(self.boxes[0]) > 0.12 and y2 > 0.93:
            side = _place((x1, 0, x2, 1))
            return " in the foreground" + (f" {side}" if "on the" in side else "")
        return f" {_place(self.boxes[0])}"


def _things(request: base.CaptionRequest, config: ComposerConfig, plain: bool) -> list[_Thing]:
    """Believed objects, largest first, then believed tags that name something else.

    Detector and tagger check each other. Agreement lowers the bar for an object. Where the tagger
    is sure of an animal without a box of its own, a person or other animal that fills the frame is
    that animal: small detectors take close-ups of animals for people. On a plain background
    (slides, drawings) the experts, which were trained on photos, must be surer.
    """
    weight: dict[str, float] = {}
    for tag in request.tags:
        weight[_kind(tag.label)] = weight.get(_kind(tag.label), 0.0) + tag.score
    animal = max(_ANIMALS, key=lambda kind: weight.get(kind, 0.0))
    sure = weight.get(animal, 0.0) >= 0.5
    sure &= not any(_kind(o.label) == animal and area(o.box) <= 0.5 for o in request.objects)

    def kind_of(found: DetectedObject) -> str:
        mistaken = _kind(found.label) in ("person", *_ANIMALS) and area(found.box) > 0.5
        return animal if sure and mistaken else _kind(found.label)

    kept: list[DetectedObject] = []
    for found in sorted(request.objects, key=lambda o: (-o.score, o.label, o.box)):
        odd = plain or not 0.01 < area(found.box) < 0.85
        agreed = weight.get(kind_of(found), 0.0) >= 0.2
        bar = config.agreed_threshold if agreed else config.object_threshold + 0.1 * odd
        if round(found.score, 4) >= bar and all(_overlap(found.box, k.box) < 0.6 for k in kept):
            kept.append(found)
    things: dict[str, _Thing] = {}
    for found in sorted(kept, key=lambda o: (-area(o.box), o.label, o.box)):
        kind, name = kind_of(found), clean(found.label, MAX_LABEL_CHARS)
        tags = sorted((t for t in request.tags if _kind(t.label) == kind), key=lambda t: -t.score)
        single = sum(kind_of(other) == kind for other in kept) == 1
        same = kind in _ANIMALS or any(name.split()[-1:] == t.label.split()[-1:] for t in tags[:1])
        if tags and (kind != _kind(name) or (single and same and tags[0].score >= 0.5)):
            name = _name(tags[0], config)
        thing = things.setdefault(name, _Thing(name, [], []))
        thing.boxes.append(found.box)
        thing.evidence += [found, *tags]
    seen = {_kind(name) for name in things} - {"cup"}  # an espresso is not the cup it is in
    for tag in sorted(request.tags, key=lambda t: (-t.score, t.label)):
        name = _name(tag, config)
        bar = config.tag_threshold + 0.3 * (plain or name in _PAPER)
        if name and round(tag.score, 4) >= bar and _kind(tag.label) not in seen:
            seen.add(_kind(tag.label))
            things.setdefault(name, _Thing(name, [], [tag]))
    return [thing for thing in things.values() if thing.name]


def _overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inner = max(0.0, width) * max(0.0, height)
    return inner / max(area(a) + area(b) - inner, 1e-9)


def _name(tag: Tag, config: ComposerConfig) -> str:
    """The tag's label; an animal's species only when sure: "egyptian cat", else "cat"."""
    label, kind = (
        _PROPER.sub(lambda m: m[0].title(), clean(tag.label, MAX_LABEL_CHARS)),
        _kind(tag.label),
    )
    if kind not in _ANIMALS or tag.score >= config.species_threshold:
        return label
    return label.split(" ")[-1] if kind == "animal" else kind


def _believed_lines(lines: Sequence[TextLine], config: ComposerConfig) -> list[TextLine]:
    """Confident lines, cleaned, in reading order. A lone letter or digit needs lines around it."""
    sure = [TextLine(clean(t.text, 500), t.score, t.quad) for t in lines
            if round(t.score, 4) >= config.text_threshold]  # fmt: skip
    signs = [sum(character.isalnum() for character in line.text) for line in sure]
    least = 1 if sum(count > 1 for count in signs) >= 3 else 2
    return reading_order([t for t, count in zip(sure, signs, strict=True) if count >= least])


_SPAM = re.compile(r"[<>{}@|\\\[\]]|https?:|www\.|\.(com|net|org|jpe?g|png)\b|&\w+;|!!", re.I)


def _name_from_alt_texts(
    things: list[_Thing], alt_texts: Sequence[str], lines: Sequence[TextLine]
) -> list[_Thing]:
    """Give a single thing the longer name that an alt text has for it ("cup": "cup of coffee").

    An object, a tag or a text in the picture must back every word of it, "of" apart. Spam, mark-up
    and long texts are passed over. A mere tag that is now part of a name goes.
    """
    backing: dict[str, list[Item]] = {}
    for thing in things:
        for word in thing.name.lower().split():
            backing.setdefault(word, []).extend(thing.evidence)
    for line in lines:
        for word in re.findall(r"\w{3,}", line.text.lower()):
            backing.setdefault(word, []).append(line)
    for alt in (alt for alt in alt_texts if len(alt) <= 200 and not _SPAM.search(alt)):
        words = re.findall(r"\w+|[^\w\s]", alt)
        lower = [word.lower() for word in words]
        for thing in (thing for thing in things if len(thing.boxes) < 2):
            own = thing.name.lower().split()
            start = next((i for i in range(len(words)) if lower[i : i + len(own)] == own), None)
            if start is None:
                continue
            end = start + len(own)
            while start and lower[start - 1] in backing.keys() - set(own):
                start -= 1
            if lower[end : end + 1] == ["of"] and set(lower[end + 1 : end + 2]) & backing.keys():
                end += 2
            if end - start > len(own):
                thing.name = " ".join(words[start:end])
                extra = [item for word in lower[start:end] for item in backing.get(word, [])]
                thing.evidence += [*extra, AltText(alt)]
    longer = {
        word.lower() for thing in things if " of " in thing.name for word in thing.name.split()
    }
    return [thing for thing in things if thing.boxes or thing.name not in longer]


def _paint(things: Sequence[_Thing], canvas: Canvas) -> None:
    """Name the colour of a large single thing of one body: that of the middle of its box."""
    for thing in things:
        paintable = len(thing.boxes) == 1 and _kind(thing.name) in _PAINTABLE
        if not paintable or area(thing.boxes[0]) < 0.04:
            continue
        x1, y1, x2, y2 = thing.boxes[0]
        dx, dy = (x2 - x1) / 4, (y2 - y1) / 4
        inner = (x1 + dx, y1 + dy, x2 - dx, y2 - dy)
        for colour in _colours(canvas, f"colour of the {thing.name}", inner, least=0.5):
            thing.name = f"{colour.value} {thing.name}"
            thing.evidence.append(colour)


# --- sentences -----------------------------------------------------------------------------------


def _opening(
    request: base.CaptionRequest,
    things: Sequence[_Thing],
    lines: Sequence[TextLine],
    canvas: Canvas,
    tone: Sequence[Measured],
) -> Statement:
    ratio = request.width / max(1, request.height)
    size = Measured("frame", f"{request.width} x {request.height}")
    shape = ("narrow, upright", "portrait-format", "square", "landscape-format", "wide")[
        (ratio > 0.45) + (ratio > 0.95) + (ratio > 1.05) + (ratio > 2.2)
    ]
    rim, rest = _ground(canvas)
    if lines and rim and not things:
        areas = f" and areas of {_join([m.value for m in rest])}" if rest else ""
        text = f"a {shape} layout with text on a plain {rim[0].value} background{areas}"
        return _sentence(text, [size, *lines, *rim, *rest])
    light = "".join(f"{t.value}, " for t in tone if t.value in ("dark", "bright"))
    hueless = "black-and-white " if any(t.value == "black-and-white" for t in tone) else ""
    what, evidence = f"{light}{shape} {hueless}picture", [size, *tone]
    if things:
        return _sentence(_subject(things[0], f"this {what}"), [*evidence, *things[0].evidence])
    if lines:
        return _sentence(f"a {what} with text in it", [*evidence, *lines])
    colours = _bands(canvas)
    if colours:
        top, low = colours
        text = f", mostly {top.value} in the upper part and {low.value} in the lower part"
    else:
        colours = _colours(canvas, "picture")[:3]
        text = f" in {_join([m.value for m in colours])}" if colours else ""
        if colours and colours[0].share > 0.85:
            text, colours = f", almost all {colours[0].value}", colours[:1]
    return _sentence(f"a {what}{text}", [*evidence, *colours])


def _subject(thing: _Thing, picture: str) -> str:
    """The first thing and its place, content first: "a cat is on the left of this picture"."""
    where, verb = thing.where(), thing.verb()
    if where == " filling most of the frame":
        return f"{thing.noun()} {'fill' if verb == 'are' else 'fills'} most of {picture}"
    if where == " spread over the picture":
        return f"{thing.noun()} are spread over {picture}"
    if where.startswith(" ("):
        return f"{thing.noun()}, {where.strip(' ()')}, are in {picture}"
    return f"{thing.noun()} {verb}{where} {'of' if where else 'in'} {picture}"


def _bands(canvas: Canvas) -> list[Measured]:
    """The colours of the upper and the lower third, when each has one and they differ."""
    top = _colours(canvas, "upper third", (0, 0, 1, 0.33), 0.6)
    low = _colours(canvas, "lower third", (0, 0.67, 1, 1), 0.6)
    return [*top, *low] if top and low and top[0].value != low[0].value else []


def _ground(canvas: Canvas) -> tuple[list[Measured], list[Measured]]:
    """The plain background, if there is one, and the other colours then."""
    rim = _colours(canvas, "background", least=0.9)
    rest = _colours(canvas, "picture", least=0.04)[:3] if rim else []
    return rim, [m for m in rest if m.value != rim[0].value]


def _others(things: Sequence[_Thing]) -> list[Statement]:
    """The things beside the first: where they are, in relation to it where that is clear."""
    sentences = []
    placed = [thing for thing in things[1:] if thing.boxes]
    for start in range(0, len(placed), 4):
        part = placed[start : start + 4]
        evidence = [item for thing in part for item in thing.evidence]
        verb = "are" if len(part) > 1 else part[0].verb()
        side = _side(part[0], things[0]) if len(part) == 1 else ""
        if side:
            evidence += things[0].evidence
            text = f"{side} {verb} {part[0].noun()}"
        else:
            lead = f"also in view {verb}" if len(part) > 1 and not start else f"there {verb}"
            text = f"{lead} {_join([thing.noun() + thing.where() for thing in part])}"
        sentences.append(_sentence(text, evidence))
    extra = [thing for thing in things[1:] if not thing.boxes]
    if extra:
        text = f"the scene also includes {_join([thing.noun() for thing in extra])}"
        sentences.append(_sentence(text, [item for thing in extra for item in thing.evidence]))
    return sentences


def _side(thing: _Thing, main: _Thing) -> str:
    """ "to the left of the cat" for a thing wholly beyond a single main one, else nothing."""
    if len(main.boxes) != 1 or len(thing.boxes) != 1:
        return ""
    box, other = thing.boxes[0], main.boxes[0]
    gaps = {"to the left of": other[0] - box[2], "to the right of": box[0] - other[2],
            "above": other[1] - box[3], "below": box[1] - other[3]}  # fmt: skip
    side = max(gaps, key=lambda name: gaps[name])
    return f"{side} the {main.name}" if gaps[side] > -0.03 else ""


def _palette(
    things: Sequence[_Thing], lines: Sequence[TextLine], canvas: Canvas
) -> list[Statement]:
    """The colours of the whole, unless the opening has named them."""
    (rim, rest), whole, bands = _ground(canvas), _colours(canvas, "picture")[:3], _bands(canvas)
    names = [m.value for m in whole]
    if not (things or lines) or (rim and not things) or not whole:
        return []
    if rim and things[0].where() != " filling most of the frame":
        also = f", with {_join([m.value for m in rest])} elsewhere" if rest else ""
        return [_sentence(f"the background is plain {rim[0].value}{also}", [*rim, *rest])]
    if bands:
        text = (
            f"the upper part is mostly {bands[0].value} and the lower part mostly {bands[1].value}"
        )
        return [_sentence(text, bands)]
    if whole[0].share > 0.5 or not names[1:]:
        also = f", followed by {_join(names[1:])}" if names[1:] else ""
        return [_sentence(f"the main colour is {names[0]}{also}", whole)]
    return [_sentence(f"{_join(names)} are the main colours", whole)]


def _texts(lines: Sequence[TextLine]) -> list[Statement]:
    """Every line, quoted in reading order; neighbours of one look and place share a sentence."""
    groups: list[list[list[TextLine]]] = []  # groups of paragraphs of lines
    for line in lines:
        if groups and _continues(groups[-1][-1][-1], line, 0.45):
            groups[-1][-1].append(line)
        elif groups and _continues(groups[-1][-1][-1], line, 4.0):
            groups[-1].append([line])
        else:
            groups.append([[line]])
    sentences = []
    common = float(np.median([_height(line) for line in lines])) if lines else 0.0
    for number, (place, run) in enumerate(
        groupby(groups, key=lambda g: _place(_union(list(chain(*g)))))
    ):
        paragraphs = list(chain(*run))
        quotes = [_quote(" ".join(line.text for line in part)) for part in paragraphs]
        heights = [_height(part[0]) for part in paragraphs]
        title = len(quotes) > 1 and heights[0] > 1.25 * max(heights[1:])
        height = heights[0] if title else min(heights)
        size = "large " if height > 0.1 or height > max(0.05, 1.2 * common) else ""
        if title:
            text = f"{place}, {size}text reads {quotes[0]}, followed by {_join(quotes[1:])}"
        elif len(quotes) > 1 and len(quotes) == sum(map(len, paragraphs)):
            text = f"{place} are the {size}lines {_join(quotes)}"
        elif len(quotes) == 1 and number % 2:
            text = f"the {size}text {quotes[0]} is {place}"
        else:
            text = f"{place}, {size}text reads {_join(quotes)}"
        sentences.append(_sentence(text, chain(*paragraphs)))
    return sentences


def _continues(last: TextLine, line: TextLine, gap: float) -> bool:
    """Whether a line of the same height follows within `gap` heights below, in the same column."""
    (x1, _, x2, y2), (u1, v1, u2, v2), height = last.box, line.box, max(_height(last), 1e-6)
    aligned = abs(u1 - x1) < 0.03 or abs(u1 + u2 - x1 - x2) < 0.06
    return aligned and 0.75 < (v2 - v1) / height < 1.33 and -0.3 < (v1 - y2) / height < gap


def _height(line: TextLine) -> float:
    return line.box[3] - line.box[1]


def _union(lines: Sequence[TextLine]) -> Box:
    x1, y1, x2, y2 = zip(*(line.box for line in lines), strict=True)
    return min(x1), min(y1), max(x2), max(y2)


def _quote(text: str) -> str:
    return f'"{text}"' if '"' not in text else f"“{text}”"
