"""What users read of a dataset: docs/reading.md runs, and each of its promises can fail here."""

import io
import itertools
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import fusion_pipeline
from fusion_pipeline.config import load_config
from fusion_pipeline.dataset.filters import ReadingError, to_expression
from fusion_pipeline.dataset.fingerprints import Fingerprint
from fusion_pipeline.dataset.images import ImageInfo
from fusion_pipeline.dataset.layout import Dataset, DatasetError, TableVersion
from fusion_pipeline.dataset.reading import Reader, Selection
from fusion_pipeline.dataset.rows import NotOk, Ok, Outcome, build_table
from fusion_pipeline.dataset.samples import Sample, pack_samples, sample_key
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.demo import make_demo_data
from fusion_pipeline.engine.chain import Replace
from fusion_pipeline.engine.ray_pool import RayOptions, start_ray, stop_ray
from fusion_pipeline.engine.shard import Redo, Step
from fusion_pipeline.pipeline import build_pipeline
from fusion_pipeline.runner import Options, Runner
from tests.dataset.tables import put_table
from tests.toy import ROWS, ToyStage, path_of, png, run_toy, toy_steps

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reading.md"
CAPTIONS = "captions/some-model-1.5"
"""A name with a dot, as models have."""
APPLE = f"{CAPTIONS}.boxes[apple]"
Row = dict[str, Any]


@dataclass(frozen=True)
class Made:
    """A dataset of three shards, and by hand what its rows are."""

    root: Path
    rows: list[Row]
    """Of all shards in order; columns by the names that users give them."""

    @property
    def reader(self) -> Reader:
        return fusion_pipeline.open(self.root)


CAPTION_COLUMNS = (
    pa.field("caption", pa.string()),
    pa.field("score", pa.float64()),
    pa.field("boxes", pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))),
)
WORDS = ["", "apple", "apples", "pear", "Übung"]
SCORES = [-1.5, 0.0, 0.25, 8.0]


def best_of(items: list[Row], label: str) -> float:
    return max((item["score"] for item in items if item["label"] == label), default=0.0)


def version(name: str) -> TableVersion:
    return TableVersion.of(name, Fingerprint({"table": name}))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("made")
    dataset, random = Dataset.create(root), np.random.default_rng(9)
    rows: list[Row] = []
    for shard in range(3):
        samples, outcomes = [], list[Outcome]()
        for i in range(7):
            # No images, but large enough that reading around them pays.
            data = random.bytes(400_000)
            info = ImageInfo(
                "png" if i % 3 else "jpeg", int(random.integers(1, 9)), 5, 1, "RGB", False
            )
            samples.append(Sample(sample_key(data), data, info, [f"row {i}"]))
            caption = str(random.choice(WORDS))
            score = float(random.choice(SCORES))
            boxes = [{"label": caption, "score": (i + 1) / (8 << n)} for n in range(i % 3)]
            values = {"caption": caption, "score": score, "boxes": boxes}
            fails = random.random() < 0.3
            outcomes.append(NotOk("failed", "timeout: 9 s") if fails else Ok(values))
            rows.append(
                {
                    "key": sample_key(data),
                    "image": data,
                    "samples.width": info.width,
                    "samples.format": info.format,
                    f"{CAPTIONS}.status": "failed" if fails else "ok",
                    f"{CAPTIONS}.reason": "timeout: 9 s" if fails else None,
                    f"{CAPTIONS}.caption": None if fails else caption,
                    f"{CAPTIONS}.score": None if fails else score,
                    f"{CAPTIONS}.boxes": None if fails else boxes,
                    APPLE: None if fails else best_of(boxes, "apple"),
                }
            )
        tar, table = pack_samples(samples)
        dataset.storage.put(version("samples").tar_path(shard), tar)
        put_table(dataset, version("samples"), table, shard)
        captions = build_table(table["key"].to_pylist(), outcomes, CAPTION_COLUMNS)
        put_table(dataset, version(CAPTIONS), captions, shard)
    return Made(root, rows)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Three shards of `samples`, `a`, `b` made from it, `nested/c` from both, and `sources`."""
    run_toy(tmp_path / "toy", range(3), toy_steps())
    return tmp_path / "toy"


# The page


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small but real run in `runs/quickstart`: one tar of the demo data."""
    folder = tmp_path_factory.mktemp("quickstart")
    make_demo_data(folder / "demo", seed=0)
    (folder / "few").mkdir()
    (folder / "demo" / "shards" / "00000.tar").rename(folder / "few" / "00000.tar")
    overrides = [
        f"run={folder}/runs/quickstart",
        f"source.webdataset={folder}/few",
        "source.shard_size=8",
        "select.shard_size=6",
        "select.clusters=3",
    ]
    pipeline = build_pipeline(load_config(ROOT / "configs" / "quickstart.yaml", overrides))
    Runner(pipeline, Options(in_process=True), Console(file=io.StringIO())).run()
    return folder


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    start_ray(RayOptions(cpus=2))
    yield
    stop_ray()


