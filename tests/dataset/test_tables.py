"""Table files: what goes in comes out, equal tables are equal bytes, footers tell the truth."""

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_pipeline.dataset import artifacts
from fusion_pipeline.dataset.artifacts import (
    Artifact,
    artifact_digest,
    artifact_state,
    inputs_of,
    keep_artifact,
    read_artifact,
    write_artifact,
)
from fusion_pipeline.dataset.evidence import ARROW_TYPES, EvidenceKind
from fusion_pipeline.dataset.fingerprints import Fingerprint
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import LEASE, LeaseError, hold_lease
from fusion_pipeline.dataset.rows import NotOk, Ok, Outcome, build_table
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.dataset.tables import (
    DamagedTableError,
    FingerprintMismatchError,
    NoTableError,
    encode_table,
    read_footer,
    read_table,
)
from tests.toy import run_toy, toy_steps

MADE = Fingerprint({"made": "by a test"})
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
COLUMNS = (
    pa.field("caption", pa.string()),
    pa.field("score", pa.float32()),
    pa.field("objects", ARROW_TYPES[EvidenceKind.OBJECTS]),
)
OBJECT = st.fixed_dictionaries(
    {
        "label": TEXT,
        "score": st.floats(0, 1, width=32),
        "box": st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4),
    }
)
OUTCOME = st.one_of(
    st.builds(
        lambda c, s, o: Ok({"caption": c, "score": s, "objects": o}),
        TEXT, st.floats(width=32, allow_nan=False), st.lists(OBJECT, max_size=3),
    ),
    st.builds(NotOk, st.sampled_from(["filtered", "failed"]), TEXT.filter(bool)),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(OUTCOME, max_size=20))
def test_what_goes_in_comes_out(outcomes: list[Outcome]) -> None:
    table = build_table([f"{i:032x}" for i in range(len(outcomes))], outcomes, COLUMNS)
    data, footer = encode_table(table, "objects/x", 7, MADE, {"samples": "digest"})
    storage = Storage("memory://tables")
    storage.put("t.parquet", data)
    read, again = read_table(storage, "t.parquet", "objects/x", 7, MADE)
    assert read.equals(table)
    assert again == footer == read_footer(storage, "t.parquet")
    assert footer.rows == sum(footer.counts.values()) == len(outcomes)
    assert footer.counts.get("ok", 0) == sum(isinstance(o, Ok) for o in outcomes)


def test_equal_tables_are_equal_bytes() -> None:
    outcomes = [Ok({"caption": f"c{i}", "score": i / 7, "objects": []}) for i in range(500)]
    table = build_table([f"{i:032x}" for i in range(500)], outcomes, COLUMNS)
    in_pieces = pa.concat_tables([table.slice(0, 3), table.slice(3, 400), table.slice(403)])
    with_offset = pa.concat_tables([table.slice(499), table]).slice(1)
    backwards = {"b": "2", "a": "1"}
    files = {
        encode_table(t, "x", 0, MADE, inputs)[0]
        for t in (table, in_pieces, with_offset)
        for inputs in ({"a": "1", "b": "2"}, backwards)
    }
    assert len(files) == 1
    assert encode_table(table.slice(1), "x", 0, MADE, {})[0] not in files


def test_reasons_are_counted_without_their_detail() -> None:
    outcomes: list[Outcome] = [
        Ok({}),
        NotOk("filtered", "short_edge: 300 px, at least 448"),
        NotOk("filtered", "short_edge: 12 px, at least 448"),
        NotOk("filtered", "upstream:resolution"),
        NotOk("failed", "TimeoutError: a: b"),
    ]
    table = build_table(list("abcde"), outcomes, COLUMNS)
    counts = encode_table(table, "x", 0, MADE, {})[1].counts
    assert counts == {
        "ok": 1,
        "filtered:short_edge": 2,
        "filtered:upstream:resolution": 1,
        "failed:TimeoutError": 1,
    }


def test_embeddings_are_one_plain_buffer(tmp_path: Path) -> None:
    vectors = np.random.default_rng(5).standard_normal((64, 96)).astype(np.float16)
    column = pa.array([row.tobytes() for row in vectors], pa.binary(2 * 96))
    keys = [f"{i:032x}" for i in range(64)]
    table = pa.table({"key": keys, "status": ["ok"] * 64, "reason": pa.nulls(64, pa.string()),
                      "embedding": column})  # fmt: skip
    data, _ = encode_table(table, "embeddings", 0, MADE, {})
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0)
    chunk = next(
        metadata.column(i)
        for i in range(metadata.num_columns)
        if metadata.column(i).path_in_schema == "embedding"
    )
    assert chunk.compression == "UNCOMPRESSED"
    assert set(chunk.encodings) <= {"PLAIN", "RLE"}  # RLE: definition levels
    assert vectors.tobytes() in data  # contiguous in the file itself
    storage = Storage(tmp_path)
    storage.put("e.parquet", data)
    read = read_table(storage, "e.parquet", "embeddings", 0)[0]["embedding"].combine_chunks()
    matrix = np.frombuffer(read.buffers()[1], np.float16, count=64 * 96).reshape(64, 96)
    assert np.array_equal(matrix, vectors)


