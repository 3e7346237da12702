"""Shard tars: what we write others read; what others send can do no harm."""

import io
import itertools
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_pipeline.dataset.images import EXTENSIONS, inspect
from fusion_pipeline.dataset.samples import Sample, pack_samples, sample_key
from fusion_pipeline.dataset.tars import Member, TarWriter, read_members
from tests.dataset.pictures import ENCODED
from tests.toy import png


def samples() -> list[Sample]:
    made = []
    for i, image in enumerate([*ENCODED.values(), png(3, 4)]):
        sample = Sample(sample_key(image), image, inspect(image))
        sample.add_row(f"row-{i}", f"Ein Hündchen, {i} 🐕", f"https://example.org/{i}.jpg")
        sample.add_row(f"again-{i}", 'second text, "quoted"\twith tab', None)
        made.append(sample)
    return made


def test_the_webdataset_library_reads_our_shards(tmp_path: Path) -> None:
    packed = samples()
    tar, table = pack_samples(packed)
    (tmp_path / "00000000.tar").write_bytes(tar)
    read = list(webdataset.WebDataset(str(tmp_path / "00000000.tar"), shardshuffle=False))
    assert [row["__key__"] for row in read] == [sample.key for sample in packed]
    for sample, row, stored in zip(packed, read, table.to_pylist(), strict=True):
        assert row[EXTENSIONS[sample.info.format]] == sample.image  # the original bytes
        assert row["txt"].decode().split("\n") == sample.alt_texts
        origin = json.loads(row["json"])
        assert origin["alt_texts"] == stored["alt_texts"] == sample.alt_texts
        assert origin["urls"] == stored["urls"] == sample.urls
        assert origin["row_ids"] == stored["row_ids"] == sample.row_ids
        start = stored["image_offset"]
        assert tar[start : start + stored["image_bytes"]] == sample.image


def test_equal_samples_make_equal_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = pack_samples(samples())
    monkeypatch.setattr("time.time", lambda: 4e9)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert pack_samples(samples())[0] == first
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname) == (0, 0, 0, "", "")


@given(st.lists(st.binary(max_size=1500), max_size=8))
def test_members_come_back_with_their_offsets(contents: list[bytes]) -> None:
    writer = TarWriter()
    offsets = [writer.add(f"{i:032d}.bin", data) for i, data in enumerate(contents)]
    tar = writer.close()
    assert list(read_members(io.BytesIO(tar))) == [
        Member(f"{i:032d}.bin", data, offset)
        for i, (data, offset) in enumerate(zip(contents, offsets, strict=True))
    ]
    assert all(tar[o : o + len(d)] == d for o, d in zip(offsets, contents, strict=True))


# Hostile tars


def header(name: str, size: int | bytes = 0, kind: bytes = b"0", **more: object) -> bytes:
    """A tar header with a right checksum, whatever it says."""
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in more.items():
        setattr(info, field, value)
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    field_ = size if isinstance(size, bytes) else b"%011o\0" % size
    block[124:136] = field_
    return seal(block)


