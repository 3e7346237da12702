"""Runs what is missing of a pipeline, phase by phase; takes leases and Ray when first needed."""

import contextlib
import operator
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console

from fusion_pipeline.dataset.accounting import TableCounts, count_table, funnel
from fusion_pipeline.dataset.artifacts import artifact_state, inputs_of
from fusion_pipeline.dataset.layout import Dataset, TableVersion
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.dataset.schemas import SAMPLES
from fusion_pipeline.dataset.tables import NoTableError
from fusion_pipeline.engine.chain import Chain, Replace, check_settings, run_in_process
from fusion_pipeline.engine.guard import Incident, Limits
from fusion_pipeline.engine.run import Fuse, RunLog, drive, new_run_id
from fusion_pipeline.engine.shard import ALL_SHARDS, Redo, ShardResult
from fusion_pipeline.engine.stage import Source
from fusion_pipeline.engine.stop import Stopper
from fusion_pipeline.errors import FusionError, printable
from fusion_pipeline.pipeline import ChainPhase, GlobalPhase, Pipeline


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
        self._console = console
        self._run_id = new_run_id()
        self._stack = contextlib.ExitStack()
        self._tokens: dict[str, str] = {}
        self._ray = False
        self._stopper = Stopper(self._run_id, pipeline.config.runner.drain_seconds)
        self.committed = 0
        """Tables and artifacts written by this run."""

    def run(self) -> None:
        """Everything that the options ask for and that is not there yet.

        Raises PipelineError, SourceError, TableError, LeaseError, StageError, StoppedError.
        """
        wanted = self._wanted()
        with self._stopper.listening(), self._stack:
            for phase in self._pipeline.phases:
                if not wanted.isdisjoint(phase.names):
                    if isinstance(phase, ChainPhase):
                        self._run_chain(phase, wanted)
                    else:
                        self._run_global(phase)
                    self._stopper.check()
            if "export" in wanted:
                self._run_export()
            if "report" in wanted:
                self._run_report()

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
        for name in (options.only, options.until):
            if name is not None and name not in names:
                raise PipelineError(f"no step is called {name!r}; steps: {', '.join(names)}")
        if options.only:
            return {options.only}
        return set(names[: names.index(options.until) + 1] if options.until else names)

    # Chains

    def _run_chain(self, phase: ChainPhase, wanted: set[str]) -> None:
        if phase.packs is not None:
            _need(phase.packs.dataset, phase.packs.artifact.name)
            if "repack" in wanted:
                self._need_complete(phase.packs)
        dataset = phase.dataset
        Dataset.create(dataset.storage.url)
        digest, rows = self._plan(phase, dataset)
        shards = list(range(len(rows)))
        if self._options.limit is not None:
            shards = _first_shards(rows, self._options.limit)
        steps = [step for step in phase.steps if step.work.name in wanted]

        def look() -> tuple[Chain, list[TableVersion], dict[str, list[int]]]:
            chain = Chain.resolve(dataset, steps, digest, self._options.redo)
            outdated = chain.outdated(self._options.replace)
            return chain, outdated, chain.pending(self._with_inputs(chain, shards))

        chain, outdated, pending = look()
        if not pending and not outdated and chain.is_described:
            return
        if dataset.storage.url not in self._tokens:
            # What was seen so far may be another run's doing, who was at it until this moment.
            self._token(dataset)
            chain, outdated, pending = look()
        chain = chain.under(self._token(dataset), self._run_id)
        self._drop_dependents(chain, outdated)
        chain.describe()
        if not pending:
            return
        with RunLog(dataset.storage, self._run_id) as log:
            settings = self._pipeline.config.runner
            fuse = Fuse(settings.max_failure_rate, settings.fuse_after_rows)
            self.committed += drive(chain, pending, self._runner(), log, fuse, self._console)

    def _plan(self, phase: ChainPhase, dataset: Dataset) -> tuple[str, list[int]]:
        """Digest of the plan, and the rows of each shard; made and committed at the first call."""
        source, current = phase.source, dataset.current(SAMPLES)
        digest = source.plan_digest()
        rows = source.plan(digest)
        if rows is None:
            if current is not None:
                if phase.steps[0].work is source:
                    made_by = phase.steps[0].made_by
                    check_settings(dataset, current, made_by, self._options.replace)
                if self._options.replace is Replace.NOTHING:
                    raise SourceChangedError(source, dataset)
            rows = source.make_plan(digest, self._token(dataset))
        return digest, rows

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

    def _drop_dependents(self, chain: Chain, outdated: list[TableVersion]) -> None:
        """Say what is made anew. Of another set of samples no table of the old one is left."""
        for version in outdated:
            self._say(f"{chain.dataset.storage.url}: {version.name} is made anew")
        if SAMPLES in {version.name for version in outdated}:
            made = {version.name for version in chain.written}
            for table in chain.dataset.table_names():
                if table not in made:
                    chain.dataset.drop_table(table)

    # Global steps, sinks

    def _run_global(self, phase: GlobalPhase) -> None:
        dataset, artifact = phase.dataset, phase.artifact
        state = self._state(phase)
        if state == "current":
            return
        if state == "changed" and self._options.replace is not Replace.CHANGED:
            raise PipelineError(
                f"{dataset.storage.full(artifact.path)} was made with other settings. Restore "
                "them, choose a new `run` folder, or run again with --overwrite."
            )
        if state == "stale" and self._options.replace is Replace.NOTHING and not phase.writes:
            self._say(
                f"{artifact.name} is stale: its input changed since. It is kept; --refresh makes "
                "it anew."
            )
            return
        for table in artifact.reads:
            _need(dataset, table)
        token = self._token(dataset)
        run_task = self._task()
        with (
            RunLog(dataset.storage, self._run_id) as log,
            self._console.status(f"{phase.step.name} …"),
        ):
            started = time.perf_counter()
            inputs = inputs_of(dataset, artifact.reads)
            run_task(phase.step.run, dataset, artifact, inputs, token)
            seconds = time.perf_counter() - started
            rows = count_table(dataset, artifact.reads[0]).rows
            log.add(ShardResult(phase.step.name, ALL_SHARDS, rows, rows, 0, seconds, None))
        self._say(f"{phase.step.name}: {rows:,} rows in {seconds:.1f} s")
        self.committed += 1

    def _state(self, phase: GlobalPhase) -> str:
        """`artifacts.artifact_state`; of a step that writes a table, the table's too."""
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
        return state if is_whole else "stale"

    def _need_complete(self, phase: GlobalPhase) -> None:
        """A global step's artifact marks its end: without it some shards may still be old."""
        if self._state(phase) != "current":
            raise PipelineError(
                f"{phase.dataset.storage.url}: {phase.step.name!r} is not complete for what is "
                f"there. Run it first: --until {phase.step.name}."
            )

    def _run_export(self) -> None:
        export = self._pipeline.export
        _need(export.selected, export.captions)
        if export.is_current():
            return
        with self._console.status("export …"):
            count = export.run()
        self._say(f"export: {count:,} captioned samples in {export.out.url}")
        self.committed += 1

    def _run_report(self) -> None:
        report = self._pipeline.report()
        _need(report.selected, report.captions)
        if report.is_current():
            return
        with self._console.status("report …"):
            report.run()
        self.committed += 1

    # Means

    def _say(self, text: str) -> None:
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

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
        return partial(run_on_ray, limits=limits)

    def _task(self) -> Callable[..., None]:
        """Runs a function in a worker process, or here when there is no Ray."""
        if self._options.in_process:
            return operator.call
        from fusion_pipeline.engine.ray_pool import run_task

        self._start_ray()
        return run_task

    def _start_ray(self) -> None:
        from fusion_pipeline.engine.ray_pool import RayOptions, start_ray, stop_ray

        if self._ray:
            return
        runner = self._pipeline.config.runner
        with self._console.status("starting Ray …"):
            start_ray(RayOptions(runner.ray_address, runner.workers, runner.dashboard))
        self._stopper.listen()  # Ray has put a handler of its own in place
        self._ray = True
        self._stack.callback(stop_ray)


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
