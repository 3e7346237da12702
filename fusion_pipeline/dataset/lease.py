"""The lease: one run at a time writes a dataset.

`lease.json` names its holder. It is only ever written by conditional writes (`Storage.create`,
`Storage.replace`), so of many runs that want it one gets it, and a process that was frozen can't
write over its successor. A heartbeat keeps it alive; it is taken over at once when its process on
this host is gone, otherwise when its heartbeat ran out. Each commit checks that the file still
carries its run's token.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace

import psutil

from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.errors import FusionError

LEASE = "lease.json"
HEARTBEAT_S = 15.0
EXPIRES_S = 90.0
_TRIES = 100


class LeaseError(FusionError):
    """Another run holds the dataset, or took it from this one."""


@dataclass(frozen=True)
class Lease:
    token: str
    run: str
    host: str
    pid: int
    started: float
    """Start time of the process, seconds since the epoch: a pid alone may be reused."""
    heartbeat: float
    """Seconds since the epoch."""
    released: bool = False
    """Given back. The file stays: a conditional write needs something to compare with."""

    @property
    def is_free(self) -> bool:
        return self.released or self.holder_is_dead() or time.time() - self.heartbeat >= EXPIRES_S

    def holder_is_dead(self) -> bool:
        """Whether the holding process is known to be gone (only for this host)."""
        if self.host != _host():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > 1
        except psutil.NoSuchProcess:
            return True


def _host() -> str:
    """This host and process namespace: a pid means nothing outside of it."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        namespace = ""
    return socket.gethostname() + namespace.removeprefix("pid:")


def _encode(lease: Lease) -> bytes:
    return json.dumps(asdict(lease), indent=1).encode()


def _read(storage: Storage) -> Lease | None:
    try:
        return Lease(**json.loads(storage.read(LEASE)))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:  # not written by us: somebody edited it
        raise LeaseError(
            f"{storage.full(LEASE)} can't be read ({error}). If no run is at work here, delete it."
        ) from error


def read_lease(storage: Storage) -> Lease | None:
    """Who holds the dataset; None when nobody does. Raises LeaseError for a file not ours."""
    held = _read(storage)
    return None if held is None or held.released else held


def _acquire(storage: Storage, run: str) -> Lease:
    mine = Lease(
        token=uuid.uuid4().hex,
        run=run,
        host=_host(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        heartbeat=time.time(),
    )
    for _ in range(_TRIES):
        version = storage.version(LEASE)  # before the read: what changes in between is noticed
        held = _read(storage)
        if held is not None and held.token == mine.token:
            return mine  # the answer to our own write got lost
        if held is not None and not held.is_free:
            raise LeaseError(
                f"{storage.url} is in use by run {held.run} (process {held.pid} on {held.host}). "
                f"Wait for it or stop it; a dead run's lease ends {EXPIRES_S:.0f} s after its "
                "last sign of life, at once on its own host."
            )
        if _write(storage, mine, version):
            return mine
    raise LeaseError(f"{storage.full(LEASE)} changes all the time: too many runs want it")


def _write(storage: Storage, lease: Lease, version: str | None) -> bool:
    if version is None:
        return storage.create(LEASE, _encode(lease))
    return storage.replace(LEASE, _encode(lease), version)


def check_token(storage: Storage, token: str) -> None:
    """Raises LeaseError unless the dataset is still held under this token."""
    held = read_lease(storage)
    if held is None or held.token != token:
        by = f"run {held.run} on {held.host}" if held else "nobody"
        raise LeaseError(f"{storage.url} is no longer held by this run (now: {by}); not committing")


Rank = tuple[int, str]
"""Generation, and what is pointed to. Of one generation there is one pointer only."""


def put_as_holder(
    storage: Storage, path: str, data: bytes, token: str, rank: Callable[[bytes], Rank]
) -> None:
    """Write a pointer, of which there is one a name: what a table's or artifact's files are.

    It carries the token, so that each run changes it, and no run that was frozen in here can write
    it later. `rank` reads a pointer; none is replaced by one of an older generation. Raises
    LeaseError.
    """
    while True:  # ends: only an orphan's one late write can come between, or the lease is lost
        mark = storage.version(path)  # before the token: what came later is noticed
        check_token(storage, token)
        found = storage.read(path) if mark is not None else None
        if found == data:
            return
        if found is not None and not (rank(found) == rank(data) or rank(found)[0] < rank(data)[0]):
            raise LeaseError(
                f"{storage.full(path)} was written just now by a run that had lost the dataset to "
                "this one. Run again."
            )
        if storage.replace(path, data, mark) if mark else storage.create(path, data):
            return


@contextlib.contextmanager
def as_holder(storage: Storage, token: str) -> Iterator[None]:
    """What fails in this block after the lease was lost is a LeaseError: the run that took it over
    may have removed the files that this one reads."""
    try:
        yield
    except (FileNotFoundError, FusionError):
        if token:
            check_token(storage, token)
        raise


def _update(storage: Storage, lease: Lease) -> bool:
    """Write our own lease anew; False when it is no longer ours."""
    for _ in range(_TRIES):
        version = storage.version(LEASE)
        held = _read(storage)
        if version is None or held is None or held.token != lease.token:
            return False
        if held == lease or storage.replace(LEASE, _encode(lease), version):
            return True
    return False


@contextlib.contextmanager
def hold_lease(storage: Storage, run: str) -> Iterator[str]:
    """Hold the dataset for the length of the block; gives the token that commits carry."""
    lease = _acquire(storage, run)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_S):
            try:
                if not _update(storage, replace(lease, heartbeat=time.time())):
                    return  # taken over: commits will be refused
            except (OSError, FusionError):
                continue  # the store did not answer; the next beat may come through

    thread = threading.Thread(target=beat, name="lease-heartbeat", daemon=True)
    thread.start()
    try:
        yield lease.token
    finally:
        stop.set()
        thread.join(timeout=5)
        # A full disk or a silent store: the lease is then free when this process is gone.
        with contextlib.suppress(OSError, FusionError):
            if not thread.is_alive():
                _update(storage, replace(lease, released=True))
