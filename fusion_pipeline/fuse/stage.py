"""The stage that runs any caption engine; writes `captions/<name>`."""

import asyncio
import atexit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from fusion_pipeline.dataset.images import ImageInfo
from fusion_pipeline.dataset.rows import NotOk, Ok, Outcome, build_table
from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardBlock, Worker
from fusion_pipeline.fuse.base import Captioned, CaptionEngine, CaptionOutcome, CaptionRequest
from fusion_pipeline.prompts.stages import read_evidence

_TICK_S = 10.0


@dataclass(frozen=True)
class Caption:
    engine: str
    """Name of the engine's table: `captions/<engine>`."""
    make_engine: Callable[[], CaptionEngine]
    """Picklable; called once a worker."""
    engine_version: int
    engine_settings: Mapping[str, Any]
    """What changes the captions: model, sampling, token limit; no addresses, no keys."""
    evidence: tuple[str, ...]
    prompts: str
    """The table of prompts."""
    resources: Resources = CPU_WORKER

    columns: Sequence[pa.Field] = (
        pa.field("caption", pa.string()),
        pa.field("finish", pa.string()),  # stop, length, blocked
    )

    @property
    def name(self) -> str:
        return f"captions/{self.engine}"

    @property
    def version(self) -> int:
        return self.engine_version

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.evidence, self.prompts)

    def settings(self) -> Mapping[str, Any]:
        return self.engine_settings

    def revision(self) -> None:
        return None

    def open(self) -> Worker:
        engine, loop = self.make_engine(), asyncio.Runner()  # one loop: connections stay open
        atexit.register(lambda: loop.run(engine.close()))
        return lambda block: loop.run(self._caption(engine, block))

    async def _caption(self, engine: CaptionEngine, block: ShardBlock) -> pa.Table:
        asked = [asyncio.ensure_future(engine.caption(r)) for r in self._requests(block)]
        # The engine has time limits of its own, far longer than other work may be silent.
        ticking = asyncio.create_task(_tick(block))
        try:
            answers = await asyncio.gather(*asked)
        finally:  # of an engine that is broken the other requests are given up, too
            for task in (ticking, *asked):
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        return build_table(block.keys, [_outcome(answer) for answer in answers], self.columns)

    def _requests(self, block: ShardBlock) -> list[CaptionRequest]:
        columns = zip(
            block.keys,
            block.images,
            block.table("samples").to_pylist(),
            block.column(self.prompts, "prompt"),
            read_evidence(block, self.evidence),
            strict=True,
        )
        return [
            CaptionRequest(
                key,
                image,
                sample["width"],
                sample["height"],
                prompt,
                row.tags,
                row.objects,
                row.text,
                row.alt_texts,
                block.shard,
                ImageInfo.from_row(sample),
            )
            for key, image, sample, prompt, row in columns
        ]


async def _tick(block: ShardBlock) -> None:
    while True:
        block.tick()
        await asyncio.sleep(_TICK_S)


def _outcome(answer: CaptionOutcome) -> Outcome:
    if isinstance(answer, Captioned):
        if answer.caption is None:
            return NotOk("filtered", "blocked", {"finish": answer.finish.value})
        return Ok({"caption": answer.caption, "finish": answer.finish.value})
    return NotOk("failed", answer.reason)
