"""The commit protocol against its claim: whatever the order in which runs act, crash, freeze and
wake up again, no reader sees a half or mixed table, and an undisturbed run mends everything.

The runs are the real code; `tests/model_store.py` decides which of them takes the next step.
"""

import contextlib
import hashlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache
from types import ModuleType
from typing import Any, ClassVar

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from fusion_pipeline.dataset import artifacts, layout, lease
from fusion_pipeline.dataset.artifacts import (
    Artifact,
    artifact_state,
    inputs_of,
    keep_artifact,
    read_artifact,
    write_artifact,
)
from fusion_pipeline.dataset.fingerprints import Fingerprint, fingerprint
from fusion_pipeline.dataset.images import inspect
from fusion_pipeline.dataset.layout import Dataset, TableVersion
from fusion_pipeline.dataset.lease import LEASE, LeaseError, as_holder, check_token, hold_lease
from fusion_pipeline.dataset.rows import NotOk, Ok, build_table
from fusion_pipeline.dataset.samples import Sample, pack_samples, sample_key
from fusion_pipeline.dataset.schemas import SAMPLES, SOURCES_SCHEMA
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.dataset.tables import (
    FingerprintMismatchError,
    NoTableError,
    StaleTableError,
)
from fusion_pipeline.engine import shard as shard_module
from fusion_pipeline.engine.chain import Chain, ChainRunner, Replace
from fusion_pipeline.engine.shard import Redo, Step
from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardBlock, ShardContents
from fusion_pipeline.engine.watch import Watch
from tests.model_store import (
    LOST,
    ROOT,
    Answer,
    Bucket,
    Moment,
    Program,
    Request,
    modelled,
    reading,
)
from tests.toy import ToySource, png, seen_by_readers

ROWS = 2
HONEST = (LeaseError, StaleTableError, FingerprintMismatchError, NoTableError)
"""How a run may end that was disturbed, or had no permission."""


@pytest.fixture(autouse=True, scope="module")
def model() -> Iterator[None]:
    with modelled():
        yield


def at(path: str) -> str:
    """Its name in the bucket."""
    return f"data/{path}"


# The chain


@cache
def contents(plan: str, shard: int) -> ShardContents:
    """Two plans give other images under the same fingerprint: only versions keep them apart."""
    samples, sources = [], []
    for row in range(ROWS):
        image = png(shard, 10 * int(plan) + row)
        sample = Sample(sample_key(image), image, inspect(image))
        name = f"{shard}-{row}"
        sample.add_row(name, None, None)
        samples.append(sample)
        origin = {"row_id": name, "source": "toy", "source_id": name}
        sources.append({"key": sample.key, "status": "ok", "reason": None, **origin})
    tar, table = pack_samples(samples)
    return ShardContents(tar, table, pa.Table.from_pylist(sources, schema=SOURCES_SCHEMA))


@dataclass(frozen=True)
class PlannedSource(ToySource):
    def open_source(self, digest: str) -> Callable[[int, Watch], ShardContents]:
        return lambda shard, watch: contents(digest, shard)


@dataclass(frozen=True)
class HashStage:
    """Hashes what it reads. While it is sick, some rows fail."""

    name: str
    reads: tuple[str, ...] = ()
    setting: int = 0
    is_sick: bool = False
    version: int = 1
    resources: Resources = CPU_WORKER
    columns: Sequence[pa.Field] = (pa.field("value", pa.string()),)

    def settings(self) -> dict[str, object]:
        return {"setting": self.setting}

    def revision(self) -> None:
        return None

    def open(self) -> Callable[[ShardBlock], pa.Table]:
        return self.work

    def work(self, block: ShardBlock) -> pa.Table:
        upstream = [block.column(name, "value") for name in self.reads] or [block.images]
        outcomes = [
            NotOk("failed", "sick: on purpose")
            if self.is_sick and can_fail(key)
            else Ok({"value": self._hash(values)})
            for key, values in zip(block.keys, zip(*upstream, strict=True), strict=True)
        ]
        return build_table(block.keys, outcomes, self.columns)

    def _hash(self, values: object) -> str:
        text = f"{self.name} {self.setting} {values}"
        return hashlib.sha512(text.encode()).hexdigest()


