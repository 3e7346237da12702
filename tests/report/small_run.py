"""A small run, made by the real steps around hand-made evidence: every kind of outcome is there."""

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from fusion_pipeline.dataset.evidence import (
    ARROW_TYPES,
    DetectedObject,
    EvidenceKind,
    Tag,
    TextLine,
    to_arrow,
)
from fusion_pipeline.dataset.fingerprints import fingerprint
from fusion_pipeline.dataset.images import inspect
from fusion_pipeline.dataset.layout import Dataset, TableVersion
from fusion_pipeline.dataset.rows import NotOk, Ok, Outcome, build_table
from fusion_pipeline.dataset.samples import Sample, pack_samples, sample_key
from fusion_pipeline.dataset.schemas import SOURCES_SCHEMA, UPSTREAM
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.prompts.hints import Hints
from fusion_pipeline.report.html import Report
from fusion_pipeline.select.selection import Selection
from tests.dataset.tables import put_table

HOSTILE = (
    "<script>alert('alt')</script><img src=\"https://evil.example/x\"> \x1b[31m \u202e fdp.exe"
)
HINTS = Hints(
    tags=(Tag("fruit", 0.91),),
    objects=(DetectedObject("apple", 0.8, (0.25, 0.5, 0.75, 1.0)),),
    text=(TextLine(f"EAT {HOSTILE}", 0.95, (0.1, 0.1, 0.5, 0.1, 0.5, 0.2, 0.1, 0.2)),),
)
MADE_BY = fingerprint("test", 1, {}, {})


def picture(seed: int, width: int = 400, height: int = 300, orientation: int = 1) -> bytes:
    low = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    sink = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(low).resize((width, height)).save(sink, "JPEG", exif=exif)
    return sink.getvalue()


def put(dataset: Dataset, name: str, table: pa.Table, shard: int = 0) -> None:
    put_table(dataset, TableVersion.of(name, MADE_BY), table, shard)


def put_samples(dataset: Dataset, samples: Sequence[Sample]) -> None:
    tar, table = pack_samples(samples)
    dataset.storage.put(TableVersion.of("samples", MADE_BY).tar_path(0), tar)
    put(dataset, "samples", table)


def source_row(number: int, key: str | None, reason: str | None) -> dict[str, Any]:
    return {
        "row_id": hashlib.sha256(str(number).encode()).hexdigest()[:32],
        "key": key,
        "status": "failed" if reason else "ok",
        "reason": reason,
        "source": "00000.tar",
        "source_id": f"{number:09d}",
        "url": None,
    }


EVIDENCE = ("tags/t", "objects/o", "text/x")
FAILED_SOURCES = ("no_image", "corrupt: bad <b>header</b>", "corrupt: other")


@dataclass(frozen=True)
class Run:
    root: Path
    samples: list[Sample]
    report: Report

    @property
    def page(self) -> str:
        return (self.root / "report.html").read_text()


def build_run(root: Path, chosen: int = 2, captioned: bool = True) -> Run:
    """Ten input rows: three failed, seven made six samples. The first two samples are selected (or
    none), the second one's caption failed; the next three were dropped as duplicates, the last one
    is too small."""
    pool, selected = Dataset.create(root / "pool"), Dataset.create(root / "selected")
    samples = []
    for number in range(6):
        image = picture(number, orientation=6 if number == 0 else 1)
        rows = ["0a", "0b"] if number == 0 else [f"{number}a"]
        alt = [HOSTILE] if number == 0 else []
        urls = ["https://example.com/a.jpg?<x>"] if number == 0 else []
        samples.append(Sample(sample_key(image), image, inspect(image), rows, alt, urls))
    _put_pool(pool, samples, chosen)
    put_samples(selected, samples[:chosen])
    _put_selected(selected, samples[:chosen], captioned)
    report = Report(
        title="small & <odd>",
        pool=pool,
        selected=selected,
        evidence=EVIDENCE,
        prompts="prompts/p",
        captions="captions/c",
        settings="run: <b>x</b>\n",
        cards=8,
        groups=8,
        seed=0,
        out=Storage(root),
    )
    return Run(root, samples, report)


def _put_pool(pool: Dataset, samples: Sequence[Sample], chosen: int) -> None:
    put_samples(pool, samples)
    rows = [
        source_row(n, key, None) for n, key in enumerate(s.key for s in samples for _ in s.row_ids)
    ]
    rows += [source_row(100 + n, None, reason) for n, reason in enumerate(FAILED_SOURCES)]
    put(pool, "sources", pa.Table.from_pylist(rows, schema=SOURCES_SCHEMA))
    keys = [s.key for s in samples]
    small = NotOk("filtered", "short_edge: 300 px, at least 448")
    after: list[Outcome] = [Ok({})] * 5 + [NotOk("filtered", f"{UPSTREAM}resolution")]
    put(pool, "resolution", build_table(keys, [*[Ok({})] * 5, small], ()))
    put(pool, "embeddings", build_table(keys, after, ()))
    put(pool, "clusters", build_table(keys, after, ()))
    a, _, c, _, _, _ = keys
    decided: list[Outcome] = [
        Ok({"cluster": 0}),
        Ok({"cluster": 1}),
        _copy("semantic_duplicate", a, 0.96),
        _copy("near_exact_copy", c, 0.991),
        _copy("near_exact_copy", a, 0.934),
    ]
    if not chosen:
        decided = [NotOk("filtered", "over_budget", {"cluster": 0})] * 5
    put(pool, "selection", build_table(keys, [*decided, after[5]], Selection.columns))


def _text(keys: Sequence[str]) -> pa.Table:
    """A line that can't be read, and one that can."""
    quad = (0.1, 0.6, 0.5, 0.6, 0.5, 0.7, 0.1, 0.7)
    column = pa.field("text", ARROW_TYPES[EvidenceKind.TEXT])
    lines = [TextLine("", 0.9, quad, "Cyrl"), TextLine("OPEN", 0.9, quad, "Latn")]
    cell = to_arrow(EvidenceKind.TEXT, [lines]).to_pylist()[0]
    outcomes: list[Outcome] = [Ok({"text": cell}), Ok({"text": []})]
    return build_table(keys, outcomes[: len(keys)], (column,))


def _copy(reason: str, of: str, cosine: float) -> NotOk:
    return NotOk("filtered", reason, {"cluster": 0, "same_as": of, "similarity": cosine})


def _put_selected(selected: Dataset, samples: Sequence[Sample], captioned: bool) -> None:
    keys = [s.key for s in samples]

    def table(name: str, column: str, values: Sequence[Mapping[str, Any] | Outcome]) -> None:
        rows = [v if isinstance(v, (Ok, NotOk)) else Ok(v) for v in values]
        columns = [pa.field(n, pa.string()) for n in column.split()]
        put(selected, name, build_table(keys, rows[: len(keys)], columns))

    for name in EVIDENCE[:2]:
        table(name, "", [{}, {}])
    put(selected, EVIDENCE[2], _text(keys))
    table("hints", "hints", [{"hints": HINTS.to_json()}, {"hints": Hints().to_json()}])
    table("prompts/p", "prompt", [{"prompt": f"Describe. {HOSTILE}"}, {"prompt": "Describe."}])
    if captioned:
        caption = {"caption": f"An apple beside the words {HOSTILE}", "finish": "stop"}
        table("captions/c", "caption finish", [caption, NotOk("failed", "http_500: <i>no</i>")])
