"""The full chain on Ray: killed thrice, the driver and an expert's actor; the same bytes."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.conftest import CONFIG, DemoRun
from tests.killing import REPOSITORY, finish, kill_after_progress, kill_an_actor, start, tables_in
from tests.toy import files_of

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("end_to_end")]


def outputs_of(run: Path) -> dict[str, bytes]:
    return {
        f"{part}/{name}": data
        for part in ("pool", "selected")
        for name, data in files_of(run / part).items()
    } | {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted((run / "export").rglob("*"))
        if path.is_file()
    }


def fusion(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fusion_pipeline", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_killed_twice_and_the_same_to_the_byte(reference: DemoRun, tmp_path: Path) -> None:
    command = ["-m", "fusion_pipeline", "run", str(CONFIG), *reference.overrides(tmp_path),
               "runner.workers=4"]  # fmt: skip
    assert kill_after_progress(start(command), tmp_path / "pool", delay=1.5)
    half_way = tables_in(tmp_path)
    assert kill_after_progress(start(command), tmp_path / "selected", delay=6.0)
    assert tables_in(tmp_path) > half_way
    driver = start(command)
    kill_an_actor(driver, tmp_path / "selected")  # it hosts the experts
    finish(driver, timeout=600)
    expected = outputs_of(reference.folder / "run")
    got = outputs_of(tmp_path)
    assert got.keys() == expected.keys()
    assert [name for name in got if got[name] != expected[name]] == []

    started = time.perf_counter()
    again = fusion(*command[2:])
    assert again.returncode == 0, again.stderr
    assert "Nothing to do" in again.stderr
    assert "Ray" not in again.stderr
    print(f"nothing to do: {time.perf_counter() - started:.1f} s")
    assert outputs_of(tmp_path) == expected


def test_status_counts_what_is_there(reference: DemoRun) -> None:
    shown = fusion("status", str(CONFIG), *reference.overrides(reference.folder / "run"), "--json")
    counts = json.loads(shown.stdout)
    sources = counts["pool"][0]
    assert sources["table"] == "sources"
    assert sources["rows"] == sum(sources["counts"].values()) == len(reference.truth.rows)
