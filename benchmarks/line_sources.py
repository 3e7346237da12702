"""Fonts, words and photos that lines of many scripts are rendered from; fit, tune and test apart.

Fonts and photos are Debian's (`line_packages.txt` names packages, versions and their part), words
are from CLDR, as Babel 2.18.0 has it, and from wordfreq 3.1.1. Both are needed beside the
development environment: pip install babel==2.18.0 wordfreq==3.1.1.
"""

import hashlib
import logging
import re
import subprocess
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random

import cv2
import numpy as np
import wordfreq  # type: ignore[import-not-found]
from babel import Locale  # type: ignore[import-not-found]
from fontTools.ttLib import TTCollection, TTFont  # type: ignore[import-untyped]
from PIL import ImageFont

from benchmarks.rendered_lines import Line, length_of, load_font
from fusion_pipeline.dataset.images import RGB

PACKAGES = Path(__file__).parent / "line_packages.txt"
TEST_FAMILIES = {"NotoSans", "NotoSansThai", "NotoSerifThai", "NotoSansDevanagari",
                 "NotoSerifHebrew", "NotoNaskhArabic", "NotoSerifArmenian",
                 "NotoSerifGeorgian"}  # fmt: skip
TUNE_FAMILIES = {"NotoSerifDevanagari", "NotoKufiArabic", "NotoRashiHebrew"}
"""Of fonts-noto-core, a package for all scripts; the other families are for the fit."""
COMMON = "Zyyy"
SHAPED = ImageFont.Layout.RAQM
"""Letters joined and marks placed as the script wants it."""
LONGEST = 48
"""Characters of a line."""


@dataclass(frozen=True)
class Script:
    names: str
    """What the Unicode names of its letters begin with, as a pattern."""
    weight: float
    """How often its lines are drawn."""
    locales: str
    """Of CLDR; one that stands here twice is taken twice as often."""
    joins: str = "  ,–"
    """What stands between words, by a character each: `-` for nothing, `,` for a comma and a
    blank, `–` for a dash between blanks."""
    cased: bool = False
    sample: str = ""
    """Letters that each font for the script has; empty: the three most frequent ones."""


SCRIPTS = {
    "Latn": Script("LATIN", 16, "en en en en de fr es pt it nl pl cs sv tr vi fi hu ro id da nb hr "
                   "sl lt lv et is ca eu ga cy sq az sw", cased=True),
    "Hani": Script("CJK", 12, "zh_Hans zh_Hans zh_Hant", "---、，· ", sample="中人大"),
    "Jpan": Script("CJK|HIRAGANA|KATAKANA", 9, "ja", "---、・ ", sample="のアン"),
    "Grek": Script("GREEK", 6, "el", cased=True),
    "Cyrl": Script("CYRILLIC", 12, "ru ru ru uk bg sr_Cyrl mk be kk ky mn tg", cased=True),
    "Hang": Script("HANGUL", 9, "ko"),
    "Arab": Script("ARABIC", 6, "ar ar fa ur ps ug sd"),
    "Hebr": Script("HEBREW", 5, "he he yi"),
    "Thai": Script("THAI", 5, "th", "-  "),
    "Deva": Script("DEVANAGARI", 5, "hi hi mr ne"),
    "Beng": Script("BENGALI", 1.2, "bn as"),
    "Gujr": Script("GUJARATI", 1.2, "gu"),
    "Guru": Script("GURMUKHI", 1.2, "pa"),
    "Orya": Script("ORIYA", 1.2, "or"),
    "Taml": Script("TAMIL", 1.2, "ta"),
    "Telu": Script("TELUGU", 1.2, "te"),
    "Knda": Script("KANNADA", 1.2, "kn"),
    "Mlym": Script("MALAYALAM", 1.2, "ml"),
    "Sinh": Script("SINHALA", 1.2, "si"),
    "Khmr": Script("KHMER", 1.2, "km", "- "),
    "Laoo": Script("LAO", 1.2, "lo", "- "),
    "Mymr": Script("MYANMAR", 1.2, "my", "- "),
    "Tibt": Script("TIBETAN", 1.2, "dz bo", "-"),
    "Geor": Script("GEORGIAN", 1.2, "ka"),
    "Armn": Script("ARMENIAN", 1.2, "hy", cased=True),
    "Ethi": Script("ETHIOPIC", 1.2, "am ti"),
    COMMON: Script("", 5, "", sample="0123"),
}  # fmt: skip
APART = {"Latn", "Hani", "Jpan", "Grek", "Cyrl", "Hang", "Hebr", "Armn", COMMON}
"""Scripts whose letters may stand apart, so that signs space them out."""


# --- packages ------------------------------------------------------------------------------------


