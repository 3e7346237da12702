"""Composer: a caption engine without a model. It writes down the evidence, and nothing else.

Every sentence is a `Statement` that holds the evidence it was made from, so a caption can't say
what nobody saw: counts and places come from boxes, colours from pixels, texts from recognised
lines, names from tags and boxes. It is the offline baseline for engines that look for themselves.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import ClassVar

import cv2
import numpy as np
from pydantic import Field

from fusion_pipeline.config_model import ConfigModel
from fusion_pipeline.dataset.blocks import reading_order
from fusion_pipeline.dataset.colours import Names, name_colours, shares_of, small_lab
from fusion_pipeline.dataset.evidence import Box, DetectedObject, Tag, TextLine, area
from fusion_pipeline.dataset.images import DecodeError, decode, layout_of
from fusion_pipeline.fuse import base
from fusion_pipeline.prompts.untrusted import MAX_LABEL_CHARS, clean


class ComposerConfig(ConfigModel):
    """Scores, 0..1, from which evidence is believed: higher than for hints, as nobody checks."""

    tag_threshold: float = Field(default=0.6, ge=0, le=1)
    """For a tag."""
    species_threshold: float = Field(default=0.8, ge=0, le=1)
    """For a tag's finer name ("golden retriever") in place of an object's ("dog")."""
    object_threshold: float = Field(default=0.7, ge=0, le=1)
    """For an object."""
    agreed_threshold: float = Field(default=0.35, ge=0, le=1)
    """For what a second source (tags of its kind, an alt text) names too."""
    text_threshold: float = Field(default=0.8, ge=0, le=1)
    """For a line of text."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Read from pixels or size: `what` was measured, its value, the value's share of the region."""

    what: str
    value: str
    share: float = 1.0


Item = Tag | DetectedObject | TextLine | Measured | str  # a string is an alt text


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

    version: ClassVar[int] = 3

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
        colours = name_colours(small_lab(decode(request.image, min_short_edge=64)))
        things = _things(request, self._config)
        cleaned = [replace(t, text=clean(t.text, 500)) for t in request.text if not t.unread]
        sure = [t for t in cleaned if round(t.score, 4) >= self._config.text_threshold]
        fewest = 2 if len(sure) < 3 else 1  # a lone letter is mostly a shape that looks like one
        lines = reading_order([t for t in sure if sum(map(str.isalnum, t.text)) >= fewest])
        return [*_say_things(things), _say_look(request, colours, things), *_say_text(lines)]


def _table(text: str) -> dict[str, str]:
    """ "name: word word; name: word" as {word: name}."""
    rows = (row.split(":") for row in text.split(";"))
    return {word: name.strip() for name, words in rows for word in words.split()}


# Last words of labels, by what a detector calls the thing: a golden retriever is a dog.
_KIND_OF = _table("""cat: kitten tabby; dog: puppy terrier hound foxhound coonhound retriever
    spaniel setter shepherd sheepdog collie poodle schnauzer corgi husky malamute bulldog mastiff
    pug beagle chihuahua; bird: hen finch goldfinch robin jay magpie eagle owl vulture macaw goose
    swan stork flamingo heron egret pelican penguin; horse: sorrel; sheep: ram; tv: television;
    car: cab convertible limousine jeep; cup: mug espresso; boat: canoe yawl; airplane: airliner""")
_ANIMALS = _table("""animal: cat dog bird horse sheep cow bear elephant zebra giraffe lion tiger
    leopard monkey gorilla chimpanzee""").keys()
# What a tagger trained on photos calls pages, slides and signs.
_PAPER = ("web site", "envelope", "book jacket", "menu", "packet", "comic book", "scoreboard")
_PLURAL_OF = {"person": "people", "man": "men", "woman": "women", "child": "children",
              "mouse": "mice", "knife": "knives", "sheep": "sheep"}  # fmt: skip
_NUMBERS = _table("one:1; two:2; three:3; four:4; five:5; six:6; seven:7; eight:8; nine:9")
Support = dict[str, list[Tag | str]]
"""What names each kind of thing besides boxes: tags, best first, then alt texts."""


