"""What was asked of a paid engine and what it answered, on the dataset's file system.

journal/<table>/<client>-<number>.jsonl     lines of intents and ends, in segments
journal/<table>/settled.json                what the segments that were read and removed had cost
journal/<table>/owner.json                  the client that may ask

Before a request goes out its *intent* is there, with the most it can cost. An intent without an
end is charged in full at the next start, and its sample may be asked for again: so a crash costs at
most what was in flight. Answers that no table holds yet are given again from here, by the hash of
image, prompt, model and parameters.

An object store can't append: lines are put in segments, and whoever waits while one is being put
shares the next. One client at a time works on a table, under the dataset's lease; an orphan finds
that it is not the owner when it next writes an intent, and stops. What it had in flight was charged
in full by then; if it ends all the same, it counts once more.
"""

import asyncio
import contextlib
import json
import uuid
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from fusion_pipeline.dataset.fingerprints import canonical_json, short_hash
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import LeaseError
from fusion_pipeline.engine.again import Again
from fusion_pipeline.fuse.base import Captioned, Finish

_SEGMENT_S = 0.1
"""Least time between two segments: each is to be read at the next start."""
_READERS = 16
_SHARDS_KEPT = 64
"""Of so many shards the answers of this process are kept, in case a shard is done again."""


def request_id(key: str, texts: Sequence[str], settings: object, again: str = "") -> str:
    """Of all that an answer hangs on. `key`: the sample's, a hash of the image's bytes. `again`: id
    of a request to ask once more, for which another answer is wanted."""
    asked = short_hash(canonical_json([key, list(texts), settings]))
    return f"{again}.{asked}" if again else asked