def seal(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def entry(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + data + bytes(-len(data) % 512)


def base256(value: int) -> bytes:
    return (value & ((1 << 96) - 1) | (0x80 << 88 if value >= 0 else 0)).to_bytes(12, "big")


def pax(**fields: str) -> bytes:
    body = b""
    for name, value in fields.items():
        text = f" {name.replace('__', '.')}={value}\n".encode()
        length = len(text)
        length = len(text) + len(str(length + len(str(length))))
        body += str(length).encode() + text
    return header("pax", len(body), b"x") + body + bytes(-len(body) % 512)


def sparse(name: str, real_size: int) -> bytes:
    """A GNU sparse file: a small map that reads as `real_size` bytes of zeros."""
    block = bytearray(header(name, 0, b"S"))
    block[386 : 386 + 24] = b"%011o\0%011o\0" % (real_size, 0)
    block[483 : 483 + 12] = b"%011o\0" % real_size
    return seal(block)


GOOD = entry("a.jpg", b"good image") + entry("a.txt", b"text")
END = bytes(1024)
PASSED_OVER = {
    "symbolic link": header("b.jpg", kind=b"2", linkname="/etc/passwd"),
    "hard link": header("b.jpg", kind=b"1", linkname="../../etc/passwd"),
    "hard link to a good member": header("b.jpg", kind=b"1", linkname="a.jpg"),
    "device": header("b.jpg", kind=b"3", devmajor=1, devminor=5),
    "pipe": header("b.jpg", kind=b"6"),
    "folder": header("b.jpg/", kind=b"5", mode=0o777),
    "sparse bomb": sparse("b.jpg", 2**32),
}
NAMES_ONLY = {
    "absolute": "/tmp/escaped-from-a-tar.jpg",
    "parent": "../../escaped-from-a-tar.jpg",
    "not UTF-8": "caf\udce9.jpg",
    "control characters": "a\n\x1b[31m.jpg",
}
BROKEN = {
    "declares 8 GiB": header("b.jpg", b"7" * 11 + b"\0"),
    "declares 2^80 bytes": header("b.jpg", base256(2**80)),
    "declares fewer than no bytes": header("b.jpg", base256(-1024)),
    "long name of 2^80 bytes": header("././@LongLink", base256(2**80), b"L"),
    "a thousand long names": header("././@LongLink", 0, b"L") * 1000,
    "pax size below zero": pax(size="-512") + header("b.jpg"),
    "pax sparse map that is none": pax(GNU__sparse__map="1,x", GNU__sparse__size="9")
    + header("b.jpg"),
    "sparse map without an end": seal(
        bytearray(sparse("b.jpg", 9)[:482] + b"\1" + sparse("b.jpg", 9)[483:])
    ),
    "cut off": entry("b.jpg", b"x" * 2000)[:1500],
}


def read_all(data: bytes) -> tuple[list[Member], tarfile.TarError | None]:
    members = []
    try:
        for member in read_members(io.BytesIO(data)):
            members.append(member)
            assert len(members) < 1000, "goes round in circles"
    except tarfile.TarError as error:
        return members, error
    return members, None


@pytest.mark.parametrize("what", PASSED_OVER)
def test_what_is_no_plain_file_is_passed_over(what: str) -> None:
    members, error = read_all(PASSED_OVER[what] + GOOD + PASSED_OVER[what] + END)
    assert error is None
    assert [member.name for member in members] == ["a.jpg", "a.txt"]
    assert members[0].data == b"good image"


@pytest.mark.parametrize("what", NAMES_ONLY)
def test_a_name_is_only_a_name(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outside = Path("/tmp/escaped-from-a-tar.jpg")
    members, error = read_all(entry(NAMES_ONLY[what], b"content") + END)
    assert error is None
    assert members == [Member(NAMES_ONLY[what], b"content", 512)]
    assert list(tmp_path.rglob("*")) == []
    assert not outside.exists()
    assert not list(tmp_path.parent.parent.glob("escaped*"))


@pytest.mark.parametrize("what", BROKEN)
def test_broken_headers_are_tar_errors_and_cost_no_memory(what: str) -> None:
    tracemalloc.start()
    try:
        members, error = read_all(GOOD + BROKEN[what])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [member.name for member in members[:2]] == ["a.jpg", "a.txt"]  # those before are good
    assert isinstance(error, tarfile.ReadError)
    assert peak < 20e6


def test_cut_off_anywhere() -> None:
    tar = GOOD + entry("b.jpg", b"y" * 700) + END
    whole, _ = read_all(tar)
    for keep in range(0, len(tar), 37):
        members, error = read_all(tar[:keep])
        assert members == whole[: len(members)]
        complete = [m for m in whole if m.offset + len(m.data) <= keep]
        assert members == complete
        if members != whole and keep % 512:
            assert error is not None or keep > members[-1].offset + 512


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_altered_anywhere(data: st.DataObject) -> None:
    parts = [GOOD, *PASSED_OVER.values(), *(entry(n, b"c") for n in NAMES_ONLY.values())]
    parts += [pax(path="long/name.jpg", size="3") + entry("x", b"abc")]
    content = bytearray(b"".join(parts) + END)
    for block in data.draw(st.lists(st.integers(0, len(content) // 512 - 1), max_size=3)):
        at = block * 512
        position = at + data.draw(st.integers(100, 511) | st.integers(124, 156))
        content[position] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            content[at : at + 512] = seal(content[at : at + 512])
    members, _ = read_all(bytes(content))
    assert sum(len(member.data) for member in members) < 2 * len(content)


def test_a_stream_that_breaks_is_not_a_damaged_tar() -> None:
    """A lost connection must not be recorded as damage of the source."""

    class Lost(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 1024:
                raise ConnectionError("lost")
            return super().read(size)

    with pytest.raises(ConnectionError):
        list(read_members(Lost(GOOD + END)))


def test_reading_keeps_no_headers() -> None:
    """Memory does not grow with the number of members."""
    writer = TarWriter()
    for i in range(3000):
        writer.add(f"{i:06d}.txt", b"")
    stream = io.BytesIO(writer.close())
    members = read_members(stream)
    next(members)
    tracemalloc.start()
    try:
        count = sum(1 for _ in itertools.islice(members, 2999))
        current, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 2999
    assert current < 100_000


def test_the_made_up_headers_say_what_they_should() -> None:
    assert tarfile.nti(base256(-1024)) == -1024
    assert tarfile.nti(base256(2**80)) == 2**80
    assert len(header("x")) == len(sparse("x", 9)) == 512
    with tarfile.open(fileobj=io.BytesIO(sparse("x", 2**32) + END)) as tar:
        (info,) = tar
    assert info.issparse()
    assert info.size == 2**32
