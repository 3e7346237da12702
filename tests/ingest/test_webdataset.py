"""WebDataset tars in: every input row is one row of `sources`, whatever the tar looks like."""

import gzip
import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusion_pipeline.dataset.artifacts import read_plan
from fusion_pipeline.dataset.samples import sample_key
from fusion_pipeline.engine.watch import Watch
from fusion_pipeline.ingest.rows import SourceError
from fusion_pipeline.ingest.source import PLAN
from tests.ingest.sources import contents_of, ingest_of, plan_of, sample_rows, source_rows, tar_of
from tests.toy import png

IMAGES = [png(9, i) for i in range(40)]


def ingested(tmp_path: Path, *tars: bytes, **limits: int) -> tuple[list[dict], list[dict]]:  # type: ignore[type-arg]
    """(rows of `sources`, rows of `samples`) of tars named 0.tar, 1.tar, ..."""
    (tmp_path / "in").mkdir()
    for i, tar in enumerate(tars):
        (tmp_path / "in" / f"{i}.tar").write_bytes(tar)
    shards = contents_of(ingest_of(tmp_path / "in", tmp_path / "out", "webdataset", **limits))
    return source_rows(shards), sample_rows(shards)


def test_members_are_grouped_into_rows(tmp_path: Path) -> None:
    sources, samples = ingested(
        tmp_path,
        tar_of(
            [
                ("./set/a.json", b'{"url": "https://x/a.jpg", "caption": "not this one"}'),
                ("./set/a.PNG", IMAGES[0]),
                ("./set/a.txt", "  Grüße \n".encode()),
                ("./set/b.jpg", IMAGES[1]),  # PNG bytes all the same
                ("./set/b.json", b'{"TEXT": "from json", "URL": "https://x/b.jpg"}'),
                ("other/b.png", IMAGES[2]),  # another folder: another row
                ("c.txt", b"text alone"),
                ("d.seg.png", IMAGES[3]),  # the extension is all behind the first dot
                ("e.png", b"\x89PNG\r\n\x1a\n broken"),
                ("f.png", IMAGES[4]),
                ("f.txt", b""),
                ("f.json", b"{ broken json"),
            ]
        ),
    )
    assert [(r["source_id"], r["status"], r["reason"], r["url"]) for r in sources] == [
        ("set/a", "ok", None, "https://x/a.jpg"),
        ("set/b", "ok", None, "https://x/b.jpg"),
        ("other/b", "ok", None, None),
        ("c", "failed", "no_image", None),
        ("d", "failed", "no_image", None),
        ("e", "failed", "truncated: unreadable header", None),
        ("f", "ok", None, None),
    ]
    assert all(row["source"] == "0.tar" for row in sources)
    assert [(s["alt_texts"], s["urls"], s["format"]) for s in samples] == [
        (["Grüße"], ["https://x/a.jpg"], "png"),
        (["from json"], ["https://x/b.jpg"], "png"),
        ([], [], "png"),
        ([], [], "png"),
    ]


def test_rows_of_one_key_stay_rows_of_their_own(tmp_path: Path) -> None:
    """The same key again: at once (a second image), later, and in a later shard."""
    names = ["a.png", "a.txt", "a.png", "a.txt", "b.png", "a.png", "c.png", "a.png", "a.2.png"]
    images = iter(IMAGES)
    tar = tar_of([(n, next(images) if n.endswith("png") else b"text") for n in names])
    sources, samples = ingested(tmp_path, tar, tar, shard_size=2)
    ids = ["a", "a.2", "b", "a.3", "c", "a.4"]
    assert [r["source_id"] for r in sources] == ids * 2
    assert len({r["row_id"] for r in sources}) == 12  # the tar's name is part of it
    assert len(samples) == 12  # the copies are in other shards


