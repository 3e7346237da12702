"""Fits and measures the classifier that tells scripts which the text recogniser can't write.

    python -m benchmarks.line_scripts fetch FOLDER
    python -m benchmarks.line_scripts collect FOLDER
    python -m benchmarks.line_scripts fit FOLDER
    python -m benchmarks.line_scripts tune FOLDER
    python -m benchmarks.line_scripts score FOLDER

`fetch` downloads fonts and photos (550 MB, see `line_sources`), `collect` draws pages of lines in
26 scripts and keeps what the recogniser saw of each line that the detector found (an hour on one
core), `fit` writes `experts/assets/line_scripts.npz`, `tune` shows what thresholds would do, and
`score` measures the expert's own on fonts, words and photos that neither of the two has seen. The
same sources give the same file.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein

from benchmarks.line_sources import COMMON, SCRIPTS, SHAPED, fetch, line, photos
from benchmarks.rendered_lines import Colour, DrawnLine, Look, Page, Quad, draw_page
from benchmarks.result import finish
from experts.base import Hardware
from experts.ocr.rapidocr import LineReader, RapidOcrConfig
from experts.ocr.recogniser import Recognised
from experts.ocr.scripts import NO_TEXT, READABLE, WEIGHTS, ScriptGuess, features, kind_of
from fusion_pipeline.dataset.images import RGB
from fusion_pipeline.prompts.hints import HintConfig

PARTS = [*(f"fit-{i}" for i in range(8)), "tune-0", "test-0", "test-1"]
PAGES, LINES = 500, 9
"""Pages of a part, lines of a page."""
CROPS = 800
"""Photos of a part in which the detector looks for text that isn't there."""
HIDDEN, EPOCHS, BATCH, RATE, PENALTY = 128, 50, 128, 2e-3, 1e-3
HINTS_SCORE = HintConfig().text_threshold
Floats = npt.NDArray[np.float32]


# --- collect -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A line that was found: what was drawn there, and what the recogniser made of it."""

    script: str
    truth: str
    text: str
    score: float
    cover: float
    """Longer side of the found box, in those of the drawn line."""
    column: bool
    px: int
    font: str
    features: Floats

    @property
    def error(self) -> float:
        """Share of wrong characters."""
        truth, text = ("".join(part.split()) for part in (self.truth, self.text))
        return Levenshtein.distance(truth, text) / max(1, len(truth))

    @property
    def label(self) -> str:
        """Its class: that of the script, but for digits and signs that were found by themselves."""
        text, truth = ("".join(part.split()) for part in (self.text, self.truth))
        alone = bool(text) and text in truth and not any(map(str.isalpha, text))
        return COMMON if alone and len(text) >= 0.7 * self.cover * len(truth) else self.script


def look(rng: Random, pictures: Sequence[RGB]) -> Look:
    """One of many ways in which text is shown; about half of all pages lie straight."""
    ground, ink = _colours(rng)
    straight = rng.random() < 0.5
    return Look(
        angle=0 if straight else rng.gauss(0, 4) if rng.random() < 0.4 else rng.uniform(-32, 32),
        tilt=rng.uniform(0, 0.15) if rng.random() < 0.2 else 0,
        stretch=rng.uniform(0.75, 1.35) if rng.random() < 0.25 else 1,
        ground=ground,
        ink=ink,
        photo=rng.choice(pictures) if rng.random() < 0.25 else None,
        shadow=rng.randint(1, 3) if rng.random() < 0.12 else 0,
        shade=rng.uniform(0.2, 0.6) if rng.random() < 0.2 else 0,
        blur=rng.uniform(0.3, 1.4) if rng.random() < 0.33 else 0,
        smear=rng.randint(2, 4) if rng.random() < 0.07 else 0,
        noise=rng.uniform(1, 9) if rng.random() < 0.33 else 0,
        jpeg=rng.randint(30, 95) if rng.random() < 0.5 else None,
        scale=rng.uniform(0.5, 1) if rng.random() < 0.33 else 1,
    )


def _colours(rng: Random) -> tuple[Colour, Colour]:
    """Of ground and ink, as different in brightness as people choose them."""
    if rng.random() < 0.25:
        return rng.choice([((255, 255, 255), (0, 0, 0)), ((0, 0, 0), (255, 255, 255))])
    while True:
        pair = [(rng.randrange(256), rng.randrange(256), rng.randrange(256)) for _ in range(2)]
        pair = [c if rng.random() < 0.6 else (c[0], c[0], c[0]) for c in pair]
        bright = [0.3 * r + 0.59 * g + 0.11 * b for r, g, b in pair]
        if abs(bright[0] - bright[1]) > 70:
            return pair[0], pair[1]


def draw(rng: Random, folder: Path, part: str, pictures: Sequence[RGB]) -> Page:
    if rng.random() < 0.08:
        lines = [line(rng, folder, part, ["Hani", "Jpan", "Hang"], True) for _ in range(LINES)]
    else:
        lines = [line(rng, folder, part, [*SCRIPTS]) for _ in range(LINES)]
    return draw_page(lines, look(rng, pictures), rng, SHAPED)


