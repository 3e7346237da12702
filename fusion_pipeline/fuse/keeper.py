"""Runs a command for as long as its own parent lives, and ends it with all that it started.

python keeper.py COMMAND ...     ends when standard input does

A server of vLLM that is killed leaves its engine processes behind, with the GPU's memory
(vllm-project/vllm#55510), and nothing stands between a killed Ray worker and its children. So the
command gets a process group of its own, and whatever of it is orphaned becomes a child of this
process, which is not gone before all of them are.

Imports the standard library alone: it is run by its path, in any Python.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_GRACE_S = 20.0
"""From the polite signal to the other one."""
_LOOK_S = 0.2


def main(command: list[str]) -> int:
    """Exit status of the command, or 128 + the signal that ended it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for ignored in (signal.SIGINT, signal.SIGTERM):  # those of the terminal or the group: the
        signal.signal(ignored, signal.SIG_IGN)  # parent decides, and it is listened to below

    def become_the_command() -> None:
        # For the case that this process itself is killed.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        for restored in (signal.SIGINT, signal.SIGTERM):
            signal.signal(restored, signal.SIG_DFL)

    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=become_the_command,
    )
    asked_at = None
    while server.poll() is None:
        if asked_at is None:
            ready, _, _ = select.select([0], [], [], _LOOK_S)
            if ready and not os.read(0, 4096):
                asked_at = time.monotonic()
                _signal(server.pid, signal.SIGTERM)
        elif time.monotonic() - asked_at > _GRACE_S:
            break
        else:
            time.sleep(_LOOK_S)
    _signal(server.pid, signal.SIGKILL)
    status = server.wait()
    _reap()
    return status if status >= 0 else 128 - status


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of it is gone
        os.killpg(group, number)


def _reap() -> None:
    """Wait for the orphans: until then they hold memory that the next server needs."""
    with contextlib.suppress(ChildProcessError):  # none is left
        while True:
            os.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