@dataclass(frozen=True)
class CenterStage(HashStage):
    """Reads an artifact, when it is opened."""

    name: str = "k"
    reads: tuple[str, ...] = ("a",)
    dataset: Dataset | None = None

    def open(self) -> Callable[[ShardBlock], pa.Table]:
        assert self.dataset is not None
        centers = read_artifact(self.dataset, "centers")["center"].to_pylist()
        return replace(self, name=f"{self.name} {centers}").work


def can_fail(key: str) -> bool:
    return int(key[0], 16) % 4 == 1


def chain_of(setting: int, is_sick: bool) -> tuple[Step, ...]:
    source = PlannedSource()
    made: dict[str, Fingerprint] = {SAMPLES: fingerprint("toy", 1, source.settings(), {})}
    steps = [Step(source, made[SAMPLES], {})]
    for stage in (HashStage("a", (), setting, is_sick), HashStage("b", ("a",))):
        reads = {name: made[name] for name in (SAMPLES, *stage.reads)}
        made[stage.name] = fingerprint(stage.name, stage.version, stage.settings(), reads)
        steps.append(Step(stage, made[stage.name], reads))
    return tuple(steps)


EMPTY = Bucket({})


# The runs


@dataclass(frozen=True)
class Run:
    setting: int = 0
    plan: str = "1"
    redo: Redo = Redo.MISSING
    allowed: Replace = Replace.NOTHING
    shards: int = 2
    steps: tuple[str, ...] = (SAMPLES, "a", "b")
    is_sick: bool = False
    is_orphan: bool = False
    """Its driver dies when its worker starts, and nobody gives the lease back."""

    def work(self, name: str) -> None:
        dataset = Dataset.create(ROOT) if SAMPLES in self.steps else Dataset(ROOT)
        if self.is_orphan:
            self.go(dataset, lease._acquire(dataset.storage, name).token)
        else:
            with (
                hold_lease(dataset.storage, name) as token,
                as_holder(dataset.storage, token),  # as `runner` does it
            ):
                self.go(dataset, token)

    def go(self, dataset: Dataset, token: str) -> None:
        steps = chain_of(self.setting, self.is_sick)
        self.run_chain(dataset, token, [step for step in steps if step.table in self.steps])

    def run_chain(self, dataset: Dataset, token: str, steps: Sequence[Step]) -> None:
        chain = Chain.resolve(dataset, steps, self.plan, self.redo).under(token)
        if SAMPLES in {version.name for version in chain.outdated(self.allowed)}:
            made = {version.name for version in chain.written}
            for table in dataset.table_names():  # as `runner` does it
                if table not in made:
                    dataset.drop_table(table, token)
        chain.describe()
        pending = chain.pending(range(self.shards))
        runner = ChainRunner(chain.reduced(pending))
        for shard in sorted({shard for todo in pending.values() for shard in todo}):
            for _ in runner.run(shard):
                pass

    def program(self, name: str) -> Program:
        return Program(name, lambda: self.work(name))


@dataclass(frozen=True)
class Centering(Run):
    """Makes an artifact from table `a`, and table `k` from both."""

    @property
    def artifact(self) -> Artifact:
        a = chain_of(0, False)[1].made_by
        made_by = fingerprint("centers", 1, {"setting": self.setting}, {"a": a})
        return Artifact("centers", made_by, ("a",))

    def go(self, dataset: Dataset, token: str) -> None:
        samples, a, _ = chain_of(0, False)
        artifact = self.artifact
        state = artifact_state(dataset, artifact)
        if state == "changed" and self.allowed is not Replace.CHANGED:
            raise FingerprintMismatchError(artifact.path, {}, artifact.made_by.fields)
        if state == "current":
            keep_artifact(dataset, artifact.name, token)
        else:
            inputs = inputs_of(dataset, artifact.reads)
            values = [value for _, a in dataset.iterate("a") for value in a["value"].to_pylist()]
            centers = pa.table({"center": [f"{self.setting}: {value}" for value in values]})
            write_artifact(dataset, artifact, inputs, centers, token)
        reads = {SAMPLES: samples.made_by, "a": a.made_by}
        stage = CenterStage(dataset=dataset)
        made = fingerprint(stage.name, 1, {}, {**reads, "centers": artifact.made_by})
        self.run_chain(dataset, token, [Step(stage, made, reads, ("centers",))])