def collect(folder: Path, name: str) -> None:
    """Lines of one part and their features, in a file that is not made again."""
    path = folder / f"{name}.npz"
    if path.exists():
        return
    part, rng = name.split("-")[0], Random(name)
    pictures, reader = photos(folder, part), Reader()
    found = [
        seen
        for _ in range(PAGES)
        for seen in reader.lines(draw(rng, folder, part, pictures), folder)
    ]
    for _ in range(CROPS):
        found += reader.noise(rng, rng.choice(pictures))
    plain = json.dumps([{**vars(seen), "features": None} for seen in found])
    values = np.stack([seen.features for seen in found])
    with path.with_suffix(".part").open("wb") as file:
        np.savez_compressed(file, lines=np.array(plain), features=values)
    os.replace(path.with_suffix(".part"), path)
    print(name, len(found), flush=True)


class Reader:
    """The expert's own steps, up to what it decides from."""

    def __init__(self) -> None:
        self._reader = LineReader(RapidOcrConfig(), Hardware())
        self._keen = LineReader(RapidOcrConfig(box_score=0.1), Hardware())
        self._kinds = np.array([kind_of(c) for c in self._reader.characters])

    def lines(self, page: Page, folder: Path) -> Iterator[Seen]:
        for quad, read in self._reader(page.image):
            if place := page.line_at(quad):
                drawn = page.lines[place[0]]
                if 0.25 < (cover := _cover(quad, drawn)) < 1.6:
                    yield self._seen(read, drawn, cover, folder)

    def noise(self, rng: Random, picture: RGB) -> Iterator[Seen]:
        """What a keener detector takes for text in some part of a photo."""
        height, width = picture.shape[:2]
        h, w = (round(side * rng.uniform(0.3, 1)) for side in (height, width))
        y, x = rng.randrange(height - h + 1), rng.randrange(width - w + 1)
        for _, read in self._keen(np.ascontiguousarray(picture[y : y + h, x : x + w])):
            yield Seen(NO_TEXT, "", read.text, read.score, 1, False, 0, "",
                       features(read, self._kinds))  # fmt: skip

    def _seen(self, read: Recognised, drawn: DrawnLine, cover: float, folder: Path) -> Seen:
        what = drawn.line
        return Seen(
            script=what.script,
            truth=what.text,
            text=read.text,
            score=float(read.score),
            cover=cover,
            column=what.column,
            px=what.px,
            font=str(what.font.relative_to(folder)),
            features=features(read, self._kinds),
        )


def _cover(quad: Quad, drawn: DrawnLine) -> float:
    found, own = (
        np.linalg.norm(q - np.roll(q, -1, axis=0), axis=1).max() for q in (quad, drawn.quad)
    )
    return float(found / max(own, 1))


def load(folder: Path, part: str) -> list[Seen]:
    found: list[Seen] = []
    for name in (name for name in PARTS if name.startswith(part)):
        with np.load(folder / f"{name}.npz", allow_pickle=False) as stored:
            rows, values = json.loads(stored["lines"].item()), stored["features"]
        found += [Seen(**{**row, "features": own}) for row, own in zip(rows, values, strict=True)]
    return found


# --- fit -----------------------------------------------------------------------------------------


def fit(folder: Path) -> None:
    """Trains on standardised features; the file takes features as they are."""
    lines = load(folder, "fit")
    values = np.stack([seen.features for seen in lines])
    labels = [seen.label for seen in lines]
    scripts = sorted(set(labels))
    target = np.array([scripts.index(label) for label in labels])
    middle, spread = values.mean(axis=0), values.std(axis=0) + 1e-3
    hidden, hidden_bias, out, out_bias = _train((values - middle) / spread, target, len(scripts))
    hidden /= spread[:, None]
    with WEIGHTS.open("wb") as file:
        np.savez_compressed(
            file,
            scripts=np.array(scripts),
            hidden=hidden.astype(np.float16),
            hidden_bias=hidden_bias - middle @ hidden,
            out=out.astype(np.float16),
            out_bias=out_bias,
        )
    print(f"{len(lines)} lines, {len(scripts)} classes, {WEIGHTS.stat().st_size} bytes")


