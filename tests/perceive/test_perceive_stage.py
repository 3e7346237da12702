"""The stage that hosts experts: one odd image costs its row, and nothing else."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from experts import EXPERTS, load_expert
from experts.base import Context, ExpertConfig, Hardware
from fusion_pipeline.config import load_config
from fusion_pipeline.dataset.evidence import DetectedObject, EvidenceKind
from fusion_pipeline.dataset.images import RGB
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.engine.chain import Chain
from fusion_pipeline.engine.errors import StageError
from fusion_pipeline.engine.shard import run_stage
from fusion_pipeline.engine.stage import Resources, ShardBlock, ShardImages
from fusion_pipeline.perceive.stage import Perceive, _PerceiveWorker
from fusion_pipeline.perceive.tiles import TilesConfig
from tests.toy import ROWS, run_toy, toy_steps

TILES = TilesConfig(edge=640)


class Picky:
    """Finds one object an image; breaks on the image whose green value it is told."""

    kind: ClassVar[EvidenceKind] = EvidenceKind.OBJECTS
    version: ClassVar[int] = 3
    uses_tags: ClassVar[bool] = False
    batch_size: int = 4
    min_short_edge: ClassVar[int | None] = None
    calls: ClassVar[list[tuple[list[int], list[Context]]]] = []

    class Config(ExpertConfig):
        breaks_on: int | None = None
        how: str = "raise"
        floor: float = 0.25

    @classmethod
    def revision(cls, config: Any) -> str:
        return "sha256:0123"

    def __init__(self, config: Config, hardware: Hardware) -> None:
        self._config = config

    def __call__(self, images: Sequence[RGB], context: Sequence[Context]) -> list[Any]:
        rows = [int(image[0, 0, 1]) for image in images]
        self.calls.append((rows, list(context)))
        if self._config.breaks_on in rows:
            if self._config.how == "memory":
                raise MemoryError("no memory for this batch")
            if self._config.how == "raise":
                raise ValueError("negative box\nat <Tensor object at 0x7f00aa>")
        return [self._see(row) for row in rows]

    def _see(self, row: int) -> Any:
        if row == self._config.breaks_on and self._config.how == "nonsense":
            return [DetectedObject("cat", "very high", (0, 0, 1))]  # type: ignore[arg-type]
        return [DetectedObject(f"row-{row}", 0.5, (0.0, 0.0, 0.25, 1.0))] if row else []


@pytest.fixture
def expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPERTS, "picky", f"{__name__}:Picky")
    monkeypatch.setattr(Picky, "calls", [])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("perceive")
    run_toy(root, range(1), toy_steps()[:1])
    return Dataset.open(root)


def perceive(dataset: Dataset, **config: Any) -> list[dict[str, Any]]:
    stage = Perceive("picky", Picky.Config(**config))
    tables = {"samples": dataset.read_table("samples", 0)[0]}
    block = ShardBlock(dataset, 0, tables, ShardImages(dataset, 0))
    table = stage.open()(block)
    assert table["key"].to_pylist() == block.keys
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


@pytest.mark.usefixtures("expert")
def test_evidence_of_each_image_in_order(dataset: Dataset) -> None:
    rows = perceive(dataset)
    assert [row["status"] for row in rows] == ["ok"] * ROWS
    assert rows[0]["objects"] == []  # nothing found is an answer, not a missing one
    assert rows[5]["objects"] == [{"label": "row-5", "score": 0.5, "box": [0, 0, 0.25, 1]}]
    assert [seen for seen, _ in Picky.calls] == [[0, 1, 2, 3], [4, 5]]  # slices of its own size
    assert Picky.calls[1][1][0] == Context(8, 8, ("text 4",), key=rows[4]["key"])


@pytest.mark.usefixtures("expert")
@pytest.mark.parametrize(
    ("how", "reason"), [("raise", "ValueError: negative box"), ("nonsense", "TypeError")]
)
def test_an_image_that_breaks_its_slice_fails_alone(
    how: str, reason: str, dataset: Dataset
) -> None:
    good = perceive(dataset)
    rows = perceive(dataset, breaks_on=2, how=how)
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "ok", "ok", "ok"]
    assert rows[2]["reason"].startswith(reason)
    assert rows[2]["objects"] is None
    assert [r for i, r in enumerate(rows) if i != 2] == [r for i, r in enumerate(good) if i != 2]


@pytest.mark.usefixtures("expert")
def test_an_image_that_cannot_be_decoded_fails_alone(dataset: Dataset) -> None:
    stage = Perceive("picky", Picky.Config())
    images = ShardImages(dataset, 0)
    tables = {"samples": dataset.read_table("samples", 0)[0]}
    keys = tables["samples"]["key"].to_pylist()
    images.by_key[keys[4]] = images.by_key[keys[4]][:50]
    rows = stage.open()(ShardBlock(dataset, 0, tables, images)).to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * 4 + ["failed", "ok"]
    assert rows[4]["reason"].startswith("truncated: ")


@pytest.mark.usefixtures("expert")
def test_out_of_memory_is_nobodys_row(dataset: Dataset) -> None:
    with pytest.raises(MemoryError, match="this batch"):
        perceive(dataset, breaks_on=2, how="memory")
    step, place = toy_steps()[1], Chain.resolve(dataset, toy_steps()).place
    stage = Perceive("picky", Picky.Config(breaks_on=2, how="memory"))
    with pytest.raises(StageError, match=r"'a' broke on shard 0: MemoryError"):
        run_stage(place, step, stage.open, 0, ShardImages(dataset, 0))
    assert dataset.shards_of(place.versions["a"]) == set()


@pytest.mark.usefixtures("expert")
def test_on_a_gpu_the_next_slice_is_decoded_ahead(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same outcomes, an image that can't be decoded among them. (No GPU is needed to be
    told of one.)"""
    last_was_decoded = threading.Event()

    def decoded(worker: Any, images: Any, contexts: Any) -> Any:
        if len(images) == 2:
            last_was_decoded.set()
        return decodes(worker, images, contexts)

    decodes = _PerceiveWorker._decode
    monkeypatch.setattr(_PerceiveWorker, "_decode", decoded)

    def run(gpus: float) -> Any:
        images = ShardImages(dataset, 0)
        samples = dataset.read_table("samples", 0)[0]
        key = samples["key"].to_pylist()[4]
        images.by_key[key] = images.by_key[key][:50]
        stage = Perceive("picky", Picky.Config(), resources=Resources(gpus=gpus))
        worker = stage.open()
        last_was_decoded.clear()
        return worker(ShardBlock(dataset, 0, {"samples": samples}, images))

    plain = run(0)
    see = Picky._see
    monkeypatch.setattr(Picky, "_see", lambda *a: last_was_decoded.wait(20) and see(*a))
    assert run(0.5) == plain
    warm_up, first = Picky.calls[-3], Picky.calls[-2]
    assert warm_up[1] == [Context(448, 448)]
    assert first[0] == [0, 1, 2, 3]


