"""A model of processes on an object store, for trying out the orders in which things can happen.

The processes run the real code, each in a thread of its own. Their file system is a dictionary
(`Bucket`), and every request to it waits until the one who plays the world answers it: so one
request is one step, like one of S3, and between any two steps anything can happen elsewhere.

A process is a function of the answers it gets. A `Program` remembers what it asked next after each
sequence of answers, so that the same beginning is run once, however many schedules share it.
"""

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem

from fusion_pipeline.dataset import layout, lease
from fusion_pipeline.dataset.lease import Lease
from fusion_pipeline.engine.stage import ShardBlock, ShardImages

ROOT = "model://data"
Verb = Literal["get", "head", "exists", "list", "folders", "put", "delete", "is silent"]
LOST = "lost"
"""The answer to a write that took effect, when the answer did not arrive."""


@dataclass(frozen=True)
class Request:
    verb: Verb
    path: str
    data: bytes = b""
    if_match: str | None = None
    """Version that the file must have; `*`: there must be no file."""

    def __str__(self) -> str:
        return f"{self.verb} {self.path}"


Answer = Any
"""Hashable, and never changed."""


@cache
def _etag(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


class Bucket:
    """What the store holds at one moment. There is one object for each content."""

    files: Mapping[str, bytes]
    _known: ClassVar[dict[frozenset[tuple[str, bytes]], "Bucket"]] = {}

    def __new__(cls, files: Mapping[str, bytes]) -> "Bucket":
        key = frozenset(files.items())
        if key not in cls._known:
            cls._known[key] = bucket = super().__new__(cls)
            bucket.files = dict(files)
        return cls._known[key]

    def under(self, folder: str) -> dict[str, bytes]:
        return {p: d for p, d in sorted(self.files.items()) if p.startswith(f"{folder}/")}

    def after(self, request: Request) -> tuple[Answer, "Bucket"]:
        """What the store answers, and what it then holds."""
        path, found = request.path, self.files.get(request.path)
        match request.verb:
            case "get":
                return found, self
            case "head":
                return (None if found is None else (len(found), _etag(found))), self
            case "exists":
                return found is not None or bool(self.under(path)), self
            case "list":
                return tuple((p, len(d), _etag(d)) for p, d in self.under(path).items()), self
            case "folders":
                below = (p[len(path) + 1 :].split("/") for p in self.under(path))
                return tuple(sorted({parts[0] for parts in below if len(parts) > 1})), self
            case "put":
                return self._put(request, found)
            case "delete":
                return None, Bucket({p: d for p, d in self.files.items() if p != path})
        raise AssertionError(f"not for the store: {request}")

    def _put(self, request: Request, found: bytes | None) -> tuple[Answer, "Bucket"]:
        wanted = request.if_match
        if wanted == "*" and found is not None:
            return "PreconditionFailed", self
        if wanted not in (None, "*") and found is None:
            return "NoSuchKey", self
        if wanted not in (None, "*") and found is not None and _etag(found) != wanted:
            return "PreconditionFailed", self
        return "done", Bucket({**self.files, request.path: request.data})


class _Here(threading.local):
    """To whom this thread's requests go."""

    ask: Callable[[Request], Answer]
    process: "Process | None" = None


_here = _Here()


def ask(request: Request) -> Answer:
    return _here.ask(request)


@contextlib.contextmanager
def reading(bucket: Bucket) -> Iterator[None]:
    """In this block this thread reads the bucket, undisturbed and for nothing."""

    def answer(request: Request) -> Answer:
        found, then = bucket.after(request)
        assert then is bucket, f"a reader wrote: {request}"
        return found

    _here.ask = answer
    yield
    del _here.ask


class ModelFileSystem(AbstractFileSystem):
    """What `Storage` needs of an fsspec file system, in s3fs's words."""

    protocol = "model"
    cachable = False

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **_: Any
    ) -> bytes:
        data: bytes | None = self._ask("get", path)
        if data is None:
            raise FileNotFoundError(path)
        return data[start:end]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        found = self._ask("head", path)
        if found is None:
            raise FileNotFoundError(path)
        return {"name": path, "type": "file", "size": found[0], "ETag": found[1]}

    def exists(self, path: str, **_: Any) -> bool:
        return bool(self._ask("exists", path))

    def find(self, path: str, *_: Any, **__: Any) -> dict[str, Any]:
        found = self._ask("list", path)
        return {name: {"size": size, "ETag": etag} for name, size, etag in found}

    def ls(self, path: str, *_: Any, **__: Any) -> list[dict[str, Any]]:
        found = self._ask("folders", path)
        if not found:
            raise FileNotFoundError(path)
        return [{"name": f"{path}/{name}", "type": "directory"} for name in found]

    def pipe_file(
        self,
        path: str,
        value: bytes,
        *_: Any,
        IfMatch: str | None = None,  # S3's own names
        IfNoneMatch: str | None = None,
        **__: Any,
    ) -> None:
        answer = LOST
        while answer == LOST:  # s3fs sends it again
            answer = self._ask("put", path, value, IfMatch or IfNoneMatch)
        if answer == "NoSuchKey":
            raise FileNotFoundError(path)
        if answer != "done":
            raise OSError(answer) from _Refused(answer)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Like s3fs: lists, then deletes what was listed; file by file, for the worst case."""
        found = list(self.find(path)) or [path] * self.exists(path)
        if not found:
            raise FileNotFoundError(path)
        for name in found:
            self._ask("delete", name)

    def _ask(self, verb: Verb, path: str, data: bytes = b"", if_match: str | None = None) -> Answer:
        return ask(Request(verb, self._strip_protocol(path), data, if_match))


class _Refused(Exception):
    def __init__(self, code: str) -> None:
        self.response = {"Error": {"Code": code}}


fsspec.register_implementation("model", ModelFileSystem, clobber=True)


class Killed(BaseException):
    """Ends a process where it stands."""


class Process:
    """Runs a function in a thread up to its next request, and waits there for the answer."""

    def __init__(self, name: str, work: Callable[[], object]) -> None:
        self.name = name
        self.request: Request | None = None
        """None: it has ended."""
        self.error: BaseException | None = None
        self.tokens = 0
        self._work = work
        self._killed = False
        self._answer: Answer = None
        self._waits, self._goes = threading.Lock(), threading.Lock()
        self._waits.acquire()
        self._goes.acquire()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._waits.acquire()

    def answer(self, value: Answer) -> None:
        """Returns when it has asked for more, or has ended."""
        self._answer = value
        self._goes.release()
        self._waits.acquire()

    def kill(self) -> None:
        if self.request is not None:
            self._killed = True
            self._goes.release()
        self._thread.join()

    def _run(self) -> None:
        _here.ask, _here.process = self._ask, self
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - the test looks at it, whatever it is
            self.error = error
        self.request = None
        self._waits.release()

    def _ask(self, request: Request) -> Answer:
        if not self._killed:
            self.request = request
            self._waits.release()
            self._goes.acquire()
        if self._killed:
            raise Killed
        return self._answer


@dataclass(eq=False)
class Moment:
    """A process at one point of its life: what it asks now, or how it ended."""

    program: "Program"
    request: Request | None
    error: BaseException | None
    before: "tuple[Moment, Answer] | None"
    _next: dict[Answer, "Moment"] = field(default_factory=dict)

    def after(self, answer: Answer) -> "Moment":
        if answer not in self._next:
            self._next[answer] = self.program.run_on(self, answer)
        return self._next[answer]

    def answers(self) -> Iterator[tuple[Request, Answer]]:
        """Every request so far with its answer, the latest first."""
        moment = self
        while moment.before is not None:
            moment, answer = moment.before
            assert moment.request is not None
            yield moment.request, answer


_AWAKE = 150
"""Threads a program keeps waiting where they may be asked to go on; others are run again."""


class Program:
    """All that a process may do, as far as it was tried."""

    def __init__(self, name: str, work: Callable[[], object]) -> None:
        self.name = name
        self._work = work
        self._live: dict[Moment, Process] = {}
        self.start = self._moment(Process(name, work), None)

    def run_on(self, moment: Moment, answer: Answer) -> Moment:
        process = self._live.pop(moment, None) or self._replay(moment)
        process.answer(answer)
        return self._moment(process, (moment, answer))

    def close(self) -> None:
        """End all threads; what is known stays."""
        for process in self._live.values():
            process.kill()
        self._live.clear()

    def _replay(self, moment: Moment) -> Process:
        process = Process(self.name, self._work)
        for request, answer in reversed(list(moment.answers())):
            assert process.request == request, f"{self.name} is not a function of its answers"
            process.answer(answer)
        assert process.request == moment.request
        return process

    def _moment(self, process: Process, before: tuple[Moment, Answer] | None) -> Moment:
        moment = Moment(self, process.request, process.error, before)
        if process.request is not None:
            self._live[moment] = process
        if len(self._live) > _AWAKE:
            self._live.pop(next(iter(self._live))).kill()
        return moment


class _OneByOne:
    """In place of a thread pool: the requests of a process have one order."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> "_OneByOne":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def map(self, function: Callable[..., Any], *arguments: Iterable[Any]) -> Iterator[Any]:
        return map(function, *arguments)


@contextlib.contextmanager
def modelled() -> Iterator[None]:
    """Takes time and chance out of the lease: whether its holder seems dead is a question to the
    world, since a frozen process is taken for a dead one at any moment."""

    def token() -> Any:
        process = _here.process
        assert process is not None
        process.tokens += 1
        return SimpleNamespace(hex=f"{process.name}-{process.tokens}")

    def is_free(self: Lease) -> bool:
        return self.released or ask(Request("is silent", self.run))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "HEARTBEAT_S", 3600.0)
        patch.setattr(lease, "time", SimpleNamespace(time=lambda: 0.0))
        patch.setattr(lease, "uuid", SimpleNamespace(uuid4=token))
        patch.setattr(Lease, "is_free", property(is_free))
        patch.setattr(layout, "ThreadPoolExecutor", _OneByOne)
        for lazy in (vars(ShardImages)["by_key"], vars(ShardBlock)["images"]):
            # Python 3.11 holds one lock of the whole class while it computes such a property.
            patch.setattr(lazy, "lock", contextlib.nullcontext(), raising=False)
        yield
