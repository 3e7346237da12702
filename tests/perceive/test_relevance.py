"""Which alt texts belong to their image: scores of a model, and what is made of them."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experts.base import Hardware
from experts.checkpoint import CheckpointError
from experts.tagging.clip import ClipConfig, ClipModel
from experts.tagging.vocabulary import relevance
from fusion_pipeline.config import ConfigError, load_config
from fusion_pipeline.dataset.images import decode
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.rows import Ok, build_table
from fusion_pipeline.engine.stage import Resources, ShardBlock, ShardImages
from fusion_pipeline.perceive import relevance as module
from fusion_pipeline.perceive.alt_text import AltText, AltTextConfig
from fusion_pipeline.perceive.relevance import Relevance, RelevantAltTexts
from fusion_pipeline.pipeline import evidence_of
from fusion_pipeline.prompts.stages import read_evidence
from tests.experts import tiny_taggers
from tests.toy import run_toy, toy_steps

RAWS = [
    ["A red fox", "Click to enlarge", "Harbour at dusk"],
    [],
    ["IMG_0001.JPG"],
    ["A cat on a sofa"],
    ["The old mill", "Two boats"],
    ["Snow"],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "siglip"
    tiny_taggers.siglip(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("relevance")
    run_toy(root, range(1), toy_steps()[:1])
    return Dataset.open(root)


@pytest.fixture
def block(dataset: Dataset) -> ShardBlock:
    """Six tiny images with the texts above, cleaned."""
    samples = dataset.read_table("samples", 0)[0]
    place = samples.schema.get_field_index("alt_texts")
    samples = samples.set_column(place, samples.schema.field(place), [RAWS])
    block = ShardBlock(dataset, 0, {"samples": samples}, ShardImages(dataset, 0))
    return with_table(block, "alt_texts", AltText(AltTextConfig()).open()(block))


def with_table(block: ShardBlock, name: str, table: Any) -> ShardBlock:
    tables = {**block._tables, name: table}
    return ShardBlock(block.dataset, block.shard, tables, ShardImages(block.dataset, 0))


def stage_of(model: Path, **settings: Any) -> Relevance:
    return Relevance("clip", ClipConfig(model=str(model), **settings), "siglip")


def test_each_text_has_the_models_own_score(block: ShardBlock, model: Path) -> None:
    found = stage_of(model).open()(block).column("relevance").to_pylist()
    loaded = ClipModel(ClipConfig(model=str(model)), Hardware())
    image = loaded.embed_images([decode(block.images[0])])[0]
    cosines = loaded.embed_texts(["A red fox", "Harbour at dusk"]) @ image
    expected = 1 / (1 + np.exp(-(loaded.scale * cosines + loaded.bias)))
    assert found[0][0::2] == pytest.approx(expected, rel=1e-5)
    assert found[0][1] is None  # nothing is left of it
    assert [len(scores) for scores in found] == [3, 0, 1, 1, 2, 1]
    assert found[2] == [None]


def test_the_best_come_first_and_the_others_go(block: ShardBlock) -> None:
    scores = [[0.4, None, 0.9], [], [None], [0.1], [0.6, 0.5], [0.35]]
    stage = Relevance("clip", ClipConfig.model_construct(), "siglip")
    outcomes = [Ok({"relevance": cell}) for cell in scores]
    scored = with_table(block, stage.name, build_table(block.keys, outcomes, stage.columns))
    ranked = RelevantAltTexts(stage.name, threshold=0.35)
    table = ranked.open()(scored)
    rows = table.column("alt_texts").to_pylist()
    assert rows[0] == [
        {"text": "Harbour at dusk", "reason": None, "language": None,
         "relevance": pytest.approx(0.9)},
        {"text": "A red fox", "reason": None, "language": None, "relevance": pytest.approx(0.4)},
        {"text": "", "reason": "boilerplate", "language": None, "relevance": None},
    ]  # fmt: skip
    assert rows[3] == [
        {"text": "", "reason": "irrelevant", "language": None, "relevance": pytest.approx(0.1)}
    ]
    told = read_evidence(with_table(scored, ranked.name, table), (ranked.name,))
    assert [row.alt_texts for row in told] == [
        ["Harbour at dusk", "A red fox"], [], [], [], ["The old mill", "Two boats"], ["Snow"],
    ]  # fmt: skip


def test_scores_that_are_no_numbers_fail_their_row(
    block: ShardBlock, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = stage_of(model).open()
    monkeypatch.setattr(module, "relevance", lambda _, images, *__: [[float("nan")]] * len(images))
    rows = worker(block).to_pylist()
    assert rows[0]["status"] == "failed"
    assert rows[0]["reason"].startswith("not_finite")


def test_a_batch_scores_like_its_images_alone(block: ShardBlock, model: Path) -> None:
    alone = stage_of(model).open()(block)
    block.images[3] = block.images[3][:50]  # breaks its batch, and fails alone
    together = stage_of(model, batch_size=4).open()(block).to_pylist()
    assert [row["status"] for row in together] == ["ok"] * 3 + ["failed"] + ["ok"] * 2
    for one, other in zip(alone.to_pylist(), together, strict=True):
        if other["status"] == "ok":  # NaN for None, so that numpy compares both
            expected = np.array(one["relevance"], float)
            np.testing.assert_allclose(np.array(other["relevance"], float), expected, rtol=1e-4)


def test_thousands_of_texts_are_embedded_in_parts(model: Path) -> None:
    loaded = ClipModel(ClipConfig(model=str(model)), Hardware())
    image = np.zeros((50, 50, 3), np.uint8)
    texts = [f"text {number}" for number in range(150)]
    sizes = list[int]()

    class Counting:
        scale, bias = loaded.scale, loaded.bias
        embed_images = staticmethod(loaded.embed_images)

        def embed_texts(self, texts: list[str]) -> Any:
            sizes.append(len(texts))
            return loaded.embed_texts(texts)

    [scores] = relevance(Counting(), [image], [texts])  # type: ignore[arg-type]
    assert len(scores) == 150
    assert max(sizes) <= 64


def test_what_goes_into_its_lineage(model: Path) -> None:
    clip = stage_of(model)
    others = [
        Relevance("open-clip", clip.config, "siglip"),
        Relevance("clip", clip.config, "siglip", Resources(threads=2)),
        stage_of(model, calibration={"scale": 10, "bias": -3}),
        stage_of(model, batch_size=4),
    ]
    assert len({str(stage.settings()) for stage in [clip, *others]}) == 5


def test_an_image_that_cannot_be_decoded_fails_alone(block: ShardBlock, model: Path) -> None:
    block.images[3] = block.images[3][:50]
    block.images[1] = b""  # without texts nobody looks at it
    rows = stage_of(model).open()(block).to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 3 + ["failed"] + ["ok"] * 2


def test_a_softmax_says_nothing_of_a_single_text(tmp_path: Path) -> None:
    tiny_taggers.clip(tmp_path / "clip")
    with pytest.raises(CheckpointError, match=r"softmax.*fit a calibration on sentences"):
        stage_of(tmp_path / "clip").open()
    stage_of(tmp_path / "clip", calibration={"scale": 10, "bias": -3}).open()


CONFIG = "run: out\nsource: {folder: photos}\n"


def test_prompts_are_made_from_the_relevant_ones(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG)
    assert "alt_texts" in evidence_of(load_config(path))
    path.write_text(CONFIG + f"relevance: {{clip: {{model: {model}, name: siglip}}}}\n")
    config = load_config(path)
    told = evidence_of(config)
    assert "alt_texts/relevant" in told
    assert not {"alt_texts", "relevance/siglip"} & set(told)
    path.write_text(config.to_yaml())
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("relevance: nanodet", "nanodet has no model for texts; clip and open-clip do"),
        ("relevance: {clip: {model: ./m, max_tags: 3}}", "clip.max_tags: a setting of taggers"),
        ("relevance: {expert: clip, name: x}", "this has 2 keys: expert, name"),
        ("experts: [{expert: rapidocr, name: ../x}]", "this has 2 keys: expert, name"),
        ("alt_text: {min_relevance: 0.1}", "no model scores the texts"),
    ],
)
def test_settings_without_effect_are_refused(more: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG + more + "\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(path)
