"""The tables that a comparison of two engines reads, as rows of one shard after the other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from fusion_pipeline.dataset.blocks import reading_order
from fusion_pipeline.dataset.evidence import (
    ALT_TEXTS,
    RELEVANT_ALT_TEXTS,
    EvidenceKind,
    TextLine,
    objects_from,
    tags_from,
    text_from,
)
from fusion_pipeline.dataset.layout import Dataset, TableVersion
from fusion_pipeline.dataset.schemas import SAMPLES
from fusion_pipeline.dataset.tables import Footer
from fusion_pipeline.prompts.hints import HintConfig, Hints
from fusion_pipeline.prompts.untrusted import clean
from fusion_pipeline.report.compare_measures import Known, Row

CAPTIONS = "captions/"
"""Before an engine's name: its table."""


class PairTables:
    """The tables of a shard as rows, each of the version that is current at the beginning."""

    def __init__(self, dataset: Dataset, engines: tuple[str, str], evidence: Sequence[str]) -> None:
        self.dataset = dataset
        self._engines = [f"{CAPTIONS}{name}" for name in engines]
        # A caption may quote an alt text as it was: those of the samples are read.
        self._evidence = [t for t in evidence if t not in (ALT_TEXTS, RELEVANT_ALT_TEXTS)]
        names = [SAMPLES, "hints", *self._engines, *self._evidence]
        self._versions = {name: dataset.current(name) for name in names}
        self.shards = sorted(dataset.shards_of(self.version(SAMPLES)))

    def version(self, name: str) -> TableVersion:
        return self._versions[name] or self.dataset.version(name)

    def _read(self, name: str, shard: int) -> pa.Table | None:
        version = self._versions[name]
        try:
            return None if version is None else self.dataset.read_table(version, shard)[0]
        except FileNotFoundError:
            return None  # its step has not run for this shard yet

    def samples(self, shard: int) -> list[Row]:
        return self._rows(SAMPLES, shard)

    def _rows(self, name: str, shard: int) -> list[Row]:
        table = self._read(name, shard)
        rows: list[Row] = [] if table is None else table.to_pylist()
        return rows

    def captions(self, shard: int) -> list[dict[str, Row]]:
        """Of both engines, by key."""
        return [{row["key"]: row for row in self._rows(n, shard)} for n in self._engines]

    def hints(self, shard: int) -> dict[str, Hints]:
        rows = (row for row in self._rows("hints", shard) if row["status"] == "ok")
        return {row["key"]: Hints.from_json(row["hints"]) for row in rows}

    def have_other_inputs(self, shard: int) -> bool:
        """Whether the two tables of captions were made from different tables of one name."""
        footers = [self._footer(name, shard) for name in self._engines]
        a, b = ({} if footer is None else dict(footer.inputs) for footer in footers)
        return any(a[name] != b[name] for name in a.keys() & b.keys())

    def _footer(self, name: str, shard: int) -> Footer | None:
        try:
            return self.dataset.read_footer(self.version(name), shard)
        except FileNotFoundError:
            return None

    def known(self, shard: int, samples: Sequence[Row], config: HintConfig) -> dict[str, Known]:
        """What captions of each sample are held against."""
        cells = {sample["key"]: _Cells([*sample["alt_texts"]]) for sample in samples}
        for name in self._evidence:
            kind = EvidenceKind(name.split("/")[0])
            for row in self._rows(name, shard):
                if row["key"] in cells:
                    cells[row["key"]].add(kind, row[kind.value])
        return {key: found.known(config) for key, found in cells.items()}


@dataclass
class _Cells:
    """Evidence of one sample, over all experts."""

    texts: list[str]
    """Alt texts and labels."""
    lines: list[TextLine] = field(default_factory=list)

    def add(self, kind: EvidenceKind, cell: Sequence[dict[str, Any]] | None) -> None:
        match kind:
            case EvidenceKind.TEXT:
                self.lines += [line for line in text_from(cell) if not line.unread]
            case EvidenceKind.TAGS:
                self.texts += [tag.label for tag in tags_from(cell)]
            case EvidenceKind.OBJECTS:
                self.texts += dict.fromkeys(found.label for found in objects_from(cell))

    def known(self, config: HintConfig) -> Known:
        sure = [t for t in self.lines if round(t.score, 4) >= config.text_threshold]
        cut = config.max_item_chars
        joined = " ".join(line.text for line in reading_order(self.lines))
        return Known([clean(line.text, cut) for line in sure], [joined, *self.texts])
