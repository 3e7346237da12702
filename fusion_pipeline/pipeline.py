"""The main job: which steps a config asks for, what each depends on, and running what is missing.

    pool:      ingest -> resolution -> embeddings -> (centroids) -> clusters -> (selection)
    selected:  repack -> alt_texts [-> relevance], tags -> objects, text -> hints -> prompts
               -> [(meta_sample) ->] captions
    then       export -> report

Steps in round brackets read all shards; those in square ones are there when the config has
`relevance` or `caption.sample`. Each
step is done, or its missing shards are; nothing is kept in memory between them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from experts import load_expert
from experts.tagging.vocabulary import VocabularyConfig
from fusion_pipeline.config import CaptionConfig, Config, ExpertChoice
from fusion_pipeline.dataset.artifacts import Artifact
from fusion_pipeline.dataset.evidence import MERGED_TAGS, EvidenceKind
from fusion_pipeline.dataset.fingerprints import Fingerprint, fingerprint
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.schemas import SAMPLES, SAMPLES_SCHEMA, SOURCES, stage_schema
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.engine.shard import Step
from fusion_pipeline.engine.stage import Resources, Source, Stage
from fusion_pipeline.export.blur import BLUR, Blur
from fusion_pipeline.export.captions import Export
from fusion_pipeline.fuse.engines import engine_of
from fusion_pipeline.fuse.stage import Caption
from fusion_pipeline.ingest.filters import Resolution
from fusion_pipeline.ingest.source import Ingest
from fusion_pipeline.perceive.alt_text import AltText
from fusion_pipeline.perceive.look import Look
from fusion_pipeline.perceive.merge_stages import MergeObjects, MergeTags
from fusion_pipeline.perceive.relevance import Relevance, RelevantAltTexts
from fusion_pipeline.perceive.stage import Perceive
from fusion_pipeline.prompts.stages import HintsStage, PromptStage
from fusion_pipeline.select.clusters import Centroids, Clusters
from fusion_pipeline.select.embed import Embed
from fusion_pipeline.select.meta_sample import MetaSample
from fusion_pipeline.select.repack import Repack
from fusion_pipeline.select.selection import Selection

if TYPE_CHECKING:
    from fusion_pipeline.report.html import Report


class GlobalStep(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def resources(self) -> Resources: ...

    def run(
        self, dataset: Dataset, artifact: Artifact, inputs: Mapping[str, str], token: str
    ) -> None:
        """Make the artifact from the tables it reads and commit it; `inputs`: `inputs_of` them."""
        ...


@dataclass(frozen=True)
class ChainPhase:
    dataset: Dataset
    steps: tuple[Step, ...]
    source: Source
    """By whose plan the dataset's shards are made; the first step, here or in an earlier phase."""
    packs: "GlobalPhase | None" = None
    """The step whose choice this dataset is packed from."""

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
    keeps_stale: bool = False
    """Whether its whole table stays when its inputs have changed, until `--refresh`."""

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
    perceived: tuple[str, ...]
    """Tables of all experts, and those that merge them."""
    evidence: tuple[str, ...]
    """Tables that prompts and captions are made from: the merged ones, and those of texts."""
    sample: MetaSample | None = None
    """What draws the rows to caption; None: all are."""

    @property
    def step_names(self) -> list[str]:
        return [name for phase in self.phases for name in phase.names] + ["export", "report"]

    def tables_of(self, dataset: Dataset) -> list[str]:
        """Tables of the pool or of the selected dataset, in the order of the data flow."""
        tables = [SOURCES]
        for phase in self.phases:
            if phase.dataset is not dataset:
                continue
            if isinstance(phase, ChainPhase):
                tables += [step.table for step in phase.steps]
            elif phase.writes:
                tables.append(phase.writes)
        return tables

    def schemas(self) -> dict[str, pa.Schema]:
        """Of the tables of the selected dataset that runs of this config make, by name."""
        stages = [step.work for step in self._selected_steps() if not isinstance(step.work, Source)]
        found = {stage.name: stage_schema(stage.columns) for stage in stages}
        if self.sample:
            found[self.sample.name] = stage_schema(self.sample.columns)
        return {SAMPLES: SAMPLES_SCHEMA, **found}

    def rules(self) -> list[Step]:
        """The steps by whose tables exported pictures are blurred and samples left out."""
        return [step for step in self._selected_steps() if step.table in self.export.rules_by]

    def _selected_steps(self) -> list[Step]:
        chains = [phase for phase in self.phases if isinstance(phase, ChainPhase)]
        return [step for chain in chains if chain.dataset is self.selected for step in chain.steps]

    def report(self) -> "Report":
        from fusion_pipeline.report.html import Report

        settings, counts = self.config.report, self.export.counts()
        return Report(
            title=Path(self.config.run).name,
            pool=self.pool,
            selected=self.selected,
            evidence=self.perceived,
            prompts=self.export.prompts,
            captions=self.export.captions,
            settings=self.config.to_yaml(),
            cards=settings.cards,
            groups=settings.groups,
            seed=settings.seed,
            out=Storage(self.config.run),
            thresholds={
                EvidenceKind.TAGS: self.config.hints.tag_threshold,
                EvidenceKind.OBJECTS: self.config.hints.object_threshold,
            },
            sample=tuple(step.name for step in [self.sample] if step),
            exported=counts._asdict() if counts and self.export.is_current() else {},
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
    centroids = Centroids(
        choice.clusters, choice.iterations, choice.seed, choice.threads, choice.gpus
    )
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
    sample = _meta_sample(config, repack)
    *stages, caption = _caption_stages(config, selected, sample)
    choose = GlobalPhase(pool, selection, decided, writes="selection")
    if sample is None:
        packed = of_selected.chain([repack, *stages, caption], also_first=("selection",))
        captioned: tuple[ChainPhase | GlobalPhase, ...] = ()
    else:
        packed = of_selected.chain([repack, *stages], also_first=("selection",))
        drawn = of_selected.artifact(sample)
        captioned = (
            GlobalPhase(selected, sample, drawn, writes=sample.name, keeps_stale=True),
            ChainPhase(selected, of_selected.chain([caption]), repack, packs=choose),
        )

    return Pipeline(
        config,
        pool,
        selected,
        (
            ChainPhase(pool, first, ingest),
            GlobalPhase(pool, centroids, fitted),
            ChainPhase(pool, assigned, ingest),
            choose,
            ChainPhase(selected, packed, repack, packs=choose),
            *captioned,
        ),
        Export(
            selected,
            caption.name,
            stages[-1].name,
            Storage(f"{config.run}/export"),
            _blur(config),
            tuple(config.export.where),
        ),
        tuple(stage.name for stage in stages if isinstance(stage, _PERCEIVES)),
        evidence_of(config),
        sample,
    )


def _meta_sample(config: Config, repack: Repack) -> MetaSample | None:
    choice = config.caption.sample
    if choice is None:
        return None
    prompts = PromptStage(config.caption.template).name
    return MetaSample(choice.size, choice.seed, choice.by, repack, prompts, evidence_of(config))


def _caption_stages(
    config: Config, dataset: Dataset, sample: MetaSample | None = None
) -> list[Stage]:
    perceive = _perceive_stages(config)
    evidence = evidence_of(config)
    prompts = PromptStage(config.caption.template)
    also = (sample.name,) if sample else ()
    caption = _caption_stage(config.caption, dataset, evidence, prompts.name, also)
    return [*perceive, HintsStage(evidence, config.hints), prompts, caption]


_PERCEIVES = (AltText, Relevance, RelevantAltTexts, Perceive, MergeTags, MergeObjects, Look)


def _perceive_stages(config: Config) -> list[Stage]:
    """The alt texts; every expert, the taggers first, since open-set detectors are told the tags;
    and the merging of what they say."""
    experts = [_perceive(choice) for choice in config.experts]
    untold: list[Stage] = [_perceive(choice) for choice in config.scores]
    untold += [Look()] if config.look else []
    untold += [_perceive(choice, BLUR) for choice in config.blur.experts] if config.blur else []
    of_kind = {kind: [e for e in experts if e.expert_class.kind is kind] for kind in EvidenceKind}
    taggers, detectors = of_kind[EvidenceKind.TAGS], of_kind[EvidenceKind.OBJECTS]
    stages: list[Stage] = [AltText(config.alt_text), *_relevance_stages(config), *taggers]
    if taggers:
        stages.append(MergeTags(tuple(tagger.name for tagger in taggers)))
    stages += [*detectors]
    if detectors:
        names = tuple(detector.name for detector in detectors)
        stages.append(MergeObjects(names, bool(taggers), config.merge))
    return [*stages, *of_kind[EvidenceKind.TEXT], *untold]


def _perceive(choice: ExpertChoice, folder: str = "") -> Perceive:
    return Perceive(
        choice.expert,
        choice.config,
        reads=(MERGED_TAGS,) if load_expert(choice.expert).uses_tags else (),
        resources=Resources(**choice.hosting.model_dump()),
        label=choice.name,
        tiles=choice.tiles,
        folder=folder,
    )


def _blur(config: Config) -> Blur | None:
    if config.blur is None:
        return None
    tables = tuple(_perceive(choice, BLUR).name for choice in config.blur.experts)
    return Blur(tables, config.blur.labels, config.blur.score)


def _relevance_stages(config: Config) -> list[Stage]:
    choice = config.relevance
    if choice is None:
        return []
    resources = Resources(**choice.hosting.model_dump())
    assert isinstance(choice.config, VocabularyConfig)
    scores = Relevance(choice.expert, choice.config, choice.name, resources)
    return [scores, RelevantAltTexts(scores.name, config.alt_text.min_relevance)]


def evidence_of(config: Config) -> tuple[str, ...]:
    """Tables that prompts and captions are made from: the merged ones, and those of texts."""

    def is_told(stage: Stage) -> bool:
        match stage:
            case Perceive():
                return stage.expert_class.kind is EvidenceKind.TEXT
            case AltText():
                return config.relevance is None
            case _:
                return not isinstance(stage, Relevance | Look)

    return tuple(stage.name for stage in _perceive_stages(config) if is_told(stage))


def _caption_stage(
    config: CaptionConfig,
    dataset: Dataset,
    evidence: tuple[str, ...],
    prompts: str,
    sample: tuple[str, ...],
) -> Caption:
    engine = engine_of(config.engine, dataset)
    return Caption(
        config.engine.name,
        engine,
        evidence,
        prompts,
        config.max_words,
        config.repair and engine.can_repair,
        sample,
    )


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
            steps.append(Step(work, made, {name: self.made[name] for name in reads}, also))
        return tuple(steps)

    def artifact(
        self, step: Centroids | Selection | MetaSample, also: tuple[str, ...] = ()
    ) -> Artifact:
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


def smoke_steps(config: Config, dataset: Dataset, source: Source) -> tuple[Step, ...]:
    """The source, then the config's experts, hints, prompts and captions, over one dataset.

    For a trial on a few images: without filter and selection.
    """
    return _Lineage().chain([source, *_caption_stages(config, dataset)])
