"""Shards as tar files: written byte for byte the same, read as streams of regular members."""

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


def read_members(stream: IO[bytes]) -> Iterator[Member]:
    """Regular files of a tar, in order. Links, devices and folders are passed over, nothing is
    ever written to disk.

    Raises tarfile.ReadError where the tar is damaged or cut off; the members before it are good.
    """
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        for info in tar:
            if not info.isreg():
                continue
            file = tar.extractfile(info)
            data = file.read() if file is not None else b""
            if len(data) != info.size:
                raise tarfile.ReadError(f"{info.name}: cut off")
            yield Member(info.name, data, info.offset_data)
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
