"""A chain of steps over one dataset: what is pending, and running it shard by shard in a loop."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from fusion_pipeline.dataset.artifacts import artifact_digest
from fusion_pipeline.dataset.fingerprints import Fingerprint
from fusion_pipeline.dataset.layout import Dataset, TableVersion
from fusion_pipeline.dataset.lease import as_holder
from fusion_pipeline.dataset.schemas import SOURCES, UPSTREAM
from fusion_pipeline.dataset.tables import FingerprintMismatchError, Footer, StaleTableError
from fusion_pipeline.engine.again import Again
from fusion_pipeline.engine.errors import broken
from fusion_pipeline.engine.shard import (
    Place,
    Redo,
    ShardResult,
    Step,
    examine,
    make_shard,
    run_stage,
)
from fusion_pipeline.engine.stage import Resources, ShardImages, ShardMaker, Source, Worker
from fusion_pipeline.engine.watch import Watch


class Replace(Enum):
    """Which finished tables may be replaced as a whole."""

    NOTHING = 0
    STALE = 1
    """Made from another source, selection or clustering: `--refresh`."""
    CHANGED = 2
    """Made with other settings, too: `--overwrite`."""


@dataclass(frozen=True)
class Chain:
    """Steps in the order in which data flows through them; a source, if any, comes first."""

    place: Place
    steps: tuple[Step, ...]
    redo: Redo | Again = Redo.MISSING

    @classmethod
    def resolve(
        cls,
        dataset: Dataset,
        steps: Sequence[Step],
        plan: str = "",
        redo: Redo | Again = Redo.MISSING,
    ) -> "Chain":
        """The chain with the versions that its tables have now; `plan`: digest of the source's.

        Raises NoTableError when a table or artifact that it reads is not there.
        """
        return cls(Place(dataset, resolve(dataset, steps, plan), plan=plan), tuple(steps), redo)

    @property
    def dataset(self) -> Dataset:
        return self.place.dataset

    def under(self, token: str, run: str = "") -> "Chain":
        """The same chain as the holder of the dataset's lease, in the run of this name."""
        return replace(self, place=replace(self.place, token=token, run=run))

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

    @property
    def written(self) -> list[TableVersion]:
        """In the order in which older versions are replaced: `samples`, which marks a shard as
        complete, before `sources`, which is there wherever `samples` is."""
        tables = [step.table for step in self.steps]
        if any(isinstance(step.work, Source) for step in self.steps):
            tables.insert(1, SOURCES)
        return [self.place.versions[table] for table in tables]

    def outdated(self, allowed: Replace) -> list[TableVersion]:
        """Existing tables that are of another version than this chain makes.

        Raises FingerprintMismatchError, StaleTableError when they may not be replaced.
        """
        found = []
        for version in self.written:
            current = self.dataset.current(version.name)
            if current is None or current.digest == version.digest:
                continue
            check_settings(self.dataset, current, version.made_by, allowed)
            if current.made_by.hash == version.made_by.hash and allowed is Replace.NOTHING:
                raise StaleTableError(self.dataset.storage.full(f"tables/{version.name}"))
            found.append(version)
        return found

    @property
    def is_described(self) -> bool:
        """Whether readers see these versions. A run that died may have left a whole one unseen."""
        return all(self.dataset.current(version.name) == version for version in self.written)

    def describe(self) -> None:
        """Declare the chain's tables, before their first shards. Raises LeaseError."""
        for version in self.written:
            self.dataset.describe_table(version, self.place.token)

    def pending(self, shards: Sequence[int]) -> dict[str, list[int]]:
        """For each table with something to do its shards, in order; by listing, O(shards).

        To find stale and failed rows, footers are read, too.
        """
        with as_holder(self.dataset.storage, self.place.token):
            return self._pending(shards)

    def _pending(self, shards: Sequence[int]) -> dict[str, list[int]]:
        if isinstance(self.redo, Again):
            return self._asked_again(self.redo, shards)
        found: dict[str, list[int]] = {}
        again: set[int] = set()
        footers: dict[str, Mapping[int, Footer]] = {}
        if self.redo is not Redo.MISSING:
            versions = self.place.versions
            footers = {name: self.dataset.footers(versions[name]) for name in versions}
        for step in self.steps:
            version = self.place.versions[step.table]
            if isinstance(step.work, Source):
                done = self.dataset.packed_shards(version, self.place.versions[SOURCES])
            elif self.redo is Redo.MISSING:
                done = self.dataset.shards_of(version)
            else:
                done = set(footers[step.table])
            if self.redo is not Redo.MISSING:
                # What hangs on a table that is made, or made again, is looked at again, too.
                again.update(
                    shard
                    for shard in shards
                    if shard not in done or self._is_due(step, shard, footers)
                )
            todo = [shard for shard in shards if shard not in done or shard in again]
            if todo:
                found[step.table] = todo
        return found

    def _asked_again(self, request: Again, shards: Sequence[int]) -> dict[str, list[int]]:
        """Those with chosen rows, for which it is not done yet. Reads every table."""
        version = self.place.versions[request.table]
        left = self.dataset.shards_of(version) - request.done(self.dataset.storage)

        def is_due(shard: int) -> bool:
            return any(request.chosen(self.dataset.read_table(version, shard)[0]))

        due = [shard for shard in shards if shard in left and is_due(shard)]
        return {request.table: due} if due else {}

    def reduced(self, tables: Container[str]) -> "Chain":
        """The steps of these tables alone: the others' models need not be loaded."""
        steps = tuple(step for step in self.steps if step.table in tables)
        return replace(self, steps=steps)

    def _is_due(self, step: Step, shard: int, footers: Mapping[str, Mapping[int, Footer]]) -> bool:
        if isinstance(step.work, Source):
            return False
        footer = footers[step.table][shard]
        is_stale = any(
            shard in footers[name] and footers[name][shard].digest != old
            for name, old in footer.inputs.items()
        )
        if self.redo is Redo.STALE:
            return is_stale
        if any(name.startswith("failed") for name in footer.counts):
            return True
        # Rows left out for an upstream table, which has changed since.
        return is_stale and any(name.startswith(f"filtered:{UPSTREAM}") for name in footer.counts)


