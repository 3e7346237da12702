"""Sending files as batches, looking after them, and taking in what they answer.

Whatever dies when: a file that counts is in the books before it is uploaded, and that its batch is
being asked for is written down before it is. A batch that is then not known here is looked for
among the provider's, by the name it carries, and only asked for once more when it can't come any
longer.
"""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from fusion_pipeline.fuse.base import CaptionFailed, CaptionOutcome
from fusion_pipeline.fuse.batch.books import SENDINGS, Asked, Books, Entry, State
from fusion_pipeline.fuse.batch.client import BatchError, Provider, UnknownOutcomeError
from fusion_pipeline.fuse.batch.config import BatchConfig
from fusion_pipeline.fuse.batch.files import Limits, Packer
from fusion_pipeline.fuse.batch.plan import Plan
from fusion_pipeline.fuse.batch.remote import ACCOUNT_CODES, Remote
from fusion_pipeline.fuse.batch.results import Results, lines_in

SETTLE_S = 60.0
"""A batch that was asked for so long ago and is not in the provider's list does not exist."""
LATE_S = 3600.0
"""How long results that are missing in the files of an ended batch are waited for."""
_READERS = 8
Track = Callable[[Sequence[int]], Iterable[int]]
_CHUNK = 2**20


@dataclass
class Sent:
    """What `submit` did."""

    entries: list[Entry] = field(default_factory=list)
    refused: int = 0
    """Requests that can't be sent: they have failed."""
    left_out: int = 0
    """Requests for which the budget, or the limit of enqueued tokens, had no room."""


