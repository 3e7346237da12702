"""Which script a line is written in, and whether the recogniser can write that script.

Lines of a script that the recogniser was not taught come out as look-alikes of one that it was,
often with high confidence: "РЕМОНТ" as "PEMOHT". What the network saw before it chose characters
tells better. A small classifier takes the mean and the spread of those activations along the line,
and how sure the network is of characters of which kind. It was fitted to rendered lines by
`benchmarks/line_scripts.py`.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from experts.base import ASSETS
from experts.ocr.recogniser import Recognised

WEIGHTS = ASSETS / "line_scripts.npz"

NO_TEXT = "none"
"""The classifier's class of what a detector took for text."""
READABLE = frozenset({"Latn", "Hani", "Jpan", "Zyyy", NO_TEXT})
"""Classes that the recogniser writes as they stand; Zyyy are digits and signs. Greek is not among
them: the dictionary has its letters for formulas, but of Greek words it writes most letters as
Latin ones or not at all."""

Floats = npt.NDArray[np.float32]

SURE = 0.9
"""Probability from which a character counts as confident."""
KINDS = ("upper", "lower", "accented", "digit", "Han", "hiragana", "katakana", "Greek",
         "punctuation", "space", "other")  # fmt: skip
_SCRIPTS = {
    "LATIN": "Latn", "FULLWIDTH LATIN": "Latn", "GREEK": "Grek", "CJK": "Hani",
    "IDEOGRAPHIC ITERATION": "Hani", "HIRAGANA": "Jpan", "KATAKANA": "Jpan",
    "HALFWIDTH KATAKANA": "Jpan", "BOPOMOFO": "Bopo", "CYRILLIC": "Cyrl", "HANGUL": "Hang",
}  # fmt: skip
"""ISO 15924 codes by the beginning of letters' Unicode names."""


@dataclass(frozen=True)
class Guess:
    unreadable: float
    """Probability that the line's script is one that the recogniser can't write."""
    script: str
    """The likeliest of those, ISO 15924."""


@dataclass(frozen=True)
class ScriptGuess:
    """A network with one hidden layer."""

    scripts: Sequence[str]
    hidden: Floats
    """[features, units]"""
    hidden_bias: Floats
    out: Floats
    """[units, scripts]"""
    out_bias: Floats

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> Self:
        with np.load(path, allow_pickle=False) as stored:
            names = ("hidden", "hidden_bias", "out", "out_bias")
            weights = [stored[name].astype(np.float32) for name in names]
            return cls(stored["scripts"].tolist(), *weights)

    def __call__(self, seen: Floats) -> Guess:
        """Of a line's `features`."""
        logits = np.maximum(seen @ self.hidden + self.hidden_bias, 0) @ self.out + self.out_bias
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        by_script = zip(self.scripts, shares.tolist(), strict=True)
        lacking = {script: share for script, share in by_script if script not in READABLE}
        return Guess(sum(lacking.values()), max(lacking, key=lambda script: lacking[script]))


def features(seen: Recognised, kinds: npt.NDArray[np.int64]) -> Floats:
    """What the classifier takes, float32 [259]. `kinds`: of the recogniser's characters, by index.

    Shares of confident characters by kind; mean, lowest and middle probability of the characters;
    characters a step, and how sure the steps are; mean and deviation of the activations.
    """
    starts = np.ones(len(seen.best), bool)
    starts[1:] = seen.best[1:] != seen.best[:-1]
    written = starts & (seen.best != 0)
    sure = seen.sureness[written]
    confident = kinds[seen.best[written]][sure > SURE]
    by_kind = np.bincount(confident, minlength=len(KINDS)) / max(1, len(sure))
    characters = [sure.mean(), sure.min(), np.median(sure)] if len(sure) else [0.0, 0.0, 0.0]
    steps = [len(sure) / len(starts), seen.blank.mean(), seen.sureness.mean(), seen.sureness.min()]
    length = [np.log(len(starts))]
    spread = [seen.activations.mean(axis=0), seen.activations.std(axis=0)]
    return np.concatenate([by_kind, characters, steps, length, *spread]).astype(np.float32)


def kind_of(character: str) -> int:
    """Index in KINDS of a character, or of the recogniser's "blank"."""
    name = unicodedata.name(character, "") if len(character) == 1 else ""
    category = unicodedata.category(character) if len(character) == 1 else ""
    if name.startswith("LATIN"):
        kind = "accented" if ord(character) > 127 else "upper" if category == "Lu" else "lower"
    elif name.startswith("CJK"):
        kind = "Han"
    elif name.startswith(("HIRAGANA", "KATAKANA")):
        kind = name.split()[0].split("-")[0].lower()
    elif name.startswith("GREEK"):
        kind = "Greek"
    else:
        kind = {"Nd": "digit", "Zs": "space"}.get(category, "other")
        kind = "punctuation" if category.startswith("P") else kind
    return KINDS.index(kind)


def script_of(text: str) -> str:
    """ISO 15924 code of most of the text's letters: Latn, Hani, Jpan (with any kana), ... Empty
    for a text without letters."""
    found: Counter[str] = Counter()
    for character in text:
        name = unicodedata.name(character, "")
        found.update(code for start, code in _SCRIPTS.items() if name.startswith(start))
    if found["Jpan"]:
        found["Jpan"] += found.pop("Hani", 0)
    return max(sorted(found), key=lambda code: found[code], default="")