@pytest.mark.xdist_group("ray")
def test_the_examples_of_the_page_run(
    quickstart: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(quickstart)
    text, names = PAGE.read_text(), dict[str, Any]()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) >= 8
    for block in blocks:
        lines_before = text[: block.start(1)].count("\n")  # a trace names the line of the page
        exec(compile("\n" * lines_before + block[1], str(PAGE), "exec"), names)
    assert 0 < len(names["frame"]) == names["table"].num_rows < len(names["selected"])
    assert names["pixels"].dtype == np.uint8
    assert len(names["text"]) > 20
    assert names["words"].mean("words") > 5
    assert np.allclose(np.diag(names["cosines"]), 1, atol=1e-2)
    assert len(names["failed"]) == 1


def test_importing_the_package_is_cheap() -> None:
    code = "import fusion_pipeline, sys; print(*sys.modules); fusion_pipeline.open"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"pyarrow", "numpy", "fsspec", "ray", "pydantic"} & set(done.stdout.split())


# What there is


def test_the_folder_of_a_run_is_no_dataset(tmp_path: Path) -> None:
    run_toy(tmp_path / "run" / "pool", range(1), toy_steps())
    with pytest.raises(ReadingError, match=r"run/selected \(not there yet\)") as info:
        fusion_pipeline.open(f"{tmp_path}/run/")
    assert f"{tmp_path}/run/pool" in str(info.value)
    with pytest.raises(DatasetError, match="is no dataset"):
        fusion_pipeline.open(tmp_path)
    assert len(fusion_pipeline.open(f"{tmp_path}/run/pool/")) == ROWS


def test_what_there_is(toy: Path) -> None:
    reader = fusion_pipeline.open(toy)
    assert (len(reader), reader.num_rows, reader.shards) == (3 * ROWS, 3 * ROWS, [0, 1, 2])
    assert list(reader.tables) == ["a", "b", "nested/c", "samples", "sources"]
    assert reader.tables["a"].names == ["key", "status", "reason", "value"]
    assert reader.tables["samples"].field("width").type == pa.int32()
    every = reader.select()
    assert every.schema.names[:4] == ["key", "a.status", "a.reason", "a.value"]
    assert not [n for n in every.schema.names if n.startswith("sources") or n == "image"]


