"""How many rendered text lines the OCR expert reads, on demo data whose texts are known.

    python -m benchmarks.reading [--report 29 30 31] [--work FOLDER]

Every rendered picture of the pool that is large enough for the pipeline, edited copies included;
text in photos is in no truth file. A line of 12 to 64 px counts as read with a character error of
at most 5 %. With `--work` the demo data and the tables stay in a folder and are taken from there
the next time.
"""

import argparse
import io
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.result import finish
from experts import load_expert
from fusion_pipeline.config import load_config
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.demo import make_demo_data
from fusion_pipeline.demo.evaluate import Row, TextScore, Truth, score_text
from fusion_pipeline.engine.chain import Chain, run_in_process
from fusion_pipeline.engine.shard import Step
from fusion_pipeline.perceive.stage import Perceive
from fusion_pipeline.pipeline import ChainPhase, build_pipeline
from fusion_pipeline.runner import Options, Runner

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
EXPERT = "rapidocr"
BANDS = ((12, 15), (16, 23), (24, 31), (32, 47), (48, 64))
"""Em sizes in whole pixels (halved ones rounded down), both ends included."""


@dataclass(frozen=True)
class Read:
    """The rendered pictures of one seed as a pool, with the text table."""

    seed: int
    pool: Dataset
    truth: Truth
    table: str

    def score(self, keep: Callable[[Row, Row], bool]) -> TextScore:
        """Of the lines for which `keep(picture, line)` holds."""
        rows = {
            name: {**row, "texts": [line for line in row["texts"] if keep(row, line)]}
            for name, row in self.truth.rows.items()
        }
        return score_text(self.pool, self.pool, Truth(rows), self.table)


def read_seed(folder: Path, seed: int) -> Read:
    """Make, ingest and read one seed's rendered pictures; what is there is not made again."""
    demo, rendered = folder / f"demo-{seed}", folder / f"rendered-{seed}"
    if not (demo / "truth.json").exists():  # written last
        make_demo_data(demo, seed)
    truth = Truth.read(demo / "truth.json")
    if not rendered.exists():
        part = rendered.with_suffix(".part")
        part.mkdir(exist_ok=True)
        wanted = {name for name, row in truth.rows.items() if _wanted(row)}
        for tar in sorted((demo / "shards").glob("*.tar")):
            (part / tar.name).write_bytes(_only(tar, wanted))
        part.rename(rendered)
    overrides = [f"run={folder}/read-{seed}", f"source.webdataset={rendered}"]
    pipeline = build_pipeline(load_config(CONFIG, overrides))
    Runner(pipeline, Options(until="ingest", in_process=True), Console(quiet=True)).run()
    first = pipeline.phases[0]
    assert isinstance(first, ChainPhase)
    samples = first.steps[0].made_by
    stage = Perceive(EXPERT, load_expert(EXPERT).Config())
    # The table is this benchmark's own, in a pool of its own: no run ever compares its lineage.
    step = Step(stage, samples, {"samples": samples})
    with hold_lease(pipeline.pool.storage, "benchmark") as token:
        chain = Chain.resolve(pipeline.pool, (step,)).under(token)
        chain.describe()
        for _ in run_in_process(chain, pipeline.pool.shards()):
            pass
    return Read(seed, pipeline.pool, truth, stage.name)


def _wanted(row: Row) -> bool:
    """Rendered, with text, large enough to get to the experts; equal bytes once."""
    rendered = row["kind"] != "photo" and bool(row["texts"])
    twin = (row["copy_kind"] or "").startswith("exact")
    return rendered and not twin and row["expected"]["resolution"] == "ok"


def _only(tar: Path, names: set[str]) -> bytes:
    """The members of a tar that belong to these samples."""
    out = io.BytesIO()
    with tarfile.open(tar) as source, tarfile.open(fileobj=out, mode="w") as chosen:
        for member in source.getmembers():
            if member.name.partition(".")[0] in names:
                chosen.addfile(member, source.extractfile(member))
    return out.getvalue()


def table_of(reads: Sequence[Read], groups: dict[str, Callable[[Row, Row], bool]]) -> list[Row]:
    """Lines, and how many of them were read, of each group in all seeds together."""
    rows = []
    for name, keep in groups.items():
        scores = [read.score(keep) for read in reads]
        lines, right = sum(s.lines for s in scores), sum(s.read for s in scores)
        share = right / lines if lines else 1.0
        rows.append({"lines of": name, "lines": lines, "read": right, "share": share})
    return rows


def by_field(reads: Sequence[Read], field: str) -> list[Row]:
    """The same by a field of the truth, for example the kind of picture."""
    wanted = [row for read in reads for row in read.truth.rows.values() if _wanted(row)]
    names = {row[field] or "none" for row in wanted}

    def same(name: str) -> Callable[[Row, Row], bool]:
        return lambda row, line: (row[field] or "none") == name

    return table_of(reads, {name: same(name) for name in sorted(names)})


def in_band(low: int, high: int) -> Callable[[Row, Row], bool]:
    return lambda row, line: low <= int(line["px"]) <= high


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--report", type=int, nargs="+", default=[29, 30, 31])
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        reads = [read_seed(options.work or Path(temporary), seed) for seed in options.report]
        bands = {f"{low}-{high} px": in_band(low, high) for low, high in BANDS}
        rows = table_of(reads, {**bands, "all": lambda row, line: True})
        details: dict[str, Any] = {
            "seeds": options.report,
            "expert": EXPERT,
            "pictures": sum(t.num_rows for read in reads for _, t in read.pool.iterate("samples")),
            "by_picture": by_field(reads, "kind"),
            "by_copy": by_field(reads, "copy_kind"),
            "missed": {read.seed: read.score(lambda row, line: True).missed for read in reads},
        }
    share = float(rows[-1]["share"])
    finish("rendered-lines-read", share, "lines read", 0.9, share >= 0.9, rows, details)


if __name__ == "__main__":
    main()
