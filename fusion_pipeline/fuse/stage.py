"""The stage that runs any caption engine; writes `captions/<name>`."""

import asyncio
import atexit
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from fusion_pipeline.dataset.images import ImageInfo
from fusion_pipeline.dataset.rows import NotOk, Ok, Outcome, build_table
from fusion_pipeline.engine.stage import Resources, ShardBlock, Worker
from fusion_pipeline.fuse.base import Captioned, CaptionEngine, CaptionFailed, CaptionRequest
from fusion_pipeline.fuse.engines import Engine
from fusion_pipeline.prompts import rules
from fusion_pipeline.prompts.hints import Hints
from fusion_pipeline.prompts.stages import read_evidence

_TICK_S = 10.0
_CLOSING_S = 60.0
"""Of an engine that ends servers of its own; others close in no time."""


@dataclass(frozen=True)
class Caption:
    engine_name: str
    """Of the engine's table: `captions/<engine>`."""
    engine: Engine
    evidence: tuple[str, ...]
    prompts: str
    """The table of prompts."""
    max_words: int = 192
    repair: bool = False
    """Ask once more for a caption that breaks rules, naming them; the better of both is kept."""
    sample: tuple[str, ...] = ()
    """The table of the rows that are drawn, if not all are captioned."""

    columns: Sequence[pa.Field] = (
        pa.field("caption", pa.string()),
        pa.field("finish", pa.string()),  # stop, length, blocked
        pa.field("violations", pa.list_(pa.string())),  # names of `prompts.rules.Rule`
        pa.field("repairs", pa.int8()),  # how often it was asked for again
    )

    @property
    def name(self) -> str:
        return f"captions/{self.engine_name}"

    @property
    def version(self) -> int:
        return self.engine.version

    @property
    def resources(self) -> Resources:
        return self.engine.resources

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.evidence, self.prompts, *self.sample)

    def settings(self) -> Mapping[str, Any]:
        checks = {"rules": rules.VERSION, "max_words": self.max_words, "repair": self.repair}
        return {**self.engine.settings, **checks}

    def revision(self) -> None:
        return None

    def open(self) -> Worker:
        """The worker may be called from several threads: one engine serves all their shards."""
        engine, loop = self.engine.make(), asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name=self.name, daemon=True).start()

        def work(block: ShardBlock) -> pa.Table:
            requests = self.requests(block)  # here: the loop must not wait for images to be read
            asked = self._caption(engine, requests, block)
            outcomes = asyncio.run_coroutine_threadsafe(asked, loop).result()
            return build_table(block.keys, outcomes, self.columns)

        atexit.register(
            lambda: asyncio.run_coroutine_threadsafe(engine.close(), loop).result(_CLOSING_S)
        )
        return work

    async def _caption(
        self, engine: CaptionEngine, requests: Sequence[CaptionRequest], block: ShardBlock
    ) -> list[Outcome]:
        asked = [asyncio.ensure_future(self._ask(engine, request)) for request in requests]
        # The engine has time limits of its own, far longer than other work may be silent.
        ticking = asyncio.create_task(_tick(block))
        try:
            return await asyncio.gather(*asked)
        finally:  # of an engine that is broken the other requests are given up, too
            for task in (ticking, *asked):
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    async def _ask(self, engine: CaptionEngine, request: CaptionRequest) -> Outcome:
        answer = await engine.caption(request)
        if isinstance(answer, CaptionFailed):
            return NotOk("failed", answer.reason)
        if answer.caption is None:
            return NotOk("filtered", "blocked", {"finish": answer.finish.value})
        found, repairs = self._check(answer.caption, request), 0
        if found and self.repair:
            repairs = 1
            correction = (answer.caption, rules.complaint(found))
            again = await engine.caption(replace(request, correction=correction))
            if isinstance(again, Captioned) and again.caption is not None:
                left = self._check(again.caption, request)
                if len(left) < len(found):
                    answer, found = again, left
        return Ok(
            {
                "caption": answer.caption,
                "finish": answer.finish.value,
                "violations": sorted({violation.rule.value for violation in found}),
                "repairs": repairs,
            }
        )

    def _check(self, caption: str, request: CaptionRequest) -> list[rules.Violation]:
        evidence = Hints(text=tuple(request.text), alt_texts=tuple(request.alt_texts))
        return rules.check(caption, evidence, self.max_words)

    def requests(self, block: ShardBlock) -> list[CaptionRequest]:
        """What the engine is asked, a row each."""
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
                shard=block.shard,
                info=ImageInfo.from_row(sample),
                again=block.again,
            )
            for key, image, sample, prompt, row in columns
        ]


async def _tick(block: ShardBlock) -> None:
    while True:
        block.tick()
        await asyncio.sleep(_TICK_S)