def test_the_same_bytes_in_a_shard_are_one_sample(tmp_path: Path) -> None:
    def row(key: str, image: bytes, text: str, url: str) -> list[tuple[str, bytes]]:
        return [
            (f"{key}.png", image),
            (f"{key}.txt", text.encode()),
            (f"{key}.json", json.dumps({"url": url}).encode()),
        ]

    tar = tar_of(
        [
            *row("a", IMAGES[0], "first", "https://1"),
            *row("b", IMAGES[1], "other", "https://2"),
            *row("c", IMAGES[0], "second", "https://3"),
            *row("d", IMAGES[0], "first", "https://3"),
            ("e.png", b"<html>"),
            ("f.png", b"<html>"),
        ]
    )
    sources, samples = ingested(tmp_path, tar)
    by_id = {row["source_id"]: row for row in sources}
    assert [row["key"] for row in samples] == [sample_key(IMAGES[0]), sample_key(IMAGES[1])]
    assert samples[0]["alt_texts"] == ["first", "second"]
    assert samples[0]["urls"] == ["https://1", "https://3"]
    assert samples[0]["row_ids"] == [by_id[i]["row_id"] for i in "acd"]
    assert [by_id[i]["reason"] for i in "ef"] == [by_id["e"]["reason"]] * 2
    assert by_id["e"]["reason"].startswith("not_an_image")


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_larger_than_a_shard_is_split(kind: int, tmp_path: Path) -> None:
    long = "folder/" * 12 + "x" * (60 if kind == tarfile.USTAR_FORMAT else 200)
    members = [
        member
        for i in range(23)
        for member in ((f"{long}{i:02}.png", IMAGES[i]), (f"{long}{i:02}.txt", b"t" * i))
    ]
    place = tmp_path / "in"
    place.mkdir()
    (place / "0.tar").write_bytes(tar_of(members, kind))
    by_rows = contents_of(ingest_of(place, tmp_path / "rows", "webdataset", shard_size=5))
    assert [s.sources.num_rows for s in by_rows] == [5, 5, 5, 5, 3]
    limit = 12_000  # bytes in the source tar, headers included
    ingest = ingest_of(place, tmp_path / "bytes", "webdataset", max_shard_bytes=limit)
    by_bytes = contents_of(ingest)
    assert len(by_bytes) > 3
    parts = read_plan(ingest.dataset, PLAN, ingest.plan_digest()).to_pylist()
    assert all(part["end"] - part["start"] <= limit for part in parts)
    for shards in (by_rows, by_bytes):
        assert [s["key"] for s in sample_rows(shards)] == [sample_key(i) for i in IMAGES[:23]]
        assert [s["alt_texts"] for s in sample_rows(shards)][1:] == [
            ["t" * i] for i in range(1, 23)
        ]


# Damage


TEN = tar_of([m for i in range(10) for m in ((f"{i}.png", IMAGES[i]), (f"{i}.txt", b"text"))])
ROW = 2048  # header, image, header, text


def damaged_tars() -> dict[str, tuple[bytes, int]]:
    """(tar, rows that are still good)"""
    at = 6 * ROW
    wrong_sum = bytearray(TEN)
    wrong_sum[at + 3] ^= 0xFF
    return {
        "cut off in an image": (TEN[: at + 512 + 30], 6),
        "cut off in a header": (TEN[: at + 200], 6),
        "cut off between rows": (TEN[:at], 6),
        "garbage in the middle": (TEN[:at] + b"\xa5" * 3000 + TEN[at + 3072 :], 6),
        "wrong checksum": (bytes(wrong_sum), 6),
        "no tar at all": (b"<html>502 Bad Gateway</html>" * 100, 0),
        "no bytes": (b"", 0),
        "no members": (tar_of([]), 0),
    }


@pytest.mark.parametrize("what", damaged_tars())
@pytest.mark.parametrize("shard_size", [4, 500])
def test_damage_costs_the_rows_behind_it(what: str, shard_size: int, tmp_path: Path) -> None:
    tar, good = damaged_tars()[what]
    after = tar_of([("x.png", IMAGES[30])])
    sources, samples = ingested(tmp_path, tar, after, shard_size=shard_size)
    assert [r["source_id"] for r in sources if r["status"] == "ok"] == [
        *map(str, range(good)), "x",
    ]  # fmt: skip
    (bad,) = [r for r in sources if r["status"] != "ok"]
    assert bad["source"] == "0.tar"
    assert bad["reason"].startswith("source_damaged: ")
    assert len(samples) == good + 1
    assert [s["alt_texts"] for s in samples] == [["text"]] * good + [[]]


