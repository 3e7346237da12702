"""What there is of a pipeline's tables, and what of it is out of date."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusion_pipeline.dataset.accounting import TableCounts, count_rows
from fusion_pipeline.dataset.artifacts import artifact_state
from fusion_pipeline.dataset.layout import Dataset, TableVersion
from fusion_pipeline.dataset.schemas import SAMPLES, SOURCES
from fusion_pipeline.dataset.tables import Footer, NoTableError, StaleTableError
from fusion_pipeline.engine.chain import depends_on
from fusion_pipeline.engine.shard import Step
from fusion_pipeline.engine.stage import Source
from fusion_pipeline.pipeline import ChainPhase, GlobalPhase, Pipeline
from fusion_pipeline.select.repack import Repack


@dataclass(frozen=True)
class TableState:
    counts: TableCounts
    pending: int
    """Shards of the dataset that lack this table."""
    stale: int
    """Shards made from inputs that have changed since: `--refresh` makes them again."""
    other_settings: bool
    """Made with other settings than the config's: `--overwrite` makes it again."""

    def as_dict(self) -> dict[str, Any]:
        return {
            **self.counts.as_dict(),
            "pending": self.pending,
            "stale": self.stale,
            "other_settings": self.other_settings,
        }


Footers = Mapping[str, Mapping[int, Footer]]
"""By table and shard."""


def table_states(pipeline: Pipeline, dataset: Dataset) -> list[TableState]:
    """Of the pool's or the selected dataset's tables, in the order of the data flow.

    O(shards): footers are read, not tables; the source is not looked at.
    """
    if not dataset.exists:
        return []
    footers = {table: dataset.footers(table) for table in dataset.table_names()}
    states = []
    for phase in pipeline.phases:
        if phase.dataset is not dataset:
            continue
        if isinstance(phase, GlobalPhase):
            if phase.writes:
                states += _of_global(footers, phase, phase.writes)
            continue
        for step in phase.steps:
            for table in (SOURCES, SAMPLES) if isinstance(step.work, Source) else (step.table,):
                states += _of_step(footers, phase, step, table)
    return states


def export_state(pipeline: Pipeline) -> dict[str, Any]:
    """`state`: missing, current or outdated (other tables or rules than there are now); of one that
    is there also what it holds, and how many captioned samples it leaves out."""
    export = pipeline.export
    counts = export.counts()
    if counts is None:
        return {"state": "missing"}
    versions = [(step, export.selected.current(step.table)) for step in pipeline.rules()]
    is_current = export.is_current() and all(
        version is not None and version.made_by.hash == step.made_by.hash
        for step, version in versions
    )
    return {"state": "current" if is_current else "outdated", **counts._asdict()}


def stale_artifacts(pipeline: Pipeline) -> list[str]:
    """Names of artifacts without a table that their inputs have outdated."""
    return [
        phase.artifact.name
        for phase in pipeline.phases
        if isinstance(phase, GlobalPhase)
        and phase.writes is None
        and phase.dataset.exists
        and artifact_state(phase.dataset, phase.artifact) == "stale"
    ]


def _of_step(footers: Footers, phase: ChainPhase, step: Step, table: str) -> list[TableState]:
    current = phase.dataset.current(table)
    if current is None:
        return _not_yet(footers, table)
    changed = current.made_by.hash != step.made_by.hash
    is_old = not changed and _expected(phase.dataset, step, current) != current.digest
    return [_state(footers, table, is_old, changed)]


def _expected(dataset: Dataset, step: Step, current: TableVersion) -> str | None:
    """Digest of the version that a table would have if it were made now."""
    if isinstance(step.work, Repack):
        depends = {"plan": step.work.plan_digest()}
    elif isinstance(step.work, Source):  # to know its plan the source must be listed
        return current.digest
    else:
        try:
            versions = {name: dataset.version(name) for name in step.inputs}
            depends = depends_on(dataset, step, versions)
        except (NoTableError, StaleTableError):
            return None
    return TableVersion.of(current.name, step.made_by, depends).digest


def _of_global(footers: Footers, phase: GlobalPhase, table: str) -> list[TableState]:
    current = phase.dataset.current(table)
    if current is None:
        return _not_yet(footers, table)
    changed = current.made_by.hash != phase.artifact.made_by.hash
    is_old = not changed and artifact_state(phase.dataset, phase.artifact) != "current"
    return [_state(footers, table, is_old, changed)]


def _not_yet(footers: Footers, table: str) -> list[TableState]:
    """Of a table that the config asks for and no run has made."""
    shards = len(footers.get(SAMPLES, {}))
    return [TableState(TableCounts(table), shards, 0, False)] if shards else []


def _state(footers: Footers, table: str, is_old: bool, changed: bool) -> TableState:
    counts = count_rows(table, footers[table])
    stale = counts.shards if is_old else _stale_shards(footers, table)
    pending = len(footers.get(SAMPLES, {}).keys() - footers[table].keys())
    return TableState(counts, pending, 0 if changed else stale, changed)


def _stale_shards(footers: Footers, table: str) -> int:
    return sum(
        any(
            (there := footers.get(name, {}).get(shard)) is None or there.digest != digest
            for name, digest in footer.inputs.items()
        )
        for shard, footer in footers[table].items()
    )
