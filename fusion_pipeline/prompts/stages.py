"""Two cheap stages: evidence -> hints, hints -> fusion prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from fusion_pipeline.dataset.evidence import (
    ALT_TEXTS,
    RELEVANT_ALT_TEXTS,
    DetectedObject,
    EvidenceKind,
    Tag,
    TextLine,
    iou,
    objects_from,
    tags_from,
    text_from,
)
from fusion_pipeline.dataset.rows import Ok, build_table
from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardBlock, Worker
from fusion_pipeline.prompts.hints import HintConfig, Hints, choose_hints
from fusion_pipeline.prompts.render import render, template_name, template_revision


@dataclass(frozen=True)
class RowEvidence:
    """All evidence of one sample, over all experts."""

    tags: list[Tag]
    objects: list[DetectedObject]
    text: list[TextLine]
    alt_texts: list[str]


def read_evidence(block: ShardBlock, tables: Sequence[str]) -> list[RowEvidence]:
    """Evidence of each row of a block. Tags and objects of several tables are put one after the
    other; of text lines that lie at one place, the surer stays. Alt texts are the sample's own, or
    what is left of them where the table of the cleaned ones is read."""
    rows = [RowEvidence([], [], [], list(texts)) for texts in block.column("samples", "alt_texts")]
    for table in tables:
        if table in (ALT_TEXTS, RELEVANT_ALT_TEXTS):
            for row, cell in zip(rows, block.column(table, ALT_TEXTS), strict=True):
                row.alt_texts[:] = [one["text"] for one in cell or () if one["text"]]
            continue
        kind = EvidenceKind(table.split("/")[0])
        for row, cell in zip(rows, block.column(table, kind.value), strict=True):
            match kind:
                case EvidenceKind.TAGS:
                    row.tags.extend(tags_from(cell))
                case EvidenceKind.OBJECTS:
                    row.objects.extend(objects_from(cell))
                case EvidenceKind.TEXT:
                    row.text[:] = _joined(row.text, text_from(cell))
    return rows


_SAME_LINE = 0.5
"""Overlap (intersection over union) from which lines of two experts are one."""


def _joined(lines: Sequence[TextLine], more: Sequence[TextLine]) -> list[TextLine]:
    """Lines of two experts. A line that one of them could not read is the other's."""

    def surer(line: TextLine, others: Sequence[TextLine]) -> bool:
        there = [other for other in others if iou(line.box, other.box) >= _SAME_LINE]
        return all((not line.unread, line.score) > (not o.unread, o.score) for o in there)

    kept = [line for line in more if surer(line, lines)]
    return [*(line for line in lines if surer(line, kept)), *kept]


@dataclass(frozen=True)
class HintsStage:
    """Chooses and orders evidence. Column `hints`: canonical JSON of `prompts.hints.Hints`."""

    reads: tuple[str, ...]
    """Evidence tables."""
    config: HintConfig
    resources: Resources = CPU_WORKER

    name = "hints"
    version = 4
    columns: Sequence[pa.Field] = (pa.field("hints", pa.string()),)

    def settings(self) -> Mapping[str, Any]:
        return self.config.model_dump(mode="json")

    def revision(self) -> None:
        return None

    def open(self) -> Worker:
        return self._work

    def _work(self, block: ShardBlock) -> pa.Table:
        outcomes = []
        for key, row in zip(block.keys, read_evidence(block, self.reads), strict=True):
            hints = choose_hints(row.tags, row.objects, row.text, row.alt_texts, key, self.config)
            outcomes.append(Ok({"hints": hints.to_json()}))
        return build_table(block.keys, outcomes, self.columns)


@dataclass(frozen=True)
class PromptStage:
    """Renders the fusion prompt with one template; writes `prompts/<its name>`."""

    template: str
    resources: Resources = CPU_WORKER

    version = 2
    reads: tuple[str, ...] = ("hints",)
    columns: Sequence[pa.Field] = (pa.field("prompt", pa.string()),)

    @property
    def name(self) -> str:
        return f"prompts/{template_name(self.template)}"

    def settings(self) -> Mapping[str, Any]:
        return {}

    def revision(self) -> str:
        return template_revision(self.template)

    def open(self) -> Worker:
        return self._work

    def _work(self, block: ShardBlock) -> pa.Table:
        outcomes = [
            Ok({"prompt": render(self.template, Hints.from_json(hints))})
            for hints in block.column("hints", "hints")
        ]
        return build_table(block.keys, outcomes, self.columns)
