"""Kill −9 on Ray: driver, actor. Afterwards the tables are those of an undisturbed plain loop."""

import random
from pathlib import Path

import pytest

from tests.killing import finish, kill_after_progress, kill_an_actor, start
from tests.toy import files_of, run_toy, toy_steps

SHARDS = 120

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("ray")]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("plain")
    run_toy(root, range(SHARDS), toy_steps())
    return files_of(root)


def driver_of(root: Path, workers: int, pause: float) -> list[str]:
    return ["-m", "tests.toy", str(root), f"--workers={workers}", f"--shards={SHARDS}",
            f"--pause={pause}"]  # fmt: skip


def test_driver_killed_ten_times(tmp_path: Path, expected: dict[str, bytes]) -> None:
    moments = random.Random(20)
    kills = 0
    while kills < 10:
        driver = start(driver_of(tmp_path, 2, 0.05))
        kills += kill_after_progress(driver, tmp_path, moments.uniform(0.0, 0.5))
        assert driver.returncode != 0, "finished before ten kills: make the chain longer"
        seen = files_of(tmp_path)
        partial = {name for name in seen if not name.endswith("table.json")}
        assert all(expected[name] == seen[name] for name in partial)
    finish(start(driver_of(tmp_path, 2, 0.0)))
    assert files_of(tmp_path) == expected


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_a_byte(
    workers: int, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    finish(start(driver_of(tmp_path, workers, 0.0)))
    assert files_of(tmp_path) == expected


def test_killed_actor_is_replaced(tmp_path: Path, expected: dict[str, bytes]) -> None:
    driver = start(driver_of(tmp_path, 2, 0.05))
    kill_an_actor(driver, tmp_path)
    finish(driver)
    assert files_of(tmp_path) == expected
