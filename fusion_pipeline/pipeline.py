"""The main job: which steps a config asks for, what each depends on, and running what is missing.

    pool:      ingest -> resolution -> embeddings -> (centroids) -> clusters -> (selection)
    selected:  repack -> tags, objects, text -> hints -> prompts -> captions
    then       export -> report

Steps in brackets read all shards. Each step is done, or its missing shards are; nothing is kept
in memory between them.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.console import Console

from fusion_pipeline.config import Config, EngineChoice
from fusion_pipeline.dataset.accounting import count_table
from fusion_pipeline.dataset.artifacts import Artifact, artifact_state
from fusion_pipeline.dataset.fingerprints import Fingerprint, fingerprint
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.dataset.schemas import SAMPLES, SOURCES
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.dataset.tables import FingerprintMismatchError
from fusion_pipeline.engine.chain import Chain, run_in_process
from fusion_pipeline.engine.run import Fuse, RunLog, drive, new_run_id
from fusion_pipeline.engine.shard import ALL_SHARDS, ShardResult, Step
from fusion_pipeline.engine.stage import Source, Stage
from fusion_pipeline.errors import FusionError
from fusion_pipeline.export.captions import Export
from fusion_pipeline.fuse.base import CaptionEngine
from fusion_pipeline.fuse.composer import Composer
from fusion_pipeline.fuse.endpoint import Endpoint
from fusion_pipeline.fuse.stage import Caption
from fusion_pipeline.ingest.filters import Resolution
from fusion_pipeline.ingest.rows import SourceChangedError
from fusion_pipeline.ingest.source import Ingest
from fusion_pipeline.perceive.stage import Perceive
from fusion_pipeline.prompts.stages import HintsStage, PromptStage
from fusion_pipeline.select.clusters import Centroids, Clusters
from fusion_pipeline.select.embed import Embed
from fusion_pipeline.select.repack import Repack, StaleSelectionError
from fusion_pipeline.select.selection import Selection

if TYPE_CHECKING:
    from fusion_pipeline.report.html import Report


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


class GlobalStep(Protocol):
    @property
    def name(self) -> str: ...

    def run(self, dataset: Dataset, artifact: Artifact, token: str) -> None: ...


@dataclass(frozen=True)
class ChainPhase:
    dataset: Dataset
    steps: tuple[Step, ...]
    planned: Callable[[], list[int]]
    """Rows of each shard there is to be."""

    @property
    def names(self) -> list[str]:
        return [step.work.name for step in self.steps]


@dataclass(frozen=True)
class GlobalPhase:
    dataset: Dataset
    step: GlobalStep
    artifact: Artifact
    writes: str | None = None
    """The shard-aligned table it writes, if it does."""

    @property
    def names(self) -> list[str]:
        return [self.step.name]


@dataclass(frozen=True)
class Pipeline:
    """What a config asks for, with the lineage of every step."""

    config: Config
    pool: Dataset
    selected: Dataset
    phases: tuple[ChainPhase | GlobalPhase, ...]
    export: Export
    evidence: tuple[str, ...]

    @property
    def step_names(self) -> list[str]:
        return [name for phase in self.phases for name in phase.names] + ["export", "report"]

    @property
    def tables_of_pool(self) -> list[str]:
        """In the order of the data flow."""
        return [SOURCES, SAMPLES, "resolution", "embeddings", "clusters", "selection"]

    @property
    def tables_of_selected(self) -> list[str]:
        chain = self.phases[-1]
        assert isinstance(chain, ChainPhase)
        return [SOURCES, *(step.table for step in chain.steps)]

    def report(self) -> "Report":
        from fusion_pipeline.report.html import Report

        settings = self.config.report
        return Report(
            title=Path(self.config.run).name,
            pool=self.pool,
            selected=self.selected,
            evidence=self.evidence,
            prompts=self.export.prompts,
            captions=self.export.captions,
            settings=self.config.to_yaml(),
            cards=settings.cards,
            groups=settings.groups,
            seed=settings.seed,
            out=Storage(self.config.run),
        )

    def outputs(self) -> list[str]:
        """What there is for a person to open."""
        out, report = self.export.out, Storage(self.config.run)
        found = [
            ("report", report, "report.html"),
            ("captions", out, "densefusion.jsonl"),
            ("LLaVA JSON", out, "llava.json"),
        ]
        return [f"{name:<11}{at.full(file)}" for name, at, file in found if at.exists(file)]


def build_pipeline(config: Config) -> Pipeline:
    """Pure: touches no file but the models' weights, whose hashes are part of the lineage."""
    pool, selected = Dataset(f"{config.run}/pool"), Dataset(f"{config.run}/selected")
    source, choice = config.source, config.select
    ingest = Ingest(
        dataset=pool,
        kind="webdataset" if source.webdataset else "folder",
        place=source.webdataset or source.folder or "",
        shard_size=source.shard_size,
        max_shard_bytes=source.max_shard_mb * 2**20,
        max_image_bytes=source.max_image_mb * 2**20,
        max_pixels=source.max_pixels,
    )
    centroids = Centroids(choice.clusters, choice.iterations, choice.seed)
    selection = Selection(
        propose=choice.copies.propose,
        probes=choice.copies.probes,
        copy_rule=choice.copies.rule,
        duplicates=choice.duplicates.rule,
        threshold=choice.duplicates.threshold,
        per_cluster=choice.per_cluster,
    )
    repack = Repack(pool, selected, choice.shard_size)

    of_pool = _Lineage()
    first = of_pool.chain([ingest, Resolution(config.filter.min_short_edge), Embed()])
    fitted = of_pool.artifact(centroids)
    assigned = of_pool.chain([Clusters(pool)], also=("centroids",))
    decided = of_pool.artifact(selection, also=("centroids",))
    of_selected = _Lineage({"selection": decided.made_by})
    stages = _caption_stages(config)
    packed = of_selected.chain([repack, *stages], also_first=("selection",))

    def pool_rows() -> list[int]:
        return [shard.rows for shard in ingest.plan()]

    return Pipeline(
        config,
        pool,
        selected,
        (
            ChainPhase(pool, first, pool_rows),
            GlobalPhase(pool, centroids, fitted),
            ChainPhase(pool, assigned, pool_rows),
            GlobalPhase(pool, selection, decided, writes="selection"),
            ChainPhase(selected, packed, repack.plan),
        ),
        Export(selected, stages[-1].name, stages[-2].name, Storage(f"{config.run}/export")),
        tuple(stage.name for stage in stages if isinstance(stage, Perceive)),
    )


