"""Middleware of `vllm serve` that writes down each request as it comes and as it is answered.

The environment variable REQUEST_LOG names the file. It runs in vLLM's environment, which has none
of this project's packages.
"""

import os
from collections.abc import Awaitable, Callable
from typing import Any


async def count(request: Any, call_next: Callable[[Any], Awaitable[Any]]) -> Any:
    name = request.headers.get("x-client-request-id")
    if name is None:  # a look at its health
        return await call_next(request)
    write(f"begin {name}")
    response = await call_next(request)
    write(f"end {name} {response.status_code}")
    return response


def write(line: str) -> None:
    with open(os.environ["REQUEST_LOG"], "a") as log:
        log.write(line + "\n")
