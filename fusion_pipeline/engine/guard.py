"""Runs a chain in a child process, so that no image and no model can take the run down.

A child that dies, eats too much memory or says nothing for long is replaced. When the same step
loses it again, its images are worked on one by one in a fresh child, and an image that is there
alone at the end of two of them is *condemned*: its row fails with reason `killed_worker`, and the
others of the shard are done without it. So a kill from outside is blamed on nobody, and the number
of restarts is bounded.
"""

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from pathlib import Path

import psutil

from fusion_pipeline.engine.chain import Chain
from fusion_pipeline.engine.child import SHOW_STACK, Done, Examine, Run
from fusion_pipeline.engine.errors import (
    DeviceError,
    DeviceMemoryError,
    HostMemoryError,
    ResourceError,
    StageError,
)
from fusion_pipeline.engine.shard import ShardResult
from fusion_pipeline.engine.stage import Source
from fusion_pipeline.engine.watch import CELLS_BYTES, NOWHERE, Watch

_POLL_S = 0.25
_SIGN_OF_LIFE_S = 60.0
_LOADING = 3
"""Times the usual silence for models to load: weights may be fetched, kernels compiled."""
_MAX_DEATHS = 6
"""Of one step on one shard, besides those that condemn an image."""
_MAX_HALVINGS = 6
_MIN_CONDEMNED = 5
"""From so many condemned images on, and if they are most of the shard, the stage is to blame."""


@dataclass(frozen=True)
class Limits:
    memory_bytes: int | None = None
    """Resident memory of one child; None: `default_memory` of the machine it runs on."""
    stall_s: float = 600.0
    """How long a child may go on without a sign of progress (`ShardBlock.tick`)."""
    image_s: float = 120.0
    """How long it may take over one image alone."""
    start_s: float = 300.0
    """For Ray to place actors and for models to be loaded, on top of the silence of workers."""


def default_memory(workers: int) -> int:
    """Bytes for each of so many workers of this machine: their share of 80 % of it, but 2 GiB."""
    total = min([psutil.virtual_memory().total, *_memory_limits()])
    return max(2 * 2**30, int(0.8 * total / max(workers, 1)))


def _memory_limits() -> Iterator[int]:
    """Of the control groups that this process is in (containers, Slurm), in bytes."""
    root = Path("/sys/fs/cgroup")
    try:
        own = Path("/proc/self/cgroup").read_text().splitlines()[-1].rpartition(":")[2]
    except (OSError, IndexError):  # not Linux
        return
    place = root / own.strip("/")
    for folder in (place, *place.parents):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            yield int((folder / "memory.max").read_text())
        if folder == root:
            return


@dataclass(frozen=True)
class Incident:
    """A child that came to its end before its work was done; goes into the run's log."""

    step: str
    shard: int
    row: int | None
    """The row it was at alone, if it was."""
    cause: str
    """`SIGSEGV`, `memory over 8.0 GiB`, `silent for 600 s`, ..."""
    verdict: str
    """What follows: `again`, `examine`, `condemned`, `smaller batches`."""
    stack: str
    """Where it was, most recent call first; empty when it could not say."""


class _Death(Exception):
    """The child is gone."""

    def __init__(
        self,
        cause: str,
        watch: Watch,
        stack: str = "",
        error: Exception | None = None,
        limit: str = "",
    ):
        """`cause` may go into tables; `limit`, that it went over, may be another machine's."""
        super().__init__(f"{cause} {limit}".rstrip())
        self.cause, self.stack, self.error = cause, stack, error
        self.step, self.row = watch.step, watch.row


