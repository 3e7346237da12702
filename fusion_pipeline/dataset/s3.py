"""Patience with S3: about a minute of trouble is waited out, then a run stops and can be resumed.

What s3fs and botocore retry by default multiplies in some cases (minutes) and leaves out others:
reset connections, answers of 500. Measured with `tests/faulty_s3.py`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from fusion_pipeline.errors import FusionError

OPTIONS: dict[str, Any] = {
    # Two tries in botocore, for its own reconnects; the rest is s3fs's, which waits longer.
    "config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 2}}
}
TIMEOUT_S = 300.0
"""Of one call with all its tries, for a server that accepts and then says nothing. Less than a
worker may be silent (`Limits.stall_s`): it is the store that is to be named."""
_TRIES = 14
"""Waits of 0.1 x 1.7^i s, at most 15 s: 88 s in all."""
_PASSING = (500, 502, 503, 504)


class StorageError(FusionError):
    """A place that can't be opened, or does not answer."""


def make_patient(filesystem: Any) -> None:
    """Retries for an s3fs filesystem. What counts as passing is set for the whole process: s3fs
    has no other place for it."""
    import botocore.exceptions
    from s3fs import core

    filesystem.retries = _TRIES
    if botocore.exceptions.ConnectionError in core.S3_RETRYABLE_ERRORS:
        return
    core.add_retryable_error(botocore.exceptions.ConnectionError)
    core.set_custom_error_handler(_is_passing)


def _is_passing(error: BaseException) -> bool:
    answer = getattr(error, "response", None) or {}
    return answer.get("ResponseMetadata", {}).get("HTTPStatusCode") in _PASSING


@contextlib.contextmanager
def answering(url: str) -> Iterator[None]:
    """Turns what an object store and its client raise into StorageError; that a file is missing,
    or there already, is for the caller."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):
        raise
    except Exception as error:  # botocore's errors share no base class with s3fs's; others go on
        kind = type(error)
        if kind.__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            what = "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        elif isinstance(error, PermissionError):
            what = f"refused ({error}); check the credentials and what they are allowed to do"
        elif isinstance(error, OSError) or kind.__module__.startswith("botocore"):
            what = f"no good answer ({kind.__name__}: {error})"
        else:
            raise
        raise StorageError(
            f"{url}: {what}. What is finished is kept; the same command resumes."
        ) from error


def error_code(error: BaseException) -> str | None:
    """The store's own name of an error, which s3fs keeps in the cause."""
    response = getattr(error.__cause__, "response", None) or {}
    code: str | None = response.get("Error", {}).get("Code")
    return code