def test_names_of_columns(made: Made) -> None:
    asked = [f"{CAPTIONS}.score", "key", "samples", "samples.width", CAPTIONS, "image"]
    names = made.reader.select(asked).to_arrow().column_names
    assert names[:3] == [f"{CAPTIONS}.score", "key", "samples.status"]
    assert names.count("samples.width") == names.count(f"{CAPTIONS}.score") == 1
    assert names[-2:] == [f"{CAPTIONS}.boxes", "image"]
    assert made.reader.select("key").schema.names == ["key"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["samples.widht"], r"Did you mean 'samples.width'.*'samples' has key, .*, width, height"),
        (["width"], "Did you mean 'samples.width'"),
        (["captions/some-model-1.5.captoin"], r"mean 'captions/some-model-1\.5\.caption'"),
        (["sampels"], r"mean 'samples'.*tables: captions/some-model-1\.5, samples"),
        (["images"], r"mean 'image'"),
        (["samples.width[cat]"], r"'samples.width' is no list of labels with scores"),
        (["samples.url[cat]"], r"no column 'samples.url'.*mean 'samples.urls'"),
        ([f"{CAPTIONS}[apple]"], rf"is a table, not a column. Did you mean '{CAPTIONS}.boxes\[app"),
        (["samples[apple]"], "It has no labels"),
        ([f"{CAPTIONS}.boxes[]"], "'' is no label"),
        ([f"{CAPTIONS}.boxes[ apple]"], "' apple' is no label"),
        ([f"{CAPTIONS}.boxes[apple][pear]"], r"'apple\]\[pear' is no label"),
        (["samples.width[cat"], r"no column 'samples.width\[cat'"),
        ([], "no column was named"),
    ],
)
def test_a_wrong_name_says_what_there_is(made: Made, columns: list[str], message: str) -> None:
    with pytest.raises(ReadingError, match=message):
        made.reader.select(columns)


# Rows

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda value, given: value is not None and value == given,
    "!=": lambda value, given: value is not None and value != given,
    "<": lambda value, given: value is not None and value < given,
    ">=": lambda value, given: value is not None and value >= given,
    "in": lambda value, given: value is not None and value in given,
    "not in": lambda value, given: value is not None and value not in given,
}
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "samples.width": st.integers(0, 9),
    "samples.format": st.sampled_from(["jpeg", "png", "webp"]),
    f"{CAPTIONS}.status": st.sampled_from(["ok", "failed"]),
    f"{CAPTIONS}.caption": st.sampled_from(WORDS),
    f"{CAPTIONS}.score": st.sampled_from(SCORES),
    APPLE: st.integers(0, 8).map(lambda eighths: eighths / 8),
}


@st.composite
def predicates(draw: st.DrawFn) -> tuple[str, str, Any]:
    column, operator = draw(st.sampled_from(sorted(VALUES))), draw(st.sampled_from(list(OPERATORS)))
    value = VALUES[column]
    return column, operator, draw(st.lists(value, min_size=1) if "in" in operator else value)


def holds(row: Row, where: list[Any]) -> bool:
    """Filters in plain Python: any of the lists of conditions that all hold."""
    lists = where if isinstance(where[0], list) else [where]
    return any(all(OPERATORS[op](row[name], given) for name, op, given in one) for one in lists)


CONDITIONS = st.lists(predicates(), min_size=1, max_size=3)


@settings(max_examples=120, deadline=None)
@given(
    where=CONDITIONS | st.lists(CONDITIONS, min_size=1, max_size=3),
    columns=st.lists(st.sampled_from(["key", "image", f"{CAPTIONS}.boxes", *VALUES]), min_size=1,
                     unique=True),
)  # fmt: skip
def test_rows_are_those_for_which_the_filter_holds(
    made: Made, where: list[Any], columns: list[str]
) -> None:
    expected = [row for row in made.rows if holds(row, where)]
    found = made.reader.select(columns, where).to_arrow()
    assert found.column_names == columns
    assert found.to_pylist() == [{name: row[name] for name in columns} for row in expected]
    # The same as an Expression, which needs its columns to be selected; nulls are its own affair.
    lists = where if isinstance(where[0], list) else [where]
    if not any(operator == "not in" for one in lists for _, operator, _ in one):
        names = ["key", *sorted(VALUES)]
        found = made.reader.select(names, pq.filters_to_expression(where)).to_arrow()
        assert found["key"].to_pylist() == [row["key"] for row in expected]


