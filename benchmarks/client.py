"""What a request costs the caption client: CPU time against a server that answers at once.

    python -m benchmarks.client [--requests 3000] [--runs 3]

Images of 200 KB that go as they are. Ours (journal on a local disk included) beside the openai
client as it comes, in one run, alternating.
"""

import argparse
import asyncio
import base64
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import openai
from PIL import Image

from benchmarks.result import finish
from fusion_pipeline.dataset.images import inspect
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.fuse.base import Captioned, CaptionRequest
from fusion_pipeline.fuse.endpoint import Endpoint, EndpointConfig
from fusion_pipeline.fuse.journal import Journal

TARGET = 300.0
IMAGE_BYTES = 200_000
EDGE = 640
IN_FLIGHT = 128
SERVER = Path(__file__).parents[1] / "tests" / "fuse" / "api_server.py"
MODEL = "captioner-7b"
PROMPT = "Describe the picture.\n" + 40 * "- a line of evidence, as long as they are\n"


def an_image() -> bytes:
    """A JPEG of very nearly IMAGE_BYTES."""
    noise = np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), np.uint8)
    for quality in range(95, 5, -1):
        sink = io.BytesIO()
        Image.fromarray(noise).save(sink, "JPEG", quality=quality)
        if sink.tell() <= IMAGE_BYTES:
            return sink.getvalue() + bytes(IMAGE_BYTES - sink.tell())
    raise AssertionError


@contextlib.contextmanager
def null_server() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "url"
        server = subprocess.Popen([sys.executable, str(SERVER), str(place)])
        try:
            while not place.exists() or not place.read_text():
                time.sleep(0.05)
            yield place.read_text()
        finally:
            server.kill()
            server.wait()


Ask = Callable[[int], Awaitable[object]]


async def per_cpu_second(ask: Ask, count: int) -> float:
    """Requests a second of this process's CPU time, after a warm-up."""
    await asyncio.gather(*map(ask, range(IN_FLIGHT)))
    started = time.process_time()
    await asyncio.gather(*map(ask, range(IN_FLIGHT, IN_FLIGHT + count)))
    return count / (time.process_time() - started)


async def ours(url: str, image: bytes, count: int, journal: bool) -> float:
    with tempfile.TemporaryDirectory() as root:
        config = EndpointConfig(url=url, model=MODEL, key_env=None, concurrency=IN_FLIGHT)
        books = Journal(Dataset.create(root), "captions/null") if journal else None
        engine, info = Endpoint(config, books), inspect(image)

        async def ask(i: int) -> None:
            prompt = f"{PROMPT}sample {i}"
            request = CaptionRequest(
                f"{i:032x}", image, EDGE, EDGE, prompt, (), (), (), (), info=info
            )
            assert isinstance(await engine.caption(request), Captioned)

        try:
            return await per_cpu_second(ask, count)
        finally:
            await engine.close()


async def as_it_comes(url: str, image: bytes, count: int) -> float:
    client, slots = openai.AsyncOpenAI(base_url=url, api_key="none"), asyncio.Semaphore(IN_FLIGHT)

    async def ask(i: int) -> None:
        async with slots:
            data = base64.b64encode(image).decode()
            answer = await client.chat.completions.create(
                model=MODEL,
                messages=[
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "image_url",
                                "image_url": {"url": f"data:image/jpeg;base64,{data}"},
                            },
                            {"type": "text", "text": f"{PROMPT}sample {i}"},
                        ],
                    }
                ],
                max_tokens=512,
                temperature=0.0,
                seed=0,
            )
            assert answer.choices[0].message.content

    try:
        return await per_cpu_second(ask, count)
    finally:
        await client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    image, count, rows = an_image(), options.requests, []
    with null_server() as url:
        for run in range(options.runs):
            rows.append(
                {
                    "run": run,
                    "ours": asyncio.run(ours(url, image, count, journal=True)),
                    "ours, no journal": asyncio.run(ours(url, image, count, journal=False)),
                    "openai as it comes": asyncio.run(as_it_comes(url, image, count)),
                }
            )
    value = statistics.median(float(row["ours"]) for row in rows)
    finish("client", value, "requests/CPU s", TARGET, value >= TARGET, rows)


if __name__ == "__main__":
    main()