@dataclass(frozen=True)
class Holding(Run):
    """Has the lease, and does nothing with it."""

    steps: tuple[str, ...] = ()

    def go(self, dataset: Dataset, token: str) -> None:
        check_token(dataset.storage, token)


@dataclass(frozen=True)
class Beating(Run):
    """One heartbeat of another run."""

    steps: tuple[str, ...] = ()
    of: str = "run 0"

    def work(self, name: str) -> None:
        storage = Dataset(ROOT).storage
        held = lease.read_lease(storage)
        if held is not None and held.run == self.of:
            lease._update(storage, replace(held, heartbeat=1.0))


# What readers see


def seen(bucket: Bucket) -> dict[str, bytes]:
    """The current version of each table, and artifacts: read as readers do it. Raises what they
    would meet."""
    files: dict[str, bytes] = {}
    with reading(bucket):
        dataset = Dataset(ROOT)
        for table in dataset.table_names():
            version = dataset.version(table)
            paths = [f"tables/{table}/table.json"]
            for shard in dataset.shards_of(version):
                dataset.read_table(version, shard)
                paths.append(version.path(shard))
                if table == SAMPLES:
                    paths.append(version.tar_path(shard))
            files |= {path: dataset.storage.read(path) for path in paths}
        if artifact_state(dataset, CENTERS.artifact) != "missing":
            read_artifact(dataset, "centers")
            pointer = "artifacts/centers/artifact.json"
            said = json.loads(dataset.storage.read(pointer))
            number = f"-{said['generation']}" if said["generation"] else ""
            path = f"artifacts/centers/v-{said['content']}{number}.parquet"
            files |= {name: dataset.storage.read(name) for name in (pointer, path)}
    return seen_by_readers(files)


@cache
def observe(bucket: Bucket) -> dict[str, bytes]:
    """`seen`, after a look whether each file is what some undisturbed run writes there.

    Bytes say all: the rows and their order, the fingerprint, the digests of its inputs.
    """
    try:
        found = seen(bucket)
    except FileNotFoundError as error:
        raise AssertionError(f"{error} is missing") from error
    for path, data in found.items():
        assert data in written_undisturbed()[path], f"{path} is not what an undisturbed run writes"
    return found


@cache
def written_undisturbed() -> dict[str, set[bytes]]:
    """For each path what a reader may find there."""
    buckets = [
        undisturbed(Run(setting, plan, is_sick=is_sick))
        for setting, plan, is_sick in itertools.product((0, 5), "12", (False, True))
    ]
    buckets += [undisturbed(Centering(setting, shards=1), whole()) for setting in (0, 5)]
    found: dict[str, set[bytes]] = {}
    for bucket in buckets:
        files = {path.removeprefix(at("")): data for path, data in bucket.files.items()}
        for path, data in seen_by_readers(files).items():
            found.setdefault(path, set()).add(data)
    return found


_numbers = itertools.count()  # no two runs have one token


@cache
def undisturbed(run: Run, bucket: Bucket = EMPTY) -> Bucket:
    """What a run makes of a bucket when nothing happens meanwhile."""
    return finished(run.program(f"alone {next(_numbers)}"), bucket)


def finished(
    program: Program, bucket: Bucket, look: Callable[[Bucket], object] = lambda _: None
) -> Bucket:
    """What it makes of a bucket, alone; whoever holds the lease is dead."""
    moment = program.start
    while (request := moment.request) is not None:
        if request.verb == "is silent":
            moment = moment.after(True)
        else:
            answer, bucket = bucket.after(request)
            moment = moment.after(answer)
            look(bucket)
    program.close()
    assert moment.error is None, repr(moment.error)
    return bucket


# What a process may do next


@cache
def has_had_lease(moment: Moment) -> bool:
    """It knows that it has, or had, it."""
    return any(
        is_own_lease(moment, request, answer)
        or (request.path == at(LEASE) and request.verb == "put" and answer == "done")
        for request, answer in moment.answers()
    )


def is_own_lease(moment: Moment, request: Request, answer: Answer) -> bool:
    if request != Request("get", at(LEASE)) or answer is None:
        return False
    held = json.loads(answer)
    return held["run"] == moment.program.name and not held["released"]


def holds_lease(moment: Moment, bucket: Bucket) -> bool:
    return is_own_lease(moment, Request("get", at(LEASE)), bucket.files.get(at(LEASE)))


