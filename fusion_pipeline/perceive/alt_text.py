"""Alt texts of web pages cleaned into evidence, with a typed reason for each that says nothing.

Judges whether a text can be useful, not whether it is safe (`prompts.untrusted`), nor whether it
belongs to its image: that takes a model which sees both. docs/alt-text.md has each rule with an
example. When a rule is unsure the text stays.
"""

import hashlib
import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import py3langid
import pyarrow as pa
from ftfy import fix_encoding
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from pydantic import Field

from fusion_pipeline.config_model import ConfigModel
from fusion_pipeline.dataset.evidence import ALT_TEXTS, CLEANED
from fusion_pipeline.dataset.rows import Ok, build_table
from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardBlock, Worker
from fusion_pipeline.perceive.alt_phrases import (
    AFTER_SITE,
    BEFORE_SITE,
    EDGES,
    ELEMENTS,
    FILE_WORDS,
    INLINE,
    LABELS,
    LOUD_NOISE,
    NOISE,
    SITES,
    WORD,
    Phrases,
    words_of,
)


class Reason(StrEnum):
    """Why nothing is left of a text."""

    HTML_ONLY = "html_only"
    """Nothing but tags, entities or template marks, or these nested deeper than a page has them."""
    NO_LETTERS = "no_letters"
    """Digits, signs and emoji, or nothing at all."""
    URL = "url"
    FILE_NAME = "file_name"
    """A file's name that isn't written in words."""
    KEYWORD_SPAM = "keyword_spam"
    """A list or a text that repeats itself, is made of shop words, or is endless."""
    BOILERPLATE = "boilerplate"
    """What a site says of any image: its name, `image`, `click to enlarge`, `free shipping`."""
    TOO_SHORT = "too_short"
    DUPLICATE = "duplicate"
    """The same words as an earlier text of this sample."""


class AltTextConfig(ConfigModel):
    max_chars: int = Field(default=4096, ge=16, le=16384)
    """Characters of a raw text that are read. HTML parsers of older Pythons need quadratic time for
    hostile tags, so this bounds the cost of a text."""
    min_chars: int = Field(default=3, ge=1)
    """Fewest letters and digits of a text. Letters of scripts other than Latin, Greek, Cyrillic,
    Armenian and Georgian count twice: 白猫 is a white cat."""
    max_repeats: float = Field(default=0.3, gt=0, le=1)
    """Largest share that one word may have of a text, when it is there five times or more."""
    list_items: int = Field(default=6, ge=2)
    """Items from which short items between commas, pipes or hashes are a list of keywords."""
    max_list_items: int = Field(default=24, ge=2)
    """A longer list of keywords is stuffing even when all are distinct."""
    max_list_repeats: float = Field(default=0.4, gt=0, le=1)
    """Largest share of a keyword list's words that may be repetitions."""
    min_language_confidence: float = Field(default=0.5, ge=0, le=1)
    """Below it a text's language is null."""
    min_relevance: float = Field(default=0.0, ge=0, le=1)
    """Where a model scores the texts (`relevance`): least score of a text that is told."""


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What became of one raw text."""

    text: str
    """Empty when dropped."""
    reason: Reason | None
    """Null when kept."""
    language: str | None
    """ISO 639-1; null when dropped, or when too short or mixed to say."""


# --- words and phrases ---------------------------------------------------------------------------

_WIDE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]{2,}")
"""Kanji, kana, hanzi: written without spaces."""
_SIZE_WORD = re.compile(r"\d{2,5}x\d{2,5}(?:px)?")
_MAX_PHRASE = max(map(len, LABELS | SITES))


def _is_number(word: str) -> bool:
    return word.isdigit() or bool(_SIZE_WORD.fullmatch(word))


def _is_idle(words: Sequence[str]) -> bool:
    """Whether labels and numbers are all there is, and not only a year or a short number."""
    at, labels = 0, 0
    while at < len(words):
        length = _longest(words, at, LABELS)
        if length:
            labels += 1
        elif not _is_number(words[at]):
            if (words[at].rstrip("0123456789"),) not in LABELS:  # image042, slide3
                return False
            labels += 1
        at += length or 1
    return labels > 0 or any(len(word) > 4 for word in words)


def _longest(words: Sequence[str], at: int, table: Phrases) -> int:
    """Words of the longest phrase of a table that starts at a place; 0: none does."""
    sizes = range(min(_MAX_PHRASE, len(words) - at), 0, -1)
    return next((size for size in sizes if tuple(words[at : at + size]) in table), 0)


def _is_site(words: Sequence[str]) -> bool:
    words = [w for w in words if not w.isdigit() and w not in BEFORE_SITE]
    size = _longest(words, 0, SITES)
    return size > 0 and all(word in AFTER_SITE for word in words[size:])


# --- steps: each gives what is left of a text ----------------------------------------------------

_HIDDEN = ("script", "style")
_CUT_OFF_TAG = re.compile(r"<(?:!--|/?([a-zA-Z][a-zA-Z0-9:-]{0,30})(?=$|/|\s+(?:$|[a-zA-Z-]+=)))")
_TEMPLATE_MARK = re.compile(
    r"\{\{[^{}]{0,200}\}\}|\{%[^{}%]{0,200}%\}|\$\{[^{}]{0,200}\}|\[/?caption\b[^\[\]]{0,400}\]"
)


class _Text(HTMLParser):
    """Gathers the text of a piece of HTML, the alt texts of its images included."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not _is_element(tag):
            self.handle_data(html.unescape(self.get_starttag_text() or ""))
            return
        if tag in _HIDDEN:
            self._hidden = tag
        gap = "" if tag in INLINE else " "
        self.handle_data(
            gap + next((value or "" for name, value in attrs if name == "alt"), "") + gap
        )

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _HIDDEN:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag == self._hidden:
            self._hidden = None
        self.handle_data("" if tag in INLINE else " ")

    def handle_data(self, data: str) -> None:
        if self._hidden is None:
            self.parts.append(data)


