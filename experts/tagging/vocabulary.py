"""What taggers of any vocabulary share: the vocabulary, its text features, scores, calibration.

A model that was trained on images and their texts embeds both in one space; a tag fits an image as
well as the cosine of their embeddings says. Source: CLIP (Radford et al., arXiv 2103.00020), whose
prompts, and the mean of several of them, are used here; SigLIP (Zhai et al., arXiv 2303.15343).
docs/tagging.md tells what the scores mean.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator, model_validator

from experts.base import ASSETS, Context, ExpertConfig
from experts.checkpoint import CheckpointConfig, checkpoint_revision
from experts.scores import ranked, softmax
from fusion_pipeline.dataset.evidence import EvidenceKind, Tag
from fusion_pipeline.dataset.images import RGB

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

BUILT_IN = "built-in"
TAGS = ASSETS / "tags.txt"
_TEXTS = 64
"""Texts that are embedded at once."""
_WORTH_KEEPING_S = 5.0
"""Text features that took longer to compute are kept on disk. Of the built-in vocabulary they take
one core 1 minute (CLIP ViT-B/32), 10 (SigLIP base) or 45 (SigLIP so400m), for every worker."""
_STEEPEST = 1e4


@dataclass(frozen=True, slots=True)
class Vocabulary:
    tags: tuple[str, ...]
    floors: tuple[float | None, ...]
    """Of each tag, the score from which it is told; None: the config's `score_floor`."""


def read_vocabulary(path: Path) -> Vocabulary:
    """One tag a line, after a tab perhaps its own score floor. Empty lines and lines that begin
    with # are left out.

    Raises ValueError, which names file, line and fix.
    """
    floors: dict[str, float | None] = {}
    for number, line in enumerate(_text_of(path).splitlines(), 1):
        tag, tab, floor = line.partition("\t")
        tag = " ".join(tag.split())
        if line.strip() and not line.startswith("#"):
            if not tag or tag in floors:
                raise ValueError(f"{path}, line {number}: {'twice' if tag else 'no tag'}: {line!r}")
            floors[tag] = _score(floor, f"{path}, line {number}") if tab else None
    if not floors:
        raise ValueError(f"{path}: no tag in it; write one a line")
    return Vocabulary(tuple(floors), tuple(floors.values()))


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ValueError(f"{path}: can't be read: {reason}") from error


