"""Cutting rows into shards, and samples with several rows."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion_pipeline.dataset.images import inspect
from fusion_pipeline.dataset.samples import Limits, Sample, cut, pack_samples, sample_key
from tests.toy import png

SIZES = st.lists(st.integers(0, 50) | st.integers(0, 2000), max_size=60)


@given(SIZES, st.integers(1, 10), st.integers(1, 300))
def test_rows_keep_their_order_and_limits_hold(sizes: list[int], rows: int, limit: int) -> None:
    parts = list(cut(sizes, Limits(rows, limit)))
    assert [i for part in parts for i in part] == list(range(len(sizes)))
    for part in parts:
        assert 1 <= len(part) <= rows
        assert sum(sizes[i] for i in part) <= limit or len(part) == 1
    for part, following in pairwise(parts):  # no part ends before it must
        full = sum(sizes[i] for i in part) + sizes[following.start] > limit
        assert len(part) == rows or full


@given(st.integers(1, 40), st.integers(1, 7))
def test_equal_rows_fill_shards_evenly(count: int, rows: int) -> None:
    parts = list(cut([1] * count, Limits(rows, 10**9)))
    assert [len(part) for part in parts[:-1]] == [rows] * (count // rows - (count % rows == 0))


def test_texts_and_urls_are_kept_once_each() -> None:
    image = png(0, 0)
    sample = Sample(sample_key(image), image, inspect(image))
    sample.add_row("1", "a cat", "https://a")
    sample.add_row("2", None, None)
    sample.add_row("3", "", "https://b")
    sample.add_row("4", "a cat", "https://a")
    sample.add_row("5", "une chatte", "https://a")
    row = pack_samples([sample])[1].to_pylist()[0]
    assert row["row_ids"] == ["1", "2", "3", "4", "5"]
    assert row["alt_texts"] == ["a cat", "une chatte"]
    assert row["urls"] == ["https://a", "https://b"]


def test_a_key_is_of_the_bytes() -> None:
    # https://csrc.nist.gov/projects/cryptographic-standards-and-guidelines: sha256 of "abc"
    assert sample_key(b"abc") == "ba7816bf8f01cfea414140de5dae2223"


@pytest.mark.parametrize("count", [0, 1])
def test_a_shard_without_samples_is_a_shard(count: int) -> None:
    image = png(0, 0)
    tar, table = pack_samples([Sample(sample_key(image), image, inspect(image))] * count)
    assert table.num_rows == count
    assert len(tar) % 512 == 0
