"""Untrusted text made harmless before it enters a prompt: recognised text, alt texts, labels."""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache

MAX_LABEL_CHARS = 60

# The rules are matched against the skeleton of a text (see `_skeleton`), which has neither
# fullwidth signs nor accents nor joiners.
_NAMES = (
    "image img video audio s bos eos pad unk mask cls sep start_of_turn end_of_turn start_of_image "
    "end_of_image image_soft_token image_placeholder im_start im_end im_patch img_context box ref "
    "quad point think tool_call tool_response external_information system user assistant"
).replace(" ", "|")
_TOKEN = re.compile(
    r"<\s*\|[^<>]{0,60}?\|\s*>"  # <|im_start|>, <｜begin▁of▁sentence｜>
    rf"|<\s*/?\s*(?:{_NAMES})\s*/?\s*>"  # <image>, </s>
    r"|<\s*/?\s*external[\W_]{0,3}information(?:[^<>]{0,60}>)?"  # the mark, attributes or no end
    r"|<<\s*/?\s*sys\s*>>"
    r"|\[\s*/?\s*(?:inst|img|img_break|img_end|system_prompt|available_tools|tool_calls"
    r"|tool_results|gmask|cls|sep|pad|mask|unk|prefix|suffix|middle"
    r"|unused_token_\d{1,4})\s*\]",  # InternLM's vocabulary has its <|im_start|> under such a name
    re.IGNORECASE,
)
_UNKNOWN_TAG = re.compile(r"(?<=<)(?=[/|]?[^\s<>]+>)")
_MARK_NAME = re.compile(r"(?<=external)_(?=information)", re.IGNORECASE)
_ROLE = re.compile(  # Vicuna's marks, even inside a word, and what looks like one
    r"(?=:)(?:(?<=USER)|(?<=ASSISTANT)"
    r"|(?i:(?<=\buser)|(?<=\bassistant)|(?<=\bsystem)|(?<=\bhuman)|(?<=\bgpt)))"
)
_LAST_ROLE = re.compile(r"(?:USER|ASSISTANT)$")
_RULES: tuple[tuple[re.Pattern[str], Callable[[str], str]], ...] = (
    (_TOKEN, lambda token: ""),
    (_UNKNOWN_TAG, lambda nothing: " "),
    (_MARK_NAME, lambda underscore: " "),
    (_ROLE, lambda nothing: " "),
    (_LAST_ROLE, str.lower),
)
_BRACKETS = set("<>[]")
_MAX_ROUNDS = 16

_JOINERS = "\u200c\u200d"  # format characters that Persian, Indic scripts and emoji are spelt with
_LETTER = rf"[^\0-\x7f{_JOINERS}]"  # what a joiner can have a meaning between
_IDLE_JOINER = re.compile(rf"(?<!{_LETTER})[{_JOINERS}]|[{_JOINERS}](?!{_LETTER})")
# Not of category C, and yet nothing to see: fillers, joiners, blanks, variation selectors.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)


def clean(text: str, limit: int) -> str:
    """Untrusted text as one harmless line of at most `limit` characters (idempotent).

    Control, invisible and private-use characters go, white space is folded. Chat and image tokens
    of the known model families are removed; an unknown `<tag>` gets a space after its bracket, a
    role mark (`ASSISTANT:`) one before its colon, and the name of the prompt's own mark one for
    its underscore, so that no tokeniser takes it for its own while a reader still can. `USER` and
    `ASSISTANT` at the very end, where a template may put a colon, are written small.

    All of this holds also for the text's NFKC form and for the text without combining marks, which
    tokenisers may see in its place. What stays is spelt as it was.
    """
    text = _folded("".join(map(_plain, text[: 8 * limit])))
    rounds = 0
    while (after := _harmless(text)) != text:  # removing one token may join the halves of another
        rounds += 1
        # Only an attack is nested as deep as that; the bound keeps its cost linear.
        text = _folded(after if rounds < _MAX_ROUNDS else _without_brackets(after))
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def _plain(character: str) -> str:
    category = unicodedata.category(character)
    if category in ("Zs", "Zl", "Zp") or character in "\t\n\r\v\f\x85":
        return " "
    hidden = category[0] == "C" and character not in _JOINERS
    return "" if hidden or _UNSEEN.match(character) else character


def _folded(text: str) -> str:
    return " ".join(_IDLE_JOINER.sub("", text).split())


def _harmless(text: str) -> str:
    """The text after the first rule that finds anything; unchanged when none does."""
    skeleton, places = _skeleton(text)
    for rule, change in _RULES:
        parts, kept = [], 0
        for match in rule.finditer(skeleton):
            at = places[match.start()]
            parts += [text[kept:at], change(match[0])]
            kept = places[match.end() - 1] + 1 if match[0] else at
        if parts:
            return "".join(parts) + text[kept:]
    return text


def _skeleton(text: str) -> tuple[str, Sequence[int]]:
    """The text folded for matching, and for each of its characters the place where it is from."""
    if text.isascii():
        return text, range(len(text))
    folded = [(base, place) for place, c in enumerate(text) for base in _base(c)]
    return "".join(base for base, _ in folded), [place for _, place in folded]


@cache
def _base(character: str) -> str:
    """A character without width, style and accents: `＜` is `<`, an accent or a joiner nothing."""
    if character in _JOINERS or unicodedata.category(character)[0] == "M":
        return ""
    parts = unicodedata.normalize("NFKD", character)
    base = "".join(part for part in parts if unicodedata.category(part)[0] != "M")
    return base if base.isascii() else character  # the rules know ASCII only


def _without_brackets(text: str) -> str:
    return "".join(c for c in text if _BRACKETS.isdisjoint(_base(c)))
