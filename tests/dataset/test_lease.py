"""One run at a time: who is refused, who may take over, who may commit."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from fusion_pipeline.dataset import lease
from fusion_pipeline.dataset.lease import (
    LEASE,
    Lease,
    LeaseError,
    check_token,
    hold_lease,
    read_lease,
)
from fusion_pipeline.dataset.storage import Storage
from tests.racing import in_processes, take_turns

HOLD = """
import sys, time
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.dataset.storage import Storage
with hold_lease(Storage(sys.argv[1]), "the-other-run"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the dataset."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def held_by(storage: Storage) -> Lease:
    held = read_lease(storage)
    assert held is not None
    return held


def leave_lease(storage: Storage, **changes: object) -> Lease:
    """The lease of a run that did not give it back: by default of this very process."""
    storage.delete(LEASE)
    with hold_lease(storage, "dead-run"):
        left = replace(held_by(storage), token="of the dead run", **changes)  # type: ignore[arg-type]
    storage.put(LEASE, json.dumps(asdict(left)).encode())
    return left


def test_a_second_run_is_refused_with_the_name_of_the_first(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    before = (tmp_path / LEASE).read_bytes()
    with pytest.raises(LeaseError) as raised, hold_lease(Storage(tmp_path), "mine"):
        pass
    message = str(raised.value)
    assert "in use by run the-other-run" in message
    assert f"process {holder.pid}" in message
    assert "Wait for it or stop it" in message
    assert (tmp_path / LEASE).read_bytes() == before


def test_a_killed_run_is_replaced_at_once(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    started = time.monotonic()
    with hold_lease(Storage(tmp_path), "mine") as token:
        assert time.monotonic() - started < 2
        check_token(Storage(tmp_path), token)
        assert held_by(Storage(tmp_path)).run == "mine"


def test_a_reused_pid_is_not_the_holder(tmp_path: Path) -> None:
    """The pid lives, but its process is younger than the lease."""
    storage = Storage(tmp_path)
    mine = psutil.Process().create_time()
    leave_lease(storage, pid=os.getpid(), started=mine - 3600)
    with hold_lease(storage, "new"):
        assert held_by(storage).run == "new"
    leave_lease(storage, pid=os.getpid(), started=mine)
    with pytest.raises(LeaseError, match="dead-run"), hold_lease(storage, "new"):
        pass


def test_another_host_is_waited_for(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    dead = 2**22 + 1  # no pid of this host; it may well live on the other one
    leave_lease(storage, host="elsewhere", pid=dead, heartbeat=time.time() - lease.EXPIRES_S + 20)
    with pytest.raises(LeaseError, match="on elsewhere"), hold_lease(storage, "mine"):
        pass
    leave_lease(storage, host="elsewhere", pid=dead, heartbeat=time.time() - lease.EXPIRES_S - 1)
    with hold_lease(storage, "mine"):
        assert held_by(storage).run == "mine"


def test_the_same_host_name_in_another_container_is_another_host(tmp_path: Path) -> None:
    """A pid means nothing outside its own process namespace."""
    storage = Storage(tmp_path)
    host = held_by_this_host(storage)
    leave_lease(storage, host=host.rsplit("[")[0] + "[1234]", pid=2**22 + 1)
    with pytest.raises(LeaseError, match="dead-run"), hold_lease(storage, "mine"):
        pass


def held_by_this_host(storage: Storage) -> str:
    with hold_lease(storage, "any"):
        return held_by(storage).host


def test_of_many_that_find_a_dead_holder_one_takes_over(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    leave_lease(storage, pid=2**22 + 1)
    barrier, done = threading.Barrier(6), threading.Barrier(6)

    def run(number: int) -> bool:
        barrier.wait()
        try:
            with hold_lease(Storage(tmp_path), f"run-{number}") as token:
                done.wait()  # hold it until all have tried
                check_token(storage, token)
                return True
        except LeaseError:
            done.wait()
            return False

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(run, range(6))) == 1
    assert read_lease(storage) is None  # given back


def test_processes_take_turns(tmp_path: Path) -> None:
    """Many start and end at the same moments; no two are ever inside, and none breaks."""
    refused = in_processes(4, take_turns, str(tmp_path / "data"), 25)
    assert sum(refused) > 0, "they never met: nothing was tried"
    assert read_lease(Storage(tmp_path / "data")) is None


def test_only_the_holder_may_commit(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with pytest.raises(LeaseError, match="now: nobody"):
        check_token(storage, "any")
    with hold_lease(storage, "first") as old:
        check_token(storage, old)
        with pytest.raises(LeaseError, match="now: run first"):
            check_token(storage, "other")
    with hold_lease(storage, "second") as new:
        check_token(storage, new)
        with pytest.raises(LeaseError, match=r"now: run second.*not committing"):
            check_token(storage, old)


def test_the_heartbeat_keeps_a_lease_and_never_steals_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)
    storage = Storage(tmp_path)
    with hold_lease(storage, "first"):
        first = held_by(storage)
        deadline = time.monotonic() + 10
        while held_by(storage).heartbeat == first.heartbeat:
            assert time.monotonic() < deadline
        beaten = held_by(storage)
        assert beaten.heartbeat > first.heartbeat
        assert replace(beaten, heartbeat=first.heartbeat) == first
        taken = take(storage, replace(first, token="of another", run="second"))
        time.sleep(0.2)  # ten beats, not one of which may write over it
        assert held_by(storage) == taken
    assert held_by(storage) == taken  # nor is it given back at the end


def take(storage: Storage, new: Lease) -> Lease:
    """What a run does that finds the lease free."""
    content = json.dumps(asdict(new)).encode()
    while not storage.replace(LEASE, content, str(storage.version(LEASE))):
        pass
    return new


FROZEN = """
import os, signal, sys, time
from fusion_pipeline.dataset import lease
from fusion_pipeline.dataset.lease import LeaseError, check_token, hold_lease
from fusion_pipeline.dataset.storage import Storage

lease.HEARTBEAT_S = 0.05
verb, beats = sys.argv[2], 0

def freeze_before(name):
    act = getattr(Storage, name)
    def frozen(self, path, *arguments):
        global beats
        beats += path == lease.LEASE
        if beats == 3 and path == lease.LEASE:
            os.kill(os.getpid(), signal.SIGSTOP)
        return act(self, path, *arguments)
    setattr(Storage, name, frozen)

storage = Storage(sys.argv[1])
try:
    with hold_lease(storage, "frozen") as token:
        print(token, flush=True)
        freeze_before(verb)
        while lease.read_lease(storage).token == token:
            time.sleep(0.01)
        time.sleep(0.3)  # beats that find out, too
        check_token(storage, token)
        print("still mine", flush=True)
except LeaseError as error:
    print(error, flush=True)
"""


def wait_until_stopped(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 30
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("before", ["version", "read", "replace"])
def test_a_frozen_holder_does_not_come_back(
    before: str, dataset_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen in the middle of a heartbeat, for longer than its lease lasts; another run takes the
    lease; whatever the old one was about to write then, it is refused."""
    process = subprocess.Popen(
        [sys.executable, "-c", FROZEN, dataset_root, before], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        token = process.stdout.readline().strip()
        wait_until_stopped(process)
        storage = Storage(dataset_root)
        with pytest.raises(LeaseError, match="in use by run frozen"), hold_lease(storage, "early"):
            pass
        monkeypatch.setattr(lease, "EXPIRES_S", 0.0)
        with hold_lease(storage, "second") as mine:
            taken = storage.read(LEASE)
            os.kill(process.pid, signal.SIGCONT)
            said, _ = process.communicate(timeout=30)
            assert "no longer held by this run (now: run second" in said
            assert storage.read(LEASE) == taken  # not one byte of the old one's
            check_token(storage, mine)
            with pytest.raises(LeaseError):
                check_token(storage, token)
        assert read_lease(storage) is None
    finally:
        process.kill()
        process.communicate()


def test_an_exception_gives_the_lease_back(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    with pytest.raises(KeyboardInterrupt), hold_lease(storage, "first"):
        raise KeyboardInterrupt
    with hold_lease(storage, "second"):
        pass