def test_numbers_are_compared_as_they_are_stored(tmp_path: Path) -> None:
    """0.3 as float32 is a little more than 0.3 as float64."""
    column = pa.table({"score": pa.array([0.2, 0.3, 0.4], pa.float32())})
    for operator, value, expected in (
        ("<", 0.3, [0]), ("<=", 0.3, [0, 1]), ("==", 0.3, [1]), ("in", [0.3, 0.4], [1, 2]),
        ("not in", [0.3], [0, 2]),
    ):  # fmt: skip
        holds = to_expression([("score", operator, value)], column.schema)
        rows = column.append_column("row", pa.array(range(3))).filter(holds)["row"]
        assert sorted(rows.to_pylist()) == expected, operator


WIDTH = pc.field("samples.width")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ([("samples.widht", ">", 1)], "Did you mean 'samples.width'"),
        ([("samples.width", ">", "wide")], "no kernel"),
        ([("samples.width", ">", 2**80)], "too large"),
        ([("samples.width", "~", 1)], "not a valid operator"),
        ([("samples.width", ">")], "expected 3"),
        ([], "no list of"),
        (7, "no list of"),
        ([("image", "==", b"")], "can't be compared"),
        (pc.field("samples.height") > 1, "sees the selected columns: key, samples.width"),
        (WIDTH + 1, "must evaluate to bool"),
    ],
)
def test_a_wrong_filter_is_told_before_anything_is_read(
    made: Made, where: Any, message: str
) -> None:
    with pytest.raises(ReadingError, match=message):
        made.reader.select(["key", "samples.width"], where)


