"""What was asked in batches, what was answered, and what it cost, on the dataset's file system.

batches/<table>/<name>/requests.jsonl   the file as it is sent; removed when its batch exists
batches/<table>/<name>/asked.json       the requests in it, and the most each can take
batches/<table>/<name>/state.json       how far it came; written last, and replaced from then on
batches/<table>/<name>/outcomes.jsonl   its answers, validated

A name is drawn for each file, and the provider's batch carries it: whoever finds a file here of
which nothing more is known asks the provider for the batch of that name. A folder without
`state.json` was never sent, and is removed. All is written under the dataset's lease.
"""

import json
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import LeaseError, check_token
from fusion_pipeline.fuse.base import Captioned, CaptionFailed, CaptionOutcome, Finish

SENDINGS = 3
"""A request that was sent so often without an answer is a failed row."""
MAX_EXCESS = 50_000
"""Prompt tokens. No model known counts more for an image: what is beyond is the provider's error,
and is not to be set aside for each request from then on."""
_READERS = 16


class State(StrEnum):
    WRITTEN = "written"
    """The file is for a program that is run elsewhere (`--files-only`)."""
    INTENDED = "intended"
    """Its batch was not asked for yet."""
    CREATING = "creating"
    """Its batch was asked for, and whether it exists is not known here."""
    OPEN = "open"
    """Its batch exists."""
    SETTLED = "settled"
    """What came of it is known, and counted."""


@dataclass(frozen=True)
class Asked:
    """A request of a file."""

    id: str
    """`journal.request_id`; the `custom_id` of its line."""
    shard: int
    tokens: int
    """The most that its prompt can count."""


class Entry(BaseModel):
    """One file and its batch."""

    model_config = ConfigDict(frozen=True)

    name: str
    state: State
    requests: int
    bytes: int
    tokens: int
    """The most that its prompts can count."""
    most: float
    """The most that it can cost, in dollars."""
    at: float
    """Seconds since the epoch: when its batch was last asked for; if no answer came, when it was
    clear that none would."""
    file: str | None = None
    batch: str | None = None
    """The provider's names of the file and the batch."""
    status: str | None = None
    """The provider's word for how far the batch is, when it was last asked."""
    code: str | None = None
    """Why the provider refused the batch as a whole."""
    ended: float | None = None
    """Seconds since the epoch: when the batch was first seen to have ended."""
    counts: dict[str, int] = {}
    """Of its results: answered, failed, again, missing, doubled, unknown, malformed."""
    dollars: float = 0.0
    """What it has cost; once it is settled."""
    excess: int = 0
    """Prompt tokens beyond what was thought to be the most of one request."""
    is_sent: bool = True
    """Whether its requests were tried: not so when it was cancelled, refused as a whole for a limit
    of the account, or the twin of another batch."""

    @property
    def is_open(self) -> bool:
        return self.state is not State.SETTLED

    @property
    def may_exist(self) -> bool:
        """Whether its batch was asked for without an answer, and did not turn up until now."""
        return self.state is State.INTENDED and self.file is not None