def _caption_stages(config: Config) -> list[Stage]:
    experts = [Perceive(choice.name, choice.config) for choice in config.experts]
    evidence = tuple(expert.name for expert in experts)
    prompts = PromptStage(config.caption.template)
    caption = _caption_stage(config.caption.engine, evidence, prompts.name)
    return [*experts, HintsStage(evidence, config.hints), prompts, caption]


def _caption_stage(choice: EngineChoice, evidence: tuple[str, ...], prompts: str) -> Caption:
    make: Callable[[], CaptionEngine]
    if choice.endpoint is not None:
        make, version = partial(Endpoint, choice.endpoint), Endpoint.version
        settings = choice.endpoint.fingerprint_fields()
    else:
        assert choice.composer is not None
        make, version = partial(Composer, choice.composer), Composer.version
        settings = choice.composer.model_dump(mode="json")
    return Caption(choice.name, make, version, settings, evidence, prompts)


@dataclass
class _Lineage:
    """Fingerprints of one dataset's tables and artifacts as they are declared, in order."""

    made: dict[str, Fingerprint] = field(default_factory=dict)

    def chain(
        self,
        works: Sequence[Stage | Source],
        also: tuple[str, ...] = (),
        also_first: tuple[str, ...] = (),
    ) -> tuple[Step, ...]:
        steps = []
        for i, work in enumerate(works):
            extra = also + (also_first if i == 0 else ())
            if isinstance(work, Source):
                reads: tuple[str, ...] = ()
                made = self._fingerprint(work.name, work.version, work.settings(), extra, None)
                self.made[SAMPLES] = made
            else:
                reads = (SAMPLES, *work.reads)
                settings, revision = work.settings(), work.revision()
                made = self._fingerprint(
                    work.name, work.version, settings, (*reads, *extra), revision
                )
                self.made[work.name] = made
            steps.append(Step(work, made, {name: self.made[name] for name in reads}))
        return tuple(steps)

    def artifact(self, step: Centroids | Selection, also: tuple[str, ...] = ()) -> Artifact:
        made = self._fingerprint(
            step.name, step.version, step.settings(), (*step.reads, *also), None
        )
        self.made[step.name] = made
        return Artifact(step.name, made, step.reads)

    def _fingerprint(
        self,
        name: str,
        version: int,
        settings: object,
        upstream: Sequence[str],
        revision: str | None,
    ) -> Fingerprint:
        assert isinstance(settings, dict)
        return fingerprint(name, version, settings, {n: self.made[n] for n in upstream}, revision)


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
        dataset = Dataset.create(phase.dataset.storage.url)
        if self._options.overwrite:
            self._drop_changed(phase)
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
        chain = Chain(dataset, steps, self._token(dataset), self._options.retry_failed)
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
                raise PipelineError(
                    f"{chain.dataset.storage.url}: table {table!r} is not there yet. Run the steps "
                    "before this one first (without --only)."
                )
            shards = [shard for shard in shards if shard in there]
        return shards

    def _drop_changed(self, phase: ChainPhase) -> None:
        """Remove what a changed setting, source or selection made obsolete."""
        dataset = phase.dataset
        if any(isinstance(step.work, Source) for step in phase.steps):
            try:
                phase.planned()
                dataset.check_table(SAMPLES, phase.steps[0].made_by)
            except (SourceChangedError, StaleSelectionError, FingerprintMismatchError):
                self._token(dataset)
                self._console.print(f"{dataset.storage.url}: made anew (--overwrite)")
                dataset.clear()
        for step in phase.steps:
            try:
                dataset.check_table(step.table, step.made_by)
            except FingerprintMismatchError:
                self._token(dataset)
                self._console.print(f"{step.table}: made anew (--overwrite)")
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
            self._console.print(
                f"[yellow]{artifact.name} is stale: its input changed since. It is kept; "
                "--overwrite makes it anew.[/yellow]"
            )
            return
        token = self._token(dataset)
        if phase.writes:
            if state == "changed":
                dataset.drop_table(phase.writes)
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
        self._console.print(f"{phase.step.name}: {rows:,} rows in {seconds:.1f} s")
        self.committed += 1

    def _table_state(self, phase: GlobalPhase, state: str) -> str:
        assert phase.writes is not None
        complete = phase.dataset.shards_of(phase.writes) >= set(phase.dataset.shards())
        return state if complete else "stale"

    def _run_export(self) -> None:
        export = self._pipeline.export
        if not export.selected.exists or export.is_current():
            return
        with self._console.status("export …"):
            count = export.run()
        self._console.print(f"export: {count:,} captioned samples in {export.out.url}")
        self.committed += 1

    def _run_report(self) -> None:
        report = self._pipeline.report()
        if not report.selected.exists or report.is_current():
            return
        with self._console.status("report …"):
            report.run()
        self.committed += 1

    # Means

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
            return _call
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


def _call(function: Callable[..., None], *arguments: object) -> None:
    function(*arguments)


def _first_shards(rows: list[int], limit: int) -> list[int]:
    """Whole shards until there are `limit` samples."""
    shards, total = [], 0
    for shard, count in enumerate(rows):
        if total >= limit:
            break
        shards.append(shard)
        total += count
    return shards
