"""Versions of a table: readers see one of them, whole; what nobody sees is removed."""

import contextlib
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from fusion_pipeline.dataset import layout, lease
from fusion_pipeline.dataset.fingerprints import Fingerprint
from fusion_pipeline.dataset.layout import Dataset, DatasetError, TableVersion
from fusion_pipeline.dataset.lease import LEASE, LeaseError, hold_lease
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.dataset.tables import encode_table

SHARDS = range(4)


def version_of(number: int, name: str = "t") -> TableVersion:
    """Each replaces the one before."""
    return replace(TableVersion.of(name, Fingerprint({"number": number})), generation=number)


def put_files(dataset: Dataset, version: TableVersion) -> None:
    number = version.made_by.fields["number"]
    for shard in SHARDS:
        table = pa.table({"number": [number], "shard": [shard]})
        data, _ = encode_table(table, version.name, shard, version.made_by, {})
        dataset.storage.put(version.path(shard), data)


def read(dataset: Dataset, version: TableVersion) -> list[tuple[int, int]]:
    """(number, shard) of each row; as far as it goes, when the version is just being removed."""
    rows = []
    try:
        for shard in sorted(dataset.shards_of(version)):
            row = dataset.read_table(version, shard)[0].to_pylist()[0]
            rows.append((row["number"], row["shard"]))
    except FileNotFoundError:
        pass
    return rows


def test_describing_is_one_switch(dataset_root: str) -> None:
    """A reader that looks all the time sees one version or the next, each whole."""
    dataset, rounds = Dataset.create(dataset_root), 15
    put_files(dataset, version_of(0))
    with hold_lease(dataset.storage, "writer") as token:
        dataset.describe_table(version_of(0), token)
        done, seen = threading.Event(), []

        def look() -> None:
            mine = Dataset(dataset_root)
            while not done.is_set():
                version = mine.version("t")
                rows = read(mine, version)
                if mine.version("t") == version:  # else it was replaced while it was read
                    seen.append((version.made_by.fields["number"], rows))

        reader = threading.Thread(target=look)
        reader.start()
        for number in range(1, rounds):
            put_files(dataset, version_of(number))
            dataset.describe_table(version_of(number), token)
        while not seen or seen[-1][0] != rounds - 1:
            assert reader.is_alive()
            time.sleep(0.01)
        done.set()
        reader.join()
    numbers = [number for number, _ in seen]
    assert len(set(numbers)) > 3, "it never looked in between: nothing was tried"
    assert numbers == sorted(numbers)
    assert all(rows == [(number, shard) for shard in SHARDS] for number, rows in seen)
    folders = dataset.storage.folders("tables/t")
    assert folders == [version_of(rounds - 1).folder]  # nothing is left of the others


