"""Datasets of older formats: lifted in place, and nothing of them is computed again."""

import io
import json
import re
import shutil
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fusion_pipeline.dataset import lease
from fusion_pipeline.dataset.layout import FORMAT_VERSION, Dataset, DatasetError
from fusion_pipeline.dataset.lease import LeaseError, hold_lease, read_lease
from fusion_pipeline.dataset.migrations import find_datasets, migrate
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.dataset.tables import FingerprintMismatchError
from fusion_pipeline.dataset.verify import verify
from fusion_pipeline.engine.run import read_run_log
from fusion_pipeline.pipeline import Pipeline
from fusion_pipeline.runner import SourceChangedError
from tests.dataset.version1 import put_back, put_back_dataset
from tests.jobs import job, make_photos, run, seen_in
from tests.killing import killed_at
from tests.toy import run_toy, seen_by_readers, toy_steps


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", 6)


def job_of(photos: Path, *overrides: str) -> Pipeline:
    return job(photos, "source.shard_size=2", "select.shard_size=4", *overrides)


def migrate_run(photos: Path) -> None:
    for root in find_datasets(str(photos.parent / "out")):
        migrate(root)


def readable(seen: dict[str, bytes]) -> dict[str, object]:
    """The same files, plans as what they hold: their bytes are nobody's input. Of artifacts version
    1 did not tell what they were made by."""
    return {
        _PLAN.sub(r"\1", name): pq.read_table(io.BytesIO(data))
        if _PLAN.search(name)
        else json.loads(data) | {"fields": {}}
        if name.endswith("artifact.json")
        else data
        for name, data in seen.items()
        if not name.endswith("_plan/artifact.json")
    }


_PLAN = re.compile(r"(_plan)/v-.*")


