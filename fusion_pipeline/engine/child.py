"""The process that a chain's models run in. Started and watched by `engine.guard`.

python -m fusion_pipeline.engine.child CONNECTION CELLS STACKS   (file descriptors)

A crash in a decoder or a model ends this process and nothing else.
"""

import faulthandler
import mmap
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

from fusion_pipeline.engine.chain import Chain, ChainRunner
from fusion_pipeline.engine.errors import broken
from fusion_pipeline.engine.watch import CELLS_BYTES, Watch
from fusion_pipeline.errors import FusionError

SHOW_STACK = signal.SIGUSR1
"""Makes the process write the stacks of its threads, even when it is stuck inside C code."""


@dataclass(frozen=True)
class Run:
    """Do what is missing for a shard; each result is sent, then Done."""

    shard: int
    condemned: Mapping[str, Mapping[int, str]]
    """By table the rows not to touch, with the reason."""
    halvings: int


@dataclass(frozen=True)
class Examine:
    """Work on each row alone from `start` on, keep nothing; then Done."""

    shard: int
    step: int
    """Number in the chain."""
    start: int
    condemned: Mapping[int, str]


@dataclass(frozen=True)
class Done:
    """The order is carried out, or the models are loaded."""


def main() -> None:
    connection, cells, stacks = (int(argument) for argument in sys.argv[1:])
    faulthandler.enable(stacks)
    faulthandler.register(SHOW_STACK, stacks)
    serve(Connection(connection), Watch(mmap.mmap(cells, CELLS_BYTES)))


def serve(connection: Connection, watch: Watch) -> None:
    """Answer orders until the supervisor is gone. Everything on the connection is our own."""
    orders: queue.SimpleQueue[object] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, orders), daemon=True).start()
    chain = orders.get()
    assert isinstance(chain, Chain)
    runner = ChainRunner(chain, watch)
    try:
        runner.open()
        connection.send(Done())
        while True:
            order = orders.get()
            if isinstance(order, Examine):
                runner.examine(order.shard, order.step, order.start, order.condemned)
            elif isinstance(order, Run):
                for result in runner.run(order.shard, order.condemned, order.halvings):
                    connection.send(result)
            connection.send(Done())
    except FusionError as error:
        connection.send(error)
    except Exception as error:  # noqa: BLE001 - a file system, a library: told by name, then the end
        step = chain.steps[max(watch.step, 0)].work.name
        connection.send(broken(step, "broke", error))


def _listen(connection: Connection, orders: "queue.SimpleQueue[object]") -> None:
    try:
        while True:
            orders.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)  # the supervisor is gone: nobody would hear of what is done from here on


if __name__ == "__main__":
    from fusion_pipeline.engine import child  # under its own name: orders are told by their class

    child.main()
