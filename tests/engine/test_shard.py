"""The engine's guarantees on the plain loop, without Ray."""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from fusion_pipeline.dataset import tables
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import LEASE, LeaseError, check_token
from fusion_pipeline.dataset.storage import TEMPORARY_FILES, Storage
from fusion_pipeline.engine import shard as shard_module
from fusion_pipeline.engine.chain import Chain, Replace, run_in_process
from fusion_pipeline.engine.errors import StageError
from fusion_pipeline.engine.shard import Redo, run_stage
from fusion_pipeline.engine.stage import ShardBlock, ShardImages
from tests.killing import killed_at
from tests.toy import ROWS, ToySource, ToyStage, files_of, path_of, run_toy, toy_steps

SHARDS = range(3)
OTHER = toy_steps(first=ToyStage("a", setting=5))
"""Other settings: other tables `a`, `b` and `nested/c`."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    run_toy(root, SHARDS, toy_steps())
    return root


def test_second_run_does_nothing(undisturbed: Path) -> None:
    before = files_of(undisturbed)
    assert run_toy(undisturbed, SHARDS, toy_steps()) == []
    assert files_of(undisturbed) == before


def test_crash_at_every_write_leaves_no_trace(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Die at the 1st, 2nd, ... write; the next run completes to the same bytes."""
    expected = files_of(undisturbed)
    for crash_at in range(100):
        root = tmp_path / str(crash_at)
        if not killed_at(crash_at, monkeypatch, partial(run_toy, root, SHARDS, toy_steps())):
            break  # one crash for every write of the whole run has been tried
        seen = files_of(root)
        assert all(expected[name] == data for name, data in seen.items())  # whole or not at all
        run_toy(root, SHARDS, toy_steps())
        assert files_of(root) == expected
        assert not list((root / TEMPORARY_FILES).iterdir())
    # dataset.json, five descriptors; for each shard the tar, sources, samples and three stages
    assert crash_at == 6 + 6 * len(SHARDS)


def test_rows_filtered_upstream_keep_their_place(tmp_path: Path) -> None:
    sick = ToyStage("a", healed_by=str(tmp_path / "cure"))
    run_toy(tmp_path / "data", range(8), toy_steps(first=sick))
    dataset = Dataset.open(tmp_path / "data")
    failed = 0
    for shard in range(8):
        a, b, c = (dataset.read_table(n, shard)[0] for n in ("a", "b", "nested/c"))
        assert a["key"] == b["key"] == c["key"]
        for row_a, row_b, row_c in zip(a.to_pylist(), b.to_pylist(), c.to_pylist(), strict=True):
            if row_a["status"] == "failed":
                failed += 1
                assert (row_b["status"], row_b["reason"]) == ("filtered", "upstream:a")
                assert row_c["reason"] == "upstream:a"  # the table where it began
                assert row_b["value"] is None
            else:
                assert row_b["status"] == row_c["status"] == "ok"
    assert 0 < failed < 8 * ROWS


def test_retry_failed_redoes_failed_rows_and_what_hangs_on_them(tmp_path: Path) -> None:
    cure = tmp_path / "cure"
    steps = toy_steps(first=ToyStage("a", healed_by=str(cure)))
    run_toy(tmp_path / "sick", range(8), steps)
    cure.touch()
    results = run_toy(tmp_path / "sick", range(8), steps, redo=Redo.FAILED)
    assert sum(r.worked for r in results if r.step == "a") < 8 * ROWS  # only failed rows
    assert {r.step for r in results} == {"a", "b", "nested/c"}
    run_toy(tmp_path / "well", range(8), steps)
    assert files_of(tmp_path / "sick") == files_of(tmp_path / "well")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_truncated_table_is_named(undisturbed: Path, tmp_path: Path, keep: float) -> None:
    shutil.copytree(undisturbed, tmp_path / "d")
    dataset = Dataset.open(tmp_path / "d")
    path = path_of(dataset, "a", 1)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(
        tables.DamagedTableError, match=r"a/v-\w{8}/00000/00000001\.parquet.*damaged"
    ):
        dataset.read_table("a", 1)
    with pytest.raises(tables.DamagedTableError, match=r"00000001\.parquet"):
        dataset.read_footer("a", 1)
    path_of(dataset, "b", 1).unlink()
    with pytest.raises(tables.DamagedTableError, match=r"00000001\.parquet"):
        run_toy(tmp_path / "d", SHARDS, toy_steps())


def test_every_flipped_byte_is_found(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "d")
    dataset = Dataset.open(tmp_path / "d")
    path = path_of(dataset, "a", 0)
    good = path.read_bytes()
    table, footer = dataset.read_table("a", 0)
    for position in range(0, footer.data_bytes, 7):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x40]) + good[position + 1 :])
        with pytest.raises(tables.DamagedTableError):
            dataset.read_table("a", 0)
    assert table.num_rows == ROWS


