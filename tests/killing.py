"""Starting drivers as processes and killing them without warning."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

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
        family = [
            process
            for process in psutil.Process(driver.pid).children(recursive=True)
            if "agent" not in " ".join(process.cmdline()).lower()
        ]
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        driver.communicate()
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive, f"outlived their driver: {alive}"
        return True
    return False


def kill_an_actor(driver: subprocess.Popen[bytes], root: Path) -> None:
    """Kill −9 one pool worker of a driver that has made progress."""
    before = tables_in(root)
    while tables_in(root) < before + 3:
        assert driver.poll() is None
        time.sleep(0.02)
    actors = [
        process
        for process in psutil.Process(driver.pid).children(recursive=True)
        if "ray::MapWorker" in " ".join(process.cmdline())
    ]
    assert actors
    actors[0].kill()
