"""Driving a chain: fuse, log and live progress around the stream of results."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.engine.chain import Chain
from fusion_pipeline.engine.errors import StageError
from fusion_pipeline.engine.guard import Incident
from fusion_pipeline.engine.shard import ShardResult


@dataclass(frozen=True)
class Fuse:
    """Stops a run whose stage fails too often: a broken expert, not bad samples."""

    max_failure_rate: float = 0.5
    """Share of the rows a stage worked on that may fail, 0..1."""
    after_rows: int = 50
    """Rows a stage must have worked on before it is judged."""


class FuseError(StageError):
    """A stage failed on too many rows."""


@dataclass
class FuseCounter:
    fuse: Fuse
    _worked: dict[str, int] = field(default_factory=dict)
    _failed: dict[str, int] = field(default_factory=dict)
    _first: dict[str, str] = field(default_factory=dict)

    def add(self, result: ShardResult) -> None:
        """Raises FuseError when the result is one too many."""
        step = result.step
        worked = self._worked[step] = self._worked.get(step, 0) + result.worked
        failed = self._failed[step] = self._failed.get(step, 0) + result.failed
        if result.first_error and result.failed:
            self._first.setdefault(step, result.first_error)
        if worked >= self.fuse.after_rows and failed > self.fuse.max_failure_rate * worked:
            raise FuseError(
                f"stage {step!r} failed on {failed} of {worked} rows (limit "
                f"{self.fuse.max_failure_rate:.0%}). First error: {self._first.get(step)}\n"
                "Mend it, then run again with --retry-failed; finished shards are kept."
            )


class RunLog:
    """`runs/<run>/` of a dataset: JSON lines, one for each step of a shard that was finished
    (`shards-*.jsonl`) and for each process that was lost (`incidents-*.jsonl`).

    In segments, since an object store can't append; the last one is rewritten at intervals.
    """

    FLUSH_S = 10.0
    SEGMENT_LINES = 1000

    def __init__(self, storage: Storage, run: str) -> None:
        self._storage = storage
        self._run = run
        self._spans: dict[str, tuple[float, float]] = {}
        self._segments: dict[str, tuple[int, list[str]]] = {}
        for kind in ("shards", "incidents"):  # an earlier chain of the same run has its own
            taken = [p for p in storage.files(f"runs/{run}") if f"/{kind}-" in p]
            self._segments[kind] = (len(taken), [])
        self._flushed = time.monotonic()

    def add(self, result: ShardResult | Incident) -> None:
        kind = "shards" if isinstance(result, ShardResult) else "incidents"
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        if isinstance(result, ShardResult):
            ended = time.monotonic()
            first = min(self._spans.get(result.step, (ended, ended))[0], ended - result.seconds)
            self._spans[result.step] = first, ended
        number, lines = self._segments[kind]
        lines.append(json.dumps({"at": now, "run": self._run, **asdict(result)}))
        if len(lines) == self.SEGMENT_LINES:
            self._put(kind)
            self._segments[kind] = (number + 1, [])
        if time.monotonic() - self._flushed > self.FLUSH_S:
            self.flush()

    def seconds(self, step: str) -> float:
        """From the start of the step's first shard in this run to the end of its last."""
        first, last = self._spans.get(step, (0.0, 0.0))
        return last - first

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def flush(self) -> None:
        for kind in self._segments:
            self._put(kind)
        self._flushed = time.monotonic()

    def _put(self, kind: str) -> None:
        number, lines = self._segments[kind]
        if lines:
            path = f"runs/{self._run}/{kind}-{number:05d}.jsonl"
            self._storage.put(path, ("\n".join(lines) + "\n").encode())


def new_run_id() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}"


def read_run_log(storage: Storage, kind: str = "shards") -> list[dict[str, object]]:
    """Every line of every run of a dataset, oldest run first. `kind`: shards or incidents."""
    lines: list[dict[str, object]] = []
    for path in storage.files("runs"):
        if f"/{kind}-" in path and path.endswith(".jsonl"):
            lines += [json.loads(line) for line in storage.read(path).splitlines()]
    return lines


@contextlib.contextmanager
def progress_bars(console: Console) -> Iterator[Progress]:
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards"),
        TextColumn("{task.fields[rows]:,} rows"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        transient=False,
    ) as progress:
        yield progress


def drive(
    chain: Chain,
    pending: Mapping[str, Sequence[int]],
    run: Callable[[Chain, Sequence[int]], Iterable[ShardResult | Incident]],
    log: RunLog,
    fuse: Fuse,
    console: Console,
) -> int:
    """Run what is pending of a chain (`Chain.pending`); returns the number of tables committed.

    `log` is the caller's to close. Raises StageError (FuseError among them); what was committed
    before stays.
    """
    counter = FuseCounter(fuse)
    committed = 0
    started = time.monotonic()
    with progress_bars(console) as progress:
        tasks: dict[str, TaskID] = {}
        chain = chain.reduced(pending)
        shards = sorted({shard for todo in pending.values() for shard in todo})
        for step in chain.steps:
            tasks[step.work.name] = progress.add_task(
                step.work.name, total=len(pending[step.table]), rows=0, rate=""
            )
        for result in run(chain, shards):
            log.add(result)
            if isinstance(result, Incident):
                _tell(progress.console, result)
                continue
            committed += 1
            task = progress.tasks[tasks[result.step]]
            rows = task.fields["rows"] + result.rows
            rate = f"{rows / max(time.monotonic() - started, 1e-9):,.1f}/s"
            progress.update(task.id, advance=1, rows=rows, rate=rate)
            counter.add(result)
    return committed


_VERDICTS = {
    "again": "trying again",
    "examine": "looking for the image that did it",
    "condemned": "twice at this image alone: its row fails",
    "smaller batches": "trying again with smaller batches",
}


def _tell(console: Console, lost: Incident) -> None:
    row = f", row {lost.row}" if lost.row is not None else ""
    console.print(
        f"[yellow]{lost.step}, shard {lost.shard}{row}: lost a process ({lost.cause}); "
        f"{_VERDICTS[lost.verdict]}[/]",
        highlight=False,
        soft_wrap=True,
    )