def test_a_row_cut_off_in_its_text_keeps_its_image(tmp_path: Path) -> None:
    sources, samples = ingested(tmp_path, TEN[: 6 * ROW + 1024 + 100])
    assert [r["reason"] for r in sources[:7]] == [None] * 7
    assert samples[6]["alt_texts"] == []
    assert sources[7]["reason"].startswith("source_damaged")


def test_a_tar_that_ends_with_a_folder_is_whole(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name in ("a.png", "empty", "link"):
            info = tarfile.TarInfo(name)
            data = IMAGES[0] if name == "a.png" else b""
            info.size = len(data)
            info.type = {"empty": tarfile.DIRTYPE, "link": tarfile.SYMTYPE}.get(name, b"0")
            tar.addfile(info, io.BytesIO(data))
    sources, _ = ingested(tmp_path, sink.getvalue())
    assert [(r["source_id"], r["status"]) for r in sources] == [("a", "ok")]


def test_names_and_texts_that_are_not_unicode(tmp_path: Path) -> None:
    """Latin-1 names, half an emoji in JSON: common on the web, and no reason to stop."""
    half = b'{"caption": "cut \\ud83d", "url": "https://x/\\udc00"}'
    tar = tar_of(
        [("caf\udce9.png", IMAGES[0]), ("caf\udce9.json", half), ("b.png", IMAGES[1]),
         ("b.txt", b"\xff\xfe text")],
        tarfile.GNU_FORMAT,
    )  # fmt: skip
    sources, samples = ingested(tmp_path, tar)
    assert [r["status"] for r in sources] == ["ok", "ok"]
    assert sources[0]["source_id"] == "caf\\udce9"
    assert samples[0]["alt_texts"] == ["cut \\ud83d"]
    assert samples[0]["urls"] == ["https://x/\\udc00"]
    assert samples[1]["alt_texts"] == ["\ufffd\ufffd text"]


@pytest.mark.parametrize(
    "metadata", [b"[1]", b"null", b'"x"', b"[" * 50_000, b'{"url": 5, "caption": ["x"]}', b"\xff",
                 b'{"caption": "' + b"x" * 2**20 + b'"}', b"1" * 6000],
)  # fmt: skip
def test_odd_metadata_only_lacks(metadata: bytes, tmp_path: Path) -> None:
    sources, samples = ingested(tmp_path, tar_of([("a.png", IMAGES[0]), ("a.json", metadata)]))
    assert [r["status"] for r in sources] == ["ok"]
    assert (samples[0]["alt_texts"], samples[0]["urls"]) == ([], [])


def test_metadata_with_all_the_exif_data_is_read(tmp_path: Path) -> None:
    fields = {"exif": "x" * 70_000, "caption": "y" * 70_000, "url": "https://x/1"}
    metadata = json.dumps(fields).encode()
    _, samples = ingested(tmp_path, tar_of([("a.png", IMAGES[0]), ("a.json", metadata)]))
    assert samples[0]["urls"] == ["https://x/1"]
    assert samples[0]["alt_texts"] == ["y" * 2**16]


def test_limits_on_bytes_and_pixels_have_reasons(tmp_path: Path) -> None:
    tar = tar_of([("a.png", IMAGES[0]), ("b.png", IMAGES[0] + bytes(200))])
    sources, _ = ingested(tmp_path, tar, max_image_bytes=len(IMAGES[0]))
    assert sources[0]["reason"] is None
    assert sources[1]["reason"].startswith(f"too_many_bytes: {len(IMAGES[0]) + 200}, limit ")


# Errors for people


def test_nothing_to_ingest_names_the_field(tmp_path: Path) -> None:
    for place in ("empty", "missing"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(SourceError, match=rf"source\.webdataset: nothing found at .*{place}"):
            plan_of(ingest_of(tmp_path / place, tmp_path / "out", "webdataset"))
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(SourceError, match=r"source\.webdataset: no \*\.tar under"):
        plan_of(ingest_of(tmp_path / "empty", tmp_path / "out", "webdataset"))


def test_a_compressed_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0001.tar.gz").write_bytes(gzip.compress(TEN))
    with pytest.raises(SourceError, match=r"0001\.tar\.gz is compressed: unpack it to \.tar"):
        plan_of(ingest_of(tmp_path / "in", tmp_path / "out", "webdataset"))


def test_each_state_of_a_source_has_a_plan_of_its_own(tmp_path: Path) -> None:
    """Names, sizes and settings make the plan; who has opened an older one keeps to it."""
    place = tmp_path / "in"
    place.mkdir()
    (place / "0.tar").write_bytes(TEN)
    ingest = ingest_of(place, tmp_path / "out", "webdataset")
    first = plan_of(ingest)
    old = ingest.open_source(first)
    rows = ingest.plan(first)
    artifacts = tmp_path / "out" / "artifacts"
    stored = every_file(artifacts)
    for change in (
        lambda: (place / "1.tar").write_bytes(TEN),
        lambda: (place / "0.tar").write_bytes(TEN + bytes(512)),
        lambda: (place / "0.tar").rename(place / "2.tar"),
    ):
        change()
        assert ingest.plan(ingest.plan_digest()) is None
        assert ingest.plan(first) == rows
        restore(place)
        assert ingest.plan_digest() == first
    smaller = ingest_of(place, tmp_path / "out", "webdataset", shard_size=3)
    assert smaller.plan(smaller.plan_digest()) is None
    assert every_file(artifacts) == stored
    plan_of(smaller)
    assert smaller.plan(smaller.plan_digest()) == [3, 3, 3, 1]
    assert len(every_file(artifacts)) == 2  # the older one is gone, but for the pointer
    with pytest.raises(FileNotFoundError):
        ingest.open_source(first)
    assert old(0, Watch()).sources.num_rows == 10  # and what was opened by it goes on


def every_file(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def restore(place: Path) -> None:
    for path in place.iterdir():
        path.unlink()
    (place / "0.tar").write_bytes(TEN)


# Any tar


KEY = st.sampled_from(["a", "b", "ü/c", "a/a", "a.2", "end@0"]) | st.text("abc./", max_size=4)
MEMBER = st.tuples(
    KEY,
    st.sampled_from(["jpg", "png", "txt", "json", "cls", "PNG", ""]),
    st.sampled_from([*IMAGES[:3], b"", b"not an image", b'{"url": "u", "caption": "c"}']),
)


def expected_rows(names: list[str]) -> int:
    """Written anew from the words of the contract: a row goes on while the part before the first
    dot stays and no extension comes twice."""
    rows, last, extensions = 0, None, set()
    for name in names:
        *folders, base = [part for part in name.split("/") if part not in ("", ".")] or [""]
        stem, _, extension = base.partition(".")
        # Two slashes at the beginning, and no more, are a root of their own to POSIX.
        root = "//" if re.match("//(?!/)", name) else name[:1] == "/"
        key = (root, *folders, *([stem] if stem else []))
        if key != last or extension.lower() in extensions:
            rows, extensions = rows + 1, set()
        last = key
        extensions.add(extension.lower())
    return rows


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    members=st.lists(MEMBER, min_size=1, max_size=14),
    shard_size=st.integers(1, 6),
    keep=st.none() | st.floats(0.05, 0.98),
)
def test_each_input_row_is_exactly_one_row(
    members: list[tuple[str, str, bytes]],
    shard_size: int,
    keep: float | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    named = [(f"{key}.{extension}", data) for key, extension, data in members]
    named = [(name, data) for name, data in named if not name.endswith("/")]
    whole = tar_of(named, tarfile.GNU_FORMAT)
    tar = whole if keep is None else whole[: int(keep * len(whole))]
    sources, samples = ingested(tmp_path_factory.mktemp("any"), tar, shard_size=shard_size)
    ids = [row["source_id"] for row in sources]
    assert len(set(ids)) == len(ids)
    assert len({row["row_id"] for row in sources}) == len(ids)
    damaged = [row for row in sources if (row["reason"] or "").startswith("source_damaged")]
    if keep is None:
        assert len(damaged) == (not named)
        assert len(sources) - len(damaged) == expected_rows([name for name, _ in named])
    else:
        assert len(damaged) <= 1
    ok = Counter(row["row_id"] for row in sources if row["status"] == "ok")
    assert Counter(i for sample in samples for i in sample["row_ids"]) == ok
    again, _ = ingested(tmp_path_factory.mktemp("again"), tar, shard_size=shard_size)
    assert again == sources
