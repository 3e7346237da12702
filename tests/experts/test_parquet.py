"""Evidence made elsewhere, joined by key; docs/experts.md tells how."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experts.base import Context, Hardware
from experts.parquet import (
    NoEvidenceError,
    ParquetConfig,
    ParquetError,
    ParquetObjects,
    ParquetTags,
)
from fusion_pipeline.dataset.evidence import ARROW_TYPES, DetectedObject, EvidenceKind
from tests.jobs import job, make_photos, run

BOX = {"label": "cat", "score": 0.5, "box": [0.0, 0.25, 0.5, 1.0]}


def one_row(folder: Path) -> ParquetConfig:
    """Of all kinds, of samples without a key: for the tests that all experts go through."""
    text = {
        "text": "stop",
        "score": 0.5,
        "quad": [0, 0, 1, 0, 1, 1, 0, 1],
        "script": "",
        "block": 0,
    }
    items = {kind: text if kind is EvidenceKind.TEXT else BOX for kind in EvidenceKind}
    columns = {k.value: pa.array([[item]], ARROW_TYPES[k]) for k, item in items.items()}
    pq.write_table(pa.table({"key": [""], **columns}), folder / "one.parquet")
    return ParquetConfig(path=str(folder))


def look_up(config: ParquetConfig, *keys: str) -> list[Any]:
    image = np.zeros((1, 1, 3), np.uint8)
    expert = ParquetObjects(config, Hardware())
    return expert([image] * len(keys), [Context(1, 1, key=key) for key in keys])


def write(path: Path, rows: dict[str, list[dict[str, Any]]]) -> ParquetConfig:
    # As others write them: float64, large lists, columns of their own.
    item = pa.struct({"label": pa.string(), "score": pa.float64(), "box": pa.list_(pa.float64())})
    table = pa.table(
        {
            "model": ["sam"] * len(rows),
            "key": list(rows),
            "objects": pa.array(rows.values(), pa.large_list(item)),
        }
    )
    pq.write_table(table, path)
    return ParquetConfig(path=str(path))


def test_rows_are_found_by_key(tmp_path: Path) -> None:
    config = write(tmp_path / "boxes.parquet", {"b": [BOX], "a": []})
    assert look_up(config, "a", "b") == [[], [DetectedObject("cat", 0.5, (0.0, 0.25, 0.5, 1.0))]]


def test_a_sample_without_a_row(tmp_path: Path) -> None:
    config = write(tmp_path / "boxes.parquet", {"a": [BOX]})
    with pytest.raises(
        NoEvidenceError, match=r"boxes.parquet has no row of this key .*missing: empty"
    ):
        look_up(config, "b")
    assert look_up(config.model_copy(update={"missing": "empty"}), "b") == [[]]


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        ({"box": [0, 0, 640, 480]}, "a box is x1, y1, x2, y2"),
        ({"box": [0.35, 0.05, 0.2, 0.3]}, "a box is x1, y1, x2, y2"),  # x, y, width, height
        ({"box": [0.5, 0, 0.5, 1]}, "a box is x1, y1, x2, y2"),
        ({"score": 50}, "a score outside of 0..1"),
        ({"label": None}, "no label"),
    ],
)
def test_slips_of_the_files_fail_their_row_alone(
    tmp_path: Path, slip: dict[str, Any], message: str
) -> None:
    config = write(tmp_path / "boxes.parquet", {"a": [{**BOX, **slip}], "b": [BOX]})
    with pytest.raises(ValueError, match=message):
        look_up(config, "a")
    assert len(look_up(config, "b")[0]) == 1


def test_several_rows_of_a_key_are_none(tmp_path: Path) -> None:
    """Else the last one would win, and a face of the first be shown."""
    write(tmp_path / "1.parquet", {"a": [BOX], "b": [BOX]})
    write(tmp_path / "2.parquet", {"a": [BOX]})
    config = ParquetConfig(path=str(tmp_path))
    assert len(look_up(config, "b")[0]) == 1
    with pytest.raises(ValueError, match="several rows have this key"):
        look_up(config, "a", "b")


def test_files_that_cannot_be_joined(tmp_path: Path) -> None:
    with pytest.raises(ParquetError, match=r"no \*\.parquet there"):
        ParquetObjects.revision(ParquetConfig(path=str(tmp_path)))
    config = write(tmp_path / "boxes.parquet", {"a": []})
    with pytest.raises(ParquetError, match="no column 'tags'; there are model, key, objects"):
        ParquetTags(config, Hardware())


def test_other_files_are_another_revision_wherever_they_lie(tmp_path: Path) -> None:
    config = write(tmp_path / "boxes.parquet", {"a": []})
    first = ParquetObjects.revision(config)
    (tmp_path / "there").mkdir()
    moved = ParquetConfig(
        path=str((tmp_path / "boxes.parquet").rename(tmp_path / "there/boxes.parquet"))
    )
    assert ParquetObjects.revision(moved) == first
    write(tmp_path / "there" / "boxes.parquet", {"a": [BOX]})
    assert ParquetObjects.revision(moved) != first


def test_beside_an_expert_in_a_run(tmp_path: Path) -> None:
    """Two tables of boxes, one from files: both are merged, and the row without evidence fails."""
    photos = make_photos(tmp_path / "photos")
    plain = job(photos, "experts=[nanodet]")
    run(plain, until="repack")
    keys = [k for _, t in plain.selected.iterate("samples") for k in t["key"].to_pylist()]
    write(tmp_path / "boxes.parquet", {key: [BOX] for key in keys[1:]})
    joined = job(
        photos, f"experts=[nanodet, parquet-objects: {{name: sam, path: {tmp_path}/boxes.parquet}}]"
    )
    run(joined, until="hints")
    rows = {
        row["key"]: row
        for _, t in joined.selected.iterate("objects/merged")
        for row in t.to_pylist()
    }
    assert rows[keys[0]]["reason"] == "upstream:objects/sam"
    for key in keys[1:]:
        assert any(o["label"] == "cat" and "sam" in o["experts"] for o in rows[key]["objects"])
