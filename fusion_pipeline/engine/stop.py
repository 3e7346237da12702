"""SIGTERM: spot machines, Slurm and Kubernetes give notice before they kill.

The run finishes the steps it has begun, starts none, and ends; after the time allowed it ends
anyway. Either way the same command resumes.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.engine.shard import stop_path
from fusion_pipeline.errors import FusionError


class StoppedError(FusionError):
    """The run was asked to stop, and did."""


class Stopper:
    """Hears SIGTERM in the main thread and tells the workers, wherever they are, by a file."""

    def __init__(self, run: str, drain_s: float) -> None:
        self._run = run
        self._drain_s = drain_s
        self._asked = threading.Event()
        self._ended = threading.Event()
        self._storages: list[Storage] = []

    def tell(self, storage: Storage) -> None:
        """Workers that write this dataset are to be told, too."""
        self._storages.append(storage)

    def check(self) -> None:
        """Raises StoppedError when the run was asked to stop."""
        if self._asked.is_set():
            raise StoppedError(
                "Stopped by SIGTERM. Finished shards are kept; the same command resumes."
            )

    def listen(self) -> None:
        """From here on: Ray, when it starts, puts a handler of its own in place."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, _signal: int, _frame: FrameType | None) -> None:
        self._asked.set()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Raises StoppedError when the time for draining ran out."""
        if threading.current_thread() is not threading.main_thread():
            yield  # signals reach the main thread alone
            return
        before = signal.getsignal(signal.SIGTERM)
        self.listen()
        # Not in the handler: it may interrupt the storage library in the middle of anything.
        thread = threading.Thread(target=self._drain, name="drain", daemon=True)
        thread.start()
        try:
            yield
        except KeyboardInterrupt:
            self.check()
            raise
        finally:
            try:
                self._ended.set()
                thread.join()
                time.sleep(0)  # an interruption that came at the very end is raised here
            except KeyboardInterrupt:
                self.check()
                raise
            finally:
                signal.signal(signal.SIGTERM, before)
        self.check()

    def _drain(self) -> None:
        while not self._asked.wait(0.5):
            if self._ended.is_set():
                return
        for storage in self._storages:  # an object store may take its time
            threading.Thread(target=self._tell, args=(storage,), daemon=True).start()
        if not self._ended.wait(self._drain_s):
            # A real signal: it also wakes a main thread that waits.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _tell(self, storage: Storage) -> None:
        with contextlib.suppress(OSError, FusionError):  # then only the time limit counts
            storage.put(stop_path(self._run), b"")
