"""Vocabularies, scores and calibrations; models are in test_clip.py and test_open_clip.py."""

import io
import json
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from pydantic import ValidationError

from experts.base import ASSETS, Hardware
from experts.tagging import vocabulary
from experts.tagging.clip import ClipConfig, ClipModel, ClipTagger
from experts.tagging.vocabulary import (
    TAGS,
    Calibration,
    Float32,
    VocabularyConfig,
    VocabularyTagger,
    fit_calibration,
    read_vocabulary,
)
from fusion_pipeline.dataset.images import RGB
from tests.experts import tiny_taggers

DOCS = Path(__file__).parents[2] / "docs" / "tagging.md"
Pairs = tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]


class Axes:
    """Embeds a text as the axis of its first letter, an image as its mean colour."""

    scale, bias, short_edge = 4.0, None, 1
    identity = ("axes",)

    def embed_images(self, images: Sequence[RGB]) -> Float32:
        means = np.array([image.reshape(-1, 3).mean(0) for image in images], np.float32)
        return vocabulary.unit(means)

    def embed_texts(self, texts: Sequence[str]) -> Float32:
        return np.array([np.eye(3, dtype=np.float32)["rgb".index(text[0])] for text in texts])


@pytest.fixture
def words(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "words.txt"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def config(words: Callable[[str], str], tmp_path: Path) -> Callable[..., VocabularyConfig]:
    (tmp_path / "model").mkdir()

    def make(text: str = "red\ngreen\nblue\n", **settings: Any) -> VocabularyConfig:
        chosen = {"templates": ("{label}",), **settings}
        return VocabularyConfig(model=str(tmp_path / "model"), vocabulary=words(text), **chosen)

    return make


REDDISH = np.full((4, 4, 3), (200, 100, 0), np.uint8)  # cosines 2/√5, 1/√5, 0


def told(config: VocabularyConfig) -> dict[str, float]:
    [tags] = VocabularyTagger(config, Axes())([REDDISH], [])
    return {tag.label: tag.score for tag in tags}


def test_built_in_list() -> None:
    tags = TAGS.read_text(encoding="ascii").splitlines()
    assert tags == sorted(set(tags))
    assert 4000 < len(tags) < 6000
    assert all(re.fullmatch(r"[a-z0-9'-]+( [a-z0-9'-]+)*", tag) for tag in tags)
    other_names = {"couch", "donut", "hair drier", "remote", "tv", "laptop computer", "mouse",
                   "skis", "potted plant", "microwave", "keyboard"}  # fmt: skip
    coco = set((ASSETS / "coco80_labels.txt").read_text().splitlines())
    assert coco - set(tags) <= other_names
    assert {"beach", "wood", "knitting", "pie chart", "screenshot", "sunset"} <= set(tags)
    judging = r"\b(ugly|fat|poor|homeless|sexy|pretty|beautiful|obese|disabled|criminal|savage)\b"
    assert [tag for tag in tags if re.search(judging, tag)] == []


def test_vocabulary_files(words: Callable[[str], str]) -> None:
    path = words("# of a shop\ncoffee  cup\t0.35\n\n  Eiffel Tower \ncat\t0\n")
    found = read_vocabulary(Path(path))
    assert found.tags == ("coffee cup", "Eiffel Tower", "cat")
    assert found.floors == (0.35, None, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\ndog\ncat \n", "words.txt, line 3: twice"),
        ("cat\n\t0.5\n", "words.txt, line 2: no tag"),
        ("cat\tmuch\n", "words.txt, line 1: after the tab comes a score from 0 to 1, not 'much'"),
        ("cat\t1.5\n", "from 0 to 1, not '1.5'"),
        ("cat\tnan\n", "from 0 to 1, not 'nan'"),
        ("# nothing\n", "words.txt: no tag in it"),
    ],
)
def test_bad_vocabularies_are_named_with_the_line(
    config: Callable[..., VocabularyConfig], text: str, message: str
) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        config(text)


def test_a_missing_vocabulary_is_an_error_of_the_config(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"none\.txt: can't be read: No such file"):
        VocabularyConfig(model=str(tmp_path), vocabulary=str(tmp_path / "none.txt"))


def test_templates_have_a_place_for_the_tag(config: Callable[..., VocabularyConfig]) -> None:
    with pytest.raises(ValidationError, match=r"'a photo' has no \{label\} in it"):
        config(templates=("a photo",))


