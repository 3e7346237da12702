"""What a run does about settings, sources and inputs that changed under it."""

import contextlib
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from experts.tagging.efficientnet_lite2 import EfficientNetLite2Tagger
from fusion_pipeline.config import ConfigError
from fusion_pipeline.dataset import lease
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.dataset.tables import FingerprintMismatchError, StaleTableError
from fusion_pipeline.errors import FusionError
from fusion_pipeline.runner import PipelineError, Runner, SourceChangedError
from tests.jobs import EXPERT, job, make_photos, run, seen_in
from tests.killing import killed_at


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos")


def at_once(photos: Path, *overrides: str, **options: object) -> dict[str, bytes]:
    """What an undisturbed run makes of what is there now."""
    pipeline = job(photos, f"run={photos.parent / 'at-once'}", *overrides)
    run(pipeline, **options)
    found = seen_in(pipeline)
    shutil.rmtree(photos.parent / "at-once")
    return found


def test_new_centroids_are_a_new_version_of_clusters(photos: Path) -> None:
    pipeline = job(photos)
    run(pipeline, until="clusters", limit=6)
    first = pipeline.pool.version("clusters")
    said = run(pipeline, until="clusters")
    assert "centroids is stale: its input changed since. It is kept; --refresh makes" in said
    assert pipeline.pool.version("clusters") == first  # all shards by the old ones
    assert len(pipeline.pool.shards_of("clusters")) == 4
    assert "clusters is made anew" in run(pipeline, until="clusters", refresh=True)
    second = pipeline.pool.version("clusters")
    assert second.made_by == first.made_by  # the same settings
    assert second.folder != first.folder
    assert not pipeline.pool.storage.files(f"tables/clusters/{first.folder}")
    assert seen_in(pipeline) == at_once(photos, until="clusters")


def test_a_changed_setting_of_the_selection_is_named(photos: Path) -> None:
    run(job(photos), until="centroids")
    with pytest.raises(FingerprintMismatchError, match=r"config\.clusters: 3 -> 4\n.*--overwrite"):
        run(job(photos, "select.clusters=4"), until="centroids")
    run(job(photos, "select.clusters=4"), until="centroids", overwrite=True)


def test_steps_are_named_by_their_tables(photos: Path) -> None:
    with pytest.raises(PipelineError, match=r"did you mean captions/composer\?"):
        run(job(photos), until="captions")
    with pytest.raises(PipelineError, match="give one of them"):
        run(job(photos), until="report", only="report")


def test_assignments_to_old_centroids_are_not_taken_for_new_ones(photos: Path) -> None:
    """New centroids, and then the run dies before it comes to `clusters`."""
    pipeline = job(photos)
    run(pipeline, until="clusters", limit=6)
    run(pipeline, until="embeddings")
    run(pipeline, only="centroids", refresh=True)
    before = seen_in(pipeline)
    refused: list[dict[str, object]] = [{"until": "clusters"}, {"only": "clusters"}]
    for options in refused:
        with pytest.raises(StaleTableError, match=r"tables/clusters was made from .*--refresh"):
            run(pipeline, **options)
    assert seen_in(pipeline) == before
    run(pipeline, until="clusters", refresh=True)
    assert seen_in(pipeline) == at_once(photos, until="clusters")


def test_a_changed_source_is_an_error_and_refresh_makes_all_anew(photos: Path) -> None:
    pipeline = job(photos)
    run(pipeline)
    original = seen_in(pipeline)
    shutil.copy(photos / "03.png", photos / "12.png")
    with Image.open(photos / "05.png") as image:
        image.rotate(90, expand=True).save(photos / "13.png")
    refused: list[dict[str, object]] = [{}, {"until": "ingest"}, {"retry_failed": True}]
    for options in refused:
        with pytest.raises(SourceChangedError, match=r"what 'ingest' reads changed .*--refresh"):
            run(pipeline, **options)
    run(pipeline, only="hints")  # reads no source
    assert seen_in(pipeline) == original
    run(pipeline, refresh=True)
    assert seen_in(pipeline) == at_once(photos)
    assert seen_in(pipeline) != original
    assert run(pipeline, refresh=True) == ""
    for added in ("12.png", "13.png"):
        (photos / added).unlink()
    run(pipeline, refresh=True)
    assert {name: seen_in(pipeline)[name] for name in original} == original


