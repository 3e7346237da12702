"""What trainers get: only captioned samples, images every loader opens, exact provenance."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from fusion_pipeline.dataset.evidence import ARROW_TYPES, EvidenceKind
from fusion_pipeline.dataset.filters import ReadingError
from fusion_pipeline.dataset.fingerprints import Fingerprint
from fusion_pipeline.dataset.images import decode, inspect
from fusion_pipeline.dataset.layout import Dataset, TableVersion
from fusion_pipeline.dataset.rows import NotOk, Ok, Outcome, build_table
from fusion_pipeline.dataset.samples import Sample, pack_samples, sample_key
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.dataset.tables import NoTableError
from fusion_pipeline.export.blur import Blur
from fusion_pipeline.export.captions import Export, ExportError
from tests.dataset.pictures import ENCODED, close, noise, save
from tests.dataset.tables import put_table

STRING = pa.string()
COLUMNS = {
    "hints": [pa.field("hints", STRING)],
    "prompts/v1": [pa.field("prompt", STRING)],
    "captions/engine": [pa.field("caption", STRING), pa.field("finish", STRING)],
}
EXIF = Image.Exif()
EXIF[0x0112] = 6
IMAGES = [
    ENCODED["jpeg"],
    save(noise(), "JPEG", exif=EXIF),
    ENCODED["webp animated"],
    ENCODED["png palette"],
]
CAPTIONS = ['A "<image>" token & ünïcode\nin two lines', "Two.", None, "Four."]


def put(dataset: Dataset, name: str, table: pa.Table, revision: str | None = None) -> None:
    put_table(dataset, version_of(name, revision), table)


def version_of(name: str, revision: str | None = None) -> TableVersion:
    return TableVersion.of(name, Fingerprint({"table": name, "revision": revision}))


def captions(texts: list[str | None], keys: list[str]) -> pa.Table:
    outcomes: list[Outcome] = [
        NotOk("failed", "timeout") if t is None else Ok({"caption": t, "finish": "stop"})
        for t in texts
    ]
    return build_table(keys, outcomes, COLUMNS["captions/engine"])


@pytest.fixture
def export(tmp_path: Path) -> Export:
    dataset = Dataset.create(tmp_path / "selected")
    samples = []
    for i, data in enumerate(IMAGES):
        sample = Sample(sample_key(data), data, inspect(data))
        sample.add_row(f"row-{i}", f"alt {i}", f"https://x/{i}" if i else None)
        samples.append(sample)
    tar, table = pack_samples(samples)
    dataset.storage.put(version_of("samples").tar_path(0), tar)
    keys = table["key"].to_pylist()
    put(dataset, "samples", table)
    hints: list[Outcome] = [Ok({"hints": json.dumps({"tags": [f"t{k[:2]}"]})}) for k in keys]
    put(dataset, "hints", build_table(keys, hints, COLUMNS["hints"]))
    prompts: list[Outcome] = [Ok({"prompt": f"describe {k}"}) for k in keys]
    put(dataset, "prompts/v1", build_table(keys, prompts, COLUMNS["prompts/v1"]))
    put(dataset, "tags/model", build_table(keys, [Ok({})] * 4, []), "sha256:77")
    put(dataset, "captions/engine", captions(CAPTIONS, keys))
    return Export(dataset, "captions/engine", "prompts/v1", Storage(tmp_path / "export"))


def read(export: Export) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    llava = json.loads(export.out.read("llava.json"))
    lines = export.out.read("densefusion.jsonl").decode().splitlines()
    return llava, [json.loads(line) for line in lines]


def test_only_captioned_samples_and_nothing_of_them_lost(export: Export) -> None:
    assert export.run() == (3, 0, 0, 0)
    llava, dense = read(export)
    keys = [sample_key(IMAGES[i]) for i in (0, 1, 3)]
    assert [row["id"] for row in llava] == [row["image_id"] for row in dense] == keys
    assert [row["caption"] for row in dense] == [CAPTIONS[0], "Two.", "Four."]
    assert [row["url"] for row in dense] == [None, "https://x/1", "https://x/3"]
    assert [row["row_ids"] for row in dense] == [["row-0"], ["row-1"], ["row-3"]]
    assert dense[0]["hints"] == {"tags": [f"t{keys[0][:2]}"]}
    assert {row["engine"] for row in dense} == {"engine"}
    assert {row["template"] for row in dense} == {"v1"}
    assert dense[0]["revisions"] == {"tags/model": "sha256:77"}


def test_a_quoted_image_token_stays_one_token(export: Export) -> None:
    """LLaVA's loader counts `<image>` and fails on a second one."""
    export.run()
    llava, _ = read(export)
    human, answer = llava[0]["conversations"]
    assert (human["from"], answer["from"]) == ("human", "gpt")
    assert human["value"].startswith("<image>\n")
    assert (human["value"] + answer["value"]).count("<image>") == 1
    assert "ünïcode\nin two lines" in answer["value"]