def test_other_settings_are_an_error_that_says_what_differs(
    undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "d")
    before = files_of(tmp_path / "d")
    with pytest.raises(tables.FingerprintMismatchError, match=r"config\.setting: 0 -> 5") as raised:
        run_toy(tmp_path / "d", SHARDS, OTHER)
    assert "--overwrite" in str(raised.value)
    assert "tables/a" in str(raised.value)
    assert files_of(tmp_path / "d") == before


def test_a_foreign_table_under_our_name_is_found(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "d")
    dataset = Dataset.open(tmp_path / "d")
    shutil.copy(path_of(dataset, "a", 0), path_of(dataset, "a", 1))
    with pytest.raises(tables.DamagedTableError, match="of shard 0"):
        dataset.read_table("a", 1)
    run_toy(tmp_path / "other", SHARDS, OTHER)
    other = Dataset.open(tmp_path / "other")
    shutil.copy(path_of(other, "a", 2), path_of(dataset, "a", 2))
    with pytest.raises(tables.FingerprintMismatchError, match=r"00000002\.parquet"):
        dataset.read_table("a", 2)


# Orphans: workers of a run that is dead or was taken for dead


def test_an_orphan_of_an_ended_run_cannot_commit(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "d")
    dataset = Dataset.open(tmp_path / "d")
    path = path_of(dataset, "b", 0)
    path.unlink()
    orphan = Chain.resolve(dataset, toy_steps()).under("of a run that ended")
    with pytest.raises(LeaseError, match="not committing"):
        list(run_in_process(orphan, [0]))
    assert not path.exists()


class Frozen:
    """A worker that stands still when it has just been told that it may commit, for as long as
    `meanwhile` takes: the worst moment, since nothing asks it again before it writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = 1) -> None:
        self.meanwhile: Callable[[], object] | None = None
        self._left = at
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(shard_module, "check_token", self._check)

    def _check(self, storage: Storage, token: str) -> None:
        check_token(storage, token)
        self._left -= 1
        if self._left == 0 and self.meanwhile is not None:
            storage.delete(LEASE)  # as if it had run out
            with self._monkeypatch.context() as awake:
                awake.setattr(shard_module, "check_token", check_token)
                self.meanwhile()


class OtherSource(ToySource):
    """Another version of every table."""

    def settings(self) -> dict[str, object]:
        return {"rows": ROWS, "other": True}


@pytest.mark.parametrize("at", range(1, 7), ids=["tar", "sources", "samples", "a", "b", "c"])
def test_an_orphan_with_other_settings_writes_where_nobody_looks(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of its files it was about to write when another run took over."""
    root, other = tmp_path / "d", toy_steps(source=OtherSource())
    run_toy(tmp_path / "alone", SHARDS, other)
    expected = files_of(tmp_path / "alone")
    frozen = Frozen(monkeypatch, at)
    frozen.meanwhile = lambda: run_toy(root, SHARDS, other, allowed=Replace.CHANGED)
    # At its next step: its inputs are gone, or it asks for the lease.
    with pytest.raises((LeaseError, FileNotFoundError, StageError)):
        run_toy(root, SHARDS, toy_steps())
    seen = files_of(root)
    (stray,) = seen.keys() - expected.keys()  # it did write
    assert {name: seen[name] for name in expected} == expected
    dataset = Dataset.open(root)
    folders = {dataset.version(table).folder for table in dataset.table_names()}
    assert folders.isdisjoint(stray.split("/"))
    assert run_toy(root, SHARDS, other) == []  # nothing to do, nothing to complain of
    assert stray not in files_of(root)  # what writes the dataset next sweeps it up


