"""Time and throughput of each step, from the run logs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.engine.run import read_run_log


@dataclass(frozen=True)
class StepTime:
    step: str
    shards: int
    """Shards it worked on, over all runs."""
    samples: int
    """Rows it worked on, over all runs: neither filtered upstream nor kept from before."""
    worker_seconds: float
    """Summed over workers."""
    wall_seconds: float
    """Length of the time in which at least one worker was at it; pauses between runs don't
    count."""

    @property
    def rate(self) -> float | None:
        """Samples a worker-second."""
        return self.samples / self.worker_seconds if self.worker_seconds > 0 else None


@dataclass(frozen=True)
class Timing:
    steps: tuple[StepTime, ...]
    wall_seconds: float
    worker_seconds: float


def read_timing(datasets: Sequence[Dataset], order: Sequence[str]) -> Timing:
    """The steps of `order` for which a log is there. O(shards) lines in memory."""
    lines: list[Any] = [line for dataset in datasets for line in read_run_log(dataset.storage)]
    by_step: dict[str, list[Any]] = {step: [] for step in order}
    for line in lines:
        if line["step"] in by_step:
            by_step[line["step"]].append(line)
    steps = tuple(_step_time(step, found) for step, found in by_step.items() if found)
    shown = [line for found in by_step.values() for line in found]
    return Timing(steps, _covered(map(_span, shown)), sum(step.worker_seconds for step in steps))


def _step_time(step: str, lines: Sequence[Any]) -> StepTime:
    return StepTime(
        step,
        len(lines),
        sum(line["worked"] for line in lines),
        sum(line["seconds"] for line in lines),
        _covered(map(_span, lines)),
    )


def _span(line: Any) -> tuple[float, float]:
    end = datetime.fromisoformat(line["at"]).timestamp()
    return end - line["seconds"], end


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of the spans."""
    total, reach = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total
