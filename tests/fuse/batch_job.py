"""A dataset of tiny pictures with prompts, whose captions are asked for in batches."""

import io
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from batch_server import INPUT_PRICE, OUTPUT_PRICE, BatchServer
from openai_server import MODEL
from PIL import Image

from benchmarks.plain_stage import PlainStage
from fusion_pipeline.dataset.fingerprints import fingerprint
from fusion_pipeline.dataset.images import inspect
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.dataset.rows import NotOk, Ok, Outcome, build_table
from fusion_pipeline.dataset.samples import Sample, pack_samples, sample_key
from fusion_pipeline.dataset.schemas import SAMPLES, SOURCES_SCHEMA
from fusion_pipeline.engine.chain import Chain, run_in_process
from fusion_pipeline.engine.shard import Step
from fusion_pipeline.engine.stage import ShardBlock, ShardContents
from fusion_pipeline.engine.watch import Watch
from fusion_pipeline.fuse.batch.config import BatchConfig
from fusion_pipeline.fuse.batch.desk import Desk, Sent
from fusion_pipeline.fuse.batch.plan import Plan, answered_only
from fusion_pipeline.fuse.engines import EngineChoice, engine_of
from fusion_pipeline.fuse.stage import Caption
from tests.toy import ToySource

Done = TypeVar("Done")
PRICES = {"input": INPUT_PRICE, "output": OUTPUT_PRICE}


@dataclass(frozen=True)
class Pictures(ToySource):
    rows: int = 100
    """A shard."""

    def make(self, shard: int, watch: Watch) -> ShardContents:
        samples, sources = [], []
        for row in range(self.rows):
            sink = io.BytesIO()
            Image.new("RGB", (32, 32), (shard, row, 77)).save(sink, "PNG")
            image = sink.getvalue()
            sample = Sample(sample_key(image), image, inspect(image))
            sample.add_row(f"{shard}-{row}", f"text {row}", None)
            samples.append(sample)
            origin = {"row_id": f"{shard}-{row}", "source": "toy", "source_id": f"{shard}-{row}"}
            sources.append({"key": sample.key, "status": "ok", "reason": None, **origin})
        tar, table = pack_samples(samples)
        return ShardContents(tar, table, pa.Table.from_pylist(sources, schema=SOURCES_SCHEMA))


@dataclass(frozen=True)
class Prompts(PlainStage):
    """`sample 17` of shard 3 reads "sample 3-17"; every 50th row of a shard fails."""

    columns = (pa.field("prompt", pa.string()),)
    name = "prompts/toy"

    def work(self, block: ShardBlock) -> pa.Table:
        outcomes: list[Outcome] = [
            NotOk("failed", "sick")
            if row % 50 == 49
            else Ok({"prompt": prompt_of(block.shard, row)})
            for row in range(len(block))
        ]
        return build_table(block.keys, outcomes, self.columns)


def prompt_of(shard: int, row: int) -> str:
    return f"sample {shard}-{row}"


@dataclass
class Job:
    """A dataset, and the desk of a process that works on its batches."""

    root: Path | str
    settings: Mapping[str, object]
    """Of `BatchConfig`."""
    now: list[float] = field(default_factory=lambda: [time.time()])

    @classmethod
    def at(cls, root: Path | str, server: BatchServer, **settings: object) -> "Job":
        given = {"url": server.url, "model": MODEL, "key_env": None, "prices": PRICES}
        job = cls(root, {**given, **settings})
        server.clock = lambda: job.now[0]
        return job

    @property
    def config(self) -> BatchConfig:
        return BatchConfig.model_validate(dict(self.settings))

    @property
    def dataset(self) -> Dataset:
        return Dataset.create(self.root)

    def steps(self) -> tuple[Step, Step, Step]:
        source, prompts = Pictures(), Prompts()
        choice = EngineChoice.model_validate({"batch": dict(self.settings)})
        engine = engine_of(choice, self.dataset)
        captions = Caption(choice.name, engine, (), prompts.name)
        samples = fingerprint("pictures", 1, {}, {})
        made = fingerprint("prompts", 1, {}, {SAMPLES: samples})
        inputs = {SAMPLES: samples, prompts.name: made}
        asked = fingerprint("captions", captions.version, captions.settings(), inputs)
        return (
            Step(source, samples, {}),
            Step(prompts, made, {SAMPLES: samples}),
            Step(captions, asked, inputs),
        )

    def prepare(self, shards: int, rows: int = 100) -> "Job":
        """Pictures and prompts, without captions."""
        source, prompts, _ = self.steps()
        steps = (Step(Pictures(rows=rows), source.made_by, {}), prompts)
        with hold_lease(self.dataset.storage, "test") as token:
            chain = Chain.resolve(self.dataset, steps).under(token)
            chain.describe()
            list(run_in_process(chain, range(shards)))
        return self

    def plan(self) -> Plan:
        *_, step = self.steps()
        assert isinstance(step.work, Caption)
        books = step.work.engine.books
        assert books is not None
        return Plan(Chain.resolve(self.dataset, [step]), self.config, books)

    def work(self, act: Callable[[Desk, Plan], Done]) -> Done:
        """As a process of its own would: under the lease, with books read anew."""
        plan = self.plan()
        with hold_lease(plan.books.dataset.storage, "test") as token:
            plan.books.token = token
            desk = Desk(plan.books.load(), plan.config, lambda: self.now[0])
            try:
                return act(desk, plan)
            finally:
                desk.close()

    def submit(self) -> Sent:
        def act(desk: Desk, plan: Plan) -> Sent:
            desk.look()
            desk.take_in()
            return desk.submit(plan)

        return self.work(act)

    def collect(self) -> None:
        def act(desk: Desk, plan: Plan) -> None:
            desk.look()
            desk.take_in()

        self.work(act)
        plan = self.plan()
        with hold_lease(self.dataset.storage, "test") as token:
            chain = plan.chain.under(token)
            chain.describe()
            ready, _ = answered_only(chain, chain.pending(self.dataset.shards()))
            if ready:
                list(run_in_process(chain, ready[plan.step.table]))

    def unsent(self) -> int:
        plan = self.plan()
        plan.books.load()
        return plan.unsent()

    def captions(self, model: str = MODEL) -> dict[tuple[int, int], dict[str, object]]:
        """Rows of the committed captions, by shard and row."""
        found = {}
        for shard, table in self.dataset.iterate(f"captions/{model}"):
            for number, row in enumerate(table.to_pylist()):
                found[shard, number] = row
        return found


def hours(job: Job, count: float) -> None:
    job.now[0] += 3600 * count


def outcomes_of(job: Job, model: str = MODEL) -> Counter[str]:
    rows = job.captions(model).values()
    return Counter(str(row["reason"] or row["finish"]) for row in rows)