class _Child:
    """One child process with its models loaded. Raises StageError when they can't be."""

    def __init__(self, chain: Chain, limits: Limits) -> None:
        self._limits = limits
        self._memory = limits.memory_bytes or default_memory(1)
        self._stacks = os.memfd_create("stacks")
        cells = os.memfd_create("cells")
        os.ftruncate(cells, CELLS_BYTES)
        self.watch = Watch(mmap.mmap(cells, CELLS_BYTES))
        self.watch.rest()
        self._connection, theirs = Pipe()
        fds = (theirs.fileno(), cells, self._stacks)
        self._process = subprocess.Popen(
            # -P: no module of the working directory stands in for one of Python's.
            [sys.executable, "-P", "-m", "fusion_pipeline.engine.child", *map(str, fds)],
            pass_fds=fds,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # ends with all that a model starts
        )
        theirs.close()
        os.close(cells)
        self._ps = psutil.Process(self._process.pid)
        try:
            for _ in self._answers(chain, _LOADING * limits.stall_s):
                pass
        except _Death:
            raise  # closed already
        except BaseException:  # also Ctrl-C: nobody else would end the child
            self.close()
            raise

    def carry_out(self, order: Run | Examine) -> Iterator[ShardResult | None]:
        """Results as they come; None, now and then, for work that goes on. Raises _Death,
        StageError and what else stops a run."""
        yield from self._answers(order, self._limits.stall_s)

    def _answers(self, order: object, stall_s: float) -> Iterator[ShardResult | None]:
        try:
            self._connection.send(order)
        except (BrokenPipeError, ConnectionResetError):
            raise self._dead() from None
        ticks, since, told = self.watch.ticks, time.monotonic(), time.monotonic()
        while True:
            try:
                answer = self._connection.recv() if self._connection.poll(_POLL_S) else None
            except (EOFError, ConnectionResetError):
                raise self._dead() from None
            if isinstance(answer, Done):
                return
            if isinstance(answer, ResourceError):
                raise self._ended(str(answer), error=answer)
            if isinstance(answer, Exception):
                raise answer
            if answer is not None:
                yield answer
            allowed = stall_s if self.watch.row == NOWHERE else self._limits.image_s
            if answer is not None or self.watch.ticks != ticks:
                ticks, since = self.watch.ticks, time.monotonic()
                if since - told > _SIGN_OF_LIFE_S:
                    told = since
                    yield None
            elif time.monotonic() - since > allowed:
                raise self._ended("silent", self._ask_for_stack(), limit=f"for {allowed:.0f} s")
            self._check_memory()

    def _check_memory(self) -> None:
        try:
            used = self._ps.memory_info().rss
        except psutil.NoSuchProcess:
            return  # its connection says so, too
        if used > self._memory:
            stack = self._ask_for_stack()
            raise self._ended("memory", stack, limit=f"over {self._memory / 2**30:.1f} GiB")

    def _ask_for_stack(self) -> str:
        self._process.send_signal(SHOW_STACK)
        time.sleep(_POLL_S)
        return self._stack()

    def _dead(self) -> _Death:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # it closed its end, and lives
            return self._ended("closed its connection")
        cause = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        death = _Death(cause, self.watch, self._stack())
        self.close()
        return death

    def _ended(
        self, cause: str, stack: str = "", error: Exception | None = None, limit: str = ""
    ) -> _Death:
        death = _Death(cause, self.watch, stack, error, limit)
        self.close()
        return death

    def _stack(self) -> str:
        return os.pread(self._stacks, 64 * 1024, 0).decode(errors="replace")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: left behind
            self._process.wait(timeout=30)
        self._connection.close()
        os.close(self._stacks)


@dataclass
class Guard:
    """Runs a chain on one shard after another, in a child process."""

    chain: Chain
    limits: Limits
    _child: _Child | None = None

    def open(self) -> None:
        """Load the models. Raises StageError."""
        deaths = 0
        while self._child is None:
            try:
                self._child = _Child(self.chain, self.limits)
            except _Death as death:
                deaths += 1
                if deaths == 3:
                    names = ", ".join(step.work.name for step in self.chain.steps)
                    raise StageError(
                        f"the worker process of {names} died {deaths} times while it loaded its "
                        f"models ({_explained(death)}){_at(death.stack)}"
                    ) from death.error

    def run(self, shard: int) -> Iterator[ShardResult | Incident | None]:
        """Do what is missing for a shard: the results, and what happened to its processes; None
        about once a minute, as a sign of life.

        Raises StageError when a step can't be brought to its end on this shard.
        """
        inquest = _Inquest(self.chain, shard)
        while (order := inquest.order()) is not None:
            self.open()
            assert self._child is not None
            try:
                for result in self._child.carry_out(order):
                    yield result and replace(result, attempt=1 + inquest.lost[result.step])
                inquest.done()
            except _Death as death:
                self._child = None
                yield inquest.after(death)
            except BaseException:  # also a caller that listens no more: the child would go on
                self.close()
                raise

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None


