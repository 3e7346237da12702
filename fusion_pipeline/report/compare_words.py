"""Words of captions: how many, which of them differ, and which texts a caption or evidence holds.

Words, sentences and quotations are found as the check of the rules finds them: a figure here and a
violation there are about the same thing.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate

from fusion_pipeline.prompts import rules

_CJK = rules.CJK
_TOKEN = re.compile(rf"[{_CJK}]|[^\s—{_CJK}]+")
_PART = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
LONG = 8
"""Letters and digits from which a text is found inside words, too: recognition loses spaces."""


def words(caption: str) -> list[str]:
    """Small letters, without the punctuation behind; of Han and kana two characters are a word."""
    return rules.bare_words(rules.plain_text(caption))


def count_sentences(caption: str) -> int:
    """Sentences, the last one even without its full stop. Full stops in quotations end none."""
    count = last = 0
    # The end of a quotation may be that of its sentence, too: it is left as it is.
    open_ended = rules.QUOTED.sub(lambda m: "x" * (len(m[0]) - 2) + m[0][-2:], caption)
    for found in rules.SENTENCE_END.finditer(rules.plain_text(open_ended)):
        if not caption[found.end() : found.end() + 3].lstrip()[:1].islower():
            count, last = count + 1, found.end()
    return count + bool(re.search(r"\w", caption[last:]))


def quotations(caption: str) -> list[str]:
    """What stands in quotation marks, marks included; a caption that is one as a whole has none."""
    if rules.masked(caption) == caption:
        return []
    return [found.group() for found in rules.QUOTED.finditer(caption)]


@dataclass(frozen=True)
class Letters:
    """A text's letters and digits in one row, small and in their plain forms (NFKC)."""

    text: str
    edges: frozenset[int]
    """Places where a word begins or ends. A character of Han or kana is a word."""

    @classmethod
    def of(cls, text: str) -> "Letters":
        parts = _PART.findall(unicodedata.normalize("NFKC", text).casefold())
        return cls("".join(parts), frozenset(accumulate(map(len, parts), initial=0)))

    def holds(self, other: "Letters") -> bool:
        """Whether the other text stands here: as whole words, a `LONG` one anywhere."""
        length = len(other.text)
        at = self.text.find(other.text)
        while at >= 0:
            if length >= LONG or {at, at + length} <= self.edges:
                return True
            at = self.text.find(other.text, at + 1)
        return False


def difference(a: str, b: str) -> float:
    """Share of the words of both captions that the other one lacks, 0..1.

    A word counts as often as it is said; order, case and punctuation don't count.
    """
    one, two = (Counter(filter(None, map(_same, _TOKEN.findall(text)))) for text in (a, b))
    both = one.total() + two.total()
    return 1 - 2 * (one & two).total() / both if both else 0.0


def _same(token: str) -> str:
    """What two tokens that are the same word share."""
    return re.sub(r"^\W+|\W+$", "", token).casefold()


Piece = tuple[str, bool]
"""A part of a caption, and whether the other caption lacks it at this place."""


def mark_differences(a: str, b: str) -> tuple[list[Piece], list[Piece]]:
    """Both captions in pieces, which joined are the captions again."""
    found = [list(_TOKEN.finditer(text)) for text in (a, b)]
    keys = [[_same(token[0]) or token[0] for token in tokens] for tokens in found]
    # Its heuristic for long texts stays on: else a caption that loops takes minutes.
    steps = SequenceMatcher(None, keys[0], keys[1]).get_opcodes()
    runs = [step for step in steps if step[0] != "equal"]
    spans = ([(i1, i2) for _, i1, i2, _, _ in runs], [(j1, j2) for _, _, _, j1, j2 in runs])
    one, two = (
        list(_pieces(text, tokens, of))
        for text, tokens, of in zip((a, b), found, spans, strict=True)
    )
    return one, two


def _pieces(
    text: str, tokens: Sequence[re.Match[str]], spans: Sequence[tuple[int, int]]
) -> Iterator[Piece]:
    end = 0
    for first, behind in spans:
        if first < behind:
            start, stop = tokens[first].start(), tokens[behind - 1].end()
            yield text[end:start], False
            yield text[start:stop], True
            end = stop
    yield text[end:], False