@pytest.mark.parametrize("function", ["check_token", "sweep"])
def test_a_frozen_driver_replaces_nothing_of_a_later_run(
    function: str, dataset_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands still when it has just been told that it holds the lease, or before it removes what
    it replaced; a later run goes back to that, and fills it."""
    dataset, (old, mine) = Dataset.create(dataset_root), map(version_of, range(2))
    later: list[TableVersion] = []

    def frozen(storage: Storage, *arguments: Any) -> None:
        storage.delete(LEASE)  # as if it had run out
        with monkeypatch.context() as awake, hold_lease(storage, "later") as new:
            awake.setattr(module, function, original)
            later.append(dataset.next_version("t", old.made_by))
            dataset.describe_table(later[0], new)
            put_files(dataset, later[0])
        original(storage, *arguments)

    with hold_lease(dataset.storage, "early") as token:
        dataset.describe_table(old, token)
        put_files(dataset, old)
        module = {"check_token": lease, "sweep": layout}[function]
        original = getattr(module, function)
        monkeypatch.setattr(module, function, frozen)
        with contextlib.suppress(LeaseError):
            dataset.describe_table(mine, token)
    assert dataset.current("t") == later[0]
    assert read(dataset, later[0]) == [(0, shard) for shard in SHARDS]


def test_a_folder_is_used_once(tmp_path: Path) -> None:
    """For a run that was frozen may still be about to remove it."""
    dataset, made = Dataset.create(tmp_path), [Fingerprint({"number": n}) for n in range(2)]
    with hold_lease(dataset.storage, "test") as token:
        folders = []
        for made_by in (made[0], made[1], made[1], made[0]):
            version = dataset.next_version("t", made_by)
            dataset.describe_table(version, token)
            folders.append(version.folder)
        dataset.drop_table("t", token)
        folders.append(dataset.next_version("t", made[0]).folder)
    first, second = (TableVersion.of("t", made_by).folder for made_by in made)
    assert folders == [first, f"{second}-1", f"{second}-1", f"{first}-2", f"{first}-3"]


def test_only_the_holder_describes(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path)
    with hold_lease(dataset.storage, "first") as token:
        dataset.describe_table(version_of(0), token)
        put_files(dataset, version_of(0))
    before = dataset.storage.read("tables/t/table.json")
    with pytest.raises(LeaseError, match="not committing"):
        dataset.describe_table(version_of(1), token)
    assert dataset.storage.read("tables/t/table.json") == before
    assert len(read(dataset, version_of(0))) == len(SHARDS)
    with hold_lease(dataset.storage, "second") as token:
        dataset.describe_table(version_of(0), token)  # the same, under a new name
    assert dataset.storage.read("tables/t/table.json") != before
    assert dataset.current("t") == version_of(0)


def test_samples_take_their_tars_with_them(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path)
    with hold_lease(dataset.storage, "test") as token:
        for number in range(2):
            version = version_of(number, "samples")
            dataset.storage.put(version.tar_path(1007), b"tar")
            put_files(dataset, version)
            dataset.describe_table(version, token)
            assert dataset.shards() == list(SHARDS)
    assert dataset.storage.files("shards") == [
        f"shards/{version_of(1, 'samples').folder}/00001/00001007.tar"
    ]


def test_a_dropped_table_is_gone(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path)
    with hold_lease(dataset.storage, "test") as token:
        for name in ("t", "t/nested"):
            put_files(dataset, version_of(0, name))
            dataset.describe_table(version_of(0, name), token)
        assert dataset.table_names() == ["t", "t/nested"]
        dataset.drop_table("t", token)
        dataset.drop_table("t", token)
        dataset.drop_table("never", token)
    assert dataset.table_names() == ["t/nested"]
    assert dataset.current("t") is None
    assert dataset.shards_of("t") == set()
    assert dataset.storage.folders("tables/t") == ["nested"]
    assert dataset.footers("t") == {}
    assert list(dataset.iterate("t")) == []
    assert list(dataset.footers("t/nested")) == list(SHARDS)


def test_a_version_is_all_that_its_files_depend_on() -> None:
    made = Fingerprint({"step": "x"})
    versions = [
        TableVersion.of("t", made),
        TableVersion.of("t", Fingerprint({"step": "y"})),
        TableVersion.of("t", made, {"samples": "v-00000000"}),
        TableVersion.of("t", made, {"samples": "v-00000001"}),
        TableVersion.of("t", made, {"samples": "v-00000000", "centroids": "0123"}),
    ]
    assert len({version.folder for version in versions}) == len(versions)
    again = TableVersion.of("t", made, {"centroids": "0123", "samples": "v-00000000"})
    assert again == versions[-1]  # in whatever order


@pytest.mark.parametrize(("found", "fix"), [(1, "fusion migrate"), (3, "newer fusion")])
def test_another_format_is_named_with_its_fix(found: int, fix: str, tmp_path: Path) -> None:
    Dataset.create(tmp_path).storage.put("dataset.json", b'{"format_version": %d}' % found)
    for open_it in (Dataset.open, Dataset.create):
        with pytest.raises(DatasetError, match=rf"format version {found}; .*version 2.*{fix}"):
            open_it(tmp_path)


def test_a_table_of_an_older_format_is_named_with_its_fix(tmp_path: Path) -> None:
    """Readers that do not open a dataset first get no less of an answer."""
    dataset = Dataset(tmp_path)
    dataset.storage.put("tables/t/table.json", b'{"fingerprint": "0", "fields": {}}')
    with pytest.raises(DatasetError, match=f"fusion migrate {tmp_path}"):
        dataset.footers("t")
