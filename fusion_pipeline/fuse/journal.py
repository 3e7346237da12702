"""What was asked of a paid engine and what it answered, on the dataset's file system.

journal/<table>/<client>-<number>.jsonl     lines of intents and ends, in segments
journal/<table>/settled.json                what the segments that were read and removed had cost
journal/<table>/owner.json                  the client that may ask

Before a request goes out its *intent* is there, with the most it can cost. An intent without an
end is charged in full at the next start, and its sample may be asked for again: so a crash costs at
most what was in flight. Answers that no table holds yet are given again from here, by the hash of
image, prompt, model and parameters. Which these are is told by what stood in the shard's place when
it was asked: see `_Standing`.

An object store can't append: lines are put in segments, and whoever waits while one is being put
shares the next. One client at a time works on a table, under the dataset's lease; an orphan finds
that it is not the owner when it next writes an intent, and stops. What it had in flight was charged
in full by then; if it ends all the same, it counts once more.
"""

import asyncio
import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from fusion_pipeline.dataset.fingerprints import canonical_json, short_hash
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import LeaseError
from fusion_pipeline.engine.again import Again
from fusion_pipeline.fuse.base import Captioned, Finish

_SEGMENT_S = 0.1
"""Least time between two segments: each is to be read at the next start."""
_READERS = 16
_SHARDS_A_LOOK = 64
"""When answers of so many more shards are in memory, those that tables hold by now go."""


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
    over: str = ""
    """Digest of the shard's table that its answer is to replace; empty: there is none."""


@dataclass(frozen=True)
class _Standing:
    """What is committed. It says which answers may still be needed.

    An answer is, as long as its shard has the very table that it had when the request went out, or
    still none: then nothing was committed since, and whoever was to commit it, the first run, a
    `--retry-failed` or a `--refresh`, may have been killed. A commit with a new answer has another
    digest. (Not if a refresh brought the very captions that were there: its answers are kept in
    vain.) To a request to ask again the model may well answer just as before: its answers are
    needed until the shard is marked as done, and then, or without the request, never.

    Limit: a `--where` that rewrites a shard in which a `--retry-failed` was killed drops what that
    one had been answered.
    """

    digests: Mapping[int, str] = field(default_factory=dict)
    """Of the shards' tables."""
    again: str = ""
    """Id of the open request to ask again."""
    done: AbstractSet[int] = frozenset()
    """Shards for which that is over."""

    @classmethod
    def of(cls, dataset: Dataset, table: str) -> "_Standing":
        digests = {shard: footer.digest for shard, footer in dataset.footers(table).items()}
        request = Again.of(dataset, table)
        if request is None:
            return cls(digests)
        return cls(digests, request.id, request.done(dataset.storage))

    def over(self, shard: int) -> str:
        return self.digests.get(shard, "")

    def needs(self, request: str, shard: int, over: str) -> bool:
        again = request.rpartition(".")[0]
        if again:
            return again == self.again and shard not in self.done
        return over == self.over(shard)


class Journal:
    """Of one table of captions. Pickled, it is one that is not started."""

    def __init__(self, dataset: Dataset, table: str) -> None:
        self.dataset = dataset
        self.table = table
        self.spent = Spent()
        """Of what has ended; with every intent of earlier processes that has not, in full."""
        self._answers: dict[int, dict[str, Captioned]] = {}
        self._standing = _Standing()
        self._look_at = _SHARDS_A_LOOK
        """Shards in `_answers` at which we look what is committed."""
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
        """Read what earlier processes left and fold it up: the cost stays, and of the answers those
        that may still be needed (`_Standing`). Only they are in memory."""
        storage = self.dataset.storage
        self._client = uuid.uuid4().hex[:12]
        storage.put(f"{self.folder}/owner.json", json.dumps({"client": self._client}).encode())
        settled_at = f"{self.folder}/settled.json"
        mark = storage.version(settled_at)  # before it is read: who folds meanwhile changes it
        before, folded = _read_settled(self.dataset, self.folder)
        paths = [p for p in storage.files(self.folder) if p.endswith(".jsonl")]
        segments = [path for path in paths if path not in folded]
        self._standing = _Standing.of(self.dataset, self.table)
        history = _History(self._standing)
        with ThreadPoolExecutor(1 if storage.is_local else _READERS) as pool:
            for _ in pool.map(storage.delete, filter(folded.__contains__, paths)):
                pass  # a process died before it had removed them
            for first in range(0, len(segments), _READERS):  # a pool reads ahead all that it gets
                for data in pool.map(storage.read, segments[first : first + _READERS]):
                    for line in _lines(data):
                        history.add(line)
        self.spent, self._answers = before + history.spent(), history.answers
        self._look_at = len(self._answers) + _SHARDS_A_LOOK
        if segments:
            kept = [
                _line("end", self._attempt("", request, shard, 0.0), 0.0, answer)
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

    def answer(self, request: str, shard: int) -> Captioned | None:
        """What the engine answered to this very request, if it did and no table holds it yet."""
        return self._answers.get(shard, {}).get(request)

    # What is

    async def intend(self, request: str, shard: int, dollars: float) -> Attempt:
        """Returns when the intent is on the file system. Raises StorageError."""
        self._attempts += 1
        number = f"{self._client}-{self._attempts}"
        attempt = self._attempt(number, request, shard, dollars)
        await self._write(_line("intent", attempt, dollars))
        return attempt

    async def end(self, attempt: Attempt, dollars: float, answer: Captioned | None = None) -> None:
        """What came of it. Returns when that is on the file system. Raises StorageError."""
        self.spent += _spent(dollars, answer)
        if answer is not None:
            # In memory, too: the shard may be done again before it is committed.
            self._answers.setdefault(attempt.shard, {})[attempt.request] = answer
        await self._write(_line("end", attempt, dollars, answer))

    def give_up(self, attempt: Attempt) -> None:
        """Nobody waits for its end any more: it counts in full."""
        self.spent += Spent(attempt.dollars, 1)

    def _attempt(self, number: str, request: str, shard: int, dollars: float) -> Attempt:
        return Attempt(number, request, shard, dollars, self._standing.over(shard))

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
                if len(self._answers) >= self._look_at:
                    await self._forget()
            finally:
                self._put_at = loop.time()

    async def _forget(self) -> None:
        """Answers that are not needed any more."""
        before = self._standing
        self._standing = now = await asyncio.to_thread(_Standing.of, self.dataset, self.table)
        for shard, answers in list(self._answers.items()):
            over = before.over(shard)
            for request in [name for name in answers if not now.needs(name, shard, over)]:
                del answers[request]
            if not answers:
                del self._answers[shard]
        self._look_at = len(self._answers) + _SHARDS_A_LOOK

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

    def __init__(self, standing: _Standing | None) -> None:
        """Without a `standing` no answers are kept."""
        self.answers: dict[int, dict[str, Captioned]] = {}
        self._standing = standing
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
        if answer is None or self._standing is None:
            return
        request, shard = line["request"], line["shard"]
        # Journals of before it was noted have none: as if the shard had had no table.
        if self._standing.needs(request, shard, line.get("over", "")):
            self.answers.setdefault(shard, {})[request] = answer

    def spent(self) -> Spent:
        return self._ended + Spent(sum(self._open.values()), len(self._open))


def spent_on(dataset: Dataset, table: str) -> Spent:
    """What the captions of a table have cost by now, without a claim to its journal."""
    folder = f"journal/{table}"
    spent, folded = _read_settled(dataset, folder)
    history = _History(None)
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
        line |= {"answer": None if answer is None else asdict(answer), "over": attempt.over}
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