@dataclass(frozen=True)
class Spent:
    """What the captions of a table have cost, over all runs."""

    dollars: float = 0.0
    requests: int = 0
    """Those that were charged, or may have been."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            self.dollars + other.dollars,
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True)
class Attempt:
    """A request that is about to go out."""

    number: str
    request: str
    """`request_id`"""
    shard: int
    dollars: float
    """The most it can cost."""


class Journal:
    """Of one table of captions. Pickled, it is one that is not started."""

    def __init__(self, dataset: Dataset, table: str) -> None:
        self.dataset = dataset
        self.table = table
        self.spent = Spent()
        """Of what has ended; with every intent of earlier processes that has not, in full."""
        self._answers: dict[int, dict[str, Captioned]] = {}
        self._client = ""
        self._attempts = 0
        self._segments = 0
        self._waiting: list[str] = []
        self._next: asyncio.Task[None] | None = None
        self._putting: asyncio.Lock | None = None
        self._put_at = 0.0

    def __reduce__(self) -> tuple[type["Journal"], tuple[Dataset, str]]:
        return Journal, (self.dataset, self.table)

    @property
    def folder(self) -> str:
        return f"journal/{self.table}"

    # What was

    def start(self) -> None:
        """Read what earlier processes left and fold it up: of a committed shard only the cost
        stays, of another one its answers too; and those to an open request to ask again, of shards
        for which it is not done. In memory are the latter."""
        storage = self.dataset.storage
        self._client = uuid.uuid4().hex[:12]
        storage.put(f"{self.folder}/owner.json", json.dumps({"client": self._client}).encode())
        settled_at = f"{self.folder}/settled.json"
        mark = storage.version(settled_at)  # before it is read: who folds meanwhile changes it
        before, folded = _read_settled(self.dataset, self.folder)
        paths = [p for p in storage.files(self.folder) if p.endswith(".jsonl")]
        segments = [path for path in paths if path not in folded]
        history = _History(self._complete_shards(), *_asked_again(self.dataset, self.table))
        with ThreadPoolExecutor(1 if storage.is_local else _READERS) as pool:
            for _ in pool.map(storage.delete, filter(folded.__contains__, paths)):
                pass  # a process died before it had removed them
            for data in pool.map(storage.read, segments):
                for line in _lines(data):
                    history.add(line)
        self.spent, self._answers = before + history.spent(), history.answers
        if segments:
            kept = [
                _line("end", Attempt("", request, shard, 0.0), 0.0, answer)
                for shard, answers in self._answers.items()
                for request, answer in answers.items()
            ]
            if kept:
                self._put(kept)
            settled = {"spent": asdict(self.spent), "segments": segments}
            content = json.dumps(settled).encode()
            is_ours = (
                storage.replace(settled_at, content, mark)
                if mark
                else storage.create(settled_at, content)
            )
            if not is_ours:
                raise LeaseError(f"{storage.full(settled_at)} was written by another run")
            with ThreadPoolExecutor(1 if storage.is_local else _READERS) as pool:
                for _ in pool.map(storage.delete, segments):
                    pass

    def _complete_shards(self) -> set[int]:
        """Those whose answers are all in the table: not even `--retry-failed` asks for more."""
        footers = self.dataset.footers(self.table)
        return {
            shard
            for shard, footer in footers.items()
            if not any(name.startswith("failed") for name in footer.counts)
        }

    def answer(self, request: str, shard: int) -> Captioned | None:
        """What the engine answered to this very request, if it did and no table holds it yet."""
        return self._answers.get(shard, {}).get(request)

    # What is

    async def intend(self, request: str, shard: int, dollars: float) -> Attempt:
        """Returns when the intent is on the file system. Raises StorageError."""
        self._attempts += 1
        attempt = Attempt(f"{self._client}-{self._attempts}", request, shard, dollars)
        await self._write(_line("intent", attempt, dollars))
        return attempt

    async def end(self, attempt: Attempt, dollars: float, answer: Captioned | None = None) -> None:
        """What came of it. Returns when that is on the file system. Raises StorageError."""
        self.spent += _spent(dollars, answer)
        if answer is not None:
            self._answers.setdefault(attempt.shard, {})[attempt.request] = answer
            while len(self._answers) > _SHARDS_KEPT:
                del self._answers[next(iter(self._answers))]
        await self._write(_line("end", attempt, dollars, answer))

    def give_up(self, attempt: Attempt) -> None:
        """Nobody waits for its end any more: it counts in full."""
        self.spent += Spent(attempt.dollars, 1)

    async def _write(self, line: str) -> None:
        self._waiting.append(line)
        if self._next is None:
            self._next = asyncio.ensure_future(self._put_waiting())
        await asyncio.shield(self._next)  # of many who wait for it one may be given up

    async def _put_waiting(self) -> None:
        loop = asyncio.get_running_loop()
        self._putting = self._putting or asyncio.Lock()
        async with self._putting:
            await asyncio.sleep(self._put_at + _SEGMENT_S - loop.time())
            lines, self._waiting = self._waiting, []
            self._next = None  # who comes from here on waits for the next one
            try:
                await asyncio.to_thread(self._put, lines)
            finally:
                self._put_at = loop.time()

    def _put(self, lines: Sequence[str]) -> None:
        storage = self.dataset.storage
        owner = json.loads(storage.read(f"{self.folder}/owner.json"))
        if owner["client"] != self._client:
            raise LeaseError(
                f"{storage.full(self.folder)}: another process keeps these books now. This one, of "
                "a run that is over, stops."
            )
        path = f"{self.folder}/{self._client}-{self._segments:06d}.jsonl"
        self._segments += 1
        storage.put(path, "".join(lines).encode())

    def new_loop(self) -> None:
        """To be called when another event loop goes on with it; nothing may be in flight."""
        self._next = self._putting = None
        self._put_at = 0.0


class _History:
    """Adds up the lines of all segments, in whatever order these are read."""

    def __init__(
        self, committed: set[int], again: str = "", done: Container[int] = frozenset()
    ) -> None:
        """`again`: id of a request to ask once more; `done`: shards for which that is over."""
        self.answers: dict[int, dict[str, Captioned]] = {}
        self._committed = committed
        self._again, self._done_again = again, done
        self._ended = Spent()
        self._open: dict[str, float] = {}
        """Intents by their number; those that have ended are kept out by `_done`."""
        self._done: set[str] = set()

    def add(self, line: dict[str, Any]) -> None:
        number = line["attempt"]
        if line["kind"] == "intent":
            if number in self._done:
                self._done.remove(number)
            else:
                self._open[number] = line["dollars"]
            return
        if number and self._open.pop(number, None) is None:
            self._done.add(number)  # its intent is in a segment still to be read
        answer = _answer(line["answer"])
        self._ended += _spent(line["dollars"], answer if number else None)
        if answer is not None and self._is_wanted(line["request"], line["shard"]):
            self.answers.setdefault(line["shard"], {})[line["request"]] = answer

    def _is_wanted(self, request: str, shard: int) -> bool:
        if self._again and request.startswith(f"{self._again}."):
            return shard not in self._done_again
        return shard not in self._committed

    def spent(self) -> Spent:
        return self._ended + Spent(sum(self._open.values()), len(self._open))


def _asked_again(dataset: Dataset, table: str) -> tuple[str, set[int]]:
    """The open request to ask again, by its id, and the shards for which it is done."""
    request = Again.of(dataset, table)
    return (request.id, request.done(dataset.storage)) if request else ("", set())


def spent_on(dataset: Dataset, table: str) -> Spent:
    """What the captions of a table have cost by now, without a claim to its journal."""
    folder = f"journal/{table}"
    spent, folded = _read_settled(dataset, folder)
    history = _History(set())
    for path in dataset.storage.files(folder):
        if path.endswith(".jsonl") and path not in folded:
            with contextlib.suppress(FileNotFoundError):  # its client folds it up just now
                for line in _lines(dataset.storage.read(path)):
                    history.add(line)
    return spent + history.spent()


def _spent(dollars: float, answer: Captioned | None) -> Spent:
    if answer is None:
        return Spent(dollars, int(dollars > 0))
    return Spent(dollars, 1, answer.prompt_tokens, answer.completion_tokens)


def _line(kind: str, attempt: Attempt, dollars: float, answer: Captioned | None = None) -> str:
    line: dict[str, Any] = {
        "kind": kind,
        "attempt": attempt.number,
        "request": attempt.request,
        "shard": attempt.shard,
        "dollars": dollars,
    }
    if kind == "end":
        line["answer"] = None if answer is None else asdict(answer)
    return json.dumps(line, ensure_ascii=False) + "\n"


def _answer(fields: dict[str, Any] | None) -> Captioned | None:
    return None if fields is None else Captioned(**{**fields, "finish": Finish(fields["finish"])})


def _lines(data: bytes) -> Iterator[dict[str, Any]]:
    # Not `splitlines`: a caption may hold what Unicode takes for a line's end.
    yield from (json.loads(line) for line in data.decode().split("\n") if line)


def _read_settled(dataset: Dataset, folder: str) -> tuple[Spent, set[str]]:
    try:
        found = json.loads(dataset.storage.read(f"{folder}/settled.json"))
    except FileNotFoundError:
        return Spent(), set()
    return Spent(**found["spent"]), set(found["segments"])