def test_images_open_upright_everywhere(export: Export) -> None:
    export.run()
    llava, _ = read(export)
    assert [Path(row["image"]).suffix for row in llava] == [".jpg", ".jpg", ".png"]
    stored = [export.out.read(row["image"]) for row in llava]
    assert stored[0] == IMAGES[0]  # already fine: not encoded again
    for data, original in zip(stored, (IMAGES[0], IMAGES[1], IMAGES[3]), strict=True):
        with Image.open(io.BytesIO(data)) as image:
            assert image.getexif().get(0x0112, 1) == 1
            assert close(np.asarray(image.convert("RGB")), decode(original), 6)
    names = export.out.files("images")
    assert len(names) == 3  # none of the sample without a caption


def test_it_is_current_until_a_table_changes(export: Export) -> None:
    assert not export.is_current()
    export.run()
    assert export.is_current()
    first = {name: export.out.read(name) for name in export.out.files("")}
    export.run()
    assert {name: export.out.read(name) for name in export.out.files("")} == first
    table, _ = export.selected.read_table("captions/engine", 0)
    put(export.selected, "captions/engine", captions(["new"] * 4, table["key"].to_pylist()))
    assert not export.is_current()
    assert export.run() == (4, 0, 0, 0)
    assert export.is_current()


def test_a_run_that_breaks_is_not_current(
    export: Export,
) -> None:
    export.run()
    before = export.out.read("llava.json")
    export.selected.storage.delete(version_of("samples").tar_path(0))
    with pytest.raises(FileNotFoundError):
        export.run()
    assert not export.is_current()
    assert export.out.read("llava.json") == before  # the old file, whole


def test_pictures_of_earlier_exports_go(export: Export) -> None:
    export.run()
    export.out.put("images/00000007/" + "0" * 32 + ".jpg", b"of a shard that is no more")
    table, _ = export.selected.read_table("captions/engine", 0)
    put(
        export.selected,
        "captions/engine",
        captions([None, "a", None, "b"], table["key"].to_pylist()),
    )
    assert export.run() == (2, 0, 0, 0)
    assert sorted(row["image_path"] for row in read(export)[1]) == export.out.files("images")


def blurring(export: Export, found: list[Outcome]) -> Export:
    """With what a detector said of the samples."""
    keys = export.selected.read_table("samples", 0)[0]["key"].to_pylist()
    columns = [pa.field("objects", ARROW_TYPES[EvidenceKind.OBJECTS])]
    put(export.selected, "blur/faces", build_table(keys, found, columns))
    return replace(export, blur=Blur(("blur/faces",), (), 0.3))