def test_refresh_redoes_the_stale_shards_and_no_others(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert fails on one picture and is healed alone: what hangs on that shard is stale."""
    well = EfficientNetLite2Tagger.__call__

    def sick(self, images, context):  # type: ignore[no-untyped-def]
        if any(image[0, 0, 0] == 100 for image in images):  # 05.png
            raise ValueError("sick")
        return well(self, images, context)

    pipeline = job(photos, "select.shard_size=3")
    with monkeypatch.context() as patch:
        patch.setattr(EfficientNetLite2Tagger, "__call__", sick)
        run(pipeline)
    before = seen_in(pipeline)
    run(pipeline, only=EXPERT, retry_failed=True)
    stale = seen_in(pipeline)
    (healed,) = changed(before, stale)
    assert run(pipeline, until="captions/composer") == ""  # nothing is missing
    assert seen_in(pipeline) == stale
    run(pipeline, until="captions/composer", refresh=True)
    after = ("tags/merged", "hints", "prompts/engine-v1", "captions/composer")
    versions = map(pipeline.selected.version, after)
    expected = {f"selected/{version.path(int(Path(healed).stem))}" for version in versions}
    assert changed(stale, seen_in(pipeline)) == expected
    assert "export: " in run(pipeline, refresh=True)
    assert seen_in(pipeline) == at_once(photos, "select.shard_size=3")
    assert run(pipeline, refresh=True) == ""


def changed(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    return {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}


def test_what_a_killed_run_made_of_another_source_never_passes_for_this_one(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture comes, the run that makes all anew dies at some write, the picture goes again: the
    next run ends where it all began, with nothing missing and nothing of the other source."""
    for path in sorted(photos.iterdir())[3:]:
        path.unlink()
    pipeline = job(photos, "source.shard_size=2", "select.clusters=2")
    run(pipeline, until="repack")
    original = seen_in(pipeline)
    shutil.copytree(photos.parent / "out", photos.parent / "kept")
    refresh = partial(run, pipeline, until="repack", refresh=True)
    for crash_at in range(200):
        shutil.copy(photos / "01.png", photos / "99.png")
        is_over = not killed_at(crash_at, monkeypatch, refresh)
        (photos / "99.png").unlink()
        if is_over:
            break
        refresh()
        assert without_strays(seen_in(pipeline), original) == original
        shutil.rmtree(photos.parent / "out")
        shutil.copytree(photos.parent / "kept", photos.parent / "out")
    assert crash_at > 40


def without_strays(seen: dict[str, bytes], current: dict[str, bytes]) -> dict[str, bytes]:
    """Without what nothing pointed to yet when the run that had written it was killed: `selection`
    writes all its files first. They go when the table is next replaced."""
    stray = re.compile(r"/tables/selection/v-")
    return {n: data for n, data in seen.items() if not stray.search(n) or n in current}


def test_limit_after_a_fuller_ingest(photos: Path) -> None:
    pipeline = job(photos)
    run(pipeline, until="ingest")
    run(pipeline, limit=6, until="selection")
    assert len(pipeline.pool.shards()) == 4
    assert len(pipeline.pool.shards_of("selection")) == 2


def test_a_half_written_selection_is_not_packed(photos: Path) -> None:
    pipeline = job(photos)
    run(pipeline, until="selection")
    pipeline.pool.storage.delete("artifacts/selection")  # killed before the end mark
    with pytest.raises(PipelineError, match="'selection' is not complete"):
        run(pipeline, only="repack")
    assert not pipeline.selected.shards()


def test_shards_of_an_old_plan_never_mix_with_new_settings(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other settings are refused; --overwrite may be killed at every single write."""
    pipeline, other = job(photos), job(photos, "source.shard_size=4")
    run(pipeline, until="resolution")
    before = seen_in(pipeline)
    refused: list[dict[str, object]] = [{}, {"refresh": True}, {"retry_failed": True}]
    for options in refused:
        with pytest.raises(FingerprintMismatchError, match="shard_size: 3 -> 4"):
            run(other, until="resolution", **options)
    assert seen_in(pipeline) == before
    expected = at_once(photos, "source.shard_size=4", until="resolution")
    overwrite = partial(run, other, until="resolution", overwrite=True)
    shutil.copytree(photos.parent / "out", photos.parent / "kept")
    for crash_at in range(100):
        if not killed_at(crash_at, monkeypatch, overwrite):
            break
        for _ in range(2):
            sizes = {table.num_rows for _, table in other.pool.iterate("samples")}
            assert sizes in ({3}, {4}, set())
            with contextlib.suppress(FusionError):  # refused, or it goes on from there
                run(other, until="resolution")
        overwrite()
        assert without_strays(seen_in(other), expected) == expected
        shutil.rmtree(photos.parent / "out")
        shutil.copytree(photos.parent / "kept", photos.parent / "out")
    # At least: two plans; descriptors and old folders of three tables and the tars; three shards
    # of a tar and three tables.
    assert crash_at >= 2 + 7 + 3 * 4


def test_hidden_files_are_not_a_changed_source(photos: Path) -> None:
    run(job(photos), until="ingest")
    (photos / ".DS_Store").write_bytes(b"x")
    run(job(photos), until="ingest")


def test_outputs_inside_the_source_are_refused(photos: Path) -> None:
    with pytest.raises(ConfigError, match="outputs would become input"):
        job(photos, f"run={photos}/out")


def test_what_another_run_made_before_the_lease_was_ours_is_not_swept(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks, another run replaces the tables and ends, and only then it gets the lease."""
    run(job(photos), until="resolution", limit=3)
    take = Runner._token

    def after_another(self: Runner, dataset: Dataset) -> str:
        monkeypatch.setattr(Runner, "_token", take)
        run(job(photos, "filter.min_short_edge=200"), until="resolution", overwrite=True)
        return take(self, dataset)

    monkeypatch.setattr(Runner, "_token", after_another)
    with pytest.raises(FingerprintMismatchError, match="min_short_edge: 200 -> 256"):
        run(job(photos), until="resolution")
    assert job(photos).pool.shards_of("resolution") == {0, 1, 2, 3}


def test_what_was_done_before_the_lease_was_ours_is_not_replaced_by_a_frozen_run(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still when it is about to replace a table; the next run has nothing to do for that
    one, and goes on behind it."""
    run(job(photos), until="embeddings")
    expected = at_once(photos, until="clusters")
    write = Storage.replace
    about_to_write: list[str] = []

    def replace(storage: Storage, path: str, data: bytes, version: str) -> bool:
        if path == "tables/resolution/table.json" and not about_to_write:
            about_to_write.append(path)
            storage.delete(lease.LEASE)  # as if it had run out
            run(job(photos), until="clusters")
        return write(storage, path, data, version)

    monkeypatch.setattr(Storage, "replace", replace)
    with pytest.raises(lease.LeaseError):
        run(job(photos, "filter.min_short_edge=200"), until="resolution", overwrite=True)
    assert about_to_write
    assert seen_in(job(photos)) == expected
