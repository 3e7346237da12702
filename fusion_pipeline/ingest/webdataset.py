"""WebDataset tars as a source: planned by their headers, read by byte range.

`webdataset`'s own reader decodes by unpickling and hides damaged tails, so members are streamed
here; what we write is readable by it (tests/dataset/test_tars.py).
"""

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from fusion_pipeline.dataset.samples import Limits, cut
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.dataset.tars import Member, read_members
from fusion_pipeline.ingest.rows import (
    IMAGE_EXTENSIONS,
    InputRow,
    PlannedShard,
    SourceError,
    first_string,
    parse_metadata,
    parse_text,
)


def split_name(name: str) -> tuple[str, str]:
    """Row key and extension of a member: split at the first dot of the last path component."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.parent / stem), extension.lower()


@dataclass
class _Group:
    key: str
    start: int
    end: int


def plan_tars(storage: Storage, limits: Limits) -> Iterator[PlannedShard]:
    """Shards of every `*.tar` under the root, in the order of their names."""
    files = storage.files("")
    names = [name for name in files if name.endswith(".tar")]
    if not names:
        compressed = [name for name in files if ".tar." in name or name.endswith(".tgz")]
        hint = f" ({compressed[0]} is compressed: unpack it to .tar)" if compressed else ""
        raise SourceError(f"source.webdataset: no *.tar under {storage.url}{hint}")
    for name in names:
        yield from _plan_tar(storage, name, limits)


def _plan_tar(storage: Storage, name: str, limits: Limits) -> Iterator[PlannedShard]:
    groups: list[_Group] = []
    size = storage.size(name)
    damaged: str | None = None
    with storage.open(name) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for info in tar:
                    end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if info.isreg():
                        key = split_name(info.name)[0]
                        if groups and groups[-1].key == key:
                            groups[-1].end = end
                        else:
                            groups.append(_Group(key, info.offset, end))
                    if info.offset_data + info.size > size:
                        damaged = f"cut off inside {info.name}"
                    tar.members.clear()  # type: ignore[attr-defined]
        except tarfile.TarError as error:
            damaged = str(error)
        if damaged is None and not _ends_well(storage, name, groups, size):
            damaged = f"no tar member at byte {groups[-1].end if groups else 0}"
    if not groups:
        yield PlannedShard(name, rows=0, damaged=damaged or "empty tar")
        return
    ranges = list(cut((g.end - g.start for g in groups), limits))
    for part in ranges:
        yield PlannedShard(
            name,
            rows=len(part),
            start=groups[part.start].start,
            end=min(groups[part.stop - 1].end, size),
            damaged=damaged if part is ranges[-1] else None,
        )


def _ends_well(storage: Storage, name: str, groups: list[_Group], size: int) -> bool:
    """Whether the end-of-archive block of zeros follows the last member: tarfile stops without a
    word at a damaged header."""
    end = groups[-1].end if groups else 0
    tail = storage.read_range(name, end, min(end + tarfile.BLOCKSIZE, size))
    return len(tail) == tarfile.BLOCKSIZE and not any(tail)


def read_tar_rows(storage: Storage, part: PlannedShard) -> Iterator[InputRow]:
    """Rows of one planned shard; a damaged source adds a row that says so."""
    data = storage.read_range(part.source, part.start, part.end) if part.rows else b""
    group: list[Member] = []
    key = ""
    seen: dict[str, int] = {}
    try:
        for member in read_members(io.BytesIO(data)):
            member_key = split_name(member.name)[0]
            if group and member_key != key:
                yield _row(part.source, key, group, seen)
                group = []
            key = member_key
            group.append(member)
    except tarfile.ReadError:
        pass  # the plan saw it: `part.damaged` becomes a row below
    if group:
        yield _row(part.source, key, group, seen)
    if part.damaged:
        yield InputRow(part.source, f"end@{part.end}", None, None, None, damaged=part.damaged)


def _row(source: str, key: str, group: list[Member], seen: dict[str, int]) -> InputRow:
    repeat = seen[key] = seen.get(key, 0) + 1
    members = {split_name(member.name)[1]: member.data for member in group}
    image = next((members[e] for e in members if e in IMAGE_EXTENSIONS), None)
    metadata = parse_metadata(members.get("json", b""))
    text = parse_text(members.get("txt", b"")) or first_string(metadata, "caption", "TEXT", "text")
    return InputRow(
        source=source,
        source_id=key if repeat == 1 else f"{key}#{repeat}",
        image=image,
        alt_text=text or None,
        url=first_string(metadata, "url", "URL"),
    )
