"""The same work in several processes at the same moment."""

import multiprocessing
from collections.abc import Callable
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import LeaseError, check_token, hold_lease
from fusion_pipeline.dataset.storage import Storage


def in_processes(n: int, work: Callable[..., Any], root: str, *arguments: Any) -> list[Any]:
    """What `work(root, barrier, *arguments)` returns in each of n processes, in any order."""
    context = multiprocessing.get_context("spawn")  # a fork would take locks of this one along
    barrier, results = context.Barrier(n), context.Queue()
    processes = [
        context.Process(target=_report, args=(results, work, root, barrier, *arguments))
        for _ in range(n)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    return found


def _report(results: "Queue[Any]", work: Callable[..., Any], *arguments: Any) -> None:
    results.put(work(*arguments))


def count_up(root: str, barrier: Barrier, times: int) -> int:
    """Adds one to the number in a file `times` times; how often another process was faster."""
    storage, done, refused = Storage(root), 0, 0
    barrier.wait()
    while done < times:
        mark = storage.version("number")  # before the read: what changes in between is noticed
        now = int(storage.read("number"))
        assert mark is not None
        if storage.replace("number", b"%08d" % (now + 1), mark):
            done += 1
        else:
            refused += 1
    return refused


def take_turns(root: str, barrier: Barrier, times: int) -> int:
    """Holds a dataset's lease `times` times, as a run does; how often it was refused.

    Raises FileExistsError when two hold it at once.
    """
    dataset, refused = Dataset(root), 0
    inside = Path(f"{root}-inside") if dataset.storage.is_local else None
    barrier.wait()
    for _ in range(times):
        while True:
            try:
                with hold_lease(dataset.storage, "turn") as token:
                    dataset.clean_temporary()
                    if inside is not None:
                        inside.touch(exist_ok=False)
                        inside.unlink()
                    check_token(dataset.storage, token)
                break
            except LeaseError:
                refused += 1
    return refused
