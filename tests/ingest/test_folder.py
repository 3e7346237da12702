"""A folder of images in: sidecars, nesting, and files that are odd or missing."""

import json
import os
from pathlib import Path

import pytest

from fusion_pipeline.engine.watch import Watch
from fusion_pipeline.ingest.rows import SourceError
from tests.ingest.sources import contents_of, ingest_of, plan_of, sample_rows, source_rows
from tests.toy import png


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def test_images_with_their_sidecars(tmp_path: Path) -> None:
    place = write(
        tmp_path / "in",
        {
            "b.jpg": png(0, 1),
            "b.txt": "text of b",
            "a.PNG": png(0, 2),
            "a.json": json.dumps({"url": "https://x", "caption": "caption of a"}),
            "both.webp": png(0, 3),
            "both.json": json.dumps({"url": "https://y", "caption": "not this one"}),
            "both.TXT": "this one",
            "nested/deep/b.jpg": png(0, 4),
            "twins.jpg": png(0, 5),
            "twins.png": png(0, 6),
            "twins.txt": "of both",
            "Straße/图像 🐕.png": png(0, 7),
            "Straße/图像 🐕.txt": "ein Hund",
            "text-alone.txt": "no image",
            "broken.gif": b"GIF89a",
            "v1.2/photo.final.png": png(0, 8),
            "v1.2/photo.final.txt": "dots",
            ".hidden.png": png(0, 9),
            ".git/objects/x.png": png(0, 10),
            "notes.pdf": b"%PDF",
        },
    )
    shards = contents_of(ingest_of(place, tmp_path / "out", "folder", shard_size=4))
    rows = {row["source_id"]: row for row in source_rows(shards)}
    texts = {i: s["alt_texts"] for s in sample_rows(shards) for i in s["row_ids"]}
    by_name = {name: texts.get(row["row_id"]) for name, row in rows.items()}
    assert by_name == {
        "a.PNG": ["caption of a"],
        "b.jpg": ["text of b"],
        "both.webp": ["this one"],
        "broken.gif": None,
        "nested/deep/b.jpg": [],
        "Straße/图像 🐕.png": ["ein Hund"],
        "text-alone.txt": None,
        "twins.jpg": ["of both"],
        "twins.png": ["of both"],
        "v1.2/photo.final.png": ["dots"],
    }
    assert rows["text-alone.txt"]["reason"] == "no_image"
    assert rows["broken.gif"]["reason"].startswith("truncated")
    assert rows["both.webp"]["url"] == "https://y"
    assert [s.sources.num_rows for s in shards] == [4, 4, 2]
    assert len(rows) == sum(s.sources.num_rows for s in shards)


def test_a_folder_without_images_names_what_it_looked_for(tmp_path: Path) -> None:
    place = write(tmp_path / "in", {"a.pdf": "x", ".hidden.jpg": png(0, 0)})
    with pytest.raises(SourceError, match=r"source\.folder: no images under .*jpeg, jpg"):
        plan_of(ingest_of(place, tmp_path / "out", "folder"))


def test_a_file_that_vanished_or_is_closed_costs_its_row(tmp_path: Path) -> None:
    place = write(tmp_path / "in", {f"{i}.png": png(0, i) for i in range(4)})
    ingest = ingest_of(place, tmp_path / "out", "folder")
    make = ingest.open_source(plan_of(ingest))
    (place / "1.png").unlink()
    (place / "2.png").chmod(0)
    if os.geteuid() == 0:  # nothing is closed to root
        (place / "2.png").unlink()
    rows = make(0, Watch()).sources.to_pylist()
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "ok"]
    assert rows[1]["reason"] == "source_damaged: FileNotFoundError"
    assert rows[2]["source_id"] == "2.png"


def test_a_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    place = write(tmp_path / "in", {"a.png": png(0, 0)})
    (place / os.fsdecode(b"caf\xe9.png")).write_bytes(png(0, 1))
    with pytest.raises(SourceError, match=r"not UTF-8: caf\\udce9\.png\. Rename"):
        plan_of(ingest_of(place, tmp_path / "out", "folder"))


def test_a_new_sidecar_is_a_changed_source(tmp_path: Path) -> None:
    place = write(tmp_path / "in", {"a.png": png(0, 0)})
    ingest = ingest_of(place, tmp_path / "out", "folder")
    before = plan_of(ingest)
    write(place, {".hidden.txt": "not ours", "notes.pdf": "nor this"})
    assert ingest.plan_digest() == before
    write(place, {"a.txt": "late"})
    after = ingest.plan_digest()
    assert after != before
    assert ingest.plan(after) is None