def look_at_write(moment: Moment, bucket: Bucket) -> None:
    """Who has lost the lease leaves it alone, and lands one late write at most: between any two
    a run looks whether it still has the lease. Raises AssertionError."""
    request = moment.request
    if request is None or request.verb != "put" or request.path == at("dataset.json"):
        return
    if request.path == at(LEASE):
        takes_place = has_had_lease(moment) and bucket.after(request)[0] == "done"
        assert not takes_place or holds_lease(moment, bucket), f"{request}: of another run"
    else:
        assert has_looked_at_lease(moment), f"{request}: without a look at the lease"


def has_looked_at_lease(moment: Moment) -> bool:
    for request, answer in moment.answers():
        if request == moment.request and answer == LOST:
            continue
        if request.path == at(LEASE) or request.verb in ("put", "delete"):
            return is_own_lease(moment, request, answer)
    return False


# Every order of a few runs


@dataclass(frozen=True)
class State:
    bucket: Bucket
    moments: tuple[Moment, ...]
    is_over: bool = False
    """The undisturbed run at the end has been."""
    lost: int = 0
    """Answers that may still get lost."""


@dataclass
class Explorer:
    """All schedules of a few runs on a bucket, and of a last one that nothing disturbs.

    Unless they are `alive`, each may stop at any step and go on at any later one: it is taken for
    dead whenever another asks, and the last run may come at any time. Those that have had the
    lease go on after it, too.
    """

    base: Bucket
    last: Run
    runs: Sequence[Run]
    lost: int = 0
    """Answers to writes that get lost, at most."""
    alive: bool = False
    states: int = 0

    def __post_init__(self) -> None:
        self.names = {f"run {number}": run for number, run in enumerate(self.runs)}
        self._final = self.last.program("final")
        self._finished: dict[Bucket, Bucket] = {}
        self._constant = {
            path
            for path in self.base.files
            if ("/samples/" in path or path.endswith(".tar")) and SAMPLES not in self.last.steps
        }
        """That nobody writes: when it is read makes no difference."""

    def schedules(self) -> int:
        """How many there are; after each of their steps all is looked at, the shortest beginnings
        first. Raises AssertionError on the first bad one, and tells its steps."""
        programs = [run.program(name) for name, run in self.names.items()]
        moments = tuple(self._settled(program.start) for program in programs)
        layer = {State(self.base, moments, lost=self.lost): 1}
        came: dict[State, tuple[State, str]] = {}
        total = 0
        while layer:
            self.states += len(layer)
            below: dict[State, int] = {}
            for state, ways in layer.items():
                try:
                    then = list(self._next(state))
                except AssertionError as error:
                    raise AssertionError("\n".join([*_trail(came, state), str(error)])) from error
                total += 0 if then else ways
                for label, after in then:
                    came.setdefault(after, (state, label))
                    below[after] = below.get(after, 0) + ways
            layer = below
        for program in programs:
            program.close()
        return total

    def _next(self, state: State) -> Iterator[tuple[str, State]]:
        self._look(state)
        if not state.is_over and not (self.alive and any(m.request for m in state.moments)):
            left = tuple(moment for moment in state.moments if has_had_lease(moment))
            bucket = self._finish(state.bucket)
            yield "the last run", replace(state, bucket=bucket, moments=left, is_over=True)
        for number, moment in enumerate(state.moments):
            if moment.request is None:
                continue
            look_at_write(moment, state.bucket)
            answer, bucket = state.bucket.after(moment.request)
            label = f"{moment.program.name}: {moment.request}"
            yield label, self._moved(state, number, answer, bucket)
            if moment.request.verb == "put" and answer == "done" and state.lost:
                after = self._moved(state, number, LOST, bucket)
                yield f"{label}, answer lost", replace(after, lost=state.lost - 1)

    def _look(self, state: State) -> None:
        found = observe(state.bucket)
        if state.is_over:
            fresh = observe(undisturbed(self.last, self.base))
            assert found == fresh, "the last run's work was changed"
            return
        ended = [moment for moment in state.moments if moment.request is None]
        for moment in ended:
            look_at_end(self.names[moment.program.name], moment, self.alive)
        if self.alive and len(ended) == len(state.moments):
            self._look_at_last(found, ended)

    def _look_at_last(self, found: Mapping[str, bytes], ended: Sequence[Moment]) -> None:
        """Nothing was disturbed: the last that worked has brought all to its own state."""
        worked = [moment.program.name for moment in ended if moment.error is None]
        fresh = {name: observe(undisturbed(self.names[name], self.base)) for name in worked}
        assert found in fresh.values(), "not what a run alone makes"

    def _finish(self, bucket: Bucket) -> Bucket:
        if bucket not in self._finished:
            self._finished[bucket] = finished(self._final, bucket, observe)
        return self._finished[bucket]

    def _moved(self, state: State, number: int, answer: Answer, bucket: Bucket) -> State:
        moments = list(state.moments)
        moments[number] = self._settled(moments[number].after(answer))
        return replace(state, bucket=bucket, moments=tuple(moments))

    def _settled(self, moment: Moment) -> Moment:
        while (request := moment.request) is not None:
            if request.verb == "is silent":
                moment = moment.after(not self.alive)
            elif request.verb == "get" and request.path in self._constant:
                moment = moment.after(self.base.files[request.path])
            else:
                break
        return moment


