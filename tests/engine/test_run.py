"""Driving a chain: the fuse, the run's log, progress."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.engine.chain import Chain, run_in_process
from fusion_pipeline.engine.errors import StageError
from fusion_pipeline.engine.run import (
    Fuse,
    FuseCounter,
    FuseError,
    RunLog,
    drive,
    read_run_log,
)
from fusion_pipeline.engine.shard import ShardResult, Step
from fusion_pipeline.engine.stage import ShardContents
from fusion_pipeline.engine.watch import Watch
from tests.toy import ROWS, ToySource, ToyStage, path_of, toy_steps

QUIET = Console(file=io.StringIO())
SHARDS = range(6)


def sick_rows(root: Path) -> tuple[int, int]:
    """(rows, failed rows) of table `a` of what is there."""
    dataset = Dataset.open(root)
    counts = [dataset.read_footer("a", shard).counts for shard in sorted(dataset.shards_of("a"))]
    return sum(sum(c.values()) for c in counts), sum(c.get("failed:sick", 0) for c in counts)


def drive_toy(
    root: Path,
    fuse: Fuse,
    console: Console = QUIET,
    steps: tuple[Step, ...] | None = None,
    log: str = "run-1",
) -> int:
    dataset = Dataset.create(root)
    steps = steps or toy_steps(first=ToyStage("a", healed_by=str(root / "cure")))
    with hold_lease(dataset.storage, "test") as token:
        chain = Chain.resolve(dataset, steps).under(token)
        chain.describe()
        pending = chain.pending(SHARDS)
        with RunLog(dataset.storage, log) as run_log:
            return drive(chain, pending, run_in_process, run_log, fuse, console)


def test_the_fuse_names_the_stage_and_its_first_error(tmp_path: Path) -> None:
    with pytest.raises(FuseError) as raised:
        drive_toy(tmp_path, Fuse(max_failure_rate=0.02, after_rows=12))
    rows, failed = sick_rows(tmp_path)
    message = str(raised.value)
    assert f"stage 'a' failed on {failed} of {rows} rows (limit 2%)" in message
    assert "First error: sick: on purpose" in message
    assert "--retry-failed" in message
    assert 12 <= rows < len(SHARDS) * ROWS  # it stopped early, and kept what was done
    assert failed > 0.02 * rows


def test_below_its_limit_the_fuse_holds(tmp_path: Path) -> None:
    assert drive_toy(tmp_path, Fuse(max_failure_rate=0.9, after_rows=1)) == 4 * len(SHARDS)
    rows, failed = sick_rows(tmp_path)
    assert 0 < failed < rows == len(SHARDS) * ROWS
    drive_toy(tmp_path / "exact", Fuse(max_failure_rate=1.0, after_rows=1))


def result(worked: int, failed: int, step: str = "s", error: str | None = "first") -> ShardResult:
    return ShardResult(step, 0, worked, worked, failed, 0.1, error)


def test_the_fuse_counts_each_stage_over_all_its_shards() -> None:
    counter = FuseCounter(Fuse(0.5, after_rows=50))
    counter.add(result(10, 10))  # too early to judge
    counter.add(result(10, 0, "other", None))
    counter.add(result(39, 39, error="second"))
    with pytest.raises(FuseError, match=r"'s' failed on 49 of 50 rows .*First error: first"):
        counter.add(result(1, 0, error=None))
    exactly_half = FuseCounter(Fuse(0.5, after_rows=2))
    exactly_half.add(result(50, 25))
    with pytest.raises(FuseError):
        exactly_half.add(result(1, 1))


def test_bad_input_does_not_blow_the_fuse(tmp_path: Path) -> None:
    """Rows that a source could not use say nothing of the source."""

    class Rotten(ToySource):
        def make(self, shard: int, watch: Watch) -> ShardContents:
            contents = super().make(shard, watch)
            n = contents.sources.num_rows
            sources = contents.sources.set_column(
                2, contents.sources.schema.field(2), [["failed"] * n]
            )
            return type(contents)(contents.tar, contents.samples, sources)

    steps = toy_steps(source=Rotten())[:1]
    assert drive_toy(tmp_path, Fuse(0.0, after_rows=1), steps=steps) == len(SHARDS)


def test_each_step_of_a_shard_is_a_line_of_the_log(tmp_path: Path) -> None:
    drive_toy(tmp_path, Fuse(1.0))
    text = (tmp_path / "runs" / "run-1" / "shards-00000.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    expected = [(s, n) for n in SHARDS for s in ("toy-source", "a", "b", "nested/c")]
    assert [(line["step"], line["shard"]) for line in lines] == expected
    assert sum(line["failed"] for line in lines if line["step"] == "a") == sick_rows(tmp_path)[1]
    assert {line["first_error"] for line in lines if line["failed"]} == {"sick: on purpose"}
    assert all(line["seconds"] >= 0 and line["at"].endswith("+00:00") for line in lines)
    assert read_run_log(Storage(tmp_path)) == lines


def test_two_chains_of_one_run_share_its_log(tmp_path: Path) -> None:
    steps = toy_steps()
    drive_toy(tmp_path, Fuse(), steps=steps[:2], log="run-1")
    first = read_run_log(Storage(tmp_path))
    drive_toy(tmp_path, Fuse(), steps=steps, log="run-1")
    both = read_run_log(Storage(tmp_path))
    assert both[: len(first)] == first
    assert len(both) == 4 * len(SHARDS)
    path_of(Dataset.open(tmp_path), "b", 0).unlink()
    drive_toy(tmp_path, Fuse(), steps=steps, log="run-2")
    assert read_run_log(Storage(tmp_path))[: len(both)] == both
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_the_log_is_kept_when_the_run_breaks(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path)

    def breaks(chain: Chain, shards: Sequence[int]) -> Iterator[ShardResult]:
        yield result(1, 0, "a", None)
        raise StageError("stage 'a' broke")

    chain = Chain.resolve(dataset, toy_steps()).reduced(["a"])
    with pytest.raises(StageError), RunLog(dataset.storage, "r") as log:
        drive(chain, {"a": [0]}, breaks, log, Fuse(), QUIET)
    assert [line["step"] for line in read_run_log(dataset.storage)] == ["a"]


def test_progress_shows_stages_shards_and_rows(tmp_path: Path) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=160)
    drive_toy(tmp_path, Fuse(1.0), console)
    lines = [line.split() for line in shown.getvalue().splitlines() if line.strip()]
    table = {line[0]: line for line in lines}
    assert list(table) == ["toy-source", "a", "b", "nested/c"]
    for line in table.values():
        assert "6/6" in line
        assert line[line.index("rows") - 1] == str(len(SHARDS) * ROWS)
        assert any(word.endswith("/s") for word in line)