def check_settings(
    dataset: Dataset, current: TableVersion, made_by: Fingerprint, allowed: Replace
) -> None:
    """Raises FingerprintMismatchError when a table was made otherwise and may not be replaced."""
    if current.made_by.hash != made_by.hash and allowed is not Replace.CHANGED:
        path = dataset.storage.full(f"tables/{current.name}")
        raise FingerprintMismatchError(path, current.made_by.fields, made_by.fields)


def resolve(dataset: Dataset, steps: Sequence[Step], plan: str) -> dict[str, TableVersion]:
    """The version of every table that the steps write or read, as things are now.

    It hangs on the versions of the tables it is made from, on the content of artifacts, and for a
    source on the plan; so new inputs as a whole make a new version. Raises NoTableError.
    """
    versions: dict[str, TableVersion] = {}
    for step in steps:
        for name, expected in step.inputs.items():
            if name not in versions:
                versions[name] = dataset.version(name)
                check_settings(dataset, versions[name], expected, Replace.NOTHING)
        depends = depends_on(dataset, step, versions)
        if isinstance(step.work, Source):
            depends["plan"] = plan
            versions[SOURCES] = dataset.next_version(SOURCES, step.made_by, depends)
        versions[step.table] = dataset.next_version(step.table, step.made_by, depends)
    return versions


def depends_on(
    dataset: Dataset, step: Step, versions: Mapping[str, TableVersion]
) -> dict[str, str]:
    """What a stage's table is made from as a whole: versions of tables, contents of artifacts.

    Raises NoTableError, and StaleTableError when an artifact is of other settings: written by a
    run that was frozen, after we looked.
    """
    depends = {name: versions[name].digest for name in step.inputs}
    made_by = step.made_by.fields["upstream"] if step.artifacts else {}
    return depends | {n: artifact_digest(dataset, n, made_by[n]) for n in step.artifacts}


