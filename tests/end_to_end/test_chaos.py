"""Three seeds of `tests/chaos.py`: a disk, a cluster of two nodes, an S3 that misbehaves."""

import os
from pathlib import Path

import pytest

from tests.chaos import plan, run_seed, undisturbed

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("ray")]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return undisturbed(tmp_path_factory.mktemp("chaos") / "plain")


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk can only be mounted by root")
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chaos(seed: int, expected: dict[str, bytes], tmp_path: Path) -> None:
    log = run_seed(seed, tmp_path / "chaos", expected)
    print(log)
    assert log.faults  # how many come in time differs from machine to machine


def test_every_place_and_fault_is_among_the_seeds() -> None:
    plans = [plan(seed) for seed in range(30)]
    assert {(p.place, p.nodes) for p in plans} == {(p, n) for p in ("disk", "s3") for n in (1, 2)}