def fetch(folder: Path) -> None:
    """Download the packages and unpack each into a folder of its name. Nothing is installed."""
    for line in PACKAGES.read_text().splitlines():
        package, _ = line.split()
        name = package.split("=")[0]
        if not (folder / name).exists():
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
            [archive] = folder.glob(f"{name}_*.deb")
            subprocess.run(["dpkg", "-x", str(archive), str(folder / name)], check=True)


@cache
def parts() -> dict[str, str]:
    """fit, tune, test or pictures, by package."""
    rows = (line.split() for line in PACKAGES.read_text().splitlines())
    return {package.split("=")[0]: part for package, part in rows}


@cache
def photos(folder: Path, part: str) -> list[RGB]:
    """Pictures without text, at most 1,200 pixels on a side."""
    found = []
    for package in sorted(name for name, of in parts().items() if of == "pictures"):
        for path in sorted((folder / package).rglob("*")):
            lettered = re.search("symbol|sign", str(path.relative_to(folder)))
            if lettered or path.suffix.lower() not in (".png", ".jpg"):
                continue
            image = cv2.imread(str(path)) if _part_of(path.name) == part else None
            if image is not None:
                scale = min(1.0, 1200 / max(image.shape))
                found.append(cv2.resize(image, None, fx=scale, fy=scale)[..., ::-1].copy())
    return found


# --- fonts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Face:
    path: Path
    index: int
    family: str
    """Faces of one family are drawn together as often as those of any other one."""
    part: str
    characters: frozenset[int]


@cache
def faces(folder: Path) -> list[Face]:
    logging.getLogger("fontTools").setLevel(logging.ERROR)
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in (".ttf", ".otf", ".ttc") or not path.is_file():
            continue
        package = path.relative_to(folder).parts[0]
        family, part = package, parts().get(package, "")
        if package == "fonts-noto-core":
            family = path.stem.split("-")[0].removesuffix("UI")
            part = "test" if family in TEST_FAMILIES else part
            part = "tune" if family in TUNE_FAMILIES else part
        if part in ("fit", "tune", "test") and "ariable" not in str(path):
            found += [Face(path, i, family, part, known) for i, known in _characters(path)]
    return found


def _characters(path: Path) -> list[tuple[int, frozenset[int]]]:
    """The faces of a file that Pillow can draw, and the characters that each one claims to have."""
    found = []
    count = len(TTCollection(str(path)).fonts) if path.suffix.lower() == ".ttc" else 1
    for index in range(count):
        known = frozenset(TTFont(str(path), fontNumber=index, lazy=True).getBestCmap() or ())
        try:
            load_font(path, index, 20).getmask("A")
        except OSError:  # a face that FreeType refuses is one font less
            continue
        if known:
            found.append((index, known))
    return found


@cache
def families(folder: Path, script: str, part: str) -> list[list[Face]]:
    """Faces of a part that draw letters of a script, family by family."""
    letters = SCRIPTS[script].sample or _frequent_letters(script)
    found: dict[str, list[Face]] = {}
    for face in faces(folder):
        if face.part == part and {*map(ord, letters)} <= face.characters and _draws(face, letters):
            found.setdefault(face.family, []).append(face)
    return [found[family] for family in sorted(found)]


def _frequent_letters(script: str) -> str:
    words = "".join(word for of_locale in _words(script, "fit") for word in of_locale)
    letters = sorted(c for c in words if unicodedata.category(c) in ("Lo", "Ll"))
    return "".join(letter for letter, _ in Counter(letters).most_common(3))


def _draws(face: Face, letters: str) -> bool:
    """Whether the face has different ink for different letters: some have boxes for most."""
    font = load_font(face.path, face.index, 32)
    drawn = [bytes(font.getmask(letter)) for letter in (*letters, "\U0010fffd")]
    return len(set(drawn)) == len(drawn) and all(map(any, drawn[:-1]))


# --- texts ---------------------------------------------------------------------------------------


def _part_of(text: str) -> str:
    """Texts (and photos) of the three parts differ."""
    lot = hashlib.sha256(text.encode()).digest()[0] % 10
    return "test" if lot < 2 else "tune" if lot < 3 else "fit"


@cache
def _words(script: str, part: str) -> list[list[str]]:
    """Of each locale: names of places, languages and currencies, and of frequent words as many."""
    pattern = re.compile(SCRIPTS[script].names)

    def fits(text: str) -> bool:
        letters = [unicodedata.name(c, "") for c in text if unicodedata.category(c)[0] in "LM"]
        marks = ("COMBINING", "ZERO", "VARIATION")
        own = all(pattern.match(name) or name.startswith(marks) for name in letters)
        return bool(letters) and own and len(text) <= 40 and _part_of(text) == part

    found = []
    for name in SCRIPTS[script].locales.split():
        locale = Locale.parse(name)
        zones = (zone["city"] for zone in locale.time_zones.values() if "city" in zone)
        named = [locale.territories, locale.languages, locale.scripts, locale.currencies,
                 locale.months["format"]["wide"], locale.days["format"]["wide"]]  # fmt: skip
        names = {text for table in named for text in table.values()} | set(zones)
        words = sorted(unicodedata.normalize("NFC", text) for text in names)
        language = {"zh_Hans": "zh", "hr": "sh"}.get(name, name)
        if language in wordfreq.available_languages("small"):
            words += wordfreq.top_n_list(language, 6000)
        if words := [word for word in words if fits(word)]:
            found.append(words)
    return found