def test_an_orphan_with_the_same_settings_does_no_harm(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it wrote is what the new run would have written, and the other way round."""
    for at in range(1, 7):
        root = tmp_path / str(at)
        frozen = Frozen(monkeypatch, at)
        frozen.meanwhile = partial(run_toy, root, SHARDS, toy_steps())
        with contextlib.suppress(LeaseError):  # unless all is done when it wakes up
            run_toy(root, SHARDS, toy_steps())
        assert files_of(root) == files_of(undisturbed)
        monkeypatch.undo()


def test_an_orphan_does_not_write_over_a_newer_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It retried failed rows while they still failed; the run after it healed them."""
    cure = tmp_path / "cure"
    steps = toy_steps(first=ToyStage("a", healed_by=str(cure)))
    run_toy(tmp_path / "d", SHARDS, steps)
    run_toy(tmp_path / "well", SHARDS, toy_steps(first=ToyStage("a", healed_by=str(tmp_path))))

    def heal() -> None:
        cure.touch()
        run_toy(tmp_path / "d", SHARDS, steps, redo=Redo.FAILED)

    Frozen(monkeypatch).meanwhile = heal
    run_toy(tmp_path / "d", SHARDS, steps, redo=Redo.FAILED)  # with sick rows in its hands
    assert cure.exists()
    assert files_of(tmp_path / "d") == files_of(tmp_path / "well")


def test_a_broken_stage_stops_the_run_with_its_name(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "d")
    step = toy_steps()[1]

    def explode(block: ShardBlock) -> pa.Table:
        raise RuntimeError("weights are gone")

    def lose_a_row(block: ShardBlock) -> pa.Table:
        return ToyStage("a").work(block).slice(1)

    dataset = Dataset.open(tmp_path / "d")
    path_of(dataset, "a", 2).unlink()
    place = Chain.resolve(dataset, toy_steps()).place
    for worker, message in (
        (explode, "stage 'a' broke on shard 2: RuntimeError: weights are gone"),
        (lose_a_row, "stage 'a' returned other rows than it got"),
    ):
        with pytest.raises(StageError, match=message):
            run_stage(place, step, lambda w=worker: w, 2, ShardImages(dataset, 2))


def test_config_that_changes_nothing_changes_no_fingerprint() -> None:
    step = toy_steps()[1]
    slow = toy_steps(pause=9.0)[1]
    assert step.made_by.hash == slow.made_by.hash
    assert replace(step.made_by, fields={**step.made_by.fields, "version": 2}).hash != (
        step.made_by.hash
    )


def test_an_interrupted_retry_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The failed rows are healed, the run dies before what hangs on them was done again."""
    cure = tmp_path / "cure"
    steps = toy_steps(first=ToyStage("a", healed_by=str(cure)))
    run_toy(tmp_path / "sick", range(4), steps)
    cure.touch()
    run_toy(tmp_path / "sick", range(4), steps[:2], redo=Redo.FAILED)  # `a` alone
    again = run_toy(tmp_path / "sick", range(4), steps, redo=Redo.FAILED)
    assert {result.step for result in again} == {"b", "nested/c"}
    run_toy(tmp_path / "well", range(4), steps)
    assert files_of(tmp_path / "sick") == files_of(tmp_path / "well")
    assert run_toy(tmp_path / "sick", range(4), steps, redo=Redo.FAILED) == []


def test_a_row_that_fails_anew_for_another_reason_leaves_nothing_stale(tmp_path: Path) -> None:
    """No row of `b` is to be done again, but what it was made from has changed."""
    steps = toy_steps(first=ToyStage("a", healed_by=str(tmp_path / "never")))
    run_toy(tmp_path / "d", range(8), steps)
    dataset = Dataset.open(tmp_path / "d")
    for shard in range(8):
        old, footer = dataset.read_table("a", shard)
        reasons = [r and "sick: otherwise" for r in old["reason"].to_pylist()]
        new = old.set_column(2, old.schema.field(2), pa.array(reasons, pa.string()))
        version = dataset.version("a")
        data, _ = tables.encode_table(new, "a", shard, version.made_by, footer.inputs)
        dataset.storage.put(version.path(shard), data)
    again = run_toy(tmp_path / "d", range(8), steps[2:], redo=Redo.FAILED)
    assert {(r.step, r.worked) for r in again} == {("b", 0), ("nested/c", 0)}
    assert run_toy(tmp_path / "d", range(8), steps[2:], redo=Redo.STALE) == []


def test_refresh_redoes_the_stale_shards_and_no_others(tmp_path: Path) -> None:
    """Rows of `a` are healed in some shards; all that hangs on those is made again, as a whole."""
    cure = tmp_path / "cure"
    steps = toy_steps(first=ToyStage("a", healed_by=str(cure)))
    run_toy(tmp_path / "d", range(8), steps)
    cure.touch()
    healed = {r.shard for r in run_toy(tmp_path / "d", range(8), steps[:2], redo=Redo.FAILED)}
    assert 0 < len(healed) < 8
    assert run_toy(tmp_path / "d", range(8), steps) == []  # nothing is missing
    again = run_toy(tmp_path / "d", range(8), steps, redo=Redo.STALE)
    assert {(r.step, r.shard) for r in again} == {
        (name, shard) for name in ("b", "nested/c") for shard in healed
    }
    assert {r.worked for r in again} == {ROWS}
    run_toy(tmp_path / "well", range(8), steps)
    assert files_of(tmp_path / "d") == files_of(tmp_path / "well")
    assert run_toy(tmp_path / "d", range(8), steps, redo=Redo.STALE) == []


def test_another_plan_is_another_version_of_every_table(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "d")
    before, dataset = files_of(tmp_path / "d"), Dataset.open(tmp_path / "d")
    chain = Chain.resolve(dataset, toy_steps(), plan="of another source")
    with pytest.raises(tables.StaleTableError, match=r"tables/samples was made from .*--refresh"):
        chain.outdated(Replace.NOTHING)
    names = ["samples", "sources", "a", "b", "nested/c"]
    assert [version.name for version in chain.outdated(Replace.STALE)] == names
    assert chain.pending(SHARDS) == {n: list(SHARDS) for n in names if n != "sources"}
    settings = Chain.resolve(dataset, OTHER)
    for allowed in (Replace.NOTHING, Replace.STALE):  # other settings are more than other inputs
        with pytest.raises(tables.FingerprintMismatchError, match="tables/a was made with other"):
            settings.outdated(allowed)
    assert [version.name for version in settings.outdated(Replace.CHANGED)] == names[2:]
    assert files_of(tmp_path / "d") == before
