"""Where a dataset's files live: one folder on a local disk or an object store.

The whole project touches stored files through the verbs here, so a guarantee about files is
made in one place: `put` shows a file whole under its name or not at all, `create` succeeds for
exactly one caller.
"""

import contextlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fusion_pipeline.errors import FusionError

TEMPORARY = ".tmp"
"""Folder, inside the dataset, of files not yet renamed into place. Readers never look there."""


class StorageError(FusionError):
    """A place that can't be opened."""


class Storage:
    """Files under one root. Paths are relative, with forward slashes.

    Picklable: workers on other nodes open the same root. Credentials of an object store come from
    its own environment variables or files, never through here.
    """

    def __init__(self, root: str | Path) -> None:
        # Other processes write here too; a cached listing would hide their work.
        try:
            self._fs, self.root = fsspec.url_to_fs(str(root), use_listings_cache=False)
        except (ImportError, ValueError) as error:  # no package for the protocol, or no such one
            hint = "pip install 'fusion-pipeline[s3]'" if str(root).startswith("s3") else "mend it"
            raise StorageError(f"{root} can't be opened: {error}; {hint}.") from error
        self.url = str(root) if "://" in str(root) else str(Path(self.root).absolute())
        self.is_local = isinstance(self._fs, LocalFileSystem)

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.url,)

    def full(self, path: str) -> str:
        return f"{self.root}/{path}"

    def read(self, path: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError."""
        data: bytes = self._fs.cat_file(self.full(path))
        return data

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file. Raises FileNotFoundError."""
        if start >= end:
            return b""  # HTTP has no empty range
        data: bytes = self._fs.cat_file(self.full(path), start=start, end=end)
        return data

    def open(self, path: str) -> IO[bytes]:
        """A seekable stream. Raises FileNotFoundError."""
        stream: IO[bytes] = self._fs.open(self.full(path), "rb")
        return stream

    def size(self, path: str) -> int:
        return int(self._fs.size(self.full(path)))

    def put(self, path: str, data: bytes) -> None:
        """Write a file, replacing any older one; it appears whole or not at all."""
        if self.is_local:
            os.replace(self._write_temporary(data), self._made(path))
        else:
            # One request from memory: a streamed upload may be completed when its writer fails.
            self._fs.pipe_file(self.full(path), data)

    @contextlib.contextmanager
    def writer(self, path: str) -> Iterator[IO[str]]:
        """A text file too large for memory: written to local disk, in place only when the block
        ends without an exception."""
        with tempfile.TemporaryDirectory() as folder:
            name = self._temporary_name() if self.is_local else f"{folder}/part"
            try:
                with open(name, "w", encoding="utf-8") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
            except BaseException:
                os.unlink(name)
                raise
            if self.is_local:
                os.replace(name, self._made(path))
            else:
                self._fs.put_file(name, self.full(path))

    def create(self, path: str, data: bytes) -> bool:
        """Write a file unless there is one; False when there is. Atomic among many callers."""
        if self.is_local:
            temporary = self._write_temporary(data)
            try:
                os.link(temporary, self._made(path))
            except FileExistsError:
                return False
            finally:
                os.unlink(temporary)
            return True
        try:
            self._fs.pipe_file(self.full(path), data, mode="create")
        except FileExistsError:
            return False
        return True

    def exists(self, path: str) -> bool:
        return bool(self._fs.exists(self.full(path)))

    def files(self, folder: str) -> list[str]:
        """Paths of all files under a folder ("" is the root) at any depth, sorted; none when it
        doesn't exist."""
        try:
            found = self._fs.find(self.full(folder) if folder else self.root)
        except FileNotFoundError:
            return []
        strip = len(self.root) + 1
        return sorted(name[strip:] for name in found)

    def delete(self, path: str) -> None:
        """Remove a file or a folder with all it holds; nothing happens when there is none."""
        if self.exists(path):
            self._fs.rm(self.full(path), recursive=True)

    def _made(self, path: str) -> str:
        full = self.full(path)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        return full

    def _write_temporary(self, data: bytes) -> str:
        name = self._temporary_name()
        with open(name, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return name

    def _temporary_name(self) -> str:
        return self._made(f"{TEMPORARY}/{uuid.uuid4().hex}")
