"""Runs what is missing of a pipeline, phase by phase; takes leases and Ray when first needed."""

import contextlib
import difflib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from rich.console import Console

from fusion_pipeline.captioning import ask_again
from fusion_pipeline.dataset.accounting import TableCounts, count_table, funnel
from fusion_pipeline.dataset.artifacts import (
    artifact_fields,
    artifact_state,
    inputs_of,
    keep_artifact,
)
from fusion_pipeline.dataset.filters import ReadingError
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import as_holder, hold_lease
from fusion_pipeline.dataset.reading import Reader, check_where
from fusion_pipeline.dataset.schemas import SAMPLES
from fusion_pipeline.dataset.tables import FingerprintMismatchError, NoTableError
from fusion_pipeline.engine.again import Again
from fusion_pipeline.engine.chain import Chain, Replace, check_settings, run_in_process
from fusion_pipeline.engine.guard import Incident, Limits
from fusion_pipeline.engine.run import Fuse, RunLog, drive, new_run_id
from fusion_pipeline.engine.shard import ALL_SHARDS, Redo, ShardResult
from fusion_pipeline.engine.stage import Source
from fusion_pipeline.engine.stop import Stopper
from fusion_pipeline.errors import FusionError, printable
from fusion_pipeline.fuse.batch.plan import answered_only
from fusion_pipeline.fuse.closing import Meter
from fusion_pipeline.fuse.stage import Caption
from fusion_pipeline.pipeline import ChainPhase, GlobalPhase, Pipeline
from fusion_pipeline.select.meta_sample import MetaSample, read_drawn


class PipelineError(FusionError):
    """The run can't go on; the message says what to do."""


class SourceChangedError(PipelineError):
    """What the shards are made from is not what they were planned from."""

    def __init__(self, source: Source, dataset: Dataset) -> None:
        super().__init__(
            f"{dataset.storage.url}: what {source.name!r} reads changed since this dataset was "
            "planned (files, sizes, the selection, or settings). Nothing was changed. Choose a "
            "new `run` folder, or run again with --refresh to make it anew (--overwrite, if "
            "settings changed)."
        )


@dataclass(frozen=True)
class Options:
    only: str | None = None
    """Run this step alone."""
    until: str | None = None
    """Run up to this step, itself included."""
    limit: int | None = None
    """Whole shards until so many samples."""
    overwrite: bool = False
    """Replace what was made with other settings or from other inputs."""
    refresh: bool = False
    """Make again what was made from inputs that have changed since."""
    retry_failed: bool = False
    in_process: bool = False
    """The plain loop instead of Ray."""
    where: str | None = None
    """Ask again for captions of the rows for which this SQL expression holds, and do nothing
    else."""

    @property
    def replace(self) -> Replace:
        if self.overwrite:
            return Replace.CHANGED
        return Replace.STALE if self.refresh else Replace.NOTHING

    @property
    def redo(self) -> Redo:
        if self.retry_failed:
            return Redo.FAILED
        return Redo.STALE if self.refresh else Redo.MISSING