def _number(rng: Random) -> str:
    forms: list[Callable[[], str]] = [
        lambda: str(rng.randrange(10)),
        lambda: str(rng.randrange(10, 100)),
        lambda: str(rng.randrange(1900, 2030)),
        lambda: f"{rng.randrange(1, 1000)}.{rng.randrange(100):02}",
        lambda: f"{rng.randrange(24)}:{rng.randrange(60):02}",
        lambda: f"{rng.randrange(1, 100)}%",
        lambda: f"{rng.choice('$€£¥')}{rng.randrange(1, 2000)}",
        lambda: f"{rng.randrange(1, 29):02}.{rng.randrange(1, 13):02}.{rng.randrange(1990, 2030)}",
    ]
    return rng.choice(forms)()


def _common(rng: Random) -> str:
    """A line without words: numbers, codes, formulas with Greek letters, signs."""
    units = ("μm", "kΩ", "°C", "μs", "m²", "km/h", "‰")
    codes = "0123456789ABCDEFGHKLMNPRSTXYZ-/"
    forms: list[Callable[[], str]] = [
        lambda: " ".join(_number(rng) for _ in range(rng.randint(1, 4))),
        lambda: f"+{rng.randrange(1, 99)} {rng.randrange(100, 999)} {rng.randrange(10**6)}",
        lambda: "".join(rng.choice(codes) for _ in range(rng.randint(3, 12))),
        lambda: f"{rng.randrange(500)} {rng.choice('x+-÷×')} {rng.randrange(500)} = {_number(rng)}",
        lambda: f"{rng.choice('αβγδελμπρσφω')} {rng.choice('=<>≈')} {_number(rng)}",
        lambda: f"Δ{rng.choice('Txyt')} = {_number(rng)} {rng.choice(units)}",
        lambda: f"{_number(rng)} {rng.choice(units)}",
        lambda: rng.choice(["★★★★☆", "→", "•", "* * *", "&", "©", "...", "!", "?", "#1", "+", "@"]),
    ]
    return rng.choice(forms)()


def _address(rng: Random, word: str) -> str:
    word = re.sub("[^a-z]", "", word.lower())[:14] or "site"
    forms = [f"www.{word}.com", f"{word}@mail.org", f"https://{word}.net/{rng.randrange(99)}",
             f"#{word}", f"{word}.jpg"]  # fmt: skip
    return rng.choice(forms)


def text(rng: Random, script: str, part: str) -> str:
    """A line's text: one to six words, in every way in which words are joined and capitalised."""
    if script == COMMON:
        return _common(rng)
    source, how = rng.choice(_words(script, part)), SCRIPTS[script]
    words = [rng.choice(source) for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 4, 6]))]
    if script == "Latn" and rng.random() < 0.06:
        return _address(rng, words[0])
    if rng.random() < 0.15:
        words.insert(rng.randrange(len(words) + 1), _number(rng))
    joint = rng.choice(how.joins)
    line = {"-": "", ",": ", ", "–": " – "}.get(joint, joint).join(words)
    if how.cased:
        line = rng.choice([line, line.upper(), line.upper(), line.title(), line.capitalize()])
    return line[:LONGEST] + (rng.choice(".!?:,") if rng.random() < 0.1 else "")


def line(
    rng: Random, folder: Path, part: str, scripts: Sequence[str], column: bool = False
) -> Line:
    """A line of one of the scripts, at most 900 pixels long."""
    while True:
        script = rng.choices(scripts, [SCRIPTS[name].weight for name in scripts])[0]
        if not (known := families(folder, script, part)):
            continue
        face = rng.choice(rng.choice(known))
        shown = unicodedata.normalize("NFC", text(rng, script, part))
        if column:
            shown = re.sub(r"[\W\d_]", "", shown)[: rng.randint(2, 10)]
        if not shown.strip() or not {*map(ord, shown)} <= face.characters | {ord(" ")}:
            continue
        apart = script in APART and not column and rng.random() < 0.12
        px = round(float(np.exp(rng.uniform(np.log(12), np.log(64)))))
        drawn = Line(shown, face.path, px, script, face.index, column,
                     rng.uniform(0.05, 0.4) if apart else 0)  # fmt: skip
        if column or (length := length_of(drawn, SHAPED)) <= 900:
            return drawn
        fitting = shown[: max(1, int(len(shown) * 900 / length))].strip() or shown[0]
        return replace(drawn, text=fitting)
