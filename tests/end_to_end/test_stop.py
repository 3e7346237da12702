"""SIGTERM, as spot machines and Slurm send it: what has begun is finished, the rest resumes."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from fusion_pipeline.dataset.lease import read_lease
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.engine.run import read_run_log
from tests.end_to_end.conftest import CONFIG, DemoRun
from tests.killing import finish, start, tables_in
from tests.toy import files_of

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("end_to_end")]


def terminate_after_progress(driver: subprocess.Popen[bytes], root: Path) -> tuple[str, float]:
    """SIGTERM a driver at its first table; its output and the seconds until its end."""
    while tables_in(root) == 0:
        assert driver.poll() is None
        time.sleep(0.02)
    driver.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    output, _ = driver.communicate(timeout=120)
    return output.decode(), time.monotonic() - sent


@pytest.mark.parametrize("how", [(), ("--no-ray",)], ids=["ray", "plain-loop"])
def test_sigterm_drains_and_the_rest_resumes(
    how: tuple[str, ...], reference: DemoRun, tmp_path: Path
) -> None:
    command = ["-m", "fusion_pipeline", "run", str(CONFIG), *reference.overrides(tmp_path),
               "--until", "embeddings", *how]  # fmt: skip
    driver = start(command)
    output, _ = terminate_after_progress(driver, tmp_path / "pool" / "tables")
    assert driver.returncode == 143, output
    assert "Stopped by SIGTERM. Finished shards are kept" in output
    done = tables_in(tmp_path / "pool" / "tables")
    assert 0 < done < 4 * 10
    pool = Storage(tmp_path / "pool")
    assert read_lease(pool) is None
    # What was begun was finished and told, not dropped: sources come with their samples.
    assert len(read_run_log(pool)) == done - tables_in(tmp_path / "pool" / "tables" / "sources")

    finish(start(command))
    expected = files_of(reference.folder / "run" / "pool")
    for name, data in files_of(tmp_path / "pool").items():
        assert expected[name] == data
    assert tables_in(tmp_path / "pool" / "tables") == 4 * 10


def test_after_the_time_allowed_it_ends_anyway(reference: DemoRun, tmp_path: Path) -> None:
    driver = start(["-m", "fusion_pipeline", "run", str(CONFIG), *reference.overrides(tmp_path),
                    "--until", "embeddings", "runner.drain_seconds=0"])  # fmt: skip
    output, seconds = terminate_after_progress(driver, tmp_path / "pool" / "tables")
    assert driver.returncode == 143, output
    assert seconds < 30
    assert read_lease(Storage(tmp_path / "pool")) is None