@pytest.mark.usefixtures("expert")
def test_a_detector_with_tiles(dataset: Dataset) -> None:
    """Images of 8 pixels have none: what is found is the same, and the lineage is not."""
    stage, plain = (Perceive("picky", Picky.Config(), tiles=t) for t in (TILES, None))
    block = ShardBlock(
        dataset, 0, {"samples": dataset.read_table("samples", 0)[0]}, ShardImages(dataset, 0)
    )
    assert stage.open()(block) == plain.open()(block)
    tiles = {**TILES.model_dump(), "version": 1}
    assert stage.settings() == {**plain.settings(), "tiles": tiles}
    other = Perceive("picky", Picky.Config(), label="mine")
    assert other.settings() == {**plain.settings(), "expert": "picky"}


@pytest.mark.usefixtures("expert")
def test_what_goes_into_its_lineage() -> None:
    stage = Perceive("picky", Picky.Config(floor=0.5))
    assert (stage.name, stage.version, stage.revision()) == ("objects/picky", 3, "sha256:0123")
    assert stage.settings() == {"breaks_on": None, "how": "raise", "floor": 0.5}
    with pytest.raises(ValidationError, match="flor"):
        Picky.Config(flor=0.5)  # type: ignore[call-arg]


def test_an_unknown_expert_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"is called 'yolo'; known: .*nanodet, .*rapidocr"):
        load_expert("yolo")


@pytest.mark.usefixtures("expert")
def test_registering_is_all_a_config_needs(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("run: out\nsource: {folder: in}\nexperts: [picky: {floor: 0.75}, nanodet]\n")
    config = load_config(path)
    assert config.experts[0].config == Picky.Config(floor=0.75)
    assert "floor: 0.75" in config.to_yaml()