def _is_element(name: str) -> bool:
    return name in ELEMENTS or ":" in name or "-" in name  # o:p, my-widget


def _without_markup(text: str) -> str:
    """Tags, comments, scripts and template marks gone, entities resolved once."""
    if "<" not in text:
        text = html.unescape(text)
    else:
        text = text.replace("<![", "<!")  # the parser raises for marked sections it doesn't know
        complete = text.rfind(">") + 1
        parser = _Text()
        parser.feed(text[:complete])
        parser.close()
        text = "".join(parser.parts) + _without_cut_off_tag(text[complete:])
    return _TEMPLATE_MARK.sub(" ", text)


def _without_cut_off_tag(tail: str) -> str:
    """Text after the last `>`, up to a tag or comment whose end is missing."""
    for match in _CUT_OFF_TAG.finditer(tail):
        if match[1] is None or _is_element(match[1].lower()):
            tail = tail[: match.start()]
            break
    return html.unescape(tail)


_JOINERS = "\u200c\u200d"
_PICTURE = (
    "(?:[\U0001f1e6-\U0001f1ff]{2}"  # a flag
    "|[\u2600-\u27bf\u2b00-\u2bff\U0001f000-\U0001f1e5\U0001f200-\U0001faff]"
    "[\ufe0f\U0001f3fb-\U0001f3ff]*)"
)
_EMOJI_RUN = re.compile(rf"(?:{_PICTURE}(?:\u200d{_PICTURE})* ?){{2,}}")