class Runner:
    """Runs the pending work of a pipeline. Ray and the leases are taken when first needed."""

    def __init__(self, pipeline: Pipeline, options: Options, console: Console) -> None:
        self._pipeline = pipeline
        self._options = options
        self._redo: Redo | Again = options.redo
        self._console = console
        self._run_id = new_run_id()
        self._stack = contextlib.ExitStack()
        self._tokens: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        self._warned: set[str] = set()
        self._waiting: dict[str, int] = {}
        """Shards whose captions are asked for in batches and are not all there, by table."""
        self._ray = False
        self._stopper = Stopper(self._run_id, pipeline.config.runner.drain_seconds)
        self.committed = 0
        """Tables and artifacts written by this run."""

    def run(self) -> None:
        """Everything that the options ask for and that is not there yet.

        Raises PipelineError, SourceError, TableError, LeaseError, StageError, StoppedError,
        WhereError.
        """
        wanted = self._wanted()
        if "export" in wanted:
            self._check_filters()  # now: it would be a pity after a week
        if self._options.where is not None:
            self._redo = ask_again(self._pipeline, self._options.where, self._options.limit)
        with self._stopper.listening(), self._stack:
            phases = [p for p in self._pipeline.phases if not wanted.isdisjoint(p.names)]
            for _, of_one in groupby(phases, lambda phase: phase.dataset.storage.url):
                self._run_phases(list(of_one), wanted)
            if "export" in wanted:
                self._run_export()
            if "report" in wanted:
                self._run_report()
        for table, count in self._waiting.items():
            if count:
                self._say(
                    f"{table}: {count:,} shards wait for batches. `fusion meta submit` sends what "
                    "was not sent, `fusion meta collect` takes in what is answered."
                )

    def failures(self) -> list[TableCounts]:
        """Tables of stages in which rows failed. Bad input rows are not among them: those are
        expected, and no stage's fault."""
        pipeline = self._pipeline
        counts = [
            *funnel(pipeline.pool, pipeline.tables_of(pipeline.pool)[2:]),
            *funnel(pipeline.selected, pipeline.tables_of(pipeline.selected)[2:]),
        ]
        return [table for table in counts if table.total("failed")]

    def _wanted(self) -> set[str]:
        names, options = self._pipeline.step_names, self._options
        if options.only and options.until:
            raise PipelineError("--only runs one step and --until all up to one: give one of them")
        for name in (options.only, options.until):
            if name is not None and name not in names:
                near = [known for known in names if known.startswith(f"{name}/")]
                near = near or difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {' or '.join(near)}? Steps" if near else "steps"
                raise PipelineError(f"no step is called {name!r}; {hint}: {', '.join(names)}")
        if options.where is not None:
            return {self._pipeline.export.captions}
        if options.only:
            return {options.only}
        return set(names[: names.index(options.until) + 1] if options.until else names)

    def _check_filters(self) -> None:
        export = self._pipeline.export
        if export.where:
            there = Reader(export.selected).tables if export.selected.exists else {}
            try:
                check_where(export.where, export.selected, {**there, **self._pipeline.schemas()})
            except ReadingError as error:
                raise PipelineError(f"export.where: {error}") from error

    def _run_phases(self, phases: Sequence[ChainPhase | GlobalPhase], wanted: set[str]) -> None:
        """The phases of one dataset, in order.

        If there is anything to do, all are gone through under the lease. What another run did up
        to that moment is seen then, and each phase that is done already is committed once more:
        from then on no run that was frozen can replace it.
        """
        is_asked = isinstance(self._redo, Again)
        if not is_asked and all(self._is_done(phase, wanted) for phase in phases):
            return
        dataset = phases[0].dataset
        token = self._token(dataset)
        if isinstance(self._redo, Again):
            self._redo = self._redo.begin(dataset)
        with as_holder(dataset.storage, token):
            for phase in phases:
                if isinstance(phase, ChainPhase):
                    self._run_chain(phase, wanted, token)
                else:
                    self._run_global(phase, token)
                self._stopper.check()

    def _is_done(self, phase: ChainPhase | GlobalPhase, wanted: set[str]) -> bool:
        if isinstance(phase, GlobalPhase):
            return not self._is_due(phase)
        rows = self._planned(phase, wanted)
        if rows is None:
            return False
        chain, pending = self._look(phase, rows, wanted)
        return not pending and chain.is_described

    # Chains

    def _run_chain(self, phase: ChainPhase, wanted: set[str], token: str) -> None:
        dataset, source = phase.dataset, phase.source
        rows = self._planned(phase, wanted)
        if rows is None:
            rows = source.make_plan(self._digest(source), token)
        else:
            keep_artifact(dataset, source.plan_name, token)
        chain, pending = self._look(phase, rows, wanted)
        chain = chain.under(token, self._run_id)
        self._drop_dependents(chain, token)
        chain.describe()
        if isinstance(self._redo, Again):
            shards = len(pending.get(self._redo.table, ()))
            self._say(f"{self._redo.table}: rows of {shards:,} shards are asked for again")
        if not pending:
            self._end_request(dataset, pending)
            return
        meters = [
            Meter(step.work.engine.journal, step.work.engine.captions_per_second)
            for step in chain.reduced(pending).steps
            if isinstance(step.work, Caption) and step.work.engine.journal is not None
        ]
        with RunLog(dataset.storage, self._run_id) as log:
            settings = self._pipeline.config.runner
            fuse = Fuse(settings.max_failure_rate, settings.fuse_after_rows)
            self.committed += drive(chain, pending, self._runner(), log, fuse, self._console)
        self._end_request(dataset, pending)
        for meter in meters:
            self._console.print(meter.panel(log.seconds(meter.table)))

    def _end_request(self, dataset: Dataset, pending: Mapping[str, Sequence[int]]) -> None:
        """To ask again, when it is done for all shards: not when the run was asked to stop."""
        request = self._redo
        if isinstance(request, Again):
            shards = {shard for todo in pending.values() for shard in todo}
            if shards <= request.done(dataset.storage):
                request.close(dataset.storage)

    def _planned(self, phase: ChainPhase, wanted: set[str]) -> list[int] | None:
        """Rows of each shard by the committed plan; None when there is none for this source.

        Raises SourceChangedError when what is there was made by another one.
        """
        if phase.packs is not None:
            _need(phase.packs.dataset, phase.packs.artifact.name)
            if "repack" in wanted:
                self._need_complete(phase.packs)
        source, dataset = phase.source, Dataset.create(phase.dataset.storage.url)
        current, rows = dataset.current(SAMPLES), source.plan(self._digest(source))
        if rows is None and current is not None:
            if phase.steps[0].work is source:
                made_by = phase.steps[0].made_by
                check_settings(dataset, current, made_by, self._options.replace)
            if self._options.replace is Replace.NOTHING:
                raise SourceChangedError(source, dataset)
        return rows

    def _digest(self, source: Source) -> str:
        """Of its plan; once a run, for it lists all files of the source."""
        if source.name not in self._digests:
            self._digests[source.name] = source.plan_digest()
        return self._digests[source.name]

    def _look(
        self, phase: ChainPhase, rows: list[int], wanted: set[str]
    ) -> tuple[Chain, dict[str, list[int]]]:
        """The chain as things are now, and what is pending. Raises TableError."""
        shards = list(range(len(rows)))
        if self._options.limit is not None:
            shards = _first_shards(rows, self._options.limit)
        steps = [step for step in phase.steps if step.work.name in wanted]
        digest = self._digest(phase.source)
        chain = Chain.resolve(phase.dataset, steps, digest, self._redo)
        chain.outdated(self._options.replace)
        pending, waiting = answered_only(chain, chain.pending(self._with_inputs(chain, shards)))
        self._waiting |= waiting
        return chain, pending

    def _with_inputs(self, chain: Chain, shards: list[int]) -> list[int]:
        """Those of the shards that have every table the chain reads and does not write."""
        made = {step.table for step in chain.steps}
        for table in {name for step in chain.steps for name in step.inputs} - made:
            there = chain.dataset.shards_of(chain.place.versions[table])
            missing = [shard for shard in shards if shard not in there]
            if missing and len(missing) == len(shards):
                raise NoTableError(chain.dataset.storage.full(f"tables/{table}"), table)
            shards = [shard for shard in shards if shard in there]
        return shards

    def _drop_dependents(self, chain: Chain, token: str) -> None:
        """Say what is made anew. Of another set of samples no table of the old one is left."""
        outdated = chain.outdated(self._options.replace)
        for version in outdated:
            self._say(f"{chain.dataset.storage.url}: {version.name} is made anew")
        if SAMPLES in {version.name for version in outdated}:
            made = {version.name for version in chain.written}
            for table in chain.dataset.table_names():
                if table not in made:
                    chain.dataset.drop_table(table, token)

    # Global steps, sinks

    def _is_due(self, phase: GlobalPhase) -> bool:
        """Whether its artifact is to be made. Raises PipelineError when it may not be."""
        dataset, artifact = phase.dataset, phase.artifact
        state = self._state(phase)
        if state == "current":
            return False
        if state == "changed" and self._options.replace is not Replace.CHANGED:
            place = dataset.storage.full(artifact.path)
            old = artifact_fields(dataset, artifact.name)
            raise FingerprintMismatchError(place, old, artifact.made_by.fields)
        is_kept = phase.keeps_stale or not phase.writes
        if state == "stale" and self._options.replace is Replace.NOTHING and is_kept:
            self._warn(
                f"{artifact.name} is stale: its input changed since. It is kept; --refresh makes "
                "it anew."
            )
            return False
        return True

    def _run_global(self, phase: GlobalPhase, token: str) -> None:
        dataset, artifact = phase.dataset, phase.artifact
        if not self._is_due(phase):
            keep_artifact(dataset, artifact.name, token)
            if phase.writes:
                dataset.describe_table(dataset.version(phase.writes), token)
            return
        for table in artifact.reads:
            _need(dataset, table)
        run_task = self._task()
        with (
            RunLog(dataset.storage, self._run_id) as log,
            self._console.status(f"{phase.step.name} …"),
        ):
            started = time.perf_counter()
            inputs = inputs_of(dataset, artifact.reads)
            run_task(phase.step.resources, phase.step.run, dataset, artifact, inputs, token)
            seconds = time.perf_counter() - started
            rows = count_table(dataset, artifact.reads[0]).rows
            log.add(ShardResult(phase.step.name, ALL_SHARDS, rows, rows, 0, seconds, None))
        self._say(f"{phase.step.name}: {rows:,} rows in {seconds:.1f} s")
        if isinstance(phase.step, MetaSample):
            self._say(f"{phase.step.name}: {read_drawn(dataset)}")
        self.committed += 1

    def _state(self, phase: GlobalPhase) -> str:
        """`artifacts.artifact_state`; of a step that writes a table, the table's too, which is
        `partial` when shards have come since."""
        dataset, artifact = phase.dataset, phase.artifact
        state = artifact_state(dataset, artifact)
        if phase.writes is None or state == "missing":
            return state
        current = dataset.current(phase.writes)
        if current is not None and current.made_by.hash != artifact.made_by.hash:
            check_settings(dataset, current, artifact.made_by, self._options.replace)
            return "changed"
        needed = dataset.shards_of(artifact.reads[-1])
        is_whole = current is not None and dataset.shards_of(current) >= needed
        return state if is_whole else "partial"

    def _need_complete(self, phase: GlobalPhase) -> None:
        """A global step's artifact marks its end: without it some shards may still be old."""
        if self._state(phase) != "current":
            raise PipelineError(
                f"{phase.dataset.storage.url}: {phase.step.name!r} is not complete for what is "
                f"there. Run it first: --until {phase.step.name}."
            )

    def _run_export(self) -> None:
        export = self._pipeline.export
        if any(self._waiting.values()) and not export.selected.shards_of(export.captions):
            return  # none is answered so far
        _need(export.selected, export.captions)
        for step in self._pipeline.rules():
            # Boxes found with other settings hide something else, other scores choose otherwise.
            current = export.selected.current(step.table)
            if current is not None:
                check_settings(export.selected, current, step.made_by, Replace.NOTHING)
        if export.is_current():
            return
        shows = export.blur is None and export.is_blurred()
        with self._console.status("export …"):
            done = export.run()
        blurred = f", {done.blurred:,} of them blurred," if export.blur else ""
        self._say(f"export: {done.samples:,} captioned samples{blurred} in {export.out.url}")
        if done.unwanted:
            self._say(f"export: {done.unwanted:,} more are left out by export.where")
        if shows:
            self._say("export: what the last one had blurred is shown now, as `blur` is off")
        if done.withheld:
            self._say(
                f"export: {done.withheld:,} more are withheld, for a detector of `blur` failed on "
                "them: --retry-failed asks it again"
            )
        idle, there = export.blur.idle_labels(export.selected) if export.blur else ([], [])
        for label in idle:
            near = ", ".join(map(repr, difflib.get_close_matches(label, there, 3, 0.0)))
            hint = f"; nearest: {near}" if near else ""
            self._say(f"blur.labels: no box is called {label!r}, nothing is hidden for it{hint}")
        self.committed += 1

    def _run_report(self) -> None:
        report = self._pipeline.report()
        if any(self._waiting.values()) and not report.selected.shards_of(report.captions):
            return
        _need(report.selected, report.captions)
        if report.is_current():
            return
        with self._console.status("report …"):
            report.run()
        self.committed += 1

    # Means

    def _say(self, text: str) -> None:
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def _warn(self, text: str) -> None:
        """Once, however often we look."""
        if text not in self._warned:
            self._warned.add(text)
            self._say(text)

    def _token(self, dataset: Dataset) -> str:
        url = dataset.storage.url
        if url not in self._tokens:
            lease = hold_lease(dataset.storage, self._run_id)
            self._tokens[url] = self._stack.enter_context(lease)
            self._stopper.tell(dataset.storage)
            dataset.clean_temporary()
        return self._tokens[url]

    def _runner(self) -> Callable[[Chain, Sequence[int]], Iterable[ShardResult | Incident]]:
        if self._options.in_process:
            return run_in_process
        from fusion_pipeline.engine.ray_pool import run_on_ray

        self._start_ray()
        settings = self._pipeline.config.runner
        memory = settings.worker_memory_gb
        limits = Limits(
            int(memory * 2**30) if memory else None,
            settings.stall_minutes * 60,
            settings.image_seconds,
        )
        return partial(run_on_ray, limits=limits, reconnect=self._reconnect)

    def _task(self) -> Callable[..., None]:
        """Runs a function in a worker process, or here when there is no Ray."""
        if self._options.in_process:
            return lambda _, function, *arguments: function(*arguments)
        from fusion_pipeline.engine.ray_pool import run_task

        self._start_ray()
        return run_task

    def _reconnect(self, why: str) -> None:
        from fusion_pipeline.engine.ray_pool import stop_ray

        self._say(f"Beginning anew with what is left: {why}")
        stop_ray()
        self._join_ray()

    def _start_ray(self) -> None:
        from fusion_pipeline.engine.ray_pool import stop_ray

        if not self._ray:
            self._join_ray()
            self._ray = True
            self._stack.callback(stop_ray)

    def _join_ray(self) -> None:
        from fusion_pipeline.engine.ray_pool import RayOptions, start_ray

        runner = self._pipeline.config.runner
        with self._console.status("starting Ray …"):
            start_ray(RayOptions(runner.ray_address, runner.workers, runner.dashboard))
        self._stopper.listen()  # Ray has put a handler of its own in place


def _need(dataset: Dataset, table: str) -> None:
    if not dataset.shards_of(table):
        raise NoTableError(dataset.storage.full(f"tables/{table}"), table)


def _first_shards(rows: list[int], limit: int) -> list[int]:
    """Whole shards until there are `limit` samples."""
    shards, total = [], 0
    for shard, count in enumerate(rows):
        if total >= limit:
            break
        shards.append(shard)
        total += count
    return shards
