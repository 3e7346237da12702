"""Contracts of the steps that work shard by shard.

A `Stage` adds one table; a `Source` makes the shards themselves. Both are small picklable
descriptions; what is heavy (models) is made by `open`, once a worker.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from fusion_pipeline.dataset.layout import Dataset, TableVersion
from fusion_pipeline.dataset.schemas import SAMPLES
from fusion_pipeline.engine.watch import Watch


@dataclass(frozen=True)
class Resources:
    """What one worker of a stage needs. Stages in a row with equal resources share a pool."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory_gb: float = 0.0
    """Reserved per worker; 0: not tracked."""
    workers: int | None = None
    """Workers of the pool; None: as many as the cluster's CPUs (or GPUs) hold."""
    threads: int = 1
    """Threads a worker's model may use. Part of the settings, never taken from the machine:
    floating-point results can depend on it."""
    is_free: bool = True
    """Whether work may be repeated for nothing, to find the image that kills its process. Not so
    where it is paid for."""
    lanes: int = 1
    """Shards that one worker has open at a time. With more than one it is called from as many
    threads, without a child process: for work that is done elsewhere (docs/decisions/006)."""
    start_s: float = 0.0
    """How long a worker may take until it is open; 0: as long as any (`guard.Limits.start_s`)."""


CPU_WORKER = Resources()
"""One CPU, one thread."""


class ShardBlock:
    """The rows of one shard that a stage is to work on, with the tables it reads.

    Only rows that are ok in all those tables are here; tables and images are aligned with `keys`.
    """

    def __init__(
        self,
        dataset: Dataset,
        shard: int,
        tables: Mapping[str, pa.Table],
        images: "ShardImages",
        watch: Watch | None = None,
        halvings: int = 0,
        again: str = "",
    ) -> None:
        self.dataset = dataset
        self.shard = shard
        self.halvings = halvings
        """How often to halve the batch size: the device ran out of memory so many times."""
        self.again = again
        """Id of the request for which these rows are made again (`engine.again`), if they are."""
        self._tables = tables
        self._images = images
        self._watch = watch or Watch()
        self.keys: list[str] = tables["samples"]["key"].to_pylist()

    def tick(self) -> None:
        """To be called by a worker that is long at work, at least every few minutes: one that says
        nothing for too long is taken to be stuck."""
        self._watch.tick()

    def __len__(self) -> int:
        return len(self.keys)

    def table(self, name: str) -> pa.Table:
        """A table the stage reads, its rows in the order of `keys`."""
        return self._tables[name]

    def column(self, table: str, name: str) -> list[Any]:
        values: list[Any] = self._tables[table][name].to_pylist()
        return values

    @cached_property
    def images(self) -> list[bytes]:
        """Encoded original bytes of each image, in the order of `keys`."""
        by_key = self._images.by_key
        return [by_key[key] for key in self.keys]


class ShardImages:
    """Images of one shard, read once for all stages of a pool, and only when one asks."""

    def __init__(
        self, dataset: Dataset, shard: int, versions: Mapping[str, TableVersion] | None = None
    ) -> None:
        self._dataset = dataset
        self._shard = shard
        self._samples = (versions or {}).get(SAMPLES, SAMPLES)

    @cached_property
    def by_key(self) -> dict[str, bytes]:
        return self._dataset.read_images(self._shard, self._samples)


class Worker(Protocol):
    def __call__(self, block: ShardBlock) -> pa.Table:
        """The stage's table for the rows of the block: same rows, same order.

        One bad sample is a row with status `failed`; an exception means that the stage itself is
        broken, and stops the run.
        """
        ...


class Stage(Protocol):
    @property
    def name(self) -> str:
        """The table it writes."""
        ...

    @property
    def version(self) -> int:
        """Raised by hand when the output changes."""
        ...

    @property
    def reads(self) -> tuple[str, ...]:
        """Tables of the same shard it needs besides `samples`."""
        ...

    @property
    def columns(self) -> Sequence[pa.Field]:
        """Columns beyond key, status, reason."""
        ...

    @property
    def resources(self) -> Resources: ...

    def settings(self) -> Mapping[str, Any]:
        """The settings that change the output, JSON-able."""
        ...

    def revision(self) -> str | None:
        """Identity of the model's weights, if there is a model."""
        ...

    def open(self) -> Worker: ...


@dataclass(frozen=True)
class ShardContents:
    tar: bytes
    samples: pa.Table
    """SAMPLES_SCHEMA, one row per sample."""
    sources: pa.Table
    """SOURCES_SCHEMA, one row per input row."""


class ShardMaker(Protocol):
    def __call__(self, shard: int, watch: Watch) -> ShardContents:
        """Make a shard. A maker that touches foreign bytes calls `watch.begin_row` with the number
        of each input row, and gives a row for which that returns a reason status `failed`."""
        ...


@runtime_checkable
class Source(Protocol):
    """Makes shards: ingest, repack. Writes the tables `sources` and `samples`."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def resources(self) -> Resources: ...

    @property
    def plan_name(self) -> str:
        """The artifact that its plan is."""
        ...

    def settings(self) -> Mapping[str, Any]: ...

    def plan_digest(self) -> str:
        """Of all that the plan hangs on: which files there are, which rows are chosen."""
        ...

    def plan(self, digest: str) -> list[int] | None:
        """Rows of each shard there is to be; None when no such plan is committed."""
        ...

    def make_plan(self, digest: str, token: str) -> list[int]:
        """Make the plan and commit it, as the holder of the lease. The same digest makes the same
        plan."""
        ...

    def open_source(self, digest: str) -> ShardMaker:
        """By the committed plan of this digest; the source itself is not listed again."""
        ...