def test_images_are_read_by_ranges(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a shard at once; a few one by one, without what lies between them."""
    asked: list[int] = []
    read_range = Storage.read_range

    def spy(self: Storage, path: str, start: int, end: int) -> bytes:
        asked.append(end - start)
        return read_range(self, path, start, end)

    few = [made.rows[i] for i in (0, 3, 4, 20)]
    where = [("key", "in", [row["key"] for row in few])]
    some, every = made.reader.select("image", where), made.reader.select(["image"])
    monkeypatch.setattr(Storage, "read_range", spy)
    assert some.to_arrow()["image"].to_pylist() == [row["image"] for row in few]
    assert sorted(round(size, -5) for size in asked) == [400_000, 400_000, 800_000]
    asked.clear()
    assert every.to_arrow()["image"].to_pylist() == [row["image"] for row in made.rows]
    assert len(asked) == 3


def test_a_damaged_image_is_named(toy: Path) -> None:
    dataset = Dataset.open(toy)
    where = [("samples.image_offset", ">", 0)]
    row = fusion_pipeline.open(toy).select(["key", "samples"], where).to_arrow().to_pylist()[1]
    tar = Path(dataset.storage.full(dataset.version("samples").tar_path(0)))
    data = bytearray(tar.read_bytes())
    data[row["samples.image_offset"] + 30] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ReadingError, match=f"image {row['key']} are damaged"):
        fusion_pipeline.open(toy).select("image").to_arrow()


def test_input_rows_are_read_alone(toy: Path) -> None:
    reader = fusion_pipeline.open(toy)
    sources = reader.select(["key", "sources.source_id"], [("sources.source", "==", "toy")])
    names = [f"{shard}-{row}" for shard in range(3) for row in range(ROWS)]
    assert sources.to_arrow()["sources.source_id"].to_pylist() == names
    mixed: list[tuple[list[str], Any]] = [
        (["sources.url", "samples.width"], None),
        (["sources.url", "image"], None),
        (["a.value"], [("sources.status", "==", "ok")]),
    ]
    for columns, where in mixed:
        with pytest.raises(ReadingError, match="select it alone"):
            reader.select(columns, where)
    with pytest.raises(ReadingError, match="not 'sources'"):
        sources.to_webdataset()


# A run that goes on


def test_shards_that_lack_a_table(toy: Path) -> None:
    reader = fusion_pipeline.open(toy)
    path_of(Dataset.open(toy), "nested/c", 1).unlink()
    with pytest.raises(ReadingError, match=r"'nested/c' is missing for 1 of 3 shards.*--limit"):
        reader.select(["key", "a.value"], [("nested/c.status", "==", "ok")])
    assert len(reader.select(["key", "a.value"]).shards) == 3
    found = reader.select(["key", "nested/c.value"], allow_missing=True)
    assert found.shards == (0, 2)
    assert found.to_arrow().num_rows == 2 * ROWS
    for shard in (0, 2):
        path_of(Dataset.open(toy), "nested/c", shard).unlink()
    assert "nested/c" not in reader.tables
    with pytest.raises(ReadingError, match=r"'nested/c' has no shard yet"):
        reader.select("nested/c", allow_missing=True)


def test_no_shards_yet(tmp_path: Path) -> None:
    run_toy(tmp_path, [], toy_steps())
    reader = fusion_pipeline.open(tmp_path)
    assert (len(reader), reader.shards, reader.tables) == (0, [], {})
    with pytest.raises(ReadingError, match="no shard is complete yet"):
        reader.select("key")


@pytest.fixture
def healed(tmp_path: Path) -> tuple[Path, tuple[Step, ...]]:
    """Some rows of `a` failed and were done again, in all shards; `b` and `nested/c` are older."""
    root, pill = tmp_path / "healed", tmp_path / "pill"
    steps = toy_steps(first=ToyStage("a", healed_by=str(pill)))
    run_toy(root, range(3), steps)
    pill.touch()
    run_toy(root, range(3), steps[:2], redo=Redo.FAILED)
    return root, steps


def test_a_table_made_from_an_older_one_is_named(healed: tuple[Path, tuple[Step, ...]]) -> None:
    root, steps = healed
    reader = fusion_pipeline.open(root)
    keys = {shard: table["key"].to_pylist() for shard, table in Dataset(root).iterate("samples")}
    first, *more = [n for n in keys if any(int(key[:2], 16) % 5 == 0 for key in keys[n])]
    message = rf"shard {first} \(and {len(more)} more\): table 'b' was made from an older 'a'"
    with pytest.raises(ReadingError, match=f"{message}.*--refresh"):
        reader.select(["a.value", "b.value"])
    assert reader.select(["a.value", "samples.width"]).to_arrow().num_rows == 3 * ROWS
    assert reader.select(["b.value", "nested/c.value"]).to_arrow().num_rows == 3 * ROWS
    old = reader.select(["a.value", "b.status"], allow_stale=True).to_arrow()
    assert old.filter(pc.field("b.status") == "filtered")["a.value"].null_count == 0
    run_toy(root, range(3), steps, redo=Redo.STALE)
    statuses = reader.select(["a.value", "b.status"]).to_arrow()["b.status"]
    assert set(statuses.to_pylist()) == {"ok"}


def test_two_tables_made_from_different_ones(healed: tuple[Path, tuple[Step, ...]]) -> None:
    """The table that they differ in is not read itself."""
    root, steps = healed
    reader = fusion_pipeline.open(root)
    run_toy(root, range(3), steps[:3], redo=Redo.STALE)  # `b` is made again, `nested/c` is not
    with pytest.raises(ReadingError, match="'b' and 'nested/c' were made from different 'a'"):
        reader.select(["b.value", "nested/c.value"])
    run_toy(root, range(3), steps, redo=Redo.STALE)
    assert reader.select(["b.value", "nested/c.value"]).to_arrow().num_rows == 3 * ROWS


def test_a_selection_does_not_mix_what_a_run_replaces(tmp_path: Path) -> None:
    """The run goes on after `select`: the reader is told, and never gets rows of both."""
    root, pill = tmp_path / "toy", tmp_path / "pill"
    steps = toy_steps(first=ToyStage("a", healed_by=str(pill)))
    run_toy(root, range(3), steps)
    both = fusion_pipeline.open(root).select(["a.value", "b.value"])
    one = fusion_pipeline.open(root).select(["b.value", "image"])
    pill.touch()
    run_toy(root, range(3), steps[:2], redo=Redo.FAILED)  # the same version, other rows
    with pytest.raises(ReadingError, match="table 'b' was made from an older 'a'"):
        both.to_arrow()
    assert one.to_arrow().num_rows == 3 * ROWS
    other = toy_steps(first=ToyStage("a", setting=7, healed_by=str(pill)))
    run_toy(root, range(3), other, allowed=Replace.CHANGED)  # another version
    with pytest.raises(ReadingError, match=r"is gone: a run has replaced .* Select again"):
        one.to_arrow()


def test_other_samples_are_never_put_side_by_side(toy: Path) -> None:
    dataset = Dataset.open(toy)
    keys = [sample_key(bytes([i])) for i in range(ROWS)]
    column = pa.field("value", pa.string())
    put_table(dataset, version("odd"), build_table(keys, [Ok({})] * ROWS, [column]), 0)
    odd = fusion_pipeline.open(toy).select(
        ["a.value", "odd.value"], allow_missing=True, allow_stale=True
    )
    with pytest.raises(ReadingError, match="'a' and 'odd' of shard 0 hold different samples"):
        odd.to_arrow()


def test_on_a_disk_and_on_s3(dataset_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After `select` nothing is listed: a worker asks for the files of its shards alone."""
    run_toy(dataset_root, range(3), toy_steps())
    reader = fusion_pipeline.open(dataset_root + "/")
    last = [("nested/c.status", "==", "ok"), ("samples.width", ">", 0)]
    found = reader.select(["key", "image", "nested/c.value"], last)
    sent = pickle.dumps(found)

    def no_listing(self: Storage, folder: str) -> Any:
        raise AssertionError(f"listed {folder}")

    for verb in ("files", "sizes", "folders"):
        monkeypatch.setattr(Storage, verb, no_listing)
    received: Selection = pickle.loads(sent)  # noqa: S301 - our own bytes
    images = received.to_arrow()["image"].to_pylist()
    assert images == [png(shard, row) for shard in range(3) for row in range(ROWS)]
    sample = next(iter(received.to_webdataset()))
    assert sample["__url__"].startswith(dataset_root + "/shards/v-")
    assert Storage(dataset_root).exists(sample["__url__"].removeprefix(dataset_root + "/"))


# What comes out


def test_batches_are_shards(made: Made) -> None:
    last = made.reader.select(["key", "image"], [("key", "==", made.rows[-1]["key"])])
    assert [batch.num_rows for batch in last.to_batches()] == [0, 0, 1]
    assert {str(batch.schema) for batch in last.to_batches()} == {str(last.schema)}
    none = made.reader.select(["key", CAPTIONS], [("samples.width", ">", 99)])
    assert none.to_arrow().schema == none.schema
    assert none.to_pandas().empty
    assert list(none.to_webdataset()) == []


def test_without_pandas(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    found = made.reader.select(["key", f"{CAPTIONS}.boxes"])
    assert found.to_pandas()["key"].tolist() == [row["key"] for row in made.rows]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ReadingError, match="pip install pandas"):
        found.to_pandas()


def test_embeddings_are_a_matrix(toy: Path) -> None:
    dataset = Dataset.open(toy)
    vectors = np.random.default_rng(4).standard_normal((3, ROWS, 16)).astype(np.float16)
    for shard in range(3):
        keys = dataset.read_table("samples", shard)[0]["key"].to_pylist()
        outcomes: list[Outcome] = [Ok({"embedding": v.tobytes()}) for v in vectors[shard]]
        outcomes[2] = NotOk("failed", "no_direction")
        columns = [pa.field("embedding", pa.binary(2 * 16))]
        put_table(dataset, version("embeddings"), build_table(keys, outcomes, columns), shard)
    reader, name = fusion_pipeline.open(toy), "embeddings.embedding"
    ok = reader.select(["image", name], [("embeddings.status", "==", "ok")])
    found = ok.to_numpy(name)
    assert found.dtype == np.float16
    assert np.array_equal(found, np.delete(vectors, 2, axis=1).reshape(-1, 16))
    with pytest.raises(ReadingError, match=r'where=\[\("embeddings.status", "==", "ok"\)\]'):
        reader.select(name).to_numpy(name)
    with pytest.raises(ReadingError, match="no selected column of embeddings"):
        ok.to_numpy("image")
    with pytest.raises(ReadingError, match=r"binary columns \(embeddings\.embedding\)"):
        ok.to_webdataset()
    nothing = reader.select(name, [("samples.width", "<", 0)])
    assert nothing.to_numpy(name).shape == (0, 16)


def test_webdataset_samples(made: Made) -> None:
    """The image under its own extension, the rest as JSON: what WebDataset itself decodes."""
    columns = ["image", "samples.width", f"{CAPTIONS}.boxes"]
    pipeline = made.reader.select(columns).to_webdataset()
    for sample, row in itertools.zip_longest(pipeline, made.rows):
        extension = {"jpeg": "jpg", "png": "png"}[row["samples.format"]]
        assert set(sample) == {"__key__", "__url__", "json", extension}
        assert sample["__key__"] == row["key"]
        assert sample[extension] == row["image"]
        assert json.loads(sample["json"]) == {name: row[name] for name in columns[1:]}
    decoded = made.reader.select("samples.width").to_webdataset().compose(webdataset.decode())
    assert [s["json"]["samples.width"] for s in decoded] == [r["samples.width"] for r in made.rows]
    assert isinstance(decoded, webdataset.pytorch.IterableDataset)  # torch's own where there is one


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(("nodes", "workers"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 4)])
def test_every_row_goes_to_exactly_one_worker(
    seed: int | None, nodes: int, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_toy(tmp_path, range(7), toy_steps()[:1])
    selection = fusion_pipeline.open(tmp_path).select(["image"])
    sent = pickle.dumps(selection.to_webdataset(seed))
    keys = selection.dataset.iterate("samples")
    expected = [key for _, table in keys for key in table["key"].to_pylist()]
    orders: dict[int, list[str]] = {0: [], 1: []}
    most = math.ceil(math.ceil(7 / nodes) / workers) * ROWS
    for node, worker in itertools.product(range(nodes), range(workers)):
        for name, number in {"RANK": node, "WORLD_SIZE": nodes, "WORKER": worker,
                             "NUM_WORKERS": workers}.items():  # fmt: skip
            monkeypatch.setenv(name, str(number))
        pipeline = pickle.loads(sent)  # noqa: S301 - our own bytes
        for epoch, seen in orders.items():
            mine = [sample["__key__"] for sample in pipeline]
            assert len(mine) <= most, f"epoch {epoch}, node {node}, worker {worker}"
            seen += mine
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(expected)
    assert (orders[0] != orders[1]) == (seed is not None)
    if (nodes, workers, seed) == (1, 1, None):
        assert orders[0] == expected


@pytest.mark.xdist_group("ray")
def test_ray_data_reads_the_same(made: Made, local_ray: None) -> None:
    where = [("samples.width", ">=", 4), (f"{CAPTIONS}.caption", "in", WORDS)]
    selection = made.reader.select(["key", "image", f"{CAPTIONS}.boxes"], where)
    expected = selection.to_arrow().sort_by("key")
    assert 3 < expected.num_rows < len(made.rows)
    dataset = selection.to_ray().materialize()
    assert dataset.num_blocks() == 3
    blocks = list(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    assert pa.concat_tables(blocks).sort_by("key").equals(expected)
    pids = made.reader.select(["key"]).to_ray().map_batches(lambda b: {"pid": [os.getpid()]})
    assert os.getpid() not in {row["pid"] for row in pids.take_all()}
