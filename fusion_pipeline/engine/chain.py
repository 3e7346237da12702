"""A chain of steps over one dataset: what is pending, and running it shard by shard in a loop."""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.schemas import SOURCES, UPSTREAM
from fusion_pipeline.engine.shard import ShardResult, Step, broken, make_shard, run_stage
from fusion_pipeline.engine.stage import Resources, ShardImages, ShardMaker, Source, Worker


@dataclass(frozen=True)
class Chain:
    """Steps in the order in which data flows through them; a source, if any, comes first."""

    dataset: Dataset
    steps: tuple[Step, ...]
    token: str = ""
    """Of the lease under which the chain commits."""
    retry_failed: bool = False

    def pools(self) -> list["Chain"]:
        """Cut into runs of steps with equal resources; each run shares its workers.

        Few pools: each costs about two seconds to start and reads the shard once more.
        """
        cut: list[list[Step]] = []
        for step in self.steps:
            if cut and cut[-1][0].work.resources == step.work.resources:
                cut[-1].append(step)
            else:
                cut.append([step])
        return [replace(self, steps=tuple(steps)) for steps in cut]

    @property
    def resources(self) -> Resources:
        """Of a chain that is one pool."""
        return self.steps[0].work.resources

    def check(self, write: bool) -> None:
        """Check that existing tables were made as this chain would make them, and with `write`
        declare the others. Raises FingerprintMismatchError."""
        act = self.dataset.describe_table if write else self.dataset.check_table
        for step in self.steps:
            act(step.table, step.made_by)
            if isinstance(step.work, Source):
                act(SOURCES, step.made_by)

    def pending(self, shards: Sequence[int]) -> dict[str, list[int]]:
        """For each table with something to do its shards, in order; by listing, O(shards)."""
        found: dict[str, list[int]] = {}
        retried: set[int] = set()
        for step in self.steps:
            done = self.dataset.shards_of(step.table)
            if self.retry_failed and not isinstance(step.work, Source):
                # What hangs on a retried table is looked at again, too.
                retried.update(s for s in shards if s in done and self._is_to_retry(step, s))
            todo = [shard for shard in shards if shard not in done or shard in retried]
            if todo:
                found[step.table] = todo
        return found

    def reduced(self, tables: Container[str]) -> "Chain":
        """The steps of these tables alone: the others' models need not be loaded."""
        steps = tuple(step for step in self.steps if step.table in tables)
        return replace(self, steps=steps)

    def _is_to_retry(self, step: Step, shard: int) -> bool:
        """Whether rows failed, or were left out for an upstream table that has changed since."""
        footer = self.dataset.read_footer(step.table, shard)
        if any(name.startswith("failed") for name in footer.counts):
            return True
        if not any(name.startswith(f"filtered:{UPSTREAM}") for name in footer.counts):
            return False
        inputs = footer.inputs.items()
        return any(self.dataset.read_footer(name, shard).digest != old for name, old in inputs)


@dataclass
class ChainRunner:
    """Runs a chain on one shard at a time, in this process. Models load when first needed."""

    chain: Chain
    _workers: dict[str, Worker] = field(default_factory=dict)
    _makers: dict[str, ShardMaker] = field(default_factory=dict)

    def run(self, shard: int) -> Iterator[ShardResult]:
        """Do what is missing for a shard; one result for each step that did something."""
        chain = self.chain
        images = ShardImages(chain.dataset, shard)
        for step in chain.steps:
            exists = chain.dataset.storage.exists(chain.dataset.table_path(step.table, shard))
            if isinstance(step.work, Source):
                if not exists:
                    maker = self._maker(step)
                    yield make_shard(chain.dataset, step, maker, shard, chain.token)
            elif not exists or chain.retry_failed:
                result = run_stage(
                    chain.dataset, step, self._opener(step), shard, chain.token, images,
                    retry_failed=chain.retry_failed and exists,
                )  # fmt: skip
                if result is not None:
                    yield result

    def open_all(self) -> None:
        """Load every model now, not at the first shard. Raises StageError."""
        for step in self.chain.steps:
            try:
                self._maker(step) if isinstance(step.work, Source) else self._opener(step)()
            except Exception as error:  # whatever a model raises: name the stage, stop
                raise broken(step.work.name, "could not be opened", error) from error

    def _maker(self, step: Step) -> ShardMaker:
        assert isinstance(step.work, Source)
        if step.table not in self._makers:
            self._makers[step.table] = step.work.open_source()
        return self._makers[step.table]

    def _opener(self, step: Step) -> Callable[[], Worker]:
        def get() -> Worker:
            assert not isinstance(step.work, Source)
            if step.table not in self._workers:
                self._workers[step.table] = step.work.open()
            return self._workers[step.table]

        return get


def run_in_process(chain: Chain, shards: Sequence[int]) -> Iterator[ShardResult]:
    """The plain loop: every step of every shard, one after the other, without Ray."""
    runner = ChainRunner(chain)
    runner.open_all()
    for shard in shards:
        yield from runner.run(shard)