@dataclass
class ChainRunner:
    """Runs a chain on one shard at a time, in this process. Models load when first needed."""

    chain: Chain
    watch: Watch = field(default_factory=Watch)
    _workers: dict[str, Worker] = field(default_factory=dict)
    _makers: dict[str, ShardMaker] = field(default_factory=dict)

    def run(
        self,
        shard: int,
        condemned: Mapping[str, Mapping[int, str]] | None = None,
        halvings: int = 0,
    ) -> Iterator[ShardResult]:
        """Do what is missing for a shard; one result for each step that did something.

        `condemned`: by table the rows that must not be touched, with the reason. Between two steps
        it looks whether the run is to stop (`Place.is_stopping`).
        """
        place, watch, redo = self.chain.place, self.watch, self.chain.redo
        if isinstance(redo, Again) and redo.is_done(place.dataset.storage, shard):
            return  # by a worker that was lost before it could say so
        images = ShardImages(place.dataset, shard, place.versions)
        for number, step in enumerate(self.chain.steps):
            if place.is_stopping():
                break
            watch.begin_step(number, (condemned or {}).get(step.table, {}))
            with as_holder(place.dataset.storage, place.token):
                result = self._run_step(step, shard, images, halvings)
                if isinstance(redo, Again):
                    redo.mark_done(place.dataset.storage, shard)
            if result is not None:
                yield result
        watch.rest()

    def _run_step(
        self, step: Step, shard: int, images: ShardImages, halvings: int
    ) -> ShardResult | None:
        place = self.chain.place
        if not isinstance(step.work, Source):
            opener, redo = self._opener(step), self.chain.redo
            return run_stage(place, step, opener, shard, images, redo, self.watch, halvings)
        samples, sources = place.versions[step.table], place.versions[SOURCES]
        parts = (samples.path(shard), samples.tar_path(shard), sources.path(shard))
        if all(place.dataset.storage.exists(part) for part in parts):
            return None
        return make_shard(place, step, self._maker(step), shard, self.watch)

    def examine(self, shard: int, number: int, start: int, condemned: Mapping[int, str]) -> None:
        """See `engine.shard.examine`, for the step of this number."""
        place, step = self.chain.place, self.chain.steps[number]
        images = ShardImages(place.dataset, shard, place.versions)
        self.watch.begin_step(number, condemned)
        opener, redo = self._opener(step), self.chain.redo
        examine(place, step, opener, shard, images, redo, self.watch, start)
        self.watch.rest()

    def open(self) -> None:
        """Load every model now, not at the first shard. Raises StageError."""
        for step in self.chain.steps:
            try:
                self._maker(step) if isinstance(step.work, Source) else self._opener(step)()
            except Exception as error:  # whatever a model raises: name the stage, stop
                raise broken(step.work.name, "could not be opened", error) from error

    def _maker(self, step: Step) -> ShardMaker:
        assert isinstance(step.work, Source)
        if step.table not in self._makers:
            self._makers[step.table] = step.work.open_source(self.chain.place.plan)
        return self._makers[step.table]

    def _opener(self, step: Step) -> Callable[[], Worker]:
        def get() -> Worker:
            assert not isinstance(step.work, Source)
            if step.table not in self._workers:
                worker = step.work.open()
                self._check_artifacts(step)
                self._workers[step.table] = worker
            return self._workers[step.table]

        return get

    def _check_artifacts(self, step: Step) -> None:
        """Raises StaleTableError when the worker may have read others than the version says."""
        dataset, versions = self.chain.dataset, self.chain.place.versions
        depends = depends_on(dataset, step, versions)
        made_now = TableVersion.of(step.table, step.made_by, depends)
        if made_now.digest != versions[step.table].digest:
            raise StaleTableError(dataset.storage.full(f"tables/{step.table}"))


def run_in_process(chain: Chain, shards: Sequence[int]) -> Iterator[ShardResult]:
    """The plain loop: every step of every shard, one after the other, without Ray."""
    runner = ChainRunner(chain)
    runner.open()
    for shard in shards:
        yield from runner.run(shard)