def _score(text: str, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError(f"{place}: after the tab comes a score from 0 to 1, not {text!r}")
    return value


class Calibration(ExpertConfig):
    """A cosine as a probability: sigmoid(scale * cosine + bias)."""

    scale: float = Field(gt=0, le=_STEEPEST)
    """Steepness."""
    bias: float = Field(ge=-_STEEPEST, le=_STEEPEST)
    """Log-odds at a cosine of 0."""

    def scores(self, cosines: npt.ArrayLike) -> Float64:
        """Of the same shape, in 0..1."""
        logits = self.scale * np.asarray(cosines, np.float64) + self.bias
        found: Float64 = np.exp(-np.logaddexp(0.0, -logits))
        return found


def fit_calibration(cosines: npt.ArrayLike, is_right: npt.ArrayLike) -> Calibration:
    """The calibration under which labelled pairs of image and tag are most likely (Platt 1999, with
    his correction for few pairs).

    `cosines` [n] are the model's (`VocabularyTagger.cosines`), `is_right` [n] says of each pair
    whether the tag fits the image. Scores are probabilities for pairs of the same mix: take them as
    the tagger meets them, not half right and half wrong ones.

    Raises ValueError without both kinds of pairs, or when right ones don't have larger cosines.
    """
    x, right = np.asarray(cosines, np.float64).ravel(), np.asarray(is_right, bool).ravel()
    if len(x) != len(right) or not np.isfinite(x).all():
        raise ValueError(f"{len(x)} cosines, some perhaps no numbers, and {len(right)} labels")
    if not 0 < right.sum() < len(right):
        raise ValueError(
            f"{right.sum()} right pairs of {len(right)}: some of both kinds are needed"
        )
    if x[right].mean() <= x[~right].mean():
        raise ValueError("right pairs have no larger cosines than wrong ones: are labels swapped?")
    target = np.where(right, 1 - 1 / (right.sum() + 2), 1 / ((~right).sum() + 2))
    centre, width = x.mean(), x.std()
    inputs = np.stack([(x - centre) / width, np.ones_like(x)], axis=1)
    slope, level = _logistic(inputs, target)
    return Calibration(scale=min(slope / width, _STEEPEST), bias=level - slope * centre / width)


def _logistic(inputs: Float64, target: Float64) -> tuple[float, float]:
    """Weights [2] of a logistic regression, by Newton's method with steps that never overshoot."""

    def loss(weights: Float64) -> float:
        logits = inputs @ weights
        return float(np.sum(np.logaddexp(0, logits) - target * logits))

    weights = np.zeros(2)
    for _ in range(100):
        share = 1 / (1 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        gradient = inputs.T @ (share - target)
        curvature = inputs.T @ (inputs * (share * (1 - share))[:, None]) + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        while loss(weights - step) > loss(weights) and np.abs(step).max() > 1e-9:
            step /= 2
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    return float(weights[0]), float(weights[1])


def check_templates(value: tuple[str, ...]) -> tuple[str, ...]:
    for template in value:
        if "{label}" not in template:
            raise ValueError(f"{template!r} has no {{label}} in it, such as 'a photo of {{label}}'")
    return value


class VocabularyConfig(CheckpointConfig):
    """Settings of a tagger that scores an image against a list of tags."""

    vocabulary: str = Field(default=BUILT_IN, min_length=1)
    """`built-in`, or a text file with one tag a line, after a tab perhaps its own score floor."""
    templates: tuple[str, ...] = Field(default=("this is a photo of {label}.",), min_length=1)
    """Texts that a tag is put into; of several, the mean of their embeddings is used."""
    calibration: Calibration | None = None
    """`{scale: ..., bias: ...}` of `fit_calibration`. Without it a score is the model's own."""
    score_floor: float = Field(default=0.01, ge=0, le=1)
    """Tags of at least this score are told."""
    max_tags: int = Field(default=20, ge=1, le=1000)
    """Most tags an image, the best ones."""

    _have_a_place = field_validator("templates")(check_templates)

    @model_validator(mode="after")
    def _vocabulary_is_read(self) -> "VocabularyConfig":
        # Now, and once: a file that changes while a run goes on can't change what its workers do.
        self.entries  # noqa: B018
        return self

    @cached_property
    def entries(self) -> Vocabulary:
        return read_vocabulary(
            TAGS if self.vocabulary == BUILT_IN else Path(self.vocabulary).expanduser()
        )

    def fingerprint_fields(self) -> dict[str, Any]:
        """With a hash of the vocabulary in place of its name: a file may be moved."""
        return {**super().fingerprint_fields(), "vocabulary": _hash(asdict(self.entries))}


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


class ImageTextModel(Protocol):
    """A model that embeds images and texts in one space."""

    scale: float
    """Factor of a cosine in the model's own score."""
    bias: float | None
    """Of models that were trained with a sigmoid; None: with a softmax."""
    short_edge: int
    """Short edge in pixels below which an image loses detail."""
    identity: tuple[str, ...]
    """All that text features depend on, besides texts and revision."""

    def embed_images(self, images: Sequence[RGB]) -> Float32:
        """float32 [n, d] of unit norm."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> Float32:
        """float32 [n, d] of unit norm. What is longer than the model reads is cut."""
        ...


class VocabularyTagger:
    """Tags of a list, best first. An expert adds its `Config` and loads its model.

    Scores are the model's own unless the config has a calibration: of a model that was trained with
    a sigmoid, that sigmoid; of one that was trained with a softmax, a softmax over the vocabulary.
    The latter depend on the vocabulary's size, sum to 1, and so mean nothing absolute.
    """

    kind: ClassVar[EvidenceKind] = EvidenceKind.TAGS
    uses_tags: ClassVar[bool] = False

    @classmethod
    def revision(cls, config: VocabularyConfig) -> str:
        return checkpoint_revision(config)

    def __init__(self, config: VocabularyConfig, model: ImageTextModel) -> None:
        self._config = config
        self._model = model
        self.labels = config.entries.tags
        floors = config.entries.floors
        own = np.array([config.score_floor if f is None else f for f in floors])
        self._floors = np.maximum(own, np.finfo(np.float64).smallest_subnormal)  # nothing is no tag
        self._texts = text_features(config, model)
        self.batch_size = config.batch_size
        self.min_short_edge: int | None = model.short_edge

    def __call__(self, images: Sequence[RGB], context: Sequence[Context]) -> list[list[Tag]]:
        rows = (self._scores(row) for row in self.cosines(images))
        return [ranked(self.labels, row, self._config.max_tags, self._floors) for row in rows]

    def cosines(self, images: Sequence[RGB]) -> Float32:
        """float32 [images, tags], of each image and each of `labels`: what a calibration is fitted
        on."""
        rows = [np.empty((0, len(self.labels)), np.float32)]
        for start in range(0, len(images), self.batch_size):
            batch = self._model.embed_images(images[start : start + self.batch_size])
            # One by one: a product with several columns rounds in another way. And not by BLAS,
            # which has threads of its own.
            rows += [np.einsum("td,d->t", self._texts, image)[None] for image in batch]
        return np.concatenate(rows)

    def _scores(self, cosines: Float32) -> npt.NDArray[np.floating[Any]]:
        if self._config.calibration or self._model.bias is not None:
            return pair_scores(self._model, cosines, self._config.calibration)
        return softmax(self._model.scale * cosines)


def pair_scores(
    model: ImageTextModel, cosines: npt.ArrayLike, calibration: Calibration | None
) -> Float64:
    """How well texts fit images, 0..1, each pair for itself: by the calibration, else by the
    sigmoid that the model was trained with.

    Raises ValueError for a model that was trained with a softmax and has no calibration.
    """
    if calibration is None:
        if model.bias is None:
            raise ValueError(
                "this model was trained with a softmax, which says nothing of a single text: fit a "
                "calibration (docs/tagging.md)"
            )
        calibration = Calibration(scale=model.scale, bias=model.bias)
    return calibration.scores(cosines)


def relevance(
    model: ImageTextModel,
    images: Sequence[RGB],
    texts: Sequence[Sequence[str]],
    calibration: Calibration | None = None,
) -> list[list[float]]:
    """How well each text fits its image, 0..1: alt texts of web pages often belong to another one.

    `texts` holds the texts of each image. A calibration for tags is not one for sentences. Raises
    ValueError for a model that was trained with a softmax and has no calibration.
    """
    pairs = [(image, text) for image, own in enumerate(texts) for text in own]
    found: list[list[float]] = [[] for _ in texts]
    if pairs:
        seen = model.embed_images(images)
    for start in range(0, len(pairs), _TEXTS):  # one image may have thousands of texts
        part = pairs[start : start + _TEXTS]
        told = model.embed_texts([text for _, text in part])
        cosines = (told * seen[[image for image, _ in part]]).sum(axis=1)
        scores = pair_scores(model, cosines, calibration).tolist()
        for (image, _), score in zip(part, scores, strict=True):
            found[image].append(score)
    return found


def text_features(config: VocabularyConfig, model: ImageTextModel) -> Float32:
    """float32 [tags, d] of unit norm: of each tag, the mean over the templates. Kept on disk when
    they took long (`~/.cache/fusion-pipeline`, or under `XDG_CACHE_HOME`)."""
    tags, templates = config.entries.tags, config.templates
    parts = [checkpoint_revision(config), list(model.identity), list(tags), list(templates)]
    place = _cache() / f"{_hash(parts)}.npy"
    kept = _read(place, len(tags))
    if kept is not None:
        return kept
    since = time.monotonic()
    rows = []
    for start in range(0, len(tags), _TEXTS):
        part = tags[start : start + _TEXTS]
        rows.append(embed_labels(model, part, templates))
    found = np.concatenate(rows)
    if time.monotonic() - since > _WORTH_KEEPING_S:
        _write(place, found)
    return found


def embed_labels(model: ImageTextModel, labels: Sequence[str], templates: Sequence[str]) -> Float32:
    """float32 [labels, d] of unit norm: of each label, the mean over the templates."""
    filled = [[template.replace("{label}", label) for label in labels] for template in templates]
    return unit(np.sum([model.embed_texts(texts) for texts in filled], axis=0))


def unit(vectors: Float32) -> Float32:
    """Rows [n, d] scaled to a length of 1."""
    found: Float32 = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    return found


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fusion-pipeline" / "text-features"


def _read(place: Path, rows: int) -> Float32 | None:
    try:
        kept = np.load(place, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # not there, or cut off: it is computed anew
        return None
    good = kept.dtype == np.float32 and kept.ndim == 2 and len(kept) == rows
    return kept if good and np.isfinite(kept).all() else None


def _write(place: Path, features: Float32) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
            np.save(file, features, allow_pickle=False)
        os.replace(file.name, place)
    except OSError:  # a full disk, a home that can't be written: it costs only time
        return
