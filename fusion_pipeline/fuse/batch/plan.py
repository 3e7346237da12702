"""Which requests are to be asked in batches, and which shards wait for answers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fusion_pipeline.engine.chain import Chain
from fusion_pipeline.engine.shard import Redo, Step, pending_block
from fusion_pipeline.engine.stage import ShardBlock, ShardImages
from fusion_pipeline.fuse.base import Captioned, CaptionRequest
from fusion_pipeline.fuse.batch.books import Books
from fusion_pipeline.fuse.batch.config import BatchConfig
from fusion_pipeline.fuse.batch.files import id_of
from fusion_pipeline.fuse.stage import Caption


@dataclass
class Plan:
    """The captions step of a dataset, and which of its requests have been asked."""

    chain: Chain
    """Of that step alone."""
    config: BatchConfig
    books: Books

    @property
    def step(self) -> Step:
        (step,) = self.chain.steps
        return step

    @property
    def stage(self) -> Caption:
        assert isinstance(self.step.work, Caption)
        return self.step.work

    def shards(self) -> list[int]:
        """Those that have all that the step reads, and no captions. Raises TableError."""
        place, step = self.chain.place, self.step
        there = [place.dataset.shards_of(place.versions[name]) for name in step.inputs]
        return self.chain.pending(sorted(set.intersection(*there))).get(step.table, [])

    def ids(self, shard: int) -> list[str]:
        """Of the shard's requests, a row each; images are not read."""
        block = self._block(shard)
        return [] if block is None else _ids(block, self.stage, self.config)

    def requests(self, shard: int, wanted: set[str]) -> Iterator[CaptionRequest]:
        """Those with these ids, each once."""
        block = self._block(shard)
        if block is not None:
            left = set(wanted)
            for request in self.stage.requests(block):
                name = id_of(request.key, request.prompt, self.config)
                if name in left:
                    left.remove(name)
                    yield request

    def of_failed(self) -> "Plan":
        """The same, with shards some of whose rows have failed: of these, those rows."""
        return replace(self, chain=replace(self.chain, redo=Redo.FAILED))

    def has_healed(self) -> bool:
        """Whether there are captions now for rows that are committed as failed."""
        done, plan = set(self.shards()), self.of_failed()
        again = (name for shard in plan.shards() if shard not in done for name in plan.ids(shard))
        return any(isinstance(self.books.outcomes.get(name), Captioned) for name in again)

    def unsent(self) -> int:
        """Requests that are in no open file and have no outcome."""
        known = self.books.outcomes.keys() | self.books.in_flight()
        return len({name for shard in self.shards() for name in self.ids(shard)} - known)

    def _block(self, shard: int) -> ShardBlock | None:
        place, step = self.chain.place, self.step
        images = ShardImages(place.dataset, shard, place.versions)
        return pending_block(place, step, shard, images, self.chain.redo)


def _ids(block: ShardBlock, stage: Caption, config: BatchConfig) -> list[str]:
    rows = zip(block.keys, block.column(stage.prompts, "prompt"), strict=True)
    return [id_of(key, prompt, config) for key, prompt in rows]


def answered_only(
    chain: Chain, pending: Mapping[str, Sequence[int]]
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """What is pending of a chain, without shards whose captions are asked for in batches and are
    not all answered; and how many of those there are, by the tables of such captions."""
    ready = {table: list(shards) for table, shards in pending.items()}
    waiting = dict[str, int]()
    for step in chain.steps:
        books = step.work.engine.books if isinstance(step.work, Caption) else None
        if books is None:
            continue
        waiting[step.table] = 0
        if step.table in ready:
            shards = _answered(chain.reduced({step.table}), books, ready, step)
            waiting[step.table] = len(ready[step.table]) - len(shards)
            ready[step.table] = shards
    return {table: shards for table, shards in ready.items() if shards}, waiting


def _answered(
    chain: Chain, books: Books, pending: Mapping[str, Sequence[int]], step: Step
) -> list[int]:
    assert isinstance(step.work, Caption)
    place, config = chain.place, step.work.engine.batch
    assert config is not None
    books = Books(books.dataset, books.table).load()  # to be read only, whoever holds the other
    outcomes = books.outcomes
    if not outcomes:
        return []
    plan = Plan(chain, config, books)
    # Of what is made or made anew in this very run nothing is known yet.
    changing = {shard for name in step.inputs for shard in pending.get(name, ())}
    there = [place.dataset.shards_of(place.versions[name]) for name in step.inputs]
    known = set.intersection(*there) - changing
    return [
        shard
        for shard in pending[step.table]
        if shard in known and all(name in outcomes for name in plan.ids(shard))
    ]