@dataclass
class Books:
    """Of one table of captions. Pickled, they are empty until `load`."""

    dataset: Dataset
    table: str
    token: str = ""
    """Of the lease; without it, what is saved stays in this process."""
    entries: dict[str, Entry] = field(default_factory=dict)
    """By name: oldest first."""
    asked: dict[str, list[Asked]] = field(default_factory=dict)
    outcomes: dict[str, CaptionOutcome] = field(default_factory=dict)
    """By request; the oldest one counts."""
    sendings: Counter[str] = field(default_factory=Counter)
    """How often a request was sent in files that are settled."""

    def __reduce__(self) -> tuple[type["Books"], tuple[Dataset, str]]:
        return Books, (self.dataset, self.table)

    @property
    def folder(self) -> str:
        return f"batches/{self.table}"

    def path(self, name: str, file: str) -> str:
        return f"{self.folder}/{name}/{file}"

    # What was

    def load(self) -> "Books":
        """All of it, anew. Under the lease, what a dead process had begun to write is removed."""
        storage = self.dataset.storage
        files = set(storage.files(self.folder))
        names = sorted({path.removeprefix(f"{self.folder}/").split("/")[0] for path in files})
        known = [name for name in names if self.path(name, "state.json") in files]
        self.entries, self.asked, self.outcomes = {}, {}, {}
        self.sendings = Counter()
        with ThreadPoolExecutor(1 if storage.is_local else _READERS) as pool:
            read = pool.map(partial(self._read, files), known)
            for name, (entry, asked, outcomes) in zip(known, read, strict=True):
                self.entries[name], self.asked[name] = entry, asked
                self._take(entry, outcomes)
        if self.token:
            for name in set(names) - set(known):
                storage.delete(f"{self.folder}/{name}")
        return self

    def _read(
        self, files: set[str], name: str
    ) -> tuple[Entry, list[Asked], dict[str, CaptionOutcome]]:
        storage = self.dataset.storage
        entry = Entry.model_validate_json(storage.read(self.path(name, "state.json")))
        asked, path = list[Asked](), self.path(name, "asked.json")
        # A process that froze while it began a file may write its state after another one has
        # removed the rest: nothing was sent, so nothing was asked.
        if path in files or entry.file is not None or entry.batch is not None:
            asked = [Asked(*row) for row in json.loads(storage.read(path))]
        outcomes, path = {}, self.path(name, "outcomes.jsonl")
        if path in files:
            outcomes = dict(_outcomes(storage.read(path)))
        return entry, asked, outcomes

    def _take(self, entry: Entry, outcomes: Mapping[str, CaptionOutcome]) -> None:
        for request, outcome in outcomes.items():
            self.outcomes.setdefault(request, outcome)
        if entry.state is State.SETTLED and entry.is_sent:
            self.sendings.update(request.id for request in self.asked[entry.name])

    # What is

    def open(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.is_open]

    def in_flight(self) -> set[str]:
        """Requests of files that are not settled."""
        return {request.id for entry in self.open() for request in self.asked[entry.name]}

    @property
    def dollars(self) -> float:
        """Of what is settled."""
        return sum(entry.dollars for entry in self.entries.values())

    @property
    def most(self) -> float:
        """Dollars that open files can cost."""
        return sum(entry.most for entry in self.open())

    @property
    def tokens(self) -> int:
        """The most that the prompts of open files can count, as far as they go to the provider."""
        return sum(entry.tokens for entry in self.open() if entry.state is not State.WRITTEN)

    @property
    def excess(self) -> int:
        """Of the answer that counted most. It is set aside with each request that is sent."""
        most = max((entry.excess for entry in self.entries.values()), default=0)
        return min(most, MAX_EXCESS)

    def intend(
        self, data: bytes, asked: Sequence[Asked], most: float, now: float, state: State
    ) -> Entry:
        """Write a file and what is in it. From here on it counts. Raises LeaseError."""
        entry = Entry(
            name=_new_name(),
            state=state,
            requests=len(asked),
            bytes=len(data),
            tokens=sum(request.tokens for request in asked),
            most=most,
            at=now,
        )
        self.check()
        self.dataset.storage.put(self.path(entry.name, "requests.jsonl"), data)
        self._begin(entry, asked)
        return entry

    def settle_here(
        self, outcomes: Mapping[Asked, CaptionOutcome], now: float, dollars: float = 0.0
    ) -> None:
        """Outcomes of requests that no file waits for: those that can't be sent at all, and answers
        that came late from elsewhere."""
        failed = sum(isinstance(outcome, CaptionFailed) for outcome in outcomes.values())
        counts = {"answered": len(outcomes) - failed, "failed": failed}
        entry = Entry(
            name=_new_name(),
            state=State.SETTLED,
            requests=len(outcomes),
            bytes=0,
            tokens=0,
            most=0,
            at=now,
            counts={name: count for name, count in counts.items() if count},
            dollars=dollars,
            is_sent=False,
        )
        self._put_outcomes(entry, {asked.id: outcome for asked, outcome in outcomes.items()})
        self._begin(entry, list(outcomes))

    def adopt(self, twin: Entry, entry: Entry) -> None:
        """Another batch of the same file turned up: it gets an entry of its own."""
        self._begin(twin, self.asked[entry.name])

    def _begin(self, entry: Entry, asked: Sequence[Asked]) -> None:
        rows = [[request.id, request.shard, request.tokens] for request in asked]
        if self.token:
            self.check()
            storage = self.dataset.storage
            storage.put(self.path(entry.name, "asked.json"), json.dumps(rows).encode())
            # Created, never replaced: the name is new.
            storage.create(self.path(entry.name, "state.json"), _encode(entry))
        self.entries[entry.name], self.asked[entry.name] = entry, list(asked)

    def save(self, entry: Entry) -> Entry:
        """The entry as it is now. Raises LeaseError."""
        if self.token and entry != self.entries[entry.name]:
            self._replace(self.path(entry.name, "state.json"), _encode(entry))
        self.entries[entry.name] = entry
        return entry

    def _replace(self, path: str, data: bytes) -> None:
        """Write a file that a process which froze and lost its lease can't write: what its
        successor wrote stays. Raises LeaseError."""
        storage = self.dataset.storage
        mark = storage.version(path)  # before the lease is looked at: what came later shows
        self.check()
        is_ours = storage.replace(path, data, mark) if mark else storage.create(path, data)
        if not is_ours and storage.read(path) != data:
            raise LeaseError(f"{storage.full(path)} was written by another process")

    def settle(self, entry: Entry, outcomes: Mapping[str, CaptionOutcome]) -> None:
        """What came of a file: its answers first, then that it is settled, and its cost."""
        self._put_outcomes(entry, outcomes)
        self.save(entry)
        if self.token:
            self.drop_file(entry)

    def _put_outcomes(self, entry: Entry, outcomes: Mapping[str, CaptionOutcome]) -> None:
        if self.token and outcomes:
            data = "".join(_line(request, outcome) for request, outcome in outcomes.items())
            self._replace(self.path(entry.name, "outcomes.jsonl"), data.encode())
        for request, outcome in outcomes.items():
            self.outcomes.setdefault(request, outcome)
        if entry.is_sent:
            self.sendings.update(request.id for request in self.asked[entry.name])

    def forgive(self) -> None:
        """Forget that requests have failed: they may be sent once more. Raises LeaseError."""
        failed = {name for name, o in self.outcomes.items() if isinstance(o, CaptionFailed)}
        for entry in self.entries.values():
            if failed.intersection(request.id for request in self.asked[entry.name]):
                path = self.path(entry.name, "outcomes.jsonl")
                if self.dataset.storage.exists(path):
                    kept = _outcomes(self.dataset.storage.read(path))
                    lines = [_line(name, outcome) for name, outcome in kept if name not in failed]
                    self._replace(path, "".join(lines).encode())
        for name in failed:
            del self.outcomes[name]

    def drop_file(self, entry: Entry) -> None:
        """What was sent is not needed any more. (It may never have been: a batch found again.)"""
        self.dataset.storage.delete(self.path(entry.name, "requests.jsonl"))

    def has_file(self, entry: Entry) -> bool:
        return self.dataset.storage.exists(self.path(entry.name, "requests.jsonl"))

    def lines_of(self, entry: Entry) -> bytes:
        return self.dataset.storage.read(self.path(entry.name, "requests.jsonl"))

    def check(self) -> None:
        """To be called before anything is asked of the provider. Raises LeaseError."""
        if self.token:
            check_token(self.dataset.storage, self.token)


def _new_name() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:12]}"


def _encode(entry: Entry) -> bytes:
    return entry.model_dump_json(indent=1).encode()


def _line(request: str, outcome: CaptionOutcome) -> str:
    line: dict[str, Any] = {"request": request}
    if isinstance(outcome, CaptionFailed):
        line["failed"] = outcome.reason
    else:
        line |= {
            "caption": outcome.caption,
            "finish": outcome.finish.value,
            "prompt_tokens": outcome.prompt_tokens,
            "completion_tokens": outcome.completion_tokens,
        }
    return json.dumps(line, ensure_ascii=False) + "\n"


def _outcomes(data: bytes) -> Iterator[tuple[str, CaptionOutcome]]:
    # Not `splitlines`: a caption may hold what Unicode takes for a line's end.
    for text in data.decode().split("\n"):
        if text:
            line = json.loads(text)
            request = line.pop("request")
            if "failed" in line:
                yield request, CaptionFailed(line["failed"])
            else:
                yield request, Captioned(**{**line, "finish": Finish(line["finish"])})