def _kind(label: str) -> str:
    """What two names must share to agree: "golden retriever" is a dog, "sports ball" a ball."""
    last = label.split(" ")[-1]
    return label if label in ("hot dog", "teddy bear", "sea lion") else _KIND_OF.get(last, last)


def _join(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _sentence(text: str, evidence: Iterable[Item]) -> Statement:
    end = "" if text.endswith((".", '."', ".”")) else "."
    return Statement(text[0].upper() + text[1:] + end, tuple(dict.fromkeys(evidence)))


def _place(box: Box) -> str:
    """ "in the upper left", "at the bottom"; a side is named when the box keeps to it."""
    if area(box) > 0.7:
        return "filling most of the frame"
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    across = "" if box[2] - box[0] > 0.6 else ("left", "", "right")[(x > 0.38) + (x > 0.62)]
    down = "" if box[3] - box[1] > 0.6 else ("upper", "", "lower")[(y > 0.38) + (y > 0.62)]
    if across:
        return f"in the {down} {across}" if down else f"on the {across}"
    return {"upper": "at the top", "lower": "at the bottom", "": "in the middle"}[down]


@dataclass(slots=True)
class _Thing:
    """Things of one name and what grounds them; without a box when only a tag names it."""

    name: str
    boxes: list[Box] = field(default_factory=list)
    evidence: list[Item] = field(default_factory=list)

    def phrase(self) -> str:
        """ "an umbrella on the left", "three people (one at the top and two on the right)"."""
        count, (start, space, last) = len(self.boxes), self.name.rpartition(" ")
        article = "an " if re.match(r"(?i)(?!uni|use|eu|one)[aeiou]", self.name) else "a "
        is_plural = re.search(r"([^sui]s|skis)$", last)
        noun = self.name if is_plural else article + self.name
        if count > 1:
            ending = "" if is_plural else "es" if re.search("(s|x|ch|sh)$", last) else "s"
            last = _PLURAL_OF.get(last, last + ending)
            noun = f"{_NUMBERS.get(str(count), count)} {start}{space}{last}"
        places = Counter(_place(box) for box in sorted(self.boxes))
        counted = [f"{_NUMBERS.get(str(n), n)} {place}" for place, n in places.items()]
        return f"{noun} ({_join(counted)})" if len(places) > 1 else " ".join([noun, *places])


def _support(request: base.CaptionRequest) -> Support:
    found: Support = defaultdict(list)
    for tag in sorted(request.tags, key=lambda t: (-t.score, t.label)):
        found[_kind(tag.label)].append(tag)
    for alt in request.alt_texts:
        for word in re.findall("[a-z]+", alt[:500].lower()):
            for kind in {_kind(word), _kind(word.removesuffix("s"))}:
                found[kind].append(alt)
    return found


def _objects(
    request: base.CaptionRequest, support: Support, config: ComposerConfig
) -> list[tuple[DetectedObject, str]]:
    """Believed objects with their kinds, largest first; of boxes over one thing the surest counts.

    Agreement lowers the bar. Small detectors take close-ups of animals for people: where the tagger
    is sure of an animal without a smaller box of its own, a person who fills the frame is that.
    """
    smaller = {_kind(found.label) for found in request.objects if area(found.box) <= 0.5}
    tagged = {k: sum(t.score for t in support[k] if isinstance(t, Tag)) for k in _ANIMALS - smaller}
    close_up = [kind for kind in sorted(tagged) if tagged[kind] >= config.tag_threshold]
    believed = []
    for found in sorted(request.objects, key=lambda o: (-o.score, o.label, o.box)):
        kind = _kind(found.label)
        if close_up and area(found.box) > 0.5 and kind in {"person", *_ANIMALS}:
            kind = close_up[0]
        agreed = sum(item.score if isinstance(item, Tag) else 1 for item in support[kind]) >= 0.2
        least = config.agreed_threshold if agreed else config.object_threshold
        if round(found.score, 4) >= least:
            believed.append((found, kind))
    corners = [(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in (o.box for o, _ in believed)]
    kept = cv2.dnn.NMSBoxes(corners, [found.score for found, _ in believed], 0, 0.6)
    return sorted((believed[i] for i in kept), key=lambda b: (-area(b[0].box), b[0].box, b[1]))


def _things(request: base.CaptionRequest, config: ComposerConfig) -> list[_Thing]:
    """Believed objects by name, largest first, then believed tags that name something else.

    A sure tag gives a single object its finer name: "golden retriever" for "dog".
    """
    support, things = _support(request), dict[str, _Thing]()
    objects = _objects(request, support, config)
    count = Counter(kind for _, kind in objects)
    for found, kind in objects:
        finer = _tagged(support[kind], config.species_threshold) if count[kind] == 1 else ""
        name = finer or (found.label if kind == _kind(found.label) else kind)
        thing = things.setdefault(name, _Thing(clean(name, MAX_LABEL_CHARS)))
        thing.boxes.append(found.box)
        thing.evidence += [found, *support[kind]]
    for kind, items in support.items():
        least = config.agreed_threshold if str in map(type, items) else config.tag_threshold
        name = _tagged(items, config.species_threshold) or (_tagged(items, least) and kind)
        if name and kind not in count:
            things[name] = _Thing(clean(name, MAX_LABEL_CHARS), [], [*items])
    return [thing for thing in things.values() if thing.name]


def _tagged(support: Sequence[Item], least: float) -> str:
    """The label of the best tag when it has at least that score, else nothing."""
    tags = [item for item in support if isinstance(item, Tag) and item.label not in _PAPER]
    return tags[0].label if tags and round(tags[0].score, 4) >= least else ""


def _shares(region: Names, what: str, least: float) -> list[Measured]:
    return [Measured(what, name, share) for name, share in shares_of(region, least)]


def _say_things(things: Sequence[_Thing]) -> list[Statement]:
    """The largest thing, then the others, up to four a sentence."""
    sentences: list[Statement] = []
    for part in filter(None, [things[:1], *(things[i : i + 4] for i in range(1, len(things), 4))]):
        lead = "also in view" if sentences else "there"
        names = [thing.phrase() for thing in part]
        be = "is" if not part[1:] and names[0].startswith(("a ", "an ")) else "are"
        evidence = [item for thing in part for item in thing.evidence]
        sentences.append(_sentence(f"{lead} {be} {_join(names)}", evidence))
    return sentences


def _say_look(request: base.CaptionRequest, colours: Names, things: list[_Thing]) -> Statement:
    """Format and colours: one background, else two bands, else the main colours."""
    layout = layout_of(request.width, request.height)
    shape = "square" if layout == "square" else f"{layout}-format"
    picture, size = f"this {shape} picture", Measured("size", f"{request.width} x {request.height}")
    rim = np.concatenate([colours[[0, -1]].ravel(), colours[:, [0, -1]].ravel()])
    ground, whole = _shares(rim, "rim", 0.9), _shares(colours, "picture", 0.04)[:4]
    top = _shares(colours[:21], "upper third", 0.6)
    low = _shares(colours[-21:], "lower third", 0.6)
    filled = any(area(box) > 0.7 for thing in things for box in thing.boxes)
    rest = [colour.value for colour in whole if ground and colour.value != ground[0].value]
    if rest and not filled:
        text = f"the background of {picture} is {ground[0].value}, with {_join(rest)} elsewhere"
        return _sentence(text, [size, *ground, *whole])
    if top and low and top[0].value != low[0].value:
        text = f"the upper part of {picture} is mostly {top[0].value}"
        return _sentence(f"{text} and the lower part mostly {low[0].value}", [size, *top, *low])
    main = [colour for colour in whole if colour.share >= 0.12][:3] or whole[:1]
    be = "are the main colours" if len(main) > 1 else "is the main colour"
    return _sentence(f"{_join([m.value for m in main])} {be} of {picture}", [size, *main])


def _say_text(lines: Sequence[TextLine]) -> list[Statement]:
    """Every line, quoted; neighbours in reading order that share a place share a sentence."""
    sentences = []
    for place, group in groupby(lines, key=lambda line: _place(line.box)):
        part = list(group)
        quotes = [f"“{t.text}”" if '"' in t.text else f'"{t.text}"' for t in part]
        sentences.append(_sentence(f"{place}, text reads {_join(quotes)}", part))
    return sentences
