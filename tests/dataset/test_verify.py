"""Whatever happens to a stored file is found, and named."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.verify import Problem, verify
from tests.toy import path_of, run_toy, toy_steps


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    run_toy(tmp_path, range(3), toy_steps())
    return Dataset.open(tmp_path)


def problems(dataset: Dataset) -> list[Problem]:
    return [problem for problem in verify(dataset) if problem is not None]


def tar_of(dataset: Dataset, shard: int) -> Path:
    return Path(dataset.storage.full(dataset.version("samples").tar_path(shard)))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)


def test_a_whole_dataset_is_whole(dataset: Dataset) -> None:
    items = list(verify(dataset))
    assert items == [None] * (5 * 3 + 3)  # sources, samples, a, b, nested/c; and the tars


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [shorten, lambda p: flip(p, 200), lambda p: p.write_bytes(b"")])
def test_a_damaged_table_is_named(harm: Callable[[Path], object], dataset: Dataset) -> None:
    path = path_of(dataset, "b", 1)
    harm(path)
    (problem,) = problems(dataset)
    assert problem.path == str(path)
    assert problem.fix == "delete this file and run again"
    path.unlink()
    run_toy(Path(dataset.storage.root), range(3), toy_steps())
    assert problems(dataset) == []


def test_every_image_is_compared_with_its_key(dataset: Dataset) -> None:
    row = dataset.read_table("samples", 2)[0].to_pylist()[3]
    flip(tar_of(dataset, 2), row["image_offset"] + 5)
    (problem,) = problems(dataset)
    assert problem.path == str(tar_of(dataset, 2))
    assert f"image {row['key']} is missing or altered" in problem.what


def test_a_missing_and_a_cut_off_tar(dataset: Dataset) -> None:
    tar_of(dataset, 0).unlink()
    shorten(tar_of(dataset, 1))
    missing, cut = problems(dataset)
    assert "missing, but its `samples` table is there" in missing.what
    assert cut.path == str(tar_of(dataset, 1))


def test_rows_of_another_shard_under_a_good_footer(dataset: Dataset) -> None:
    path_of(dataset, "a", 0).write_bytes(path_of(dataset, "a", 1).read_bytes())
    (problem,) = problems(dataset)
    assert "holds table 'a' of shard 1" in problem.what


def test_files_that_belong_to_nothing_are_told_and_harmless(dataset: Dataset) -> None:
    dataset.storage.put("tables/a/v-00000000/00000/00000000.parquet", b"of a run that was killed")
    (problem,) = problems(dataset)
    assert problem.is_harmless
    assert "v-00000000" in problem.what