def test_fingerprint_is_of_what_the_vocabulary_holds(
    config: Callable[..., VocabularyConfig], tmp_path: Path
) -> None:
    first = config("cat\ndog\n")
    moved = tmp_path / "moved.txt"
    moved.write_text("# the same\n cat\n\ndog")
    same = first.model_copy(update={"vocabulary": str(moved)})
    assert VocabularyConfig(**same.model_dump()).fingerprint_fields() == first.fingerprint_fields()
    for other in ("dog\ncat\n", "cat\ndog\t0.5\n", "cat\ndog\nbird\n"):
        assert config(other).fingerprint_fields() != first.fingerprint_fields()
    assert str(tmp_path) not in json.dumps(first.fingerprint_fields())


def test_a_vocabulary_is_read_once(config: Callable[..., VocabularyConfig]) -> None:
    """Workers get the config through a pipe; the file may have changed, or not be there."""
    chosen = config("red\n")
    before = chosen.fingerprint_fields()
    Path(chosen.vocabulary).unlink()
    received = pickle.loads(pickle.dumps(chosen))  # noqa: S301
    assert received.entries.tags == ("red",)
    assert received.fingerprint_fields() == before


def test_softmax_over_the_vocabulary(config: Callable[..., VocabularyConfig]) -> None:
    powers = np.exp(4 * np.array([2, 1, 0]) / 5**0.5)
    expected = dict(zip(("red", "green", "blue"), powers / powers.sum(), strict=True))
    assert told(config()) == pytest.approx(expected)
    more = told(config("red\ngreen\nblue\nrose\n"))
    assert more["red"] == pytest.approx(powers[0] / (powers.sum() + powers[0]))


def test_calibrated_scores_do_not_depend_on_the_vocabulary(
    config: Callable[..., VocabularyConfig],
) -> None:
    settings: dict[str, Any] = {"calibration": Calibration(scale=10, bias=-5), "score_floor": 0}
    small, large = told(config("red\ngreen\n", **settings)), told(config(**settings))
    assert small["red"] == large["red"] == pytest.approx(1 / (1 + np.exp(5 - 20 / 5**0.5)))
    assert large["blue"] == pytest.approx(1 / (1 + np.exp(5)))


def test_tags_are_sorted_limited_and_over_their_floors(
    config: Callable[..., VocabularyConfig],
) -> None:
    settings: dict[str, Any] = {"calibration": Calibration(scale=10, bias=-5)}  # .98, .37, .007
    assert list(told(config("blue\ngreen\nred\n", **settings))) == ["red", "green"]
    assert list(told(config(**settings, score_floor=0.5))) == ["red"]
    assert list(told(config(**settings, max_tags=1))) == ["red"]
    own = "red\t0.99\ngreen\nblue\t0.005\n"
    assert list(told(config(own, **settings, score_floor=0.1))) == ["green", "blue"]


def test_values_that_are_no_numbers_fail(config: Callable[..., VocabularyConfig]) -> None:
    black = np.zeros((2, 2, 3), np.uint8)
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="not_finite"):
        VocabularyTagger(config(), Axes())([black], [])


def pairs(
    count: int, seed: int, right: float, wrong: float, spread: float, share: float = 0.05
) -> Pairs:
    """Cosines of right and wrong pairs, normally distributed: then the probability that a pair is
    right is exactly a sigmoid of its cosine."""
    random = np.random.default_rng(seed)
    is_right = random.random(count) < share
    return random.normal(np.where(is_right, right, wrong), spread), is_right


def truth(right: float, wrong: float, spread: float, share: float = 0.05) -> Calibration:
    scale = (right - wrong) / spread**2
    bias = np.log(share / (1 - share)) - (right**2 - wrong**2) / (2 * spread**2)
    return Calibration(scale=scale, bias=bias)


def calibration_error(scores: npt.NDArray[np.float64], is_right: npt.NDArray[np.bool_]) -> float:
    """Mean gap of score and share of right pairs, over 20 bins of score."""
    bins = np.minimum((scores * 20).astype(int), 19)
    gaps = [abs(scores[bins == b].sum() - is_right[bins == b].sum()) for b in range(20)]
    return float(sum(gaps)) / len(scores)


CLIP_LIKE = {"right": 0.28, "wrong": 0.20, "spread": 0.03}
SIGLIP_LIKE = {"right": 0.10, "wrong": 0.01, "spread": 0.025}
WIDE = {"right": 0.6, "wrong": 0.3, "spread": 0.1}


@pytest.mark.parametrize("kind", [CLIP_LIKE, SIGLIP_LIKE])
def test_calibration_finds_the_truth(kind: dict[str, float]) -> None:
    fitted, true = fit_calibration(*pairs(50_000, 0, **kind)), truth(**kind)
    assert fitted.scale == pytest.approx(true.scale, rel=0.05)
    assert fitted.bias == pytest.approx(true.bias, rel=0.05)

    cosines, is_right = pairs(50_000, 1, **kind)
    assert calibration_error(fitted.scores(cosines), is_right) < 0.003
    for others_number in (Calibration(scale=100, bias=-20), Calibration(scale=112, bias=-16.5)):
        assert calibration_error(others_number.scores(cosines), is_right) > 0.02