def _trail(came: Mapping[State, tuple[State, str]], state: State) -> list[str]:
    steps = []
    while state in came:
        state, label = came[state]
        steps.append(label)
    return steps[::-1]


def look_at_end(run: Run, moment: Moment, is_quiet: bool) -> None:
    """`is_quiet`: nothing crashed or stood still. Then only who comes second fails, and who has
    no permission. Raises AssertionError."""
    error = moment.error
    if error is None:
        return
    assert isinstance(error, HONEST), repr(error)
    if is_quiet and not (isinstance(error, LeaseError) and "is in use by" in str(error)):
        assert isinstance(error, StaleTableError | FingerprintMismatchError), repr(error)
        assert run.allowed is not Replace.CHANGED


A = Run(shards=1, steps=("a",))
OTHER_A = replace(A, setting=5, allowed=Replace.CHANGED)
SICK_A = replace(A, is_sick=True)
ALL_ANEW = Run(plan="2", shards=1, allowed=Replace.CHANGED)
OTHER_SAMPLES = replace(ALL_ANEW, steps=(SAMPLES,))
LAST_A = replace(A, allowed=Replace.CHANGED)
RETRY_A = replace(A, redo=Redo.FAILED)
SICK_RETRY_A = replace(RETRY_A, is_sick=True)
CENTERS = Centering(shards=1)
OTHER_CENTERS = replace(CENTERS, setting=5, allowed=Replace.CHANGED)
LAST_CENTERS = replace(CENTERS, allowed=Replace.CHANGED)


def empty() -> Bucket:
    return EMPTY


def packed() -> Bucket:
    return undisturbed(Run(shards=1, steps=(SAMPLES,)))


def ill() -> Bucket:
    return undisturbed(SICK_A, packed())


def whole() -> Bucket:
    return undisturbed(Run(shards=1))


def centered() -> Bucket:
    """The artifact is there, table `k` is not."""
    files = undisturbed(CENTERS, whole()).files
    return Bucket({path: data for path, data in files.items() if "/k/" not in path})


@dataclass(frozen=True)
class Orders:
    """Of a few runs, and of a last one that nothing disturbs."""

    base: Callable[[], Bucket]
    runs: Sequence[Run]
    last: Run
    lost: int
    states: int
    """At least: fewer would mean that something is no longer tried."""

    alive: bool = False

    def explorer(self) -> Explorer:
        return Explorer(self.base(), self.last, self.runs, self.lost, self.alive)


FROZEN = {
    "the same settings": Orders(packed, [A, A], OTHER_A, 0, 40_000),
    "other settings": Orders(packed, [A, OTHER_A], LAST_A, 0, 35_000),
    "a table that is there": Orders(whole, [A, OTHER_A], LAST_A, 0, 35_000),
    "one sees sick rows": Orders(packed, [SICK_A, RETRY_A], RETRY_A, 0, 50_000),
    "two retries": Orders(ill, [SICK_RETRY_A, RETRY_A], RETRY_A, 0, 60_000),
    "an artifact": Orders(centered, [CENTERS, OTHER_CENTERS], LAST_CENTERS, 0, 60_000),
    "the lease": Orders(empty, [Holding(), Holding(), Beating()], Holding(), 0, 20_000),
}