def test_a_footer_larger_than_the_first_read(tmp_path: Path) -> None:
    wide = Fingerprint({"made": 1})
    inputs = {f"table/{i:05d}": "d" * 32 for i in range(4000)}
    data, footer = encode_table(pa.table({"x": [1]}), "wide", -1, wide, inputs)
    assert len(data) > 128 * 1024
    storage = Storage(tmp_path)
    storage.put("w.parquet", data)
    assert read_footer(storage, "w.parquet") == footer


def test_a_table_is_what_its_name_promises(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    data, _ = encode_table(build_table(["k"], [Ok({})], COLUMNS), "a", 3, MADE, {})
    storage.put("t.parquet", data)
    for name, shard in (("b", 3), ("a", 4)):
        with pytest.raises(DamagedTableError, match=r"holds table 'a' of shard 3.*Delete this"):
            read_table(storage, "t.parquet", name, shard)
    with pytest.raises(FingerprintMismatchError, match="--overwrite"):
        read_table(storage, "t.parquet", "a", 3, Fingerprint({"made": "otherwise"}))
    sink = io.BytesIO()
    pq.write_table(pa.table({"key": ["k"]}), sink)
    storage.put("foreign.parquet", sink.getvalue())
    for read in (read_footer, lambda s, p: read_table(s, p, "a", 3)):
        with pytest.raises(DamagedTableError, match="no readable footer"):
            read(storage, "foreign.parquet")
        with pytest.raises(FileNotFoundError):
            read(storage, "missing.parquet")


def test_an_artifact_is_stale_when_its_table_changed_or_grew(tmp_path: Path) -> None:
    run_toy(tmp_path, range(2), toy_steps())
    dataset = Dataset.open(tmp_path)
    artifact = Artifact("sums", MADE, ("a",))
    content = pa.table({"sum": [1, 2]})
    assert artifact_state(dataset, artifact) == "missing"
    before = inputs_of(dataset, ("a",))
    with hold_lease(dataset.storage, "test") as token:
        write_artifact(dataset, artifact, before, content, token)
    assert artifact_state(dataset, artifact) == "current"
    assert read_artifact(dataset, "sums").equals(content)
    assert artifact_state(dataset, Artifact("sums", Fingerprint({}), ("a",))) == "changed"
    digest = artifact_digest(dataset, "sums")
    run_toy(tmp_path, range(3), toy_steps())  # one shard more
    after = inputs_of(dataset, ("a", "b"))
    assert after["a"] not in (before["a"], after["b"])
    assert artifact_state(dataset, artifact) == "stale"
    with hold_lease(dataset.storage, "test") as token:
        write_artifact(dataset, artifact, after, content.slice(1), token)
    assert artifact_digest(dataset, "sums") != digest
    with pytest.raises(NoTableError, match="'totals' is not there yet"):
        artifact_digest(dataset, "totals")


@pytest.mark.parametrize("is_current", [False, True])
@pytest.mark.parametrize("function", ["check_token", "put_as_holder", "sweep"])
def test_an_artifact_of_a_later_run_is_not_written_over(
    function: str, is_current: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer stands still anywhere; a later run makes the artifact, or finds it to be there."""
    dataset, content = Dataset.create(tmp_path), pa.table({"sum": [1]})
    artifact, newer = Artifact("sums", MADE, ()), pa.table({"sum": [2]})
    original = getattr(artifacts, function)

    def frozen(storage: Storage, *arguments: Any) -> None:
        storage.delete(LEASE)  # as if it had run out
        with monkeypatch.context() as awake, hold_lease(storage, "second") as mine:
            awake.setattr(artifacts, function, original)
            if is_current and function != "sweep":
                keep_artifact(dataset, "sums", mine)
            else:
                write_artifact(dataset, artifact, {}, newer, mine)
        original(storage, *arguments)

    with hold_lease(dataset.storage, "first") as token:
        if is_current:
            write_artifact(dataset, artifact, {}, newer, token)
        monkeypatch.setattr(artifacts, function, frozen)
        with contextlib.suppress(LeaseError):
            write_artifact(dataset, artifact, {}, content, token)
    assert read_artifact(dataset, "sums").equals(newer)
