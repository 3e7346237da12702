"""The engine's guarantees on the plain loop, without Ray."""

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from fusion_pipeline.dataset import tables
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import LeaseError
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.engine.chain import Chain, run_in_process
from fusion_pipeline.engine.shard import StageError, run_stage
from fusion_pipeline.engine.stage import ShardBlock, ShardImages
from tests.toy import ROWS, ToyStage, files_of, run_toy, toy_steps

SHARDS = range(3)


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

    class Killed(BaseException):
        pass

    expected = files_of(undisturbed)
    put = Storage.put
    writes = 0
    for crash_at in range(len(expected)):
        root = tmp_path / str(crash_at)
        writes = 0

        def dying_put(self: Storage, path: str, data: bytes, at: int = crash_at) -> None:
            nonlocal writes
            writes += 1
            if writes > at:
                self._write_temporary(data[: len(data) // 2])  # what a kill leaves behind
                raise Killed
            put(self, path, data)

        monkeypatch.setattr(Storage, "put", dying_put)
        try:
            run_toy(root, SHARDS, toy_steps())
        except Killed:
            pass
        else:
            break  # one crash for every write of the whole run has been tried
        monkeypatch.setattr(Storage, "put", put)
        seen = files_of(root)
        assert all(expected[name] == data for name, data in seen.items())  # whole or not at all
        run_toy(root, SHARDS, toy_steps())
        assert files_of(root) == expected
        assert not (root / ".tmp").exists() or not list((root / ".tmp").iterdir())
    assert crash_at >= 6 * len(SHARDS)  # tar, sources, samples and three stages a shard


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
    results = run_toy(tmp_path / "sick", range(8), steps, retry_failed=True)
    assert sum(r.worked for r in results if r.step == "a") < 8 * ROWS  # only failed rows
    assert {r.step for r in results} == {"a", "b", "nested/c"}
    run_toy(tmp_path / "well", range(8), steps)
    assert files_of(tmp_path / "sick") == files_of(tmp_path / "well")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_truncated_table_is_named(undisturbed: Path, tmp_path: Path, keep: float) -> None:
    shutil.copytree(undisturbed, tmp_path / "d")
    dataset = Dataset.open(tmp_path / "d")
    path = tmp_path / "d" / dataset.table_path("a", 1)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(tables.DamagedTableError, match=r"a/00000/00000001\.parquet.*damaged"):
        dataset.read_table("a", 1)
    with pytest.raises(tables.DamagedTableError, match=r"00000001\.parquet"):
        dataset.read_footer("a", 1)
    (tmp_path / "d" / dataset.table_path("b", 1)).unlink()
    with pytest.raises(tables.DamagedTableError, match=r"00000001\.parquet"):
        run_toy(tmp_path / "d", SHARDS, toy_steps())


def test_every_flipped_byte_is_found(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "d")
    dataset = Dataset.open(tmp_path / "d")
    path = tmp_path / "d" / dataset.table_path("a", 0)
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
    changed = toy_steps(first=ToyStage("a", setting=5))
    with pytest.raises(tables.FingerprintMismatchError, match=r"config\.setting: 0 -> 5") as raised:
        run_toy(tmp_path / "d", SHARDS, changed)
    assert "--overwrite" in str(raised.value)
    assert "tables/a" in str(raised.value)
    assert files_of(tmp_path / "d") == before


def test_a_foreign_table_under_our_name_is_found(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "d")
    dataset = Dataset.open(tmp_path / "d")
    folder = tmp_path / "d" / "tables" / "a" / "00000"
    shutil.copy(folder / "00000000.parquet", folder / "00000001.parquet")
    with pytest.raises(tables.DamagedTableError, match="of shard 0"):
        dataset.read_table("a", 1)
    other = run_other_fingerprint(tmp_path / "other")
    shutil.copy(other / dataset.table_path("a", 2), tmp_path / "d" / dataset.table_path("a", 2))
    with pytest.raises(tables.FingerprintMismatchError, match=r"00000002\.parquet"):
        dataset.read_table("a", 2, toy_steps()[1].made_by)


def run_other_fingerprint(root: Path) -> Path:
    run_toy(root, SHARDS, toy_steps(first=ToyStage("a", setting=5)))
    return root


def test_an_orphan_of_an_ended_run_cannot_commit(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "d")
    dataset = Dataset.open(tmp_path / "d")
    path = tmp_path / "d" / dataset.table_path("b", 0)
    path.unlink()
    orphan = Chain(dataset, toy_steps(), token="of a run that ended")
    with pytest.raises(LeaseError, match="not committing"):
        list(run_in_process(orphan, [0]))
    assert not path.exists()


def test_a_broken_stage_stops_the_run_with_its_name(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path / "d")
    step = toy_steps()[1]

    def explode(block: ShardBlock) -> pa.Table:
        raise RuntimeError("weights are gone")

    def lose_a_row(block: ShardBlock) -> pa.Table:
        return ToyStage("a").work(block).slice(1)

    dataset = Dataset.open(tmp_path / "d")
    for worker, message in (
        (explode, "stage 'a' broke on shard 2: RuntimeError: weights are gone"),
        (lose_a_row, "stage 'a' returned other rows than it got"),
    ):
        with pytest.raises(StageError, match=message):
            run_stage(dataset, step, lambda w=worker: w, 2, "", ShardImages(dataset, 2))


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
    run_toy(tmp_path / "sick", range(4), steps[:2], retry_failed=True)  # `a` alone
    again = run_toy(tmp_path / "sick", range(4), steps, retry_failed=True)
    assert {result.step for result in again} == {"b", "nested/c"}
    run_toy(tmp_path / "well", range(4), steps)
    assert files_of(tmp_path / "sick") == files_of(tmp_path / "well")
    assert run_toy(tmp_path / "sick", range(4), steps, retry_failed=True) == []