@pytest.mark.parametrize("name", FROZEN)
def test_every_order_of_runs_that_freeze_and_wake(name: str) -> None:
    explorer = FROZEN[name].explorer()
    assert explorer.schedules() > 100_000_000
    assert explorer.states > FROZEN[name].states


GOING = {
    "one drops it late": Orders(whole, [OTHER_SAMPLES], ALL_ANEW, 0, 100),
    "one describes it late": Orders(whole, [OTHER_A], OTHER_SAMPLES, 0, 100),
}


@pytest.mark.parametrize("name", GOING)
def test_a_table_goes_with_its_samples(name: str) -> None:
    explorer = GOING[name].explorer()
    assert explorer.schedules() > 20
    assert explorer.states > GOING[name].states


ALIVE = {
    "the same settings": Orders(packed, [A, A], OTHER_A, 1, 2000, True),
    "other settings": Orders(whole, [A, OTHER_A], OTHER_A, 1, 2000, True),
    "two retries": Orders(ill, [RETRY_A, RETRY_A], RETRY_A, 2, 9000, True),
    "an artifact": Orders(whole, [CENTERS, OTHER_CENTERS], LAST_CENTERS, 1, 4000, True),
    "all of a shard": Orders(empty, [Run(shards=1)] * 2, Run(shards=1), 1, 25_000, True),
    "the lease": Orders(empty, [Holding(), Holding(), Beating()], Holding(), 1, 20_000, True),
}


@pytest.mark.parametrize("name", ALIVE)
def test_every_order_of_runs_that_live(name: str) -> None:
    """Nothing stands still, but answers get lost: who comes second is refused, the other works."""
    explorer = ALIVE[name].explorer()
    assert explorer.schedules() > 1_000_000
    assert explorer.states > ALIVE[name].states


# Code that breaks the promises