@dataclass
class Desk:
    """Works on books that are loaded; to change anything, under the dataset's lease."""

    books: Books
    config: BatchConfig
    clock: Callable[[], float] = time.time
    remotes: dict[str, Remote] = field(default_factory=dict)
    """Batches as the provider saw them at the last look, by the name of their file."""
    settled: list[Entry] = field(default_factory=list)
    """By `take_in`."""
    _client: Provider | None = None

    @property
    def provider(self) -> Provider:
        """Made when it is first needed: what is done offline needs no key. Raises BatchError."""
        if self._client is None:
            self._client = Provider(self.config)
        return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    # Looking

    def look(self) -> None:
        """See how far all batches are; find those again of which only the file is known."""
        asked_for = {
            entry.name: entry
            for entry in self.books.open()
            if entry.state in (State.CREATING, State.OPEN) or entry.may_exist
        }
        if not asked_for:
            return
        found = self.provider.named(asked_for)
        for name, entry in asked_for.items():
            remotes = {remote.id: remote for remote in found.get(name, [])}
            own = entry.batch or next(iter(remotes), None)
            if own is None:
                if entry.state is State.CREATING and self.clock() - entry.at >= SETTLE_S:
                    self.books.save(entry.model_copy(update={"state": State.INTENDED}))
                continue
            remote = remotes.pop(own, None) or self.provider.get(own)
            for twin in remotes.values():
                self._adopt(entry, twin)
            if remote is not None:
                self._see(entry, remote)

    def _adopt(self, entry: Entry, twin: Remote) -> None:
        """Of a process that was frozen before it asked, and woke up when another one had asked. It
        is cancelled, and counts."""
        name = f"{entry.name}-{twin.id}"
        if name not in self.books.entries:
            update: dict[str, object] = {"name": name, "state": State.OPEN, "batch": twin.id}
            update |= {"file": None, "status": None, "code": None, "ended": None, "counts": {}}
            # The requests are sent once more, but not because the first time was in vain.
            self.books.adopt(entry.model_copy(update={**update, "is_sent": False}), entry)
            if self.books.token:
                self.provider.cancel(twin.id)
        self._see(self.books.entries[name], self.provider.get(twin.id) or twin)

    def _see(self, entry: Entry, remote: Remote) -> None:
        self.remotes[entry.name] = remote
        update: dict[str, object] = {"state": State.OPEN, "batch": remote.id}
        update |= {"status": remote.status, "code": remote.code}
        if remote.has_ended and entry.ended is None:
            # Not when it says it did: results may be late only where somebody looks for them.
            update["ended"] = self.clock()
        if entry.is_open:
            self.books.save(entry.model_copy(update=update))
        if entry.state in (State.CREATING, State.INTENDED) and self.books.token:
            self.books.drop_file(entry)

    # Sending

    def submit(self, plan: Plan, is_elsewhere: bool = False, track: Track = iter) -> Sent:
        """Send what was never sent, or is to be sent again, as far as the limits allow.

        `is_elsewhere`: the files are written, and not sent. `track`: shows how the shards pass.
        """
        books, config = self.books, self.config
        due = {shard: set(plan.ids(shard)) - books.outcomes.keys() for shard in plan.shards()}
        wanted, sent = set[str]().union(*due.values()), Sent()
        waiting = self._waiting(plan, wanted)

        def room() -> float:
            budget = math.inf if config.budget_dollars is None else config.budget_dollars
            return budget - books.dollars - books.most

        for entry in waiting:
            if not is_elsewhere and room() >= 0:
                sent.entries.append(self._send(entry, None))

        def put(data: bytes, asked: Sequence[Asked], most: float) -> None:
            state = State.WRITTEN if is_elsewhere else State.INTENDED
            entry = books.intend(data, asked, most, self.clock(), state)
            sent.entries.append(entry if is_elsewhere else self._send(entry, data))

        tokens = math.inf if is_elsewhere else (config.enqueued_tokens or math.inf) - books.tokens
        packer, refused = Packer(config, Limits(room(), tokens), put), dict[Asked, CaptionOutcome]()
        taken, left_out = books.in_flight(), set[str]()
        try:
            with ThreadPoolExecutor(_READERS) as pool:
                for shard in track(list(due)):
                    asked = due[shard] - taken
                    taken |= asked
                    if asked and not left_out:
                        requests = plan.requests(shard, asked)
                        never, left_out = packer.pack(requests, asked, books.excess, pool)
                        refused |= never
                    else:
                        left_out |= asked
            packer.flush()
        finally:
            if refused:
                books.settle_here(refused, self.clock())
        sent.refused, sent.left_out = len(refused), len(left_out)
        return sent

    def _waiting(self, plan: Plan, wanted: set[str]) -> list[Entry]:
        """Files that are to be sent. Dropped are those whose prompts, or the config, have changed
        since, and what a process that froze while it began a file has left behind."""
        books = self.books
        waiting = [entry for entry in books.open() if entry.state is State.INTENDED]
        if not all(wanted.issuperset(self._asked(entry)) for entry in waiting):
            failed = plan.of_failed()  # an earlier `submit --retry-failed` may have begun it
            again = set[str]().union(*(failed.ids(shard) for shard in failed.shards()))
            wanted = wanted | again - books.outcomes.keys()
        others = (entry for entry in books.open() if entry.state is not State.INTENDED)
        taken, kept = set[str]().union(*map(self._asked, others)), list[Entry]()
        for entry in waiting:
            asked = self._asked(entry).keys()
            if asked and asked <= wanted and not asked & taken and books.has_file(entry):
                taken |= asked
                kept.append(entry)
            else:
                self._drop(entry)
        return kept

    def _send(self, entry: Entry, data: bytes | None) -> Entry:
        """`data`: its lines; None when an earlier process may have uploaded them. Raises
        BatchError: it can be sent again."""
        books, earlier = self.books, entry.file
        books.check()
        file = self.provider.find_file(entry) if data is None else None
        file = file or self.provider.upload(entry.name, data or books.lines_of(entry))
        update = {"state": State.CREATING, "file": file, "at": self.clock()}
        entry = books.save(entry.model_copy(update=update))
        try:
            remote = self.provider.create(file, entry.name)
        except UnknownOutcomeError:  # a later look finds it, or does not
            books.save(entry.model_copy(update={"at": self.clock()}))
            raise
        except BatchError:  # this time there is none; an earlier one may still turn up
            books.save(entry.model_copy(update={"state": State.INTENDED, "file": earlier}))
            raise
        self._see(entry, remote)
        return books.entries[entry.name]

    # Taking in

    def take_in(self) -> None:
        """Settle the batches that have ended, as they were at the last `look`. Raises BatchError
        when all others are settled, for the first one that could not be read."""
        problem: BatchError | None = None
        for entry in self.books.open():
            remote = self.remotes.get(entry.name)
            try:
                if remote is not None and remote.has_ended and self._settle(entry, remote):
                    self.settled.append(self.books.entries[entry.name])
            except BatchError as error:
                problem = problem or error
        if problem is not None:
            raise problem

    def _settle(self, entry: Entry, remote: Remote) -> bool:
        """False while results are missing that may still come. Raises BatchError."""
        results = Results(self._asked(entry), self.config)
        expected, made = remote.work(entry.requests)
        for file in filter(None, (remote.output_file_id, remote.error_file_id)):
            before = results.seen
            for line in lines_in(self.provider.chunks(file)):
                results.add(line)
            if results.seen == before:  # it is named, and not there, or no such file
                expected = entry.requests
        if results.seen < expected and self.clock() - (entry.ended or 0.0) < LATE_S:
            self.books.save(entry.model_copy(update={"counts": results.tally()}))
            return False
        lost = max(made - len(results.made), 0)
        billed = None
        if remote.usage is not None:
            billed = self.config.cost(remote.usage.input_tokens, remote.usage.output_tokens)
        is_tried = remote.status != "cancelled" and remote.code not in ACCOUNT_CODES
        reason = "batch_expired" if remote.status == "expired" else "batch_error"
        self._close(entry, results, results.cost(billed, lost), entry.is_sent and is_tried, reason)
        if entry.file is not None:
            with contextlib.suppress(BatchError):  # it costs nothing where it is
                self.provider.forget(entry.file)
        return True

    def take_files(self, files: Iterable[Path]) -> Counter[str]:
        """Take in result files that were made elsewhere; counts of what was in them."""
        books = self.books
        everything = {asked.id: asked for rows in books.asked.values() for asked in rows}
        results = Results(everything, self.config, known=frozenset(books.outcomes))
        for path in files:
            with path.open("rb") as file:
                for line in lines_in(iter(partial(file.read, _CHUNK), b"")):
                    results.add(line)
        read = Counter(results.tally())
        del read["missing"]
        for entry in books.open():
            asked = self._asked(entry)
            here = Results(asked, self.config, excess=results.excess)
            here.outcomes = {n: o for n, o in results.outcomes.items() if n in asked}
            here.again = {n: reason for n, reason in results.again.items() if n in asked}
            if entry.state is State.WRITTEN and here.seen:
                cost, results.dollars = results.dollars, 0.0  # all of it to the first of them
                self._close(entry, here, cost, True, "batch_error")
        late = {n: o for n, o in results.outcomes.items() if n not in books.outcomes}
        if late:
            outcomes = {everything[name]: outcome for name, outcome in late.items()}
            books.settle_here(outcomes, self.clock(), results.dollars)
        return read

    def _asked(self, entry: Entry) -> dict[str, Asked]:
        return {asked.id: asked for asked in self.books.asked[entry.name]}

    def _close(
        self, entry: Entry, results: Results, dollars: float, is_sent: bool, reason: str
    ) -> None:
        outcomes: dict[str, CaptionOutcome] = dict(results.outcomes)
        given_up = 0
        for name in self._asked(entry) if is_sent else ():
            tried = self.books.sendings[name] + 1
            if name not in outcomes and name not in self.books.outcomes and tried >= SENDINGS:
                outcomes[name] = CaptionFailed(results.again.get(name, reason))
                given_up += 1
        counts = results.tally()
        if given_up:
            counts["given up"] = given_up
        update: Mapping[str, object] = {
            "state": State.SETTLED,
            "counts": counts,
            "dollars": dollars,
            "excess": results.excess,
            "is_sent": is_sent,
        }
        self.books.settle(entry.model_copy(update=update), outcomes)

    # Giving up

    def cancel(self) -> Counter[str]:
        """Cancel what is open; `collect` then takes in what was answered. Counts of files by what
        was done with them."""
        return Counter(self._cancel(entry) for entry in self.books.open())

    def _cancel(self, entry: Entry) -> str:
        remote = self.remotes.get(entry.name)
        if entry.state is State.CREATING and remote is None:
            return "not known yet"
        if entry.state in (State.WRITTEN, State.INTENDED):
            return self._drop(entry)
        if remote is None:
            # The provider does not know it: nobody will say what it has cost.
            return self._drop(entry, is_charged=True)
        if remote.has_ended:
            return self._take_last(entry, remote)
        will_never_end = self.clock() - entry.at > 2 * self.config.window_s
        with contextlib.suppress(BatchError) if will_never_end else contextlib.nullcontext():
            self.provider.cancel(remote.id)
        return self._drop(entry, is_charged=True) if will_never_end else "cancelled"

    def _take_last(self, entry: Entry, remote: Remote) -> str:
        """Of a batch that has ended: its results, if they can ever be had."""
        try:
            return "collected" if self._settle(entry, remote) else "still to be collected"
        except BatchError:
            if self.clock() - (entry.ended or 0.0) < LATE_S:
                return "not readable now"
            return self._drop(entry, is_charged=True)

    def _drop(self, entry: Entry, is_charged: bool = False) -> str:
        """Nothing more is expected of it. If it can have cost something, that is what it has."""
        is_charged = is_charged or entry.may_exist
        nothing = Results(self._asked(entry), self.config)
        self._close(entry, nothing, entry.most if is_charged else 0.0, False, "")
        return "given up and charged in full" if is_charged else "dropped"