def _plain(text: str) -> str:
    """Mojibake undone, NFC, one line, without invisible characters and runs of emoji."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", fix_encoding(text))
    if not text.isprintable():
        text = "".join(map(_visible, text))
    return " ".join(_EMOJI_RUN.sub(" ", " ".join(text.split())).split())


def _visible(character: str) -> str:
    if character.isspace():
        return " "
    hidden = unicodedata.category(character)[0] == "C" and character not in _JOINERS
    return "" if hidden else character


_ENDINGS = (
    "com|net|org|edu|gov|info|biz|shop|store|io|ly|me|co|eu|uk|us|ca|au|de|ch|fr|es|pt|it|nl|be|pl|cz"
    "|se|dk|fi|ru|ua|tr|gr|hu|ro|jp|cn|tw|kr|br|mx|example"
)
_URL = re.compile(
    r"(?:https?://|www\.|data:image/)[!-~]+"
    rf"|(?<![a-z0-9.@-])(?:[a-z0-9-]{{1,63}}\.){{1,4}}(?:{_ENDINGS})/[!-~]*",
    re.IGNORECASE,
)
_DOMAIN = re.compile(rf"(?:[a-z0-9-]{{1,63}}\.){{1,4}}(?:{_ENDINGS})", re.IGNORECASE)


def _without_urls(text: str) -> str:
    return "" if _DOMAIN.fullmatch(text) else _URL.sub(" ", text)


_EXTENSION = re.compile(
    r"\.(?:jpe?g|jpe|jfif|png|gif|webp|svg|bmp|tiff?|avif|heic|ico)$", re.IGNORECASE
)
_FILE_PREFIX = re.compile(
    r"(?:file|image|datei|bild|fichier|archivo|ficheiro|bestand|plik|файл|ファイル|文件|파일):\s?",
    re.IGNORECASE,
)


def _without_file_name(text: str) -> str:
    """A file name read as its words, if it has two or one that isn't ASCII; other texts as such."""
    stem = _EXTENSION.sub("", text)
    one_word = " " not in text
    words = words_of(stem)
    if stem == text:
        digits = sum(map(str.isdigit, text))
        by_machine = "_" in text or digits > 6 or (digits > 0 and _is_idle(words))
        if not (one_word and by_machine):
            return text
    telling = [w for w in words if _tells(w)]
    if len(telling) < 2 and all(map(str.isascii, telling)):
        return ""
    if stem == text and "_" not in text:
        return text  # a word of its own beside many digits
    prefix = _FILE_PREFIX.match(stem)
    stem = stem[prefix.end() :] if prefix else stem
    if not one_word:
        return stem
    return re.sub(r"[-_+]|%20", " ", re.split(r"[/\\]", stem)[-1])


def _tells(word: str) -> bool:
    letters = sum(map(str.isalpha, word))
    return (
        (letters > 2 or not word.isascii())
        and not any(map(str.isdigit, word))
        and word not in FILE_WORDS
        and (word,) not in LABELS
    )


def _once(text: str) -> str:
    """A phrase that is said over and over said once; `Bora Bora` and other doubled words stay."""
    spans = list(WORD.finditer(text))
    words = [span[0].casefold() for span in spans]
    period = _period(words)
    if period == len(words) or (period == 1 and len(words) == 2):
        return text
    return text[: spans[period - 1].end()]


def _period(words: Sequence[str]) -> int:
    """Length of the shortest phrase that the words repeat to the end (Knuth, Morris and Pratt)."""
    borders = [0] * len(words)
    for i in range(1, len(words)):
        border = borders[i - 1]
        while border and words[i] != words[border]:
            border = borders[border - 1]
        borders[i] = border + (words[i] == words[border])
    period = len(words) - borders[-1] if words else 0
    return period if period and len(words) % period == 0 else len(words)


_BETWEEN_ITEMS = re.compile(r"[,;|#•｜、，；]")


def _is_spam(text: str, config: AltTextConfig) -> bool:
    units = list(_units(text))
    counts = Counter(unit for unit in units if len(unit) > 2 or not unit.isascii())
    most = max(counts.values(), default=0)
    if most > 4 and most > config.max_repeats * len(units):
        return True
    items = [words for item in _BETWEEN_ITEMS.split(text) if (words := words_of(item))]
    if len(items) < config.list_items or sum(map(len, items)) > 3 * len(items):
        return False  # no list of keywords, but a sentence with commas
    repeated = 1 - len(set(units)) / len(units)
    idle = sum(map(_is_idle, items))
    return (
        len(items) > config.max_list_items
        or repeated > config.max_list_repeats
        or 2 * idle >= len(items)
    )