def written_in_any_case(ending: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Files of this ending are written without a look at what is there."""

    def put(storage: Storage, path: str, data: bytes) -> bool:
        storage.put(path, data)
        return True

    def break_it(patch: pytest.MonkeyPatch) -> None:
        create, replace = Storage.create, Storage.replace
        patch.setattr(Storage, "create", lambda *a: (put if a[1].endswith(ending) else create)(*a))
        patch.setattr(
            Storage,
            "replace",
            lambda *a: put(*a[:3]) if a[1].endswith(ending) else replace(*a),
        )

    return break_it


def not_looking_at_token(module: ModuleType) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(module, "check_token", lambda *_: None)


def tar_last(patch: pytest.MonkeyPatch) -> None:
    """The tar of a shard comes after the table that says it is there."""
    create, put = Storage.create, Storage.put

    def put_later(storage: Storage, path: str, data: bytes) -> None:
        if path.endswith(".tar"):
            vars(storage)["tar"] = path, data
        else:
            put(storage, path, data)

    def create_first(storage: Storage, path: str, data: bytes) -> bool:
        done = create(storage, path, data)
        if path.startswith("tables/samples/v-"):
            put(storage, *vars(storage)["tar"])
        return done

    patch.setattr(Storage, "put", put_later)
    patch.setattr(Storage, "create", create_first)


def folders_used_twice(patch: pytest.MonkeyPatch) -> None:
    """What is made again as it was lies where it was; so all that is not current is removed."""

    def made_of(_: Dataset, *of: Any) -> TableVersion:
        return TableVersion.of(*of)

    def describe(dataset: Dataset, version: TableVersion, token: str) -> None:
        describe_only(dataset, version, token)
        for folder in dataset._folders(version.name):
            if not folder.endswith(version.folder):
                with contextlib.suppress(OSError):
                    dataset.storage.delete(folder)

    describe_only = Dataset.describe_table
    ranks_ignored(patch)
    patch.setattr(Dataset, "next_version", made_of)
    patch.setattr(Dataset, "describe_table", describe)


def ranks_ignored(patch: pytest.MonkeyPatch) -> None:
    """A pointer is written over whatever is there."""
    for module in (layout, artifacts):
        patch.setattr(module, "_rank", lambda _: (0, ""))


def dropped_in_any_case(patch: pytest.MonkeyPatch) -> None:
    """The descriptor of a table that goes is removed: nothing is left to compare with."""

    def drop(dataset: Dataset, table: str, token: str) -> None:
        check_token(dataset.storage, token)
        dataset.storage.delete(f"tables/{table}/table.json")

    patch.setattr(Dataset, "drop_table", drop)


def artifact_not_kept(patch: pytest.MonkeyPatch) -> None:
    """A run that finds an artifact to be current leaves it as it is."""
    patch.setattr(sys.modules[__name__], "keep_artifact", lambda *_: None)


BROKEN = {
    "new tables": (
        written_in_any_case(".parquet"),
        FROZEN["one sees sick rows"],
        "the last run's work was changed",
    ),
    "retried tables": (
        written_in_any_case(".parquet"),
        FROZEN["two retries"],
        "the last run's work was changed",
    ),
    "descriptors": (
        written_in_any_case("table.json"),
        FROZEN["other settings"],
        "the last run's work was changed",
    ),
    "leases": (written_in_any_case(LEASE), ALIVE["the lease"], "of another run"),
    "token of commits": (
        not_looking_at_token(shard_module),
        ALIVE["all of a shard"],
        "without a look at the lease",
    ),
    "token of descriptors": (
        not_looking_at_token(lease),
        FROZEN["other settings"],
        "without a look at the lease",
    ),
    "token of artifacts": (
        not_looking_at_token(artifacts),
        FROZEN["an artifact"],
        "without a look at the lease",
    ),
    "tar": (tar_last, ALIVE["all of a shard"], "tar is missing"),
    "folders": (folders_used_twice, FROZEN["other settings"], "the last run's work was changed"),
    "ranks of tables": (ranks_ignored, FROZEN["a table that is there"], "was changed"),
    "ranks of artifacts": (ranks_ignored, FROZEN["an artifact"], "is missing"),
    "dropped tables": (dropped_in_any_case, GOING["one drops it late"], "was changed"),
    "kept artifacts": (
        artifact_not_kept,
        FROZEN["an artifact"],
        "the last run's work was changed",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_code_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, orders, complaint = BROKEN[name]
    explorer = orders.explorer()
    undisturbed(explorer.last, explorer.base)  # by code that works
    written_undisturbed()
    break_it(monkeypatch)
    with pytest.raises(AssertionError, match=complaint):
        explorer.schedules()


# What a run finds


@pytest.mark.parametrize("redo", Redo)
def test_a_run_mends_a_version_of_which_any_files_are_missing(redo: Redo) -> None:
    """Such as it was left by a run that died while it removed it."""
    run = Run(shards=1, redo=redo)
    left = undisturbed(replace(run, is_sick=redo is Redo.FAILED))
    files = [path for path in left.files if path.endswith((".parquet", ".tar"))]
    assert len(files) == 5
    for count in range(len(files) + 1):
        for gone in itertools.combinations(files, count):
            bucket = Bucket({p: data for p, data in left.files.items() if p not in gone})
            assert observe(undisturbed(run, bucket)) == observe(undisturbed(run))


# Some orders of more


class Event(Enum):
    """What happens to the run that is at work."""

    SWITCH = "another goes on"
    FREEZE = "it stands still, and is taken for dead"
    BRINK = "the same, right before it next writes or removes something"
    CRASH = "it dies"
    LOSE = "the answer to its next write gets lost"
    WAKE = "the one that has stood still the longest goes on"


@dataclass
class World:
    runs: dict[str, Run]
    bucket: Bucket = EMPTY
    moments: dict[str, Moment] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    losing: set[str] = field(default_factory=set)
    is_quiet: bool = True
    """Nothing crashed or stood still."""
    met: ClassVar[Counter[str]] = Counter()

    def __post_init__(self) -> None:
        self.moments = {name: program_of(run, name).start for name, run in self.runs.items()}
        self.dead = {name for name, run in self.runs.items() if run.is_orphan}
        self.is_quiet = not self.dead

    def awake(self) -> list[str]:
        return [
            name
            for name, moment in self.moments.items()
            if moment.request is not None and name not in self.frozen
        ]

    def play(self, schedule: Sequence[tuple[int, Event]]) -> None:
        at_work: str | None = None
        for steps, event in schedule:
            for _ in range(steps):
                awake = self.awake()
                if not awake:
                    break
                at_work = at_work if at_work in awake else awake[0]
                self.step(at_work)
            at_work = self._meets(at_work, event)
        while awake := self.awake():
            self.step(awake[0])

    def _meets(self, name: str | None, event: Event) -> str | None:
        awake = self.awake()
        if event is Event.WAKE:
            return self.frozen.pop(0) if self.frozen else name
        if name not in awake:
            return name
        note(f"{name}: {event.value}")
        match event:
            case Event.SWITCH:
                return awake[(awake.index(name) + 1) % len(awake)]
            case Event.LOSE:
                self.losing.add(name)
                return name
            case Event.BRINK:
                while name in self.awake() and not self._is_on_brink(name):
                    self.step(name)
                self.frozen.append(name)
            case Event.FREEZE:
                self.frozen.append(name)
            case Event.CRASH:
                del self.moments[name]
        self.is_quiet = False
        return None

    def _is_on_brink(self, name: str) -> bool:
        request = self.moments[name].request
        return request is not None and request.verb in ("put", "delete")

    def step(self, name: str) -> None:
        moment, before = self.moments[name], self.bucket
        assert moment.request is not None
        look_at_write(moment, self.bucket)
        if moment.request.verb == "is silent":
            answer: Answer = self._is_silent(moment.request.path)
        else:
            answer, self.bucket = self.bucket.after(moment.request)
            if moment.request.verb == "put" and answer == "done":
                self.met["late writes"] += has_had_lease(moment) and not holds_lease(moment, before)
                if name in self.losing:
                    self.losing.remove(name)
                    answer = LOST
        note(f"{name}: {moment.request}: {summary(answer)}")
        self.moments[name] = moment.after(answer)
        if self.bucket is not before:
            observe(self.bucket)
        self._look_at_end(name, self.moments[name])

    def _is_silent(self, name: str) -> bool:
        moment = self.moments.get(name)
        is_gone = moment is None or moment.request is None or name in {*self.frozen, *self.dead}
        self.met["taken over"] += is_gone
        return is_gone

    def _look_at_end(self, name: str, moment: Moment) -> None:
        if moment.request is None:
            note(f"{name} ends: {moment.error!r}")
            look_at_end(self.runs[name], moment, self.is_quiet)

    def end(self, run: Run) -> None:
        """A last run, undisturbed; then all that stood still goes on."""
        final = program_of(run, "final")
        self.bucket = finished(final, self.bucket, observe)
        fresh = observe(undisturbed(run))
        assert observe(self.bucket) == fresh
        for name in self.frozen:
            if name in self.moments and has_had_lease(self.moments[name]):
                self.met["woken after the last run"] += 1
                while name in self.moments and self.moments[name].request is not None:
                    self.step(name)
                    assert observe(self.bucket) == fresh


def summary(answer: Answer) -> str:
    return f"{len(answer)} bytes" if isinstance(answer, bytes) else str(answer)


@cache
def program_of(run: Run, name: str) -> Program:
    return run.program(name)


PLAIN = Run()
OTHER_SETTINGS = Run(setting=5, allowed=Replace.CHANGED)
RETRY = Run(redo=Redo.FAILED)
REFRESH = Run(plan="2", redo=Redo.STALE, allowed=Replace.STALE)
ORPHAN = Run(is_orphan=True)
SICK = replace(PLAIN, is_sick=True)
RUNS = [
    PLAIN,
    SICK,
    OTHER_SETTINGS,
    RETRY,
    REFRESH,
    replace(RETRY, is_sick=True),
    ORPHAN,
    replace(OTHER_SETTINGS, is_orphan=True),
]
LAST = [
    replace(RETRY, setting=setting, plan=plan, allowed=Replace.CHANGED)
    for setting in (0, 5)
    for plan in "12"
]


def test_random_orders_of_more() -> None:
    World.met.clear()
    play_random_orders()
    assert World.met["taken over"] > 50
    assert World.met["late writes"] > 5
    assert World.met["woken after the last run"] > 20


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.sampled_from(RUNS), min_size=2, max_size=3),
    st.lists(st.tuples(st.integers(0, 70), st.sampled_from(Event)), max_size=10),
    st.sampled_from(LAST),
)
def play_random_orders(runs: list[Run], schedule: list[tuple[int, Event]], last: Run) -> None:
    world = World({f"run {number}": run for number, run in enumerate(runs)})
    world.play(schedule)
    world.end(last)
    for moment in world.moments.values():
        moment.program.close()
