"""What a run does about settings, sources and inputs that changed under it."""

import io
import shutil
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from fusion_pipeline.config import ConfigError, load_config
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.ingest.rows import SourceError
from fusion_pipeline.pipeline import Pipeline, build_pipeline
from fusion_pipeline.runner import Options, PipelineError, Runner
from tests.toy import files_of

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(12):
        image = Image.effect_noise((270, 260), 20 + 10 * i).convert("RGB")
        image.paste((20 * i, 255 - 20 * i, 90), (0, 0, 20 + 20 * i, 130))
        image.save(folder / f"{i:02d}.png")
    return folder


def job(photos: Path, *overrides: str) -> Pipeline:
    settings = [
        f"run={photos.parent / 'out'}",
        "source.webdataset=null",
        f"source.folder={photos}",
        "source.shard_size=3",
        "select.clusters=3",
        "experts=[efficientnet-lite2]",
        *overrides,
    ]
    return build_pipeline(load_config(QUICKSTART, settings))


def run(pipeline: Pipeline, **options: object) -> str:
    shown = io.StringIO()
    settings = Options(in_process=True, **options)  # type: ignore[arg-type]
    Runner(pipeline, settings, Console(file=shown, width=200)).run()
    return shown.getvalue()


def clusters_of(dataset: Dataset) -> list[int]:
    return [c for _, table in dataset.iterate("clusters") for c in table["cluster"].to_pylist()]


def test_new_centroids_take_the_old_assignments_with_them(photos: Path, tmp_path: Path) -> None:
    pipeline = job(photos)
    run(pipeline, until="clusters", limit=6)
    assert "centroids is stale" in run(pipeline, until="clusters")
    run(pipeline, until="clusters", overwrite=True)
    shutil.rmtree(tmp_path / "out.at.once", ignore_errors=True)
    at_once = job(photos, f"run={tmp_path / 'out.at.once'}")
    run(at_once, until="clusters")
    assert clusters_of(pipeline.pool) == clusters_of(at_once.pool)


def test_limit_after_a_fuller_ingest(photos: Path) -> None:
    pipeline = job(photos)
    run(pipeline, until="ingest")
    run(pipeline, limit=6, until="selection")
    assert len(pipeline.pool.shards()) == 4
    assert len(pipeline.pool.shards_of("selection")) == 2


def test_a_half_written_selection_is_not_packed(photos: Path) -> None:
    pipeline = job(photos)
    run(pipeline, until="selection")
    pipeline.pool.storage.delete("artifacts/selection.parquet")  # killed before the end mark
    with pytest.raises(PipelineError, match="'selection' is not complete"):
        run(pipeline, only="repack")
    assert not pipeline.selected.shards()


def test_shards_of_an_old_plan_never_mix_with_new_settings(photos: Path) -> None:
    run(job(photos), until="ingest")
    other = job(photos, "source.shard_size=4")
    with pytest.raises(SourceError, match="or the source's settings"):
        run(other, until="ingest")
    before = files_of(Path(other.pool.storage.root))
    other.pool.storage.delete("artifacts")  # --overwrite, killed while it cleared
    with pytest.raises(Exception, match="shard_size: 3 -> 4"):
        run(other, until="ingest")
    run(other, until="ingest", overwrite=True)
    assert [t.num_rows for _, t in other.pool.iterate("samples")] == [4, 4, 4]
    assert before != files_of(Path(other.pool.storage.root))


def test_hidden_files_are_not_a_changed_source(photos: Path) -> None:
    run(job(photos), until="ingest")
    (photos / ".DS_Store").write_bytes(b"x")
    run(job(photos), until="ingest")


def test_outputs_inside_the_source_are_refused(photos: Path) -> None:
    with pytest.raises(ConfigError, match="outputs would become input"):
        job(photos, f"run={photos}/out")
