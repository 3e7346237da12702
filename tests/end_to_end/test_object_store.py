"""The whole job on an object store: source, datasets, export and report; the bytes of a disk."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusion_pipeline.dataset.storage import Storage
from tests.end_to_end.conftest import CONFIG, DemoRun
from tests.end_to_end.test_resume import outputs_of
from tests.faulty_s3 import S3Server, s3_server
from tests.killing import REPOSITORY
from tests.toy import seen_by_readers

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("end_to_end")]


def run(server: S3Server, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fusion_pipeline", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **server.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_run_on_s3_gives_the_bytes_of_a_run_on_a_disk(
    reference: DemoRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.make_bucket("data")
        source = Storage("s3://data/source")
        for tar in sorted((reference.folder / "demo" / "shards").glob("*.tar")):
            source.put(tar.name, tar.read_bytes())
        command = [str(CONFIG), "run=s3://data/run", "source.webdataset=s3://data/source"]
        output = run(server, "run", *command)
        assert "s3://data/run/report.html" in output
        storage = Storage("s3://data/run")
        kept = re.compile(r"export/|(pool|selected)/(shards|tables|artifacts)/")
        names = filter(kept.match, storage.files(""))
        got = seen_by_readers({name: storage.read(name) for name in names})
        expected = outputs_of(reference.folder / "run")
        assert got.keys() == expected.keys()
        assert [name for name in got if got[name] != expected[name]] == []
        assert b"<html" in storage.read("report.html")[:500]

        before = server.counts()
        assert "Nothing to do" in run(server, "run", *command)
        # Each footer once, and a few listings: nothing is read that did not change.
        assert server.counts()["requests"] - before["requests"] < 550
        assert "Every file is whole" in run(server, "status", *command, "--verify")


def test_without_credentials_the_error_says_so(tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    clean |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "fusion_pipeline", "run", str(CONFIG), f"run={tmp_path}/run",
         "source.webdataset=s3://somebodys-bucket/shards"],
        cwd=REPOSITORY, env=clean, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no credentials were found; set AWS_ACCESS_KEY_ID" in done.stderr
    assert "Traceback" not in done.stderr
