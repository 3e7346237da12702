"""What is out of date is told before anybody runs."""

from pathlib import Path

import pyarrow as pa
import pytest

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.tables import encode_table
from fusion_pipeline.pipeline import Pipeline
from fusion_pipeline.status import TableState, stale_artifacts, table_states
from tests.jobs import EXPERT, job, make_photos, run, seen_in

MERGED, HINTS, PROMPTS, CAPTIONS = "tags/merged", "hints", "prompts/engine-v1", "captions/composer"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    photos = make_photos(tmp_path / "photos")
    run(job(photos, "select.duplicates.rule=off", "select.shard_size=4"))
    return photos


def of(photos: Path, *overrides: str) -> Pipeline:
    return job(photos, "select.duplicates.rule=off", "select.shard_size=4", *overrides)


def states(pipeline: Pipeline) -> dict[str, TableState]:
    both = (pipeline.pool, pipeline.selected)
    return {f"{d.storage.root[-8:]}:{s.counts.table}".split(":")[1]: s
            for d in both for s in table_states(pipeline, d)}  # fmt: skip


def flagged(pipeline: Pipeline) -> dict[str, tuple[int, int, bool]]:
    """(pending, stale, other settings) of the tables with something to tell."""
    found = {n: (s.pending, s.stale, s.other_settings) for n, s in states(pipeline).items()}
    return {name: flags for name, flags in found.items() if any(flags)}


def alter(dataset: Dataset, table: str, shard: int) -> None:
    """As `--retry-failed` does it: the same version, other rows, lineage intact."""
    version = dataset.version(table)
    old, footer = dataset.read_table(version, shard)
    status = pa.array(["failed", *old["status"].to_pylist()[1:]])
    reason = pa.array(["on_purpose", *old["reason"].to_pylist()[1:]], pa.string())
    new = old.set_column(1, old.schema.field(1), status).set_column(2, old.schema.field(2), reason)
    data, _ = encode_table(new, table, shard, version.made_by, footer.inputs)
    dataset.storage.put(version.path(shard), data)


def test_nothing_is_told_of_a_finished_run(photos: Path) -> None:
    assert flagged(of(photos)) == {}
    assert stale_artifacts(of(photos)) == []


def test_a_missing_shard_is_pending(photos: Path) -> None:
    selected = of(photos).selected
    selected.storage.delete(selected.version(HINTS).path(0))
    # What was made from the missing one can't be called current, either.
    assert flagged(of(photos)) == {HINTS: (1, 0, False), PROMPTS: (0, 1, False)}
    run(of(photos))
    assert flagged(of(photos)) == {}  # the same bytes again


def test_refresh_makes_the_stale_shard_anew_and_what_hangs_on_it(photos: Path) -> None:
    pipeline = of(photos)
    finished = seen_in(pipeline)
    alter(pipeline.selected, EXPERT, 1)
    # What reads it; the others read that, which is not made anew yet.
    assert flagged(of(photos)) == {MERGED: (0, 1, False)}
    altered = seen_in(pipeline)
    run(of(photos), refresh=True)
    assert flagged(of(photos)) == {}
    redone = {n for n, data in seen_in(pipeline).items() if data != altered.get(n)}
    assert {name.split("/v-")[0] for name in redone if name.startswith("selected")} == {
        f"selected/tables/{name}" for name in (MERGED, HINTS, PROMPTS, CAPTIONS)
    }
    assert all(name.endswith("00000001.parquet") for name in redone if "tables" in name)
    run(of(photos), retry_failed=True)  # the failed row of the expert, and its followers
    assert seen_in(pipeline) == finished
    assert flagged(of(photos)) == {}


def test_a_changed_embedding_outdates_what_was_fitted_and_chosen(photos: Path) -> None:
    pipeline = of(photos)
    finished = seen_in(pipeline)
    alter(pipeline.pool, "embeddings", 0)
    assert stale_artifacts(of(photos)) == ["centroids"]
    assert {"clusters", "selection"} <= flagged(of(photos)).keys()
    run(of(photos), until="clusters", retry_failed=True)
    assert stale_artifacts(of(photos)) == []
    assert seen_in(pipeline) == finished


def test_other_settings_are_told_as_such(photos: Path) -> None:
    other = of(photos, "hints.tag_threshold=0.9")
    assert flagged(other) == dict.fromkeys((HINTS, PROMPTS, CAPTIONS), (0, 0, True))
