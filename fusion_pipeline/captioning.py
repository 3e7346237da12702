"""Captions by themselves: asking again for some, and what the pending ones would cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.schemas import SAMPLES
from fusion_pipeline.dataset.tables import NoTableError
from fusion_pipeline.engine.again import Again, check_where
from fusion_pipeline.engine.chain import Chain, Replace
from fusion_pipeline.engine.shard import Redo, Step, pending_block
from fusion_pipeline.engine.stage import ShardBlock, ShardImages
from fusion_pipeline.errors import FusionError
from fusion_pipeline.fuse.batch.config import BatchConfig
from fusion_pipeline.fuse.endpoint import TURN_TOKENS, EndpointConfig
from fusion_pipeline.fuse.journal import Spent, spent_on
from fusion_pipeline.fuse.stage import Caption
from fusion_pipeline.pipeline import ChainPhase, Pipeline

_SAMPLE_SHARDS = 20
_SAMPLE_PROMPTS = 200
T = TypeVar("T")


class CannotAskAgainError(FusionError):
    """An engine that does not answer at once."""


def caption_step(pipeline: Pipeline) -> tuple[Step, Caption]:
    """The last step that works shard by shard."""
    chains = [phase for phase in pipeline.phases if isinstance(phase, ChainPhase)]
    step = chains[-1].steps[-1]
    assert isinstance(step.work, Caption)
    return step, step.work


def ask_again(pipeline: Pipeline, where: str, limit: int | None) -> Again:
    """The request to write captions once more: one that is open, or a new one.

    Raises WhereError, NoTableError, CannotAskAgainError; nothing is written.
    """
    _, caption = caption_step(pipeline)
    check_where(where, caption.columns)
    if caption.engine.batch is not None:
        raise CannotAskAgainError(
            f"--where: {caption.name} is asked for in batches, whose answers stay. Name an "
            "endpoint with --engine, or another batch engine in caption.engines."
        )
    return Again.find(pipeline.selected, caption.name, where, limit)


@dataclass(frozen=True)
class Estimate:
    """What the captions that are pending would cost; dollars, or None without prices."""

    table: str
    rows: int
    """That would be asked for."""
    without_prompts: int
    """Shards that can't be counted yet."""
    prompts: int
    """Rendered prompts that were looked at."""
    mean_bytes: float
    max_bytes: int
    """Of those prompts."""
    most: float | None
    """The bound that a budget sets aside; without second attempts and repairs."""
    usual: float | None
    """By what this table's requests have used so far; None when there were none."""
    seen: Spent

    def lines(self) -> list[str]:
        """For people, one fact each."""
        said = [f"{self.table}: {self.rows:,} captions are pending"]
        if self.without_prompts:
            said.append(
                f"not counted: {self.without_prompts:,} shards that the steps before have not done "
                "(--until the last of them first)"
            )
        if self.prompts:
            said.append(
                f"prompts: {self.mean_bytes:,.0f} bytes on average, {self.max_bytes:,} at most, of "
                f"{self.prompts:,} looked at"
            )
        if self.most is None:
            said.append("dollars: no prices are set for this engine")
            return said
        said.append(f"at most: {self._dollars(self.most)}; each second attempt or repair adds one")
        if self.usual is None:
            said.append("usual: not known, the journal holds no answered request")
        else:
            tokens = (self.seen.prompt_tokens, self.seen.completion_tokens)
            prompt, completion = (count / self.seen.requests for count in tokens)
            said.append(
                f"usual: {self._dollars(self.usual)}; by {self.seen.requests:,} requests of "
                f"{prompt:,.0f} and {completion:,.0f} tokens on average"
            )
        return said

    def _dollars(self, dollars: float) -> str:
        million = 1e6 * dollars / self.rows if self.rows else 0.0
        return f"${dollars:,.2f} (${million:,.0f} a million)"


