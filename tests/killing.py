"""Starting drivers as processes and killing them without warning; dying at the n-th write."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from fusion_pipeline.dataset.lease import LEASE
from fusion_pipeline.dataset.storage import Storage
from tests.toy import leave_half

REPOSITORY = Path(__file__).parent.parent


def start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(driver: subprocess.Popen[bytes], timeout: float = 280) -> str:
    """Wait for a driver; its output. Raises AssertionError when it failed."""
    output, _ = driver.communicate(timeout=timeout)
    text = output.decode(errors="replace")
    assert driver.returncode == 0, text
    return text


def tables_in(root: Path) -> int:
    return sum(1 for _ in root.rglob("*.parquet"))


def kill_after_progress(driver: subprocess.Popen[bytes], root: Path, delay: float) -> bool:
    """Kill −9 a driver `delay` seconds after its first new table; False when it ended before."""
    before = tables_in(root)
    while tables_in(root) == before:
        if driver.poll() is not None:
            return False
        time.sleep(0.02)
    try:
        driver.wait(delay)
    except subprocess.TimeoutExpired:
        # Ray's dashboard and runtime-environment agents notice late that their node is gone, and
        # do no work; whatever could still commit must die with the driver.
        family = [p for p, command in family_of(driver) if "agent" not in command.lower()]
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        driver.communicate()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive, f"outlived their driver: {alive}"
        return True
    return False


def family_of(driver: subprocess.Popen[bytes]) -> list[tuple[psutil.Process, str]]:
    """All processes below the driver, each with its command line."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself at this moment
            found.append((process, " ".join(process.cmdline())))
    return found


def kill_an_actor(driver: subprocess.Popen[bytes], root: Path) -> None:
    """Kill −9 one pool worker of a driver that has made progress."""
    before = tables_in(root)
    while tables_in(root) < before + 3:
        assert driver.poll() is None
        time.sleep(0.02)
    actors = [process for process, command in family_of(driver) if "ray::MapWorker" in command]
    assert actors
    actors[0].kill()


class Killed(BaseException):
    """Nothing catches it: as good as a kill -9, within this process."""


WRITES = ("put", "create", "replace", "move", "delete")
"""The verbs of `Storage` that change a stored file."""


def killed_at(n: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> bool:
    """Do the work and die at its n-th write (from 0) of any file but the lease; False when it ends
    before. The write leaves half a temporary file, and the lease is that of a dead process."""
    writes, roots = 0, set()

    def dying(verb: str) -> Callable[..., object]:
        act = getattr(Storage, verb)

        def write(self: Storage, path: str, *arguments: object) -> object:
            nonlocal writes
            if path != LEASE:
                roots.add(Path(self.root))
                writes += 1
            if writes > n:
                data = next((a for a in arguments if isinstance(a, bytes)), b"")
                leave_half(Path(self.root), data)
                raise Killed
            return act(self, path, *arguments)

        return write

    with monkeypatch.context() as patch:
        for verb in WRITES:
            patch.setattr(Storage, verb, dying(verb))
        try:
            work()
        except Killed:
            pass
        else:
            return False
    for root in roots:
        (root / LEASE).unlink(missing_ok=True)
    return True
