"""Rules that a finished caption must keep, checked by its words alone (docs/policies.md).

Captioners break the rules they are given ("suggesting …", "The image shows"), so captions are
checked afterwards, and one that breaks rules can be asked for again with `complaint`. What stands
in quotation marks is text of the image and is blamed for no style. Style rules know English only.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from itertools import groupby, islice
from operator import itemgetter

from fusion_pipeline.prompts.hints import Hints
from fusion_pipeline.prompts.render import TEMPLATES
from fusion_pipeline.prompts.untrusted import clean

MAX_QUOTE = 80
"""Longest quote of a violation, in characters."""


VERSION = 1
"""Raised by hand when the same caption gets another verdict."""


class Rule(StrEnum):
    EMPTY = "empty"
    OPENING = "opening"
    HEDGING = "hedging"
    MOOD = "mood"
    INTERPRETATION = "interpretation"
    COORDINATES = "coordinates"
    SOURCES = "sources"
    REFUSAL = "refusal"
    MARKUP = "markup"
    ECHO = "echo"
    URL = "url"
    REPETITION = "repetition"
    LENGTH = "length"


RULES: Mapping[Rule, str] = {
    Rule.EMPTY: "There is no description.",
    Rule.OPENING: "It opens by talking about the picture instead of starting with its content.",
    Rule.HEDGING: "It hedges or guesses: state it as a fact, or leave it out.",
    Rule.MOOD: "It speaks of mood, of atmosphere or of an effect on the viewer.",
    Rule.INTERPRETATION: "It interprets or gives reasons instead of saying what can be seen.",
    Rule.COORDINATES: "It mentions boxes or coordinates.",
    Rule.SOURCES: "It mentions where information came from.",
    Rule.REFUSAL: "It refuses or apologises instead of describing.",
    Rule.MARKUP: "It is not one plain-text paragraph: no headings, lists, markup or line breaks.",
    Rule.ECHO: "It repeats words of the instructions.",
    Rule.URL: "It names a web or mail address that is not known to be in the picture.",
    Rule.REPETITION: "It says the same thing again.",
    Rule.LENGTH: "It is too long; the first words over the limit are quoted.",
}


@dataclass(frozen=True, slots=True)
class Violation:
    """`quote` is `caption[start:end]`, cut at MAX_QUOTE characters. It is untrusted text."""

    rule: Rule
    quote: str
    start: int
    end: int


# --- patterns ------------------------------------------------------------------------------------
# All but markup run over `plain_text`: lower case, straight apostrophes, no white space but " ".
# Look-behinds stand after the letters they are about: in front they would be tried everywhere.


def _words(alternatives: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{alternatives})\b")


# Up to five words like "black and white" or "high-angle" before "photo". "A man holding a photo"
# is no such phrase, hence the words that may not be among them.
_LOOK = (
    r"(?:black and white |(?!(?:an?|the|of|in|on|at|with|and|for|to|by|from|is|are)\b)[\w'-]+,? )"
    r"{0,5}"
)
_IMAGE = r"(?:image|photo(?:graph)?|picture|snapshot)"
_SHOT = rf"(?:{_IMAGE}|shot|close-?up|view|scene|composition|perspective)"
_KIND = (
    rf"(?:{_SHOT}|screenshot|painting|illustration|drawing|poster|map|diagram|chart|graphic"
    r"|infographic|collage|artwork|slide|sketch|cartoon)"
)
_SHOWS = (
    r"(?:\w+ly |also )?(?:shows?|depicts?|displays?|features?|captures?|presents?|portrays?"
    r"|illustrates?|contains?|showcases?|highlights?|focuses|consists|includes?|reveals?|provides?"
    r"|offers?|was taken|is (?:an?|the|of|taken|composed|divided|filled|dominated|split)\b)"
)
_OPENING = re.compile(
    r"[\s*_#>\"“'-]*("
    rf"(?:the|an?) {_LOOK}{_SHOT} {_SHOWS}|this {_LOOK}{_KIND} {_SHOWS}"
    rf"|the {_LOOK}(?:landmark|subject|focus|point|logo) (?:in|of) (?:the|this) {_IMAGE} is\b"
    r"|(?:this|here) is (?:an?|the)\b|these are\b|here(?:'s| we| are)\b"
    # A photograph may also be a thing in the picture: it then hangs or lies somewhere.
    rf"|an? {_LOOK}{_IMAGE} (?:of|that|which|in which|with|taken|\w+ing)\b"
    r"(?![^.]*?\b(?:hangs|lies|leans|sits|stands|rests|is (?:pinned|taped|propped|mounted))\b)"
    rf"|(?:in|within) (?:the {_LOOK}{_IMAGE}|this {_LOOK}{_KIND})\b(?! (?:frame|window|book))"
    r"|(?:we|you|one)(?: can| could)? (?:see|observe|notice)\b|captured (?:at|from|in)\b"
    rf"|(?:depicted|pictured|shown|displayed|seen) (?:here|in (?:the|this) {_KIND})\b"
    r"|(?:sure|certainly|of course)[,!]|(?:the )?(?:image )?(?:caption|description|answer):)"
)
_UNIT = r"(?:0?\.\d+|1\.0+|[01])"
_ANYWHERE: tuple[tuple[Rule, re.Pattern[str]], ...] = (
    (Rule.HEDGING, _words(
        r"probably|possibly|perhaps|maybe|presumably|apparently|supposedly|likely|potentially"
        r"|seems?|seemingly(?! (?:endless|infinite))|appear(?:s|ing)? (?:to|as|like|that)"
        r"|might(?<!the might)|may (?:be|have|not|also|indicate|suggest|contain|include)"
        r"|could (?:be|have|also|indicate|suggest|represent)|as (?:if|though)|suggest(?:s|ing)"
        r"|suggestive of|hint(?:s|ing) at|looks? (?:like|as if|as though)"
    )),
    (Rule.MOOD, _words(  # a planet's atmosphere is a thing, and so are mood boards
        r"atmosphere(?<!earth's atmosphere)(?<!planet's atmosphere)(?<!upper atmosphere)"
        r"|mood(?! (?:board|ring|light|lamp))|ambian?ce|ambience|vibes?|evok(?:es?|ing)"
        r"|exud(?:es?|ing)|sense of(?! (?:smell|touch|taste|hearing|sight))|an air of"
        r"|(?:a feeling|feelings|a touch) of|add(?:s|ing)? (?:depth|warmth|character|charm|drama)"
        r"|(?:creat|lend|add|giv|hav)(?:e|es|s|ing)(?: [\w,'-]+){1,6} (?:feel|feeling|charm)"
        r"|(?:contribut(?:es|ing) to|enhanc(?:es|ing)) (?:the|its|their)"
        r"|(?:serene|tranquil|peaceful|co[sz]y|eerie|inviting|welcoming|festive|whimsical|dreamy"
        r"|dramatic|romantic|joyful|lively|calm),?(?: and)?(?: [\w-]+)?"
        r" (?:scene|setting|environment|moment)"
        r"|draw(?:s|ing)? (?:the |a |one's )?(?:viewer'?s? )?(?:eyes?|attention|gaze|viewer)"
        r"|(?:invit|leav|mak|giv|allow|transport|encourag|remind|immers|engag|captivat)"
        r"(?:e|es|s|ing)? (?:the |a )?(?:viewers?|observers?|onlookers?|audience)"
        r"|viewer's (?:eye|attention|gaze|imagination|focus)|breathtaking|mesmeri[sz]ing"
        r"|captivating|stunning|awe-inspiring|eye-catching"
        r"|visual(?:ly)? (?:striking|appeal|appealing|pleasing)"
    )),
    (Rule.INTERPRETATION, _words(
        r"symboli[sz](?:es?|ing)|symbolic of|a metaphor|a testament to|signif(?:ies|ying)"
        r"|impl(?:y|ies|ying)|convey(?:s|ing)?|indicat(?:e|es|ing) that|indicative of"
        r"|indicating(?<=, indicating)|emphasi[sz]ing|underscoring|reinforcing the"
        r"|represent(?:s|ing)? (?:the )?(?:passage|struggle|unity|power|hope|freedom|strength)"
        r"|captur(?:es?|ing) the (?:essence|spirit|beauty|charm)|tell(?:s|ing)? (?:a|the) story"
        r"|(?:lost|deep) in thought|(?:is|are) (?:meant|intended) to|which (?:means|explains)"
        r"|judging (?:by|from)|evidenced by|as (?:indicated|suggested|shown) by|inferred"
        r"|based on (?:the |its |his |her )?(?:visible|context|appearance|clothing|evidence)"
    )),
    (Rule.COORDINATES, re.compile(  # shares in brackets, a box in pixels, shares alone
        rf"[\[(]\s*(?=[^\])]{{0,40}}\.\d){_UNIT}(?:\s*,\s*{_UNIT}){{1,3}}\s*[\])]"
        r"|\[\s*\d{1,4}(?:\s*,\s*\d{1,4}){3}\s*\]|0\.\d{2,}(?:,\s*0\.\d{2,}){2,}"
    )),
    (Rule.COORDINATES, _words(
        r"(?:bounding|bounded|detection|object) box(?:es)?|shares? of the (?:frame|width|height)"
        r"|(?:box|object|pixel|normali[sz]ed|bounding) coordinates"
    )),
    (Rule.SOURCES, _words(
        r"external[ _]information|world knowledge|alt[- ]texts?|ocr|recogni[sz]ed text"
        r"|the (?:external|provided|given|supplied|accompanying|additional) (?:information|data"
        r"|tags|knowledge|sources?|texts?|hints|context|evidence|metadata|descriptions?|captions?)"
        r"|according to the (?:detect\w+|tags?|hints?|evidence|metadata|information|caption|prompt)"
        r"|(?:as|is|are|was|were) (?:\w+ly )?(?:mentioned|stated|noted|described|listed|given)"
        r" (?:in|by) the (?:hints?|prompt|tags?|evidence|information|captions?|context|metadata)"
        r"|the (?:tags?|hints?|prompt|metadata|detections?|text lines)(?: also)? (?:mention|state"
        r"|list|suggest|indicate|confirm|include|identify|describe)s?|object detect(?:or|ion)s?"
        r"|detected (?:objects?|texts?|boxes|labels?|tags)|detection results?"
    )),
    (Rule.REFUSAL, _words(
        r"i(?:'m| am) (?:very |so |truly )?(?:sorry|unable|not able|afraid)|i apologi[sz]e"
        r"|i (?:cannot|can't|can not)|as an? (?:large )?(?:ai|language model|assistant)"
        r"|unable to (?:view|see|process|access|describe|identify) (?:the|this|any|an|people)"
        r"|no (?:image|picture|photo) (?:was |has been |is )?(?:provided|attached|uploaded|given)"
        r"|please (?:provide|upload|attach|share) (?:the|an|a|your) (?:image|picture|photo)"
    )),
)  # fmt: skip
_NOT_IN_NAMES = (Rule.HEDGING, Rule.MOOD, Rule.INTERPRETATION)

_MARKUP = re.compile(
    r"\A(?:#{1,6} |[-*+•] |\|)[^\n]*"  # headings, lists, tables
    r"|\n\s*[^\n]*"  # whatever stands on a line of its own
    r"|\*\*[^*\n]+\*\*|__[^_\n]+__|```|\]\(https?:[^)\s]*\)"
    r"|<[/|]?[a-z][\w |-]{0,40}[/|]?>|◁/?\w+▷",  # HTML, and tokens of chat templates
    re.IGNORECASE,
)
_URL = re.compile(
    r"\b(?:https?://|www\.)[^\s\"“”«»「」<>]+"
    r"|\b[a-z0-9][\w.+-]{0,63}@[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63}){1,4}"
    r"|\b(?:[a-z0-9-]{1,63}\.){1,4}(?:com|net|org|edu|gov|info|biz|io|co|uk|de|fr|nl|ru|cn|jp|eu"
    r"|au|ca|tv|app|dev|shop|store)\b(?:/[^\s\"“”«»「」<>]*)?"
)
CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{CJK}]{{1,2}}|\w[^\s—\ufffc{CJK}]*")
SENTENCE_END = re.compile(
    r"[.!?](?<!\b[a-z]\.)(?<!\b(?:dr|mr|ms|st|no|vs|mt)\.)(?<!\bmrs\.)[\"'”»)]*(?=\s|$)|[。！？]"
)
_MASK = "\ufffc"  # neither a letter nor white space: no pattern reads over a quotation
QUOTED = re.compile(  # one that is not closed was cut off, and goes on to the end
    r"“[^”]*(?:”|\Z)|„[^“”]*(?:[“”]|\Z)|«[^»]*(?:»|\Z)|「[^」]*(?:」|\Z)|『[^』]*(?:』|\Z)"
    # 10" is inches; a " between space and letter opens a quotation inside the quotation.
    r'|"(?<!\w")(?:[^"]|"(?<=\s")(?=\w))*(?:"|\Z)'
    # An apostrophe stands inside a word or ends it; '90s has one, too.
    r"|['‘](?<![\w'’].)(?!\d0s)(?=\S)[^\n]{1,300}?(?<=\S)['’](?!\w)"
)


# --- the check -----------------------------------------------------------------------------------

Span = tuple[Rule, int, int]


def check(caption: str, hints: Hints | None = None, max_words: int = 192) -> list[Violation]:
    """Broken rules in the order of their places; empty for a caption that keeps them all.

    White space and long dashes part words; of Han and kana two characters are one word. Without
    hints nobody knows which addresses the picture holds, and `Rule.URL` is not checked.
    """
    if not re.search(r"\w", caption):
        return [_violation(caption, (Rule.EMPTY, 0, len(caption)))]
    ordered = sorted(_spans(caption, hints, max_words), key=itemgetter(1, 2, 0))
    return [_violation(caption, span) for span in ordered]


def complaint(violations: Iterable[Violation], most: int = 6) -> str:
    """What to say when the caption is asked for again: a line a rule, `most` of them at most.

    Up to three quotes a rule, cleaned and as JSON strings. Without violations it is empty.
    """
    quotes: dict[Rule, dict[str, None]] = {}
    for violation in violations:
        quotes.setdefault(violation.rule, {})[clean(violation.quote, MAX_QUOTE)] = None
    lines = ["Your description breaks these rules; write it again without that:"]
    for rule, found in list(quotes.items())[:most]:
        examples = [json.dumps(text, ensure_ascii=False) for text in found if text][:3]
        lines.append(" ".join(filter(None, [f"- {RULES[rule]}", ", ".join(examples)])))
    return "\n".join(lines) if quotes else ""


def _violation(caption: str, span: Span) -> Violation:
    rule, start, end = span
    quote = caption[start:end]
    short = quote if len(quote) <= MAX_QUOTE else quote[: MAX_QUOTE - 1] + "…"
    return Violation(rule, short, start, end)


def _spans(caption: str, hints: Hints | None, max_words: int) -> Iterator[Span]:
    unquoted = masked(caption)
    style, plain = plain_text(unquoted), plain_text(caption)
    if opening := _OPENING.match(style):
        yield Rule.OPENING, *opening.span(1)
    for rule, pattern in _ANYWHERE:
        for found in pattern.finditer(style):
            if rule not in _NOT_IN_NAMES or not _is_name(caption, found.start()):
                yield rule, *found.span()
    yield from _marked_up(unquoted)
    yield from _echoes(style)
    yield from _addresses(plain, hints)
    words = bare_words(plain)
    yield from _repeated(plain, words)
    if len(words) > max_words:
        yield Rule.LENGTH, _place(plain, max_words).start(), len(plain.rstrip())


def masked(caption: str) -> str:
    """Same length, quotations blotted out. A caption that is one quotation as a whole is not."""
    first = QUOTED.match(caption.strip())
    if first and first.end() == len(caption.strip()):
        return caption
    return QUOTED.sub(lambda found: _MASK * len(found.group()), caption)


_PLAIN = str.maketrans("’‘\n\r\t\v\f\u00a0\u2011", "''      -")


def plain_text(text: str) -> str:
    """Same length, lower case, one kind of space and of apostrophe."""
    lower = text.lower()
    if len(lower) != len(text):  # a few letters (İ) have lower cases of two characters
        lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in text)
    return lower.translate(_PLAIN)


_SENTENCE_START = re.compile(r"(?:^|[.!?:…\n-][\"'”’»)*]*)\s*\Z")


def _is_name(caption: str, start: int) -> bool:
    """A capital inside a sentence: May 2019, a band called Perhaps."""
    before = caption[max(0, start - 20) : start]
    return caption[start].isupper() and not _SENTENCE_START.search(before)


def _marked_up(unquoted: str) -> Iterator[Span]:
    indent = len(unquoted) - len(unquoted.lstrip())
    for found in _MARKUP.finditer(unquoted.strip()):
        blank = len(found.group()) - len(found.group().lstrip())
        yield Rule.MARKUP, indent + found.start() + blank, indent + found.end()


def bare_words(text: str) -> list[str]:
    return [word.rstrip(",.;:!?)]\"'*_") for word in _WORD.findall(text)]


def _place(text: str, index: int) -> re.Match[str]:
    return next(islice(_WORD.finditer(text), index, None))


ECHO_WORDS = 8
"""So many words in a row that also stand in a prompt template are an echo."""


@cache
def _instructions() -> frozenset[tuple[str, ...]]:
    runs: set[tuple[str, ...]] = set()
    for path in TEMPLATES.glob("*.jinja"):
        text = re.sub(r"\{%.*?%\}|\{\{.*?\}\}", " ", path.read_text(encoding="utf-8"))
        runs.update(_runs(bare_words(plain_text(masked(text)))))
    return frozenset(runs)


def _runs(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(ECHO_WORDS)), strict=False)


def _echoes(style: str) -> Iterator[Span]:
    known = _instructions()
    hits = [index for index, run in enumerate(_runs(bare_words(style))) if run in known]
    # Runs that follow one another, index by index, are one longer echo.
    for _, group in groupby(enumerate(hits), key=lambda pair: pair[1] - pair[0]):
        run = [hit for _, hit in group]
        last = _place(style, run[-1] + ECHO_WORDS - 1)
        yield Rule.ECHO, _place(style, run[0]).start(), last.end()


def _addresses(plain: str, hints: Hints | None) -> Iterator[Span]:
    """Compared without scheme, `www.` and white space, which OCR sets into long addresses."""
    if hints is None:
        return
    evidence = "".join(
        plain_text(" ".join([*(t.text for t in hints.text), *hints.alt_texts])).split()
    )
    for found in _URL.finditer(plain):
        address = found.group().rstrip(".,;:!?)]'*_/")
        if re.sub(r"^(?:https?://)?(?:www\.)?", "", address) not in evidence:
            yield Rule.URL, found.start(), found.start() + len(address)


def _repeated(plain: str, words: Sequence[str]) -> Iterator[Span]:
    """A sentence of four words or more that was said before, or a loop at the end."""
    seen: set[str] = set()
    start, last = 0, len(plain.rstrip())
    for end in [*(found.end() for found in SENTENCE_END.finditer(plain)), last]:
        sentence = plain[start:end].strip(" .!?")
        if sentence in seen and len(_WORD.findall(sentence)) >= 4:
            yield Rule.REPETITION, plain.index(sentence, start), end
        seen.add(sentence)
        start = end
    if looped := _loop(words, longest=24, least=8):
        yield Rule.REPETITION, _place(plain, len(words) - looped).start(), last
    elif looped := _loop(plain[:last][-400:], longest=8, least=40):  # "hahaha", "。。。。"
        yield Rule.REPETITION, last - looped, last


def _loop(items: Sequence[str], longest: int, least: int) -> int:
    """How many items at the end are one short run said three times or more, else 0.

    The very last item may be cut off and is let go.
    """
    for period in range(1, min(longest, len(items) // 3) + 1):
        index = len(items) - 2
        while index >= period and items[index] == items[index - period]:
            index -= 1
        length = len(items) - 1 - index + period
        if length >= max(least, 3 * period):
            return length
    return 0
