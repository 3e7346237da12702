"""Where a worker is: a few numbers that its supervisor still sees when the worker is dead."""

from collections.abc import Mapping
from mmap import mmap

_STEP, _ROW, _TICKS = range(3)
CELLS_BYTES = 3 * 8
NOWHERE = -1


class Watch:
    """Written by the worker, read by its supervisor (`engine.guard`), through shared memory.

    Without a supervisor it is three numbers that nobody reads.
    """

    def __init__(self, shared: mmap | None = None) -> None:
        self._cells = memoryview(shared or bytearray(CELLS_BYTES)).cast("q")
        self.condemned: Mapping[int, str] = {}
        """Rows of the present step and shard that must not be touched, with the reason."""

    @property
    def step(self) -> int:
        """Number of the step that runs, or NOWHERE."""
        return self._cells[_STEP]

    @property
    def row(self) -> int:
        """Number of the row that is being worked on alone, or NOWHERE."""
        return self._cells[_ROW]

    @property
    def ticks(self) -> int:
        """Grows whenever something was done."""
        return self._cells[_TICKS]

    def begin_step(self, step: int, condemned: Mapping[int, str]) -> None:
        self._cells[_STEP], self._cells[_ROW] = step, NOWHERE
        self.condemned = condemned
        self.tick()

    def begin_row(self, row: int) -> str | None:
        """Say that work on a row begins; gives the reason when it must not be touched."""
        self._cells[_ROW] = row
        self.tick()
        return self.condemned.get(row)

    def end_row(self) -> None:
        """Nothing is done to a single row from here on: what happens now is not its doing."""
        self._cells[_ROW] = NOWHERE

    def tick(self) -> None:
        """Say that work goes on: a worker that is silent for long is taken to be stuck."""
        self._cells[_TICKS] += 1

    def rest(self) -> None:
        """No step runs."""
        self._cells[_STEP] = self._cells[_ROW] = NOWHERE
        self.tick()
