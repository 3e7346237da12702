"""How two labels are related: what an expert calls a cat, another one a tabby.

By the nouns of WordNet 3.0 (Fellbaum 1998), which come with the package. Labels of ImageNet and
COCO have the meaning that those data sets give them (`label_meanings.txt`); any other label its
most frequent one that can be seen and is no person, if it has such a one: a cat is not a gossip.
"""

import gzip
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from experts.base import ASSETS

NOUNS = ASSETS / "wordnet30_nouns.txt.gz"
MEANINGS = ASSETS / "label_meanings.txt"
_PHYSICAL, _PERSON = 1930, 7846
"""WordNet's numbers of `physical entity` and `person`."""
_PLURALS = (("ies", "y"), ("men", "man"), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"),
            ("shes", "sh"), ("s", ""))  # fmt: skip
"""Endings of plurals and of their singulars: WordNet's own rules (man 7 morphy)."""


@dataclass(frozen=True)
class _Nouns:
    meanings: Mapping[str, tuple[int, ...]]
    """Most frequent first."""
    own: Mapping[str, tuple[int, ...]]
    """Of labels of ImageNet and COCO."""
    above: Mapping[int, tuple[int, ...]]


@cache
def _nouns() -> _Nouns:
    names, numbers = gzip.decompress(NOUNS.read_bytes()).decode("ascii").split("\n\n")
    own = MEANINGS.read_text(encoding="ascii")
    above = {int(number): up for number, up in _entries(numbers)}
    return _Nouns(dict(_entries(names)), dict(_entries(own)), above)


def _entries(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for line in text.splitlines():
        name, _, numbers = line.partition("\t")
        yield name, tuple(map(int, numbers.split()))


@cache
def meanings_of(label: str) -> tuple[int, ...]:
    """Numbers of what WordNet calls meanings; empty for a label that it does not know.

    A plural means its singular, a name of several words what its last ones mean: a `red sports car`
    is a sports car.
    """
    nouns = _nouns()
    words = label.lower().replace("_", " ").split()
    while words:
        name = " ".join(words)
        for one in (name, *_singulars(name)):
            if one in nouns.own:
                return nouns.own[one]
            if one in nouns.meanings:
                return _visible(nouns.meanings[one])
        words = words[1:]
    return ()


def _visible(meanings: tuple[int, ...]) -> tuple[int, ...]:
    for meaning in meanings:
        if _PHYSICAL in _line(meaning) and _PERSON not in _line(meaning):
            return (meaning,)
    return meanings[:1]


def _singulars(name: str) -> list[str]:
    return [name[: -len(end)] + one for end, one in _PLURALS if name.endswith(end)]


@cache
def _line(meaning: int) -> dict[int, int]:
    """All that a meaning is a kind of, itself included, with the steps up to it."""
    steps, waiting = {meaning: 0}, [meaning]
    for one in waiting:  # grows: nearest first
        for up in _nouns().above.get(one, ()):
            if up not in steps:
                steps[up] = steps[one] + 1
                waiting.append(up)
    return steps


@cache
def _depth(meaning: int) -> int:
    """Meanings on the shortest way from the top, both ends included."""
    ups = _nouns().above.get(meaning, ())
    return 1 + min((_depth(up) for up in ups), default=0)


def is_kind_of(label: str, other: str) -> bool:
    """Whether a label means the same as another one or a kind of it: a tabby is a cat."""
    wide = set(meanings_of(other))
    return label == other or any(wide & _line(one).keys() for one in meanings_of(label))


@cache
def similarity(a: str, b: str) -> float:
    """0..1: how near two labels are in the tree of nouns (Wu and Palmer 1994): 1 for one meaning,
    about 0.8 for a motorcycle and a bicycle, under 0.5 for a person and a vase. 0 when WordNet
    knows one of them not.
    """
    if a == b:
        return 1.0
    best = 0.0
    for one in meanings_of(a):
        for other in meanings_of(b):
            up, down = _line(one), _line(other)
            for shared in up.keys() & down.keys():
                depth = _depth(shared)
                best = max(best, 2 * depth / (2 * depth + up[shared] + down[shared]))
    return best