def estimate(
    pipeline: Pipeline, redo: Redo | Again, allowed: Replace, limit: int | None
) -> Estimate:
    """Of what a run with these options would ask for. Reads only.

    Raises TableError as the run would, and WhereError.
    """
    step, caption = caption_step(pipeline)
    dataset = pipeline.selected
    chain = Chain.resolve(dataset, [step], redo=redo)
    is_new = bool(chain.outdated(allowed))
    shards, missing = _shards(dataset, chain, limit)
    pending = chain.pending(shards).get(step.table, [])
    if is_new:
        chain = Chain(chain.place, chain.steps)
    rows = {shard: _rows(chain, step, shard) for shard in pending}
    lengths = _prompt_bytes(chain, caption, step, [shard for shard in pending if rows[shard]])
    total, seen = sum(rows.values()), spent_on(dataset, caption.name)
    config = pipeline.config.caption.engine.endpoint or pipeline.config.caption.engine.batch
    bound = _most(config, lengths) if config else None
    used = _usual(config, seen) if config else None
    return Estimate(
        caption.name,
        total,
        missing,
        len(lengths),
        fmean(lengths) if lengths else 0.0,
        max(lengths, default=0),
        None if bound is None else total * bound,
        None if used is None else total * used,
        seen,
    )


def _shards(dataset: Dataset, chain: Chain, limit: int | None) -> tuple[list[int], int]:
    """Those that captions can be asked for, and how many others there are."""
    footers = dataset.footers(SAMPLES)
    wanted, total = [], 0
    for shard, footer in footers.items():
        if limit is not None and total >= limit:
            break
        wanted.append(shard)
        total += footer.rows
    (step,) = chain.steps
    there = set(wanted)
    for name in step.inputs:
        there &= dataset.shards_of(chain.place.versions[name])
    if not there:
        name = list(step.inputs)[-1]
        raise NoTableError(dataset.storage.full(f"tables/{name}"), name)
    return sorted(there), len(wanted) - len(there)


def _rows(chain: Chain, step: Step, shard: int) -> int:
    """To be asked for. Of a shard without captions by its footers: those of the last table read are
    ok in all the others."""
    if chain.redo is Redo.MISSING:
        last = chain.place.versions[list(step.inputs)[-1]]
        return chain.dataset.read_footer(last, shard).counts.get("ok", 0)
    return len(_block(chain, step, shard) or ())


def _prompt_bytes(chain: Chain, caption: Caption, step: Step, shards: Sequence[int]) -> list[int]:
    """Of at most 200 prompts, from shards and rows at equal distances."""
    found: list[int] = []
    some = _spread(shards, _SAMPLE_SHARDS)
    for shard in some:
        block = _block(chain, step, shard)
        texts = block.column(caption.prompts, "prompt") if block else []
        found += [len(text.encode()) for text in _spread(texts, _SAMPLE_PROMPTS // len(some))]
    return found


def _block(chain: Chain, step: Step, shard: int) -> ShardBlock | None:
    images = ShardImages(chain.dataset, shard, chain.place.versions)
    return pending_block(chain.place, step, shard, images, chain.redo)


def _spread(items: Sequence[T], count: int) -> list[T]:
    if len(items) <= count:
        return list(items)
    return [items[len(items) * place // count] for place in range(count)]


def _most(config: EndpointConfig | BatchConfig, lengths: Sequence[int]) -> float | None:
    """Dollars a caption: a token is a byte of the prompt at least."""
    if config.prices is None or not lengths:
        return None if config.prices is None else 0.0
    tokens = fmean(lengths) + TURN_TOKENS + config.image_tokens
    return config.prices.cost(round(tokens), config.max_tokens)


def _usual(config: EndpointConfig | BatchConfig, seen: Spent) -> float | None:
    if config.prices is None or not seen.completion_tokens:
        return None
    cost = config.prices.cost(seen.prompt_tokens, seen.completion_tokens)
    return cost / seen.requests
