"""Shards as tar files: written byte for byte the same, read as streams of regular members."""

import contextlib
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    data: bytes
    offset: int
    """Of the data, in bytes from the start of the stream."""


class TarWriter:
    """Builds a tar in memory. No times, owners or modes of this machine go into it."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(  # noqa: SIM115 - closed by `close`
            fileobj=self._buffer, mode="w", format=tarfile.USTAR_FORMAT
        )

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its data."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        self._tar.addfile(info, io.BytesIO(data))
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        return self._buffer.tell() - padded

    def close(self) -> bytes:
        self._tar.close()
        return self._buffer.getvalue()


def read_headers(stream: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The headers of a tar, in order, each with the open tar. Nothing is written to disk.

    Raises tarfile.ReadError where the tar is damaged or hostile; errors of the stream itself
    (OSError) pass through, since they say nothing of its content.
    """
    with _read_errors(), tarfile.open(fileobj=stream, mode="r:") as tar:
        last = -1
        for info in tar:
            if info.size < 0 or info.offset <= last:  # tarfile would go round in circles
                raise tarfile.ReadError(f"impossible header at byte {info.offset}")
            last = info.offset
            yield tar, info
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise


def is_plain(info: tarfile.TarInfo) -> bool:
    """A regular file as it lies in the tar. A sparse one may swell to any size when read."""
    return info.isreg() and not info.issparse()


def read_members(stream: IO[bytes]) -> Iterator[Member]:
    """Plain files of a tar, in order; links, devices, folders and sparse files are passed over.

    Raises tarfile.ReadError where the tar is damaged or cut off; the members before it are good.
    """
    for tar, info in read_headers(stream):
        if not is_plain(info):
            continue
        with _read_errors():
            file = tar.extractfile(info)
            data = file.read() if file is not None else b""
        if len(data) != info.size:
            raise tarfile.ReadError(f"{info.name}: cut off")
        yield Member(info.name, data, info.offset_data)


@contextlib.contextmanager
def _read_errors() -> Iterator[None]:
    try:
        yield
    except (tarfile.TarError, OSError):
        raise
    except Exception as error:  # odd headers end in OverflowError, RecursionError, MemoryError...
        raise tarfile.ReadError(f"unreadable header: {type(error).__name__}") from error