def test_a_threshold_means_the_same_for_every_model() -> None:
    """Of the tags that score 0.45 to 0.55 half are right, whichever model scores. A threshold for
    cosines of one model lets nothing of another one pass, or nearly all."""
    thresholds = []
    for kind in (CLIP_LIKE, SIGLIP_LIKE, WIDE):
        fitted = fit_calibration(*pairs(50_000, 2, **kind))
        cosines, is_right = pairs(200_000, 3, **kind)
        near = np.abs(fitted.scores(cosines) - 0.5) < 0.05
        assert near.sum() > 500
        assert is_right[near].mean() == pytest.approx(0.5, abs=0.05)
        thresholds.append(-fitted.bias / fitted.scale)
    (siglip, found), (wide, right) = pairs(50_000, 4, **SIGLIP_LIKE), pairs(50_000, 4, **WIDE)
    assert found[siglip >= thresholds[0]].sum() < 0.01 * found.sum()
    assert right[wide >= thresholds[0]].mean() < 0.1


def test_few_and_separable_pairs_give_a_gentle_slope() -> None:
    fitted = fit_calibration([0.1, 0.2, 0.3, 0.4], [False, False, True, True])
    scores = fitted.scores([0.1, 0.25, 0.4])
    assert scores[1] == pytest.approx(0.5)
    assert scores[2] < 0.95
    assert np.isfinite(fitted.scores([-1e6, 1e6])).all()


def test_pairs_that_can_not_be_fitted_are_refused() -> None:
    with pytest.raises(ValueError, match="0 right pairs of 2"):
        fit_calibration([0.1, 0.2], [False, False])
    with pytest.raises(ValueError, match="are labels swapped"):
        fit_calibration([0.3, 0.1], [False, True])
    with pytest.raises(ValueError, match=r"3 cosines.* 2 labels"):
        fit_calibration([0.3, 0.1, 0.2], [False, True])
    with pytest.raises(ValueError, match="no numbers"):
        fit_calibration([0.3, np.nan], [False, True])


def test_text_features_are_kept(
    config: Callable[..., VocabularyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told(config())  # was quick
    assert not (tmp_path / "cache").exists()

    monkeypatch.setattr(vocabulary, "_WORTH_KEEPING_S", -1.0)
    asked: list[Sequence[str]] = []
    embed = Axes.embed_texts
    monkeypatch.setattr(Axes, "embed_texts", lambda s, t: asked.append(list(t)) or embed(s, t))
    first = told(config())
    assert told(config()) == first
    assert asked == [["red", "green", "blue"]]
    [kept] = (tmp_path / "cache").rglob("*.npy")

    kept.write_bytes(kept.read_bytes()[:-4])  # cut off
    assert told(config()) == first
    told(config("green\nred\nblue\n"))
    told(config(templates=("{label} again",)))
    monkeypatch.setattr(Axes, "identity", ("axes", "cuda"))
    told(config())
    assert len(asked) == 5
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 4


def test_the_example_of_the_docs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_taggers.clip(Path("checkpoints/clip"))
    tiny_taggers.siglip(Path("checkpoints/siglip"))
    Path("my-tags.txt").write_text("\n".join(tiny_taggers.TAGS))
    Path("photos").mkdir()
    tagger = ClipTagger(ClipConfig(model="checkpoints/clip", vocabulary="my-tags.txt"), Hardware())
    labels = {}
    for number, colour in enumerate(("red", "green", "blue", "white"), 1):
        data = io.BytesIO()
        image = Image.new("RGB", (64, 64), colour)
        image.save(data, "JPEG")
        Path(f"photos/{number}.jpg").write_bytes(data.getvalue())
        best = tagger.cosines([np.asarray(image)])[0].argsort()[-2:]
        labels[f"photos/{number}.jpg"] = [tagger.labels[i] for i in best]
    Path("labels.json").write_text(json.dumps(labels))

    names: dict[str, Any] = {}
    page = DOCS.read_text(encoding="utf-8").partition("## RAM++")[0]  # the rest: test_ram_plus.py
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, names)
    calibration, relevances = capsys.readouterr().out.splitlines()
    config = ClipConfig(
        model="checkpoints/clip", vocabulary="my-tags.txt", calibration=json.loads(calibration)
    )
    [tags] = ClipTagger(config, Hardware())([np.asarray(Image.open("photos/1.jpg"))], [])
    assert {tag.label for tag in tags[:2]} == set(labels["photos/1.jpg"])
    assert [len(row) for row in json.loads(relevances)] == [2]
    assert isinstance(names["model"], ClipModel)
