"""A place for a dataset: a folder on a disk, and a folder on an S3 server."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from tests.faulty_s3 import S3Server, s3_server


@pytest.fixture(scope="session")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of an empty bucket, which s3fs and boto3 find here and in processes started here."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # those of another server
    name = f"test-{uuid.uuid4().hex}"
    server.make_bucket(name)
    yield name
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["disk", "s3"])
def dataset_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that does not exist yet."""
    if request.param == "disk":
        return str(tmp_path / "data")
    return f"s3://{request.getfixturevalue('bucket')}/data"