def every_file(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_run_of_version_1_is_complete_in_this_one(photos: Path) -> None:
    pipeline = job_of(photos)
    run(pipeline)
    before = seen_in(pipeline)
    logs = [read_run_log(dataset.storage) for dataset in (pipeline.pool, pipeline.selected)]
    report = (photos.parent / "out" / "report.html").read_bytes()
    put_back(pipeline)
    for options in ({}, {"only": "export"}):
        with pytest.raises(DatasetError, match=r"version 1.*fusion migrate /.*/out/\w+"):
            run(pipeline, **options)
    roots = find_datasets(str(photos.parent / "out"))
    assert [migrate(root) for root in roots] == [1, 1]
    assert [migrate(root) for root in roots] == [FORMAT_VERSION] * 2
    assert readable(seen_in(pipeline)) == readable(before)
    assert run(pipeline) == ""  # nothing to do
    assert readable(seen_in(pipeline)) == readable(before)
    assert (photos.parent / "out" / "report.html").read_bytes() == report
    for dataset, log in zip((pipeline.pool, pipeline.selected), logs, strict=True):
        assert read_run_log(dataset.storage) == log
        assert list(filter(None, verify(dataset))) == []
        assert read_lease(dataset.storage) is None
        names = {name.split("/")[0] for name in every_file(Path(dataset.storage.root))}
        assert names == {"artifacts", "dataset.json", "lease.json", "runs", "shards", "tables",
                         ".tmp"}  # fmt: skip
        assert dataset.storage.files(".tmp") == [".tmp/lock"]


def test_a_run_half_done_in_version_1_goes_on(photos: Path) -> None:
    """More of the same source is taken in, as if nothing had been."""
    pipeline = job_of(photos)
    run(pipeline)
    expected = seen_in(pipeline)
    shutil.rmtree(photos.parent / "out")
    run(pipeline, until="resolution", limit=3)
    made = seen_in(pipeline)
    listing = pipeline.phases[0].source.plan_digest()  # type: ignore[union-attr]
    put_back_dataset(pipeline.pool, {"fusion_pipeline.listing": listing + 32 * "0"})
    migrate_run(photos)
    run(pipeline)
    seen = seen_in(pipeline)
    assert readable(seen) == readable(expected)
    kept = [name for name in made if name.endswith((".parquet", ".tar")) and "_plan/" not in name]
    assert len(kept) == 2 * 4
    assert {name: seen[name] for name in kept} == {name: made[name] for name in kept}


def test_a_migration_killed_at_any_write_is_done_again(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, out = job_of(photos), photos.parent / "out"
    run(pipeline)
    before = seen_in(pipeline)
    put_back(pipeline)
    shutil.copytree(out, photos.parent / "kept")
    for crash_at in range(200):
        if not killed_at(crash_at, monkeypatch, partial(migrate_run, photos)):
            break
        unfinished = [r for r in find_datasets(str(out)) if Dataset(r).format_version() == 1]
        assert unfinished  # readers are told so, up to the end
        for root in unfinished:
            with pytest.raises(DatasetError, match="fusion migrate"):
                Dataset.open(root)
        migrate_run(photos)
        assert readable(seen_in(pipeline)) == readable(before)
        shutil.rmtree(out)
        shutil.copytree(photos.parent / "kept", out)
    # Three shards of a tar and six tables, two of a tar and eight; fourteen descriptors, two plans
    # and two artifacts made, pointed to and removed, two formats, two logs made and removed,
    # leases and a temporary file.
    assert crash_at == 3 * 7 + 2 * 9 + 14 + 4 * 3 + 2 + 4 + 2 + 2


def test_the_same_on_an_object_store(photos: Path, bucket: str) -> None:
    pipeline, root = job_of(photos), f"s3://{bucket}/pool"
    run(pipeline, until="selection")
    put_back_dataset(pipeline.pool, {"fusion_pipeline.listing": "f" * 64})
    storage = Storage(root)
    for name, data in every_file(Path(pipeline.pool.storage.root)).items():
        storage.put(name, data)
    migrate_run(photos)
    copied = pipeline.pool.version("samples").path(1)  # killed before it removed the original
    storage.put(copied, storage.read("tables/samples/00000/00000001.parquet"))
    assert migrate(root) == 1
    here = every_file(Path(pipeline.pool.storage.root))
    there = {name: storage.read(name) for name in storage.files("")}
    shared = here.keys() - {"lease.json", ".tmp/lock"}
    assert there.keys() - {"lease.json"} == shared
    there, here = ({name: files[name] for name in shared} for files in (there, here))
    assert seen_by_readers(there) == seen_by_readers(here)
    assert Dataset.open(root).shards() == [0, 1, 2]


def test_a_selection_that_was_not_finished_is_made_again(photos: Path) -> None:
    """Its end mark is missing: in version 1 some of its shards may be of an older decision."""
    pipeline = job_of(photos)
    run(pipeline, until="repack")
    expected = seen_in(pipeline)
    put_back(pipeline)
    pipeline.pool.storage.delete("artifacts/selection.parquet")  # of version 1
    migrate_run(photos)
    said = run(pipeline, until="repack")
    assert "selection: 6 rows" in said
    assert readable(seen_in(pipeline)) == readable(expected)


def test_what_was_stale_is_stale_afterwards(photos: Path) -> None:
    """Tables of older settings, and a source that changed: not taken for what they are not."""
    pipeline, other = job_of(photos), job_of(photos, "filter.min_short_edge=259")
    run(pipeline)
    run(other, until="resolution", overwrite=True)
    put_back(pipeline)
    migrate_run(photos)
    assert run(other, until="resolution") == ""
    with pytest.raises(FingerprintMismatchError, match="tables/embeddings was made with other"):
        run(other)
    run(other, overwrite=True)
    shutil.copy(photos / "00.png", photos / "99.png")
    put_back_dataset(other.pool, {"fusion_pipeline.listing": "0" * 64})
    migrate_run(photos)
    with pytest.raises(SourceChangedError):
        run(other)


def test_one_at_a_time(tmp_path: Path) -> None:
    """A run of the older fusion is at work; or another migration."""
    run_toy(tmp_path, range(2), toy_steps())
    put_back_dataset(Dataset(tmp_path), {})
    before = every_file(tmp_path)
    with hold_lease(Storage(tmp_path), "older") as token:
        held = json.loads((tmp_path / lease.LEASE).read_text())
        del held["released"]  # version 1 had no such field
        (tmp_path / lease.LEASE).write_text(json.dumps(held))
        with pytest.raises(LeaseError, match="in use by run older"):
            migrate(str(tmp_path))
        lease.check_token(Storage(tmp_path), token)
    after = every_file(tmp_path)
    assert {name: after[name] for name in before} == before
    assert migrate(str(tmp_path)) == 1
    assert run_toy(tmp_path, range(2), toy_steps()) == []


def test_what_is_no_dataset_or_a_newer_one_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is no dataset, and no `run` folder"):
        find_datasets(str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()
    Dataset.create(tmp_path).storage.put("dataset.json", b'{"format_version": 99}')
    before = every_file(tmp_path)
    with pytest.raises(DatasetError, match="Use the newer fusion"):
        migrate(str(tmp_path))
    assert every_file(tmp_path) == before
