"""WebDataset tars as a source: planned by their headers, read by byte range.

`webdataset`'s own reader decodes by unpickling and hides damaged tails, so members are streamed
here; what we write is readable by it (tests/dataset/test_tars.py).
"""

import io
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from fusion_pipeline.dataset.samples import Limits, cut
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.dataset.tars import Member, is_plain, read_headers, read_members
from fusion_pipeline.ingest.rows import (
    IMAGE_EXTENSIONS,
    MAX_ROW_BYTES,
    InputRow,
    PlannedShard,
    SourceError,
    first_string,
    parse_metadata,
    parse_text,
    storable,
)


def split_name(name: str) -> tuple[str, str]:
    """Row key and extension of a member: split at the first dot of the last path component."""
    path = PurePosixPath(storable(name))
    stem, _, extension = path.name.partition(".")
    return str(path.parent / stem), extension.lower()


@dataclass
class _Group:
    """Consecutive members that make one row: one key, each extension once."""

    key: str
    start: int
    end: int
    extensions: set[str] = field(default_factory=set)

    def takes(self, key: str, extension: str) -> bool:
        return key == self.key and extension not in self.extensions


def is_tar(path: str) -> bool:
    return path.endswith(".tar")


def plan_tars(storage: Storage, limits: Limits) -> Iterator[PlannedShard]:
    """Shards of every `*.tar` under the root, in the order of their names."""
    files = storage.files("")
    names = [name for name in files if is_tar(name)]
    if not names:
        compressed = [name for name in files if ".tar." in name or name.endswith(".tgz")]
        hint = f" ({compressed[0]} is compressed: unpack it to .tar)" if compressed else ""
        raise SourceError(f"source.webdataset: no *.tar under {storage.url}{hint}")
    for name in names:
        yield from _plan_tar(storage, name, limits)


def _plan_tar(storage: Storage, name: str, limits: Limits) -> Iterator[PlannedShard]:
    groups, damaged = _find_groups(storage, name)
    if not groups:
        yield PlannedShard(name, rows=0, damaged=damaged or "empty tar")
        return
    ranges = list(cut((g.end - g.start for g in groups), limits))
    before: Counter[str] = Counter()
    for part in ranges:
        keys = [groups[i].key for i in part]
        yield PlannedShard(
            name,
            rows=len(part),
            start=groups[part.start].start,
            end=groups[part.stop - 1].end,
            damaged=damaged if part is ranges[-1] else None,
            repeated=tuple(key for key in sorted(set(keys)) for _ in range(before[key])),
        )
        before.update(keys)


def _find_groups(storage: Storage, name: str) -> tuple[list[_Group], str | None]:
    """Where the rows of a tar lie, and why it ends early, if it does. Of a local tar only
    the headers are read; an object store's client reads ahead."""
    groups: list[_Group] = []
    size, last = storage.size(name), 0
    with storage.open(name) as stream:
        try:
            for _, info in read_headers(stream):
                last = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if is_plain(info):
                    key, extension = split_name(info.name)
                    if not (groups and groups[-1].takes(key, extension)):
                        groups.append(_Group(key, info.offset, last))
                    groups[-1].end = min(last, size)
                    groups[-1].extensions.add(extension)
                if info.offset_data + info.size > size:
                    return groups, f"cut off inside {storable(info.name)}"
        except tarfile.TarError as error:
            return groups, str(error)
    # Behind the last member stands a block of zeros; tarfile stops without a word at a damaged
    # header, too.
    tail = storage.read_range(name, last, min(last + tarfile.BLOCKSIZE, size))
    if len(tail) == tarfile.BLOCKSIZE and not any(tail):
        return groups, None
    return groups, f"no tar member at byte {last}"


def read_tar_rows(storage: Storage, part: PlannedShard) -> Iterator[InputRow]:
    """Rows of one planned shard; a damaged source adds a row that says so."""
    size = part.end - part.start
    if part.rows == 1 and size > MAX_ROW_BYTES:
        name = f".row@{part.start}"
        yield InputRow(part.source, name, None, None, None, damaged=f"a row of {size:,} bytes")
        part = replace(part, rows=0)
    data = storage.read_range(part.source, part.start, part.end) if part.rows else b""
    seen = Counter(part.repeated)
    group = _Group("", 0, 0)
    members: list[Member] = []
    damaged = part.damaged
    try:
        for member in read_members(io.BytesIO(data)):
            key, extension = split_name(member.name)
            if members and not group.takes(key, extension):
                yield _row(part.source, group.key, members, seen)
                members = []
            if not members:
                group = _Group(key, 0, 0)
            group.extensions.add(extension)
            members.append(member)
    except tarfile.ReadError as error:
        damaged = damaged or str(error)  # it was whole when it was planned
    if members:
        yield _row(part.source, group.key, members, seen)
    if damaged:
        # No key has a dot, so neither this name nor those of repeated keys is another row's.
        yield InputRow(part.source, f".end@{part.end}", None, None, None, damaged=damaged)


def _row(source: str, key: str, group: Sequence[Member], seen: Counter[str]) -> InputRow:
    seen[key] += 1
    members = {split_name(member.name)[1]: member.data for member in group}
    image = next((members[e] for e in members if e in IMAGE_EXTENSIONS), None)
    metadata = parse_metadata(members.get("json", b""))
    text = parse_text(members.get("txt", b"")) or first_string(metadata, "caption", "TEXT", "text")
    return InputRow(
        source=source,
        source_id=key if seen[key] == 1 else f"{key}.{seen[key]}",
        image=image,
        alt_text=text or None,
        url=first_string(metadata, "url", "URL"),
    )