def test_faces_are_blurred(export: Export) -> None:
    export.run()
    plain = {row["image_path"]: export.out.read(row["image_path"]) for row in read(export)[1]}
    sure = {"label": "face", "score": 0.9, "box": [0.0, 0.0, 0.5, 0.5]}
    unsure = {"label": "face", "score": 0.1, "box": [0.5, 0.5, 1.0, 1.0]}
    seen = [[], [sure, unsure], [sure], [unsure]]
    other = blurring(export, [Ok({"objects": objects}) for objects in seen])
    assert not other.is_current()
    assert other.run() == (3, 0, 1, 0)
    assert other.is_current()
    paths = [row["image_path"] for row in read(other)[1]]
    assert sorted(paths) == sorted(plain) == export.out.files("images"), "no other copy is left"
    for number, path in enumerate(paths):
        before, after = (decode(data) for data in (plain[path], export.out.read(path)))
        height, width = before.shape[:2]
        corner, rest = (
            np.s_[: height // 2, : width // 2],
            np.s_[height * 5 // 8 :, width * 5 // 8 :],
        )
        assert np.abs(after[rest].astype(int) - before[rest]).mean() < 12  # saved again as a JPEG
        assert (after[corner].std() < before[corner].std() / 3) == (number == 1)
    assert not replace(other, blur=Blur(("blur/faces",), (), 0.05)).is_current()


def test_no_metadata_shows_what_is_blurred(export: Export) -> None:
    blurring(export, [Ok({"objects": []})] * 4).run()
    for row in read(export)[1]:
        data = export.out.read(row["image_path"])
        with Image.open(io.BytesIO(data)) as image:
            assert len(image.getexif()) == 0
        assert data not in IMAGES, "made anew, though nothing is blurred: it may have a thumbnail"


def test_labels_that_no_box_has_are_told(export: Export) -> None:
    box = {"label": "Face", "score": 0.2, "box": [0.0, 0.0, 0.5, 0.5]}
    made = blurring(export, [Ok({"objects": [box]})] * 4)
    blur = replace(made.blur, labels=("face", "faces"))
    assert blur.idle_labels(export.selected) == (["faces"], ["Face"])


def test_a_table_that_lacks_shards_is_named_and_nothing_is_touched(export: Export) -> None:
    export.run()
    before = {name: export.out.read(name) for name in export.out.files("")}
    with pytest.raises(ExportError, match=r"'blur/faces' is missing for 1 of 1 shards .*--limit"):
        replace(export, blur=Blur(("blur/faces",), (), 0.3)).run()
    assert {name: export.out.read(name) for name in export.out.files("")} == before


def test_an_export_that_breaks_leaves_nothing_unblurred(export: Export) -> None:
    export.run()
    other = blurring(export, [Ok({"objects": []})] * 4)
    export.selected.storage.delete(version_of("samples").tar_path(0))
    with pytest.raises(FileNotFoundError):
        other.run()
    assert export.out.files("") == []


def test_what_no_detector_could_look_at_is_withheld(export: Export) -> None:
    export.run()
    nothing = Ok({"objects": []})
    other = blurring(export, [nothing, NotOk("failed", "timeout"), nothing, nothing])
    assert other.run() == (2, 1, 0, 0)
    assert json.loads(export.out.read("manifest.json"))["withheld"] == 1
    llava, dense = read(export)
    assert [row["caption"] for row in dense] == [CAPTIONS[0], "Four."]
    assert len(llava) == 2
    assert len(export.out.files("images")) == 2, "and the picture of the first export is gone"


def test_filters_leave_samples_out(export: Export) -> None:
    export.run()
    heights = export.selected.read_table("samples", 0)[0]["height"].to_pylist()
    other = replace(export, where=(("samples.height", "<", max(heights)),))
    assert not other.is_current()
    [tall] = [i for i, height in enumerate(heights) if height == max(heights)]
    assert CAPTIONS[tall], "that it is left out is the filter's doing"
    assert other.run() == (2, 0, 0, 1)
    assert other.is_current()
    captions_left = [CAPTIONS[i] for i in (0, 1, 3) if i != tall]
    assert [row["caption"] for row in read(other)[1]] == captions_left
    assert sorted(row["image_path"] for row in read(other)[1]) == export.out.files("images")
    assert replace(export, where=(("samples.height", "<", max(heights) + 1),)).run()[0] == 3


def test_a_run_that_breaks_leaves_no_list_by_other_filters(export: Export) -> None:
    export.run()
    export.selected.storage.delete(version_of("samples").tar_path(0))
    with pytest.raises(FileNotFoundError):
        replace(export, where=(("samples.height", "<", 1),)).run()
    assert not [name for name in export.out.files("") if not name.startswith("images/")]
    assert export.counts() is None


def test_a_filter_that_cannot_be_applied_touches_nothing(export: Export) -> None:
    export.run()
    before = {name: export.out.read(name) for name in export.out.files("")}
    with pytest.raises(NoTableError, match="table 'look' is not there yet"):
        replace(export, where=(("look.sharpness", ">", 3),)).run()
    with pytest.raises(ReadingError, match=r"no column 'hints\.sharpness'"):
        replace(export, where=(("hints.sharpness", ">", 3),)).run()
    assert {name: export.out.read(name) for name in export.out.files("")} == before


def test_no_captions_are_an_empty_list(export: Export) -> None:
    table, _ = export.selected.read_table("captions/engine", 0)
    put(export.selected, "captions/engine", captions([None] * 4, table["key"].to_pylist()))
    assert export.run() == (0, 0, 0, 0)
    assert read(export) == ([], [])
