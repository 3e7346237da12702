"""Runs a command for as long as the one who asked lives, and ends it with all that it started.

python keeper.py STATUS COMMAND ...     STATUS: file descriptor, open for writing

A server of vLLM that is killed leaves its engine processes behind, with the GPU's memory
(vllm-project/vllm#55510), and a Ray worker that is ended kills its children without a word. So this
process leaves its parent's family at once: it ends the command when standard input ends. Whatever
of the command is orphaned becomes a child of this process, which is not gone before all of them
are. When the command ends, for whatever reason, `STATUS` gets a byte; when all is gone, its end.

Imports the standard library alone: it is run by its path, in any Python.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_GRACE_S = 20.0
"""From the polite signal to the other one."""
_LOOK_S = 0.1
_REAPING_S = 60.0


def main(status: int, command: list[str]) -> None:
    if os.fork():
        return  # who waits for the child of its own waits no longer
    os.setsid()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        # For the case that this process itself is killed.
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0),
    )
    _wait(server)
    os.write(status, b"x")
    _end(server.pid)


def _wait(server: subprocess.Popen[bytes]) -> None:
    """Until it has ended, by itself or because nobody wants it any more."""
    while server.poll() is None:
        ready, _, _ = select.select([0], [], [], _LOOK_S)
        if ready and not os.read(0, 4096):
            break
    else:
        return
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.killpg(server.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):  # not polite enough for it
        server.wait(_GRACE_S)


def _end(group: int) -> None:
    """Kill what is left, and wait for it: it holds memory that the next server needs."""
    deadline = time.monotonic() + _REAPING_S
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):  # the group is empty
            os.killpg(group, signal.SIGKILL)
        for orphan in _children():
            with contextlib.suppress(ProcessLookupError):  # gone by itself
                os.kill(orphan, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:  # none is left
            return
        time.sleep(_LOOK_S)


def _children() -> list[int]:
    me = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    return [int(number) for number in me.read_text().split()]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