def _units(text: str) -> Iterator[str]:
    """Words, and pairs of neighbouring characters where a script has no spaces between words."""
    for word in words_of(text):
        if _WIDE.search(word):
            yield from (word[i : i + 2] for i in range(len(word) - 1))
        else:
            yield word


_BETWEEN_PARTS = re.compile(r" ?[|｜¦•]+ ?| [-–—―~·:»›>/]+ ")
_AMOUNT = r"\d[\d.,]{0,12}"
_SIGN = "[$€£¥₹₽₩]"
_UNIT = r"USD|EUR|GBP|zł|руб\.?|грн|円|元|원"
_PRICE_OR_SIZE = re.compile(
    r"(?:[,;]? (?:price|preis|prix|precio|preço|prezzo|cena|цена|ціна|fiyat):?)? ?"
    rf"(?:(?:US|CA|AU)?{_SIGN} ?{_AMOUNT}|(?<![\d.,]){_AMOUNT} ?(?:{_SIGN}|{_UNIT})"
    r"|(?<!\d)\d{3,5} ?[x×] ?\d{3,5}(?: ?px)?)$",
    re.IGNORECASE,
)
_BEFORE_CUT = " ([{<「『【（［〈《-–—―|,;:/·•~=>"
_AFTER_CUT = " )]}>」』】）］〉》-–—―|,;:/·•~=!."


def _without_boilerplate(text: str) -> str:
    """Without parts, and edges of parts, that say nothing of the image, and parts said before."""
    kept: list[str] = []
    seen: set[tuple[str, ...]] = set()
    start, gap = 0, ""
    for match in [*_BETWEEN_PARTS.finditer(text), None]:
        part = _trimmed(text[start : match.start() if match else None])
        words = words_of(part)
        idle = not words or _is_idle(words) or _is_site(words) or bool(_DOMAIN.fullmatch(part))
        if not idle and tuple(words) not in seen:
            seen.add(tuple(words))
            kept += [gap if kept else "", part]
            gap = ""
        if match:
            start, gap = match.end(), gap or match[0]
    return "".join(kept)


def _trimmed(part: str) -> str:
    """A part of a text without phrases, prices and sizes at its edges."""
    part = _PRICE_OR_SIZE.sub("", part.strip())
    while part.endswith((")", "]")):
        opened = part.rfind("(" if part[-1] == ")" else "[")
        if opened < 0 or not _is_idle(words_of(part[opened:])):
            break
        part = part[:opened].rstrip()
    spans = list(WORD.finditer(part))
    words = [span[0].casefold() for span in spans]
    first, end = 0, len(words)
    while size := _longest(words, first, EDGES):
        first += size
    while size := _longest_before(words, first, end):
        end -= size
    noise = end
    while noise > first and (words[noise - 1] in NOISE or _SIZE_WORD.fullmatch(words[noise - 1])):
        noise -= 1
    if end - noise > 1 and any(w in LOUD_NOISE or _is_number(w) for w in words[noise:end]):
        end = noise
    if end <= first:
        return ""
    if end < len(words):
        part = part[: spans[end].start()].rstrip(_BEFORE_CUT)
    return part[spans[first - 1].end() :].lstrip(_AFTER_CUT) if first else part


def _longest_before(words: Sequence[str], first: int, end: int) -> int:
    sizes = range(min(_MAX_PHRASE, end - first), 0, -1)
    return next((size for size in sizes if tuple(words[end - size : end]) in EDGES), 0)


# --- the whole -----------------------------------------------------------------------------------