@dataclass
class _Inquest:
    """What is known of the deaths over one shard, and what to do next."""

    chain: Chain
    shard: int
    condemned: dict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))
    halvings: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    """Processes, by name of the step they were at."""
    _deaths: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    """By number of the step, besides those that condemned an image."""
    _suspect: tuple[int, int] | None = None
    """Step and row of the last death, if it was at a row."""
    _examined: Examine | None = None
    """The examination that is to come, or runs."""
    _is_done: bool = False

    def order(self) -> Run | Examine | None:
        if self._is_done:
            return None
        return self._examined or Run(self.shard, dict(self.condemned), self.halvings)

    def done(self) -> None:
        """The order was carried out; after an examination the shard itself is still to be done."""
        self._is_done = self._examined is None
        self._examined = None

    def after(self, death: _Death) -> Incident:
        """Raises StageError when there is nothing left to try."""
        number = max(death.step, 0)
        row = None if death.row == NOWHERE else death.row
        known = self.condemned[self.chain.steps[number].table]
        is_of_device = isinstance(death.error, (DeviceError, DeviceMemoryError))
        # A row that was not touched is not to blame.
        if row is not None and row not in known and not is_of_device:
            verdict = self._at_row(number, row, death)
        else:
            verdict = self._in_step(number, death)
        name = self.chain.steps[number].work.name
        self.lost[name] += 1
        return Incident(name, self.shard, row, str(death), verdict, death.stack)

    def _at_row(self, number: int, row: int, death: _Death) -> str:
        step = self.chain.steps[number]
        is_source = isinstance(step.work, Source)
        condemned = self.condemned[step.table]
        if self._suspect == (number, row):
            condemned[row] = f"killed_worker: {_typed(death)}"
            start, verdict = row + 1, "condemned"
            self._deaths[number] -= 1  # that was this row's
            if len(condemned) >= _MIN_CONDEMNED and len(condemned) > (row + 1) / 2:
                raise self._broken(number, f"lost a process on {len(condemned)} images", death)
        else:
            start, verdict = row, "again"
            self._count(number, death)
        self._suspect = (number, row)
        if not is_source:  # a source has no rows before it has read them: it runs again whole
            self._examined = Examine(self.shard, number, start, dict(condemned))
        return verdict

    def _in_step(self, number: int, death: _Death) -> str:
        deaths = self._count(number, death)
        if isinstance(death.error, DeviceMemoryError):
            self.halvings += 1
            if self.halvings > _MAX_HALVINGS:
                raise self._broken(number, "has not enough device memory for one image", death)
            return "smaller batches"
        work = self.chain.steps[number].work
        may_examine = not isinstance(work, Source) and work.resources.is_free
        if isinstance(death.error, DeviceError) or not may_examine or death.step == NOWHERE:
            return "again"
        is_crash = death.error is None and death.cause.startswith(("SIG", "exit"))
        if is_crash and deaths == 1:
            return "again"  # a kill from outside is the likelier cause
        condemned = self.condemned[self.chain.steps[number].table]
        self._examined = Examine(self.shard, number, 0, dict(condemned))
        return "examine"

    def _count(self, number: int, death: _Death) -> int:
        deaths = self._deaths[number] = self._deaths[number] + 1
        if deaths == _MAX_DEATHS:
            raise self._broken(number, f"lost its process {deaths} times, by no one image", death)
        return deaths

    def _broken(self, number: int, what: str, death: _Death) -> StageError:
        return StageError(
            f"stage {self.chain.steps[number].work.name!r} {what} on shard {self.shard}: "
            f"{_explained(death)}{_at(death.stack)}. Finished shards are kept."
        )


def _typed(death: _Death) -> str:
    """The cause as it goes into tables: without addresses and places."""
    return "MemoryError" if isinstance(death.error, HostMemoryError) else death.cause


def _explained(death: _Death) -> str:
    """The cause, with the setting that it hangs on."""
    settings = {"silent": "runner.stall_minutes", "memory": "runner.worker_memory_gb"}
    setting = settings.get(death.cause)
    return f"{death}, see {setting}" if setting else str(death)


def _at(stack: str) -> str:
    """The innermost frame of a stack that faulthandler wrote."""
    own = stack.rpartition("Current thread")[2]  # other threads stand before it
    frame = next((line.strip() for line in own.splitlines() if line.startswith("  File")), "")
    return f" at {frame}" if frame else ""
