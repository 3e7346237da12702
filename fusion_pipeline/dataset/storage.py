"""Where a dataset's files live: one folder on a local disk or an object store.

The whole project touches stored files through the verbs here, so a guarantee about files is
made in one place: `put` shows a file whole under its name or not at all, `create` succeeds for
exactly one caller, `replace` only for who has seen the latest version.
"""

import contextlib
import errno
import fcntl
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from fusion_pipeline.dataset import s3
from fusion_pipeline.dataset.s3 import StorageError

TEMPORARY = ".tmp"
"""Folder, inside the dataset, of files not yet renamed into place. Readers never look there."""
TEMPORARY_FILES = f"{TEMPORARY}/files"
_LOCK = f"{TEMPORARY}/lock"
_LOCK_WAIT_S = 30.0
_ABANDONED_S = 60.0
"""Age of a temporary file that nobody is writing any more."""


class StorageFullError(StorageError):
    """No space, or no quota, is left."""


class Storage:
    """Files under one root. Paths are relative, with forward slashes.

    Picklable: workers on other nodes open the same root. Credentials of an object store come from
    its own environment variables or files, never through here.
    """

    def __init__(self, root: str | Path) -> None:
        is_s3 = str(root).startswith(("s3://", "s3a://"))
        try:
            # Other processes write here too; a cached listing would hide their work.
            self._fs, self.root = fsspec.url_to_fs(
                str(root), use_listings_cache=False, **(s3.OPTIONS if is_s3 else {})
            )
        except (ImportError, ValueError) as error:  # no package for the protocol, or no such one
            hint = "pip install 'fusion-pipeline[s3]'" if str(root).startswith("s3") else "mend it"
            raise StorageError(f"{root} can't be opened: {error}; {hint}.") from error
        self.url = str(root) if "://" in str(root) else str(Path(self.root).absolute())
        self.is_local = isinstance(self._fs, LocalFileSystem)
        self._patience = {"timeout": s3.TIMEOUT_S} if is_s3 else {}
        if is_s3:
            s3.make_patient(self._fs)

    def __reduce__(self) -> tuple[type["Storage"], tuple[str]]:
        return Storage, (self.url,)

    def full(self, path: str) -> str:
        """The place of a file, as people write it and file systems take it."""
        return f"{self.root if self.is_local else self.url.rstrip('/')}/{path}"

    def read(self, path: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError; and StorageError, like all verbs."""
        with self._answering():
            data: bytes = self._fs.cat_file(self.full(path), **self._patience)
        return data

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file. Raises FileNotFoundError."""
        if start >= end:
            return b""  # HTTP has no empty range
        with self._answering():
            data: bytes = self._fs.cat_file(self.full(path), start=start, end=end, **self._patience)
        return data

    def tail(self, path: str, length: int) -> bytes:
        """The last bytes of a file, all of a shorter one, by one request."""
        if not self.is_local:
            with self._answering():
                data: bytes = self._fs.cat_file(self.full(path), start=-length, **self._patience)
            return data
        with open(self.full(path), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - length))
            return file.read()

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[IO[bytes]]:
        """A seekable stream. Raises FileNotFoundError."""
        with self._answering(), self._fs.open(self.full(path), "rb") as stream:
            yield stream

    def size(self, path: str) -> int:
        with self._answering():
            return int(self._fs.info(self.full(path), **self._patience)["size"])

    def put(self, path: str, data: bytes) -> None:
        """Write a file, replacing any older one; it appears whole or not at all.

        Raises StorageFullError, like all that writes.
        """
        if self.is_local:
            with self._temporary(data) as name, self._space():
                os.replace(name, self._made(path))
        else:
            # One request from memory: a streamed upload may be completed when its writer fails.
            with self._answering():
                self._fs.pipe_file(self.full(path), data, **self._patience)

    @contextlib.contextmanager
    def writer(self, path: str) -> Iterator[IO[str]]:
        """A text file too large for memory: written to local disk, in place only when the block
        ends without an exception."""
        with tempfile.TemporaryDirectory() as folder, self._space():
            name = self._temporary_name() if self.is_local else f"{folder}/part"
            try:
                with open(name, "w", encoding="utf-8") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                if self.is_local:
                    os.replace(name, self._made(path))
                else:
                    with self._answering():
                        self._fs.put_file(name, self.full(path))
            finally:
                with contextlib.suppress(FileNotFoundError):  # it was renamed, or never made
                    os.unlink(name)

    def create(self, path: str, data: bytes) -> bool:
        """Write a file unless there is one; False when there is. Atomic among many callers.

        On an object store False may also mean that this very call wrote the file: its first answer
        got lost and it was sent again. Callers look at what is there.
        """
        if self.is_local:
            with self._temporary(data) as name, self._space():
                try:
                    os.link(name, self._made(path))
                except FileExistsError:
                    return False
                return True
        return self._put_if(path, data, IfNoneMatch="*")

    def version(self, path: str) -> str | None:
        """A mark that every write of a file changes (on an object store: of other content); None
        when there is no file."""
        try:
            if self.is_local:
                found = os.stat(self.full(path))
                return f"{found.st_ino}-{found.st_mtime_ns}-{found.st_size}"
            with self._answering():
                return str(self._fs.info(self.full(path), **self._patience)["ETag"])
        except FileNotFoundError:
            return None

    def replace(self, path: str, data: bytes, version: str) -> bool:
        """Write a file if it still has this version; False when it has not. Atomic among callers
        of `replace`. As with `create`, False may mean that this very call wrote the file."""
        if not self.is_local:
            return self._put_if(path, data, IfMatch=version)
        with self._temporary(data) as name, self._lock(), self._space():
            if self.version(path) != version:
                return False
            os.replace(name, self.full(path))
        return True

    def _put_if(self, path: str, data: bytes, **condition: str) -> bool:
        with self._answering():
            try:
                # One request, whatever the size: a multipart upload would drop the condition.
                self._fs.pipe_file(
                    self.full(path), data, chunksize=5 * 2**30, **condition, **self._patience
                )
            except FileNotFoundError as error:
                if "IfMatch" in condition:  # there is no file to match
                    return False
                raise StorageError(f"{self.url}: there is no such bucket") from error
            except OSError as error:
                if s3.error_code(error) in ("PreconditionFailed", "ConditionalRequestConflict"):
                    return False
                raise
        return True

    def exists(self, path: str) -> bool:
        with self._answering():
            return bool(self._fs.exists(self.full(path), **self._patience))

    def files(self, folder: str) -> list[str]:
        """Paths of all files under a folder ("" is the root) at any depth, sorted; none when it
        doesn't exist."""
        return list(self.sizes(folder))

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each of `files`, in the same order, by the listing alone."""
        return {path: int(info["size"]) for path, info in self._listing(folder).items()}

    def marks(self, folder: str) -> dict[str, str]:
        """For each of `files` a mark that changes with its content, by the listing alone."""
        if self.is_local:
            names = ("ino", "mtime", "size")
            listing = self._listing(folder).items()
            return {path: "-".join(str(info[n]) for n in names) for path, info in listing}
        return {path: str(info["ETag"]) for path, info in self._listing(folder).items()}

    def _listing(self, folder: str) -> dict[str, dict[str, Any]]:
        try:
            with self._answering():
                root = self.full(folder) if folder else self.root
                found = self._fs.find(root, detail=True, **self._patience)
        except FileNotFoundError:
            return {}
        strip = len(self.root) + 1
        return {name[strip:]: found[name] for name in sorted(found)}

    def folders(self, path: str) -> list[str]:
        """Names of the folders right under a folder, sorted; none when it doesn't exist."""
        try:
            with self._answering():
                found = self._fs.ls(self.full(path), detail=True, **self._patience)
        except FileNotFoundError:
            return []
        return sorted(f["name"].rsplit("/", 1)[1] for f in found if f["type"] == "directory")

    def delete(self, path: str) -> None:
        """Remove a file or a folder with all it holds; nothing happens when there is none."""
        if self.exists(path):
            with self._answering():
                self._fs.rm(self.full(path), recursive=True)

    def move(self, path: str, to: str) -> None:
        """Give a file another name. On an object store it is copied there, whole, and then
        removed: after a crash in between it lies under both names, and is to be moved again."""
        if self.is_local:
            os.replace(self.full(path), self._made(to))
        else:
            with self._answering():
                self._fs.cp_file(self.full(path), self.full(to))
                self._fs.rm_file(self.full(path))

    def clean_temporary(self) -> None:
        """Remove what killed processes left half written on a local disk.

        A young file may be of a process that is alive: of a run that wants the same lease. It is
        left for the next time.
        """
        if not self.is_local:
            return
        before = time.time() - _ABANDONED_S
        for file in Path(self.full(TEMPORARY_FILES)).glob("*"):
            with contextlib.suppress(FileNotFoundError):  # just now renamed, or removed
                if file.stat().st_mtime < before:
                    file.unlink()

    def _made(self, path: str) -> str:
        full = self.full(path)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        return full

    @contextlib.contextmanager
    def _temporary(self, data: bytes) -> Iterator[str]:
        """A local file with this content, on its way to its name; gone at the end."""
        with self._space():
            name = self._temporary_name()
            try:
                with open(name, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    # The kernel's own time may stand still for milliseconds, in which a disk gives
                    # an inode away again: `version` would take this file for an older one.
                    os.utime(file.fileno(), ns=(time.time_ns(), time.time_ns()))
                yield name
            finally:
                with contextlib.suppress(FileNotFoundError):  # it was renamed
                    os.unlink(name)

    def _temporary_name(self) -> str:
        return self._made(f"{TEMPORARY_FILES}/{uuid.uuid4().hex}")

    def _answering(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.is_local else s3.answering(self.url)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Held by one process of any that replaces a file under this root, for microseconds."""
        with open(self._made(_LOCK), "wb") as file:
            ends = time.monotonic() + _LOCK_WAIT_S
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > ends:
                        raise StorageError(
                            f"{self.full(_LOCK)} has been locked for {_LOCK_WAIT_S:.0f} s: a "
                            "process was frozen while it wrote. Find it (`lsof` names it) and end "
                            "it; the same command resumes."
                        ) from None
                    time.sleep(0.01)
                except OSError as error:
                    raise StorageError(
                        f"{self.full(_LOCK)} can't be locked ({error.strerror}): the file system "
                        "must know flock (Lustre: mount it with -o flock)."
                    ) from error
            yield

    @contextlib.contextmanager
    def _space(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StorageFullError(
                f"{self.url}: {os.strerror(error.errno).lower()}. Free some, or move this folder "
                "to a larger disk (`run` in the config); what is finished is kept, and the same "
                "command resumes."
            ) from error