_MAX_ROUNDS = 12
_ALPHABETS = ("LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "GEORGIAN")


def clean_text(raw: str, config: AltTextConfig) -> tuple[str, Reason | None]:
    """One raw text as evidence, or an empty text and the reason why. Idempotent, never raises.

    Only the first `config.max_chars` characters are read. What is left is never longer than the
    text with its entities resolved.
    """
    text = raw
    for _ in range(_MAX_ROUNDS):  # to undo one escaping may bring out the next
        before, text = text, text[: config.max_chars]
        for reason, step in _STEPS:
            had_letters = _has_letters(text)
            text = step(text, config)
            if not _has_letters(text):
                return "", reason if had_letters else Reason.NO_LETTERS
        if text == before:
            short = _length(text, config.min_chars) < config.min_chars
            return ("", Reason.TOO_SHORT) if short else (text, None)
    return "", Reason.HTML_ONLY


Step = Callable[[str, AltTextConfig], str]
_STEPS: tuple[tuple[Reason, Step], ...] = (
    (Reason.HTML_ONLY, lambda text, config: _without_markup(text)),
    (Reason.NO_LETTERS, lambda text, config: _plain(text)),
    (Reason.URL, lambda text, config: _without_urls(text)),
    (Reason.FILE_NAME, lambda text, config: _without_file_name(text)),
    (Reason.KEYWORD_SPAM, lambda text, config: _once(text)),
    (Reason.KEYWORD_SPAM, lambda text, config: "" if _is_spam(text, config) else text),
    (Reason.BOILERPLATE, lambda text, config: _without_boilerplate(text)),
)


def _has_letters(text: str) -> bool:
    return any(map(str.isalpha, text))


def _length(text: str, enough: int) -> int:
    """Letters and digits as `AltTextConfig.min_chars` counts them, up to `enough`."""
    total = 0
    for character in filter(str.isalnum, text):
        name = unicodedata.name(character, "")
        total += 1 if character.isdigit() or name.startswith(_ALPHABETS) else 2
        if total >= enough:
            break
    return total


class Language:
    """Names the language of short texts (py3langid; its model is part of the package)."""

    def __init__(self, min_confidence: float) -> None:
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        labels = self._identifier.labels
        # A Chinese text is zh, not the Wu or Cantonese that have no such code.
        self._identifier.set_languages([label for label in labels if len(label) == 2])
        self._min_confidence = min_confidence

    def __call__(self, text: str) -> str | None:
        """ISO 639-1 code; None where the model is not sure, as of names."""
        label, confidence = self._identifier.classify(text)
        return str(label) if confidence >= self._min_confidence else None

    @staticmethod
    def revision() -> str:
        return _digest(Path(py3langid.__file__).parent / MODEL_FILE)


@cache
def _digest(file: Path) -> str:
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def clean_all(raws: Sequence[str], config: AltTextConfig, language: Language) -> list[Cleaned]:
    """What became of each raw text of one sample, in their order."""
    cleaned: list[Cleaned] = []
    seen: set[tuple[str, ...]] = set()
    for raw in raws:
        text, reason = clean_text(raw, config)
        words = tuple(words_of(text))
        if text and words in seen:
            text, reason = "", Reason.DUPLICATE
        seen.add(words)
        cleaned.append(Cleaned(text, reason, language(text) if text else None))
    return cleaned


@dataclass(frozen=True)
class AltText:
    """Writes `alt_texts`: for each raw alt text of a sample, in their order, a `Cleaned`.

    A sample without alt texts has an empty list. No row fails: each raw text has an outcome.
    """

    config: AltTextConfig
    resources: Resources = CPU_WORKER

    name = ALT_TEXTS
    version = 1
    reads: tuple[str, ...] = ()
    columns: Sequence[pa.Field] = (pa.field(ALT_TEXTS, CLEANED),)

    def settings(self) -> Mapping[str, Any]:
        return self.config.model_dump(mode="json", exclude={"min_relevance"})

    def revision(self) -> str:
        return Language.revision()

    def open(self) -> Worker:
        language = Language(self.config.min_language_confidence)

        def work(block: ShardBlock) -> pa.Table:
            outcomes = []
            for raws in block.column("samples", "alt_texts"):
                block.tick()
                cleaned = clean_all(raws, self.config, language)
                cells = [
                    {"text": c.text, "reason": c.reason, "language": c.language} for c in cleaned
                ]
                outcomes.append(Ok({ALT_TEXTS: cells}))
            return build_table(block.keys, outcomes, self.columns)

        return work