def _train(values: Floats, target: npt.NDArray[np.int64], classes: int) -> list[Floats]:
    """Matrix and bias of the hidden layer (rectified), and of the layer after it (softmax).

    Cross-entropy, dropout before both layers, Adam with a rate that falls like a cosine.
    """
    rng = np.random.default_rng(0)
    rows, width = values.shape
    shapes = [(width, HIDDEN), (HIDDEN,), (HIDDEN, classes), (classes,)]
    scales = [math.sqrt(2 / width), 0, math.sqrt(1 / HIDDEN), 0]
    weights = [
        (rng.normal(0, 1, shape) * scale).astype(np.float32)
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    first, second = ([np.zeros_like(w) for w in weights] for _ in range(2))
    steps = EPOCHS * (rows // BATCH)
    for step in range(steps):
        if step % (rows // BATCH) == 0:
            order = rng.permutation(rows)
        chosen = order[(at := step % (rows // BATCH) * BATCH) : at + BATCH]
        slopes = _slopes(weights, values[chosen], target[chosen], rng)
        rate = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        for place, slope in enumerate(slopes):
            slope += PENALTY * weights[place]
            first[place] += 0.1 * (slope - first[place])
            second[place] += 0.001 * (slope**2 - second[place])
            mean = first[place] / (1 - 0.9 ** (step + 1))
            size = np.sqrt(second[place] / (1 - 0.999 ** (step + 1))) + 1e-8
            weights[place] -= rate * mean / size
    return weights


def _slopes(
    weights: Sequence[Floats],
    values: Floats,
    target: npt.NDArray[np.int64],
    rng: np.random.Generator,
) -> list[Floats]:
    """Of the loss of a batch, by weight."""
    hidden, hidden_bias, out, out_bias = weights
    seen = values * _kept(rng, values.shape, 0.9)
    before = seen @ hidden + hidden_bias
    open_ = (before > 0) * _kept(rng, before.shape, 0.8)
    inner = before * open_
    wrong = inner @ out + out_bias
    wrong = np.exp(wrong - wrong.max(axis=1, keepdims=True))
    wrong /= wrong.sum(axis=1, keepdims=True)
    wrong[np.arange(len(target)), target] -= 1
    wrong /= len(target)
    back = wrong @ out.T * open_
    return [seen.T @ back, back.sum(axis=0), inner.T @ wrong, wrong.sum(axis=0)]


def _kept(rng: np.random.Generator, shape: tuple[int, ...], share: float) -> Floats:
    """Dropout: 0 for what is left out, and what makes up for it for the rest."""
    return (rng.random(shape) < share).astype(np.float32) / np.float32(share)


# --- score ---------------------------------------------------------------------------------------


def score(lines: Sequence[Seen], config: RapidOcrConfig) -> list[dict[str, Any]]:
    """Shares by class. `unread`: marked so. `garbage`: of a script that can't be read, but kept as
    text; `in hints`: with a score that brings it into a prompt. `well read`: lines with at most
    30 % wrong characters, and how many of them are marked."""
    guess = ScriptGuess.load()
    guesses = [guess(seen.features) for seen in lines]
    pairs = list(zip(guesses, lines, strict=True))
    marked = np.array([config.is_unread(found, seen.score) for found, seen in pairs])
    named = np.array([found.script == seen.label for found, seen in pairs])
    labels = np.array([seen.label for seen in lines])
    scores = np.array([seen.score if seen.text.strip() else -1 for seen in lines])
    kept, shown = ~marked & (scores >= config.score_floor), ~marked & (scores >= HINTS_SCORE)
    good = np.array([seen.error <= 0.3 or seen.label == COMMON for seen in lines])
    readable = np.isin(labels, sorted(READABLE))
    text = readable & (labels != NO_TEXT)
    groups = {label: labels == label for label in sorted(set(labels.tolist()))}
    groups |= {"all that can be read": text, "all that can't": ~readable}

    def row(name: str, here: npt.NDArray[np.bool_]) -> dict[str, Any]:
        can = bool(readable[here].all())
        return {
            "lines of": name,
            "lines": int(here.sum()),
            "unread": float(marked[here].mean()),
            "garbage": 0.0 if can else float(kept[here].mean()),
            "in hints": 0.0 if can else float(shown[here].mean()),
            "well read": int((here & good).sum()) if can else 0,
            "of these unread": float(marked[here & good].mean()) if can else 0.0,
            "script named": 0.0 if can else float(named[here & marked].mean()),
        }

    return [row(name, here) for name, here in groups.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("step", choices=["fetch", "collect", "fit", "tune", "score"])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    cv2.setNumThreads(1)
    match options.step:
        case "fetch":
            fetch(options.folder)
        case "collect":
            for name in PARTS:
                collect(options.folder, name)
        case "fit":
            fit(options.folder)
        case "tune":
            lines = load(options.folder, "tune")
            for threshold, sure in product((0.3, 0.4, 0.5, 0.6), (0.5, 0.7, 0.8, 0.9)):
                config = RapidOcrConfig(unread_score=threshold, unread_score_sure=sure)
                print(threshold, sure, *score(lines, config)[-2:], sep="\n  ")
        case "score":
            rows = score(load(options.folder, "test"), RapidOcrConfig())
            wrong = float(rows[-2]["of these unread"])
            finish("unread-scripts", wrong, "of well-read lines", 0.01, wrong <= 0.01, rows)


if __name__ == "__main__":
    main()
