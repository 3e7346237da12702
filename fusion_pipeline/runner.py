"""Runs what is missing of a pipeline, phase by phase; takes leases and Ray when first needed."""

import contextlib
import operator
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from fusion_pipeline.dataset.accounting import TableCounts, count_table, funnel
from fusion_pipeline.dataset.artifacts import artifact_state
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.dataset.schemas import SAMPLES
from fusion_pipeline.dataset.tables import FingerprintMismatchError
from fusion_pipeline.engine.chain import Chain, run_in_process
from fusion_pipeline.engine.run import Fuse, RunLog, drive, new_run_id
from fusion_pipeline.engine.shard import ALL_SHARDS, ShardResult
from fusion_pipeline.engine.stage import Source
from fusion_pipeline.errors import FusionError, printable
from fusion_pipeline.ingest.rows import SourceChangedError
from fusion_pipeline.pipeline import ChainPhase, GlobalPhase, Pipeline
from fusion_pipeline.select.repack import StaleSelectionError


class PipelineError(FusionError):
    """The run can't go on; the message says what to do."""


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
    retry_failed: bool = False
    in_process: bool = False
    """The plain loop instead of Ray."""


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
        self.committed = 0
        """Tables and artifacts written by this run."""

    def run(self) -> None:
        """Everything that the options ask for and that is not there yet.

        Raises PipelineError, SourceError, StaleSelectionError, TableError, LeaseError, StageError.
        """
        wanted = self._wanted()
        with self._stack:
            for phase in self._pipeline.phases:
                if not wanted.isdisjoint(phase.names):
                    if isinstance(phase, ChainPhase):
                        self._run_chain(phase, wanted)
                    else:
                        self._run_global(phase)
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
        dataset = Dataset.create(phase.dataset.storage.url)
        if isinstance(phase.steps[0].work, Source) and not dataset.shards():
            self._token(dataset)  # the plan is about to be made: by one run only
        if self._options.overwrite:
            self._drop_changed(phase, wanted)
        rows = phase.planned()
        shards = list(range(len(rows)))
        if self._options.limit is not None:
            shards = _first_shards(rows, self._options.limit)
        steps = tuple(step for step in phase.steps if step.work.name in wanted)
        chain = Chain(dataset, steps, retry_failed=self._options.retry_failed)
        chain.check(write=False)
        pending = chain.pending(self._with_inputs(chain, shards))
        if not pending:
            return
        chain = replace(chain, token=self._token(dataset))
        chain.check(write=True)
        with RunLog(dataset.storage, self._run_id) as log:
            settings = self._pipeline.config.runner
            fuse = Fuse(settings.max_failure_rate, settings.fuse_after_rows)
            self.committed += drive(chain, pending, self._runner(), log, fuse, self._console)

    def _with_inputs(self, chain: Chain, shards: list[int]) -> list[int]:
        """Those of the shards that have every table the chain reads and does not write."""
        made = {step.table for step in chain.steps}
        for table in {name for step in chain.steps for name in step.inputs} - made:
            there = chain.dataset.shards_of(table)
            missing = [shard for shard in shards if shard not in there]
            if missing and len(missing) == len(shards):
                raise _missing(chain.dataset, table)
            shards = [shard for shard in shards if shard in there]
        return shards

    def _drop_changed(self, phase: ChainPhase, wanted: set[str]) -> None:
        """Remove what a changed setting, source or selection made obsolete, and is wanted anew."""
        dataset = phase.dataset
        steps = [step for step in phase.steps if step.work.name in wanted]
        if any(isinstance(step.work, Source) for step in steps):
            try:
                phase.planned()
                dataset.check_table(SAMPLES, phase.steps[0].made_by)
            except (SourceChangedError, StaleSelectionError, FingerprintMismatchError):
                self._token(dataset)
                self._say(f"{dataset.storage.url}: made anew (--overwrite)")
                dataset.clear()
        for step in steps:
            try:
                dataset.check_table(step.table, step.made_by)
            except FingerprintMismatchError:
                self._token(dataset)
                self._say(f"{step.table}: made anew (--overwrite)")
                dataset.drop_table(step.table)

    # Global steps, sinks

    def _run_global(self, phase: GlobalPhase) -> None:
        dataset, artifact = phase.dataset, phase.artifact
        state = artifact_state(dataset, artifact)
        if phase.writes and state != "missing":
            state = self._table_state(phase, state)
        if state == "current":
            return
        if state == "changed" and not self._options.overwrite:
            if phase.writes:
                dataset.check_table(phase.writes, artifact.made_by)
            raise PipelineError(
                f"{dataset.storage.full(artifact.path)} was made with other settings. Restore "
                "them, choose a new `run` folder, or run again with --overwrite."
            )
        if state == "stale" and not self._options.overwrite and not phase.writes:
            self._say(
                f"{artifact.name} is stale: its input changed since. It is kept; --overwrite "
                "makes it anew."
            )
            return
        for table in artifact.reads:
            _need(dataset, table)
        token = self._token(dataset)
        if phase.writes and state == "changed":
            dataset.drop_table(phase.writes)
        if state in ("changed", "stale"):
            self._drop_dependents(dataset, artifact.name)
        if phase.writes:
            dataset.describe_table(phase.writes, artifact.made_by)
        run_task = self._task()
        with (
            RunLog(dataset.storage, self._run_id) as log,
            self._console.status(f"{phase.step.name} …"),
        ):
            started = time.perf_counter()
            run_task(phase.step.run, dataset, artifact, token)
            seconds = time.perf_counter() - started
            rows = count_table(dataset, artifact.reads[0]).rows
            log.add(ShardResult(phase.step.name, ALL_SHARDS, rows, rows, 0, seconds, None))
        self._say(f"{phase.step.name}: {rows:,} rows in {seconds:.1f} s")
        self.committed += 1

    def _table_state(self, phase: GlobalPhase, state: str) -> str:
        assert phase.writes is not None
        needed = phase.dataset.shards_of(phase.artifact.reads[-1])
        return state if phase.dataset.shards_of(phase.writes) >= needed else "stale"

    def _need_complete(self, phase: GlobalPhase) -> None:
        """A global step's artifact marks its end: without it some shards may still be old."""
        if artifact_state(phase.dataset, phase.artifact) != "current":
            raise PipelineError(
                f"{phase.dataset.storage.url}: {phase.step.name!r} is not complete for what is "
                f"there. Run it first: --until {phase.step.name}."
            )

    def _drop_dependents(self, dataset: Dataset, artifact: str) -> None:
        """Tables made from an artifact that is about to be another."""
        for table in dataset.table_names():
            fields = dataset.table_fields(table) or {}
            if artifact in fields["upstream"]:
                self._say(f"{table}: made anew, since {artifact} is")
                dataset.drop_table(table)

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
            dataset.clean_temporary()
        return self._tokens[url]

    def _runner(self) -> Callable[[Chain, Sequence[int]], Iterable[ShardResult]]:
        if self._options.in_process:
            return run_in_process
        from fusion_pipeline.engine.ray_pool import run_on_ray

        self._start_ray()
        return run_on_ray

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
        self._ray = True
        self._stack.callback(stop_ray)


def _need(dataset: Dataset, table: str) -> None:
    if not dataset.shards_of(table):
        raise _missing(dataset, table)


def _missing(dataset: Dataset, table: str) -> PipelineError:
    return PipelineError(
        f"{dataset.storage.url}: table {table!r} is not there yet. Run the steps before this one "
        "first (without --only)."
    )


def _first_shards(rows: list[int], limit: int) -> list[int]:
    """Whole shards until there are `limit` samples."""
    shards, total = [], 0
    for shard, count in enumerate(rows):
        if total >= limit:
            break
        shards.append(shard)
        total += count
    return shards
