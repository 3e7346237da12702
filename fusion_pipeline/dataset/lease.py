"""The lease: one run at a time writes a dataset.

`lease.json` names its holder. It is created by a conditional put, kept alive by a heartbeat, and
taken over at once when its process on this host is gone, otherwise when its heartbeat ran out.
Each commit checks that the file still carries its run's token.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import psutil

from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.errors import FusionError

LEASE = "lease.json"
HEARTBEAT_S = 15.0
EXPIRES_S = 90.0


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


def read_lease(storage: Storage) -> Lease | None:
    try:
        return Lease(**json.loads(storage.read(LEASE)))
    except FileNotFoundError:
        return None


def _acquire(storage: Storage, run: str) -> Lease:
    process = psutil.Process()
    mine = Lease(
        token=uuid.uuid4().hex,
        run=run,
        host=_host(),
        pid=os.getpid(),
        started=process.create_time(),
        heartbeat=time.time(),
    )
    tries = 0
    while not storage.create(LEASE, _encode(mine)):
        held = read_lease(storage)
        if held is None:
            continue  # released between the two calls
        if not held.holder_is_dead() and time.time() - held.heartbeat < EXPIRES_S:
            raise LeaseError(
                f"{storage.url} is in use by run {held.run} (process {held.pid} on {held.host}). "
                f"Wait for it or stop it; a dead run's lease ends {EXPIRES_S:.0f} s after its "
                "last sign of life, at once on its own host."
            )
        _take_over(storage, held, force=(tries := tries + 1) > 50)
    return mine


def _take_over(storage: Storage, dead: Lease, force: bool) -> None:
    """Of many runs that find the same dead holder, exactly one removes its lease.

    `force`: the one that was to remove it has died as well.
    """
    if storage.create(f"leases/{dead.token}.ended", b"") or force:
        storage.delete(LEASE)
    else:
        time.sleep(0.1)  # another run is at it


def check_token(storage: Storage, token: str) -> None:
    """Raises LeaseError unless the dataset is still held under this token."""
    held = read_lease(storage)
    if held is None or held.token != token:
        by = f"run {held.run} on {held.host}" if held else "nobody"
        raise LeaseError(f"{storage.url} is no longer held by this run (now: {by}); not committing")


@contextlib.contextmanager
def hold_lease(storage: Storage, run: str) -> Iterator[str]:
    """Hold the dataset for the length of the block; gives the token that commits carry."""
    lease = _acquire(storage, run)
    stop = threading.Event()

    def beat() -> None:
        alive = time.monotonic()
        while not stop.wait(HEARTBEAT_S):
            try:
                held = read_lease(storage)
                if held is None or held.token != lease.token:
                    return
                if time.monotonic() - alive > EXPIRES_S - HEARTBEAT_S:
                    return  # frozen for too long: another run may be taking over at this moment
                fresh = Lease(**{**asdict(lease), "heartbeat": time.time()})
                storage.put(LEASE, _encode(fresh))
                alive = time.monotonic()
            except OSError:
                continue  # the store did not answer; the next beat may come through

    thread = threading.Thread(target=beat, name="lease-heartbeat", daemon=True)
    thread.start()
    try:
        yield lease.token
    finally:
        stop.set()
        thread.join()
        held = read_lease(storage)
        if held is not None and held.token == lease.token:
            storage.delete(LEASE)
