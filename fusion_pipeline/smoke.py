"""`fusion doctor --smoke`: known photos through a config's experts, hints, prompts and caption
engine, stage by stage, in this process; what came out is shown as cards.

The photos have no alt texts: whatever a card shows was found in the pixels.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fusion_pipeline.config import Config
from fusion_pipeline.dataset.evidence import EvidenceKind
from fusion_pipeline.dataset.images import MAX_PIXELS
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.lease import hold_lease
from fusion_pipeline.dataset.schemas import SAMPLES, UPSTREAM
from fusion_pipeline.engine.chain import Chain, ChainRunner
from fusion_pipeline.engine.errors import StageError
from fusion_pipeline.engine.shard import Step
from fusion_pipeline.errors import FusionError, printable
from fusion_pipeline.fuse.batch.config import BatchConfig
from fusion_pipeline.fuse.endpoint import EndpointConfig, EndpointError
from fusion_pipeline.ingest.source import Ingest
from fusion_pipeline.perceive.merge_stages import MergeObjects, MergeTags
from fusion_pipeline.perceive.stage import Perceive
from fusion_pipeline.pipeline import smoke_steps

TAGS, OBJECTS, TEXT = EvidenceKind.TAGS, EvidenceKind.OBJECTS, EvidenceKind.TEXT
SIGN = ("HARBOUR MARKET", "Open Saturday 9:30")
KNOWN: Mapping[str, Mapping[EvidenceKind, Sequence[Sequence[str]]]] = {
    "astronaut.png": {OBJECTS: [("person", "woman", "astronaut")]},
    "cat.png": {TAGS: [("cat", "tabby")], OBJECTS: [("cat",)]},
    "coffee.png": {TAGS: [("coffee", "espresso", "cup")], OBJECTS: [("cup", "mug")]},
    "sign.png": {TEXT: [(line,) for line in SIGN]},
}
"""Facts of each photo by the kind of evidence that must hold them, each fact by its words."""
_SOURCES = {"astronaut.png": "astronaut.png", "cat.png": "chelsea.png", "coffee.png": "coffee.png"}
_MAX_RETRIES = 2
"""Of an endpoint: a server that is down shall show in seconds, one busy moment shall not."""


class SmokeError(FusionError):
    """The photos can't be made."""


@dataclass(frozen=True)
class Found:
    label: str
    """Of a tag or an object; of a text line its text."""
    score: float
    kept: bool
    """Whether it reaches the threshold of the config's hints; only then can a prompt hold it."""


@dataclass(frozen=True)
class Fact:
    stage: str
    expected: str
    seen: bool


@dataclass(frozen=True)
class Problem:
    stage: str
    reason: str


@dataclass
class Card:
    """What the stages made of one photo."""

    photo: str
    width: int
    """Pixels."""
    height: int
    seconds: dict[str, float | None] = field(default_factory=dict)
    """By stage, without loading its model; None: it broke, or one before it failed."""
    evidence: dict[str, list[Found]] = field(default_factory=dict)
    """By stage. Tags and objects by falling score, text lines as they were read."""
    prompt: str | None = None
    caption: str | None = None
    finish: str | None = None
    """`stop`, or `length` for a caption that was cut off."""
    facts: list[Fact] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def try_photos(config: Config, tell: Callable[[str], None]) -> list[Card]:
    """One card a photo, in the order of their names. `tell` hears which stage is at work.

    What a stage raises, and rows that it fails, are problems on the cards. Raises SmokeError when
    the packages that hold the photos are missing.
    """
    config = _impatient(config)
    with tempfile.TemporaryDirectory(prefix="fusion-smoke-") as root:
        folder = Path(root) / "photos"
        _write_photos(folder)
        dataset = Dataset.create(Path(root) / "dataset")
        ingest = _ingest(dataset, folder)
        with hold_lease(dataset.storage, "smoke") as token:
            plan = ingest.plan_digest()
            shards = range(len(ingest.make_plan(plan, token)))
            steps = smoke_steps(config, dataset, ingest)
            chain = Chain.resolve(dataset, steps, plan).under(token)
            chain.describe()
            trial = _Trial(config, chain)
            for step in chain.steps:
                tell(f"{step.work.name} …")
                trial.run(step, shards)
        return [trial.card(shard, name) for shard, name in enumerate(sorted(KNOWN))]


def _write_photos(folder: Path) -> None:
    folder.mkdir()
    try:
        from fusion_pipeline.demo.canvas import Sketch
        from fusion_pipeline.demo.photos import PHOTOS, load

        by_file = {photo.file: photo for photo in PHOTOS}
        for name, file in _SOURCES.items():
            load(by_file[file], Random(0)).image.save(folder / name)
        sketch = Sketch((640, 360), (150, 180, 205))
        sketch.rect((306, 250, 334, 360), (110, 112, 116))
        sketch.rect((40, 60, 600, 260), (20, 84, 60), (245, 245, 240), 6, 14)
        canvas = sketch.canvas()
        canvas.text((320, 130), SIGN[0], "sans-bold", 54, (255, 255, 255), "mm")
        canvas.text((320, 205), SIGN[1], "sans", 36, (255, 255, 255), "mm")
        canvas.image.save(folder / "sign.png")
    except ModuleNotFoundError as error:
        fix = "pip install 'fusion-pipeline[demo]'"
        raise SmokeError(f"the smoke photos need {error.name}: {fix}") from error


def _impatient(config: Config) -> Config:
    """The config with few retries of its endpoint, on which no output depends. Of a model that is
    asked in batches the same endpoint is asked at once."""
    engine = config.caption.engine
    endpoint = engine.endpoint
    if engine.batch is not None:
        shared = set(EndpointConfig.model_fields) & set(BatchConfig.model_fields)
        endpoint = EndpointConfig.model_validate(engine.batch.model_dump(include=shared))
    if endpoint is None:
        return config
    few = min(_MAX_RETRIES, endpoint.max_retries)
    endpoint = endpoint.model_copy(update={"max_retries": few})
    engine = engine.model_copy(update={"endpoint": endpoint, "batch": None})
    caption = config.caption.model_copy(update={"engine": engine})
    return config.model_copy(update={"caption": caption})


def _ingest(dataset: Dataset, folder: Path) -> Ingest:
    """A shard a photo, so that times are per photo; the config's limits are for its own data."""
    return Ingest(
        dataset=dataset,
        kind="folder",
        place=str(folder),
        shard_size=1,
        max_shard_bytes=2**28,
        max_image_bytes=2**26,
        max_pixels=MAX_PIXELS,
    )


@dataclass
class _Trial:
    config: Config
    chain: Chain
    seconds: dict[tuple[str, int], float] = field(default_factory=dict)
    """Of the tables that were made, by name and shard."""
    broken: dict[str, str] = field(default_factory=dict)
    """Why a stage stopped, by table."""

    def run(self, step: Step, shards: Sequence[int]) -> None:
        """One stage over all photos. When it breaks, the stages that don't need it still run."""
        todo = [s for s in shards if all((table, s) in self.seconds for table in step.inputs)]
        runner = ChainRunner(replace(self.chain, steps=(step,)))
        try:
            if todo:
                runner.open()
            for shard in todo:
                for result in runner.run(shard):
                    self.seconds[step.table, shard] = round(result.seconds, 3)
        except StageError as error:
            if step.table == SAMPLES:
                raise  # no photo, no card
            cause = error.__cause__
            # Of an endpoint's own message all is for the user; of others the place helps, too.
            text = str(cause if isinstance(cause, EndpointError) else error)
            self.broken[step.table] = _line(text.removeprefix(f"stage {step.table!r} "))

    def card(self, shard: int, photo: str) -> Card:
        sample = self._row(SAMPLES, shard)
        card = Card(photo, sample["width"], sample["height"])
        for step in self.chain.steps[1:]:
            self._add(card, step, shard)
        return card

    def _row(self, table: str, shard: int) -> dict[str, Any]:
        (row,) = self.chain.dataset.read_table(table, shard)[0].to_pylist()
        found: dict[str, Any] = row
        return found

    def _add(self, card: Card, step: Step, shard: int) -> None:
        table = step.table
        card.seconds[table] = None
        if (table, shard) not in self.seconds:
            if table in self.broken:
                card.problems.append(Problem(table, self.broken[table]))
            return
        row = self._row(table, shard)
        if row["status"] != "ok":
            # A refusal is a problem, too: these photos give a caption engine no cause for one.
            if not row["reason"].startswith(UPSTREAM):
                card.problems.append(Problem(table, self._reason(step, row)))
            return
        card.seconds[table] = self.seconds[table, shard]
        if isinstance(step.work, Perceive | MergeTags | MergeObjects):
            perceived = step.work if isinstance(step.work, Perceive) else None
            found_in = perceived.expert_class.kind if perceived else table.partition("/")[0]
            kind = EvidenceKind(found_in)
            found = card.evidence[table] = self._found(kind, row[kind.value])
            labels = [item.label for item in found if item.kept]
            # A detector of what is blurred has a folder, and looks for that alone.
            is_asked = perceived is not None and not perceived.folder
            known = KNOWN[card.photo].get(kind, ()) if is_asked else ()
            card.facts += [Fact(table, words[0], _says(kind, labels, words)) for words in known]
        card.prompt = row.get("prompt", card.prompt)
        card.caption, card.finish = row.get("caption"), row.get("finish")

    def _reason(self, step: Step, row: Mapping[str, Any]) -> str:
        endpoint = self.config.caption.engine.endpoint
        if endpoint is None or step is not self.chain.steps[-1]:
            return _line(row["reason"])
        return _line(f"{row['reason']} ({endpoint.model} at {', '.join(endpoint.url)})")

    def _found(self, kind: EvidenceKind, cell: Sequence[Mapping[str, Any]]) -> list[Found]:
        hints = self.config.hints
        least = {
            TAGS: hints.tag_threshold,
            OBJECTS: hints.object_threshold,
            TEXT: hints.text_threshold,
        }.get(kind, 0.0)
        if kind is TEXT:
            cell = [line for line in cell if line["text"]]  # unread lines have none
        else:
            cell = sorted(cell, key=lambda item: -item["score"])
        name = "text" if kind is TEXT else "label"
        return [Found(i[name], round(i["score"], 4), i["score"] >= least) for i in cell]


def _says(kind: EvidenceKind, labels: Sequence[str], words: Sequence[str]) -> bool:
    """Whether labels hold one of the words (not as a part of another one: a polecat is no cat)."""
    if kind is TEXT:  # OCR models differ in blanks, and in where a line ends
        read = _letters("".join(labels))
        return any(_letters(word) in read for word in words)
    return not set(re.findall(r"[a-z]+", " ".join(labels).lower())).isdisjoint(words)


def _letters(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


def _line(text: str) -> str:
    return " ".join(text.split())


# Cards for a terminal. What models say goes into `Text`, where brackets are no markup.


def shown(cards: Sequence[Card]) -> Iterator[RenderableType]:
    """The cards, a line for each problem, and the sum."""
    for card in cards:
        title = Text(f"{card.photo}, {card.width} x {card.height}", "bold")
        yield Panel(Group(_stages(card), *map(_fact, card.facts)), title=title, title_align="left")
    problems = {problem: None for card in cards for problem in card.problems}  # in order, once
    for problem in problems:
        count = sum(problem in card.problems for card in cards)
        text = f"{problem.stage}: {problem.reason}; {count} of {len(cards)} photos"
        yield Text.assemble(("failed   ", "bold red"), printable(text))
    facts = [fact for card in cards for fact in card.facts]
    yield Text(
        f"{sum(card.caption is not None for card in cards)} of {len(cards)} photos captioned, "
        f"{sum(fact.seen for fact in facts)} of {len(facts)} known facts seen"
    )


def _stages(card: Card) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for stage, seconds in card.seconds.items():
        time = "-" if seconds is None else f"{seconds:.2f} s"
        table.add_row(Text(stage, "cyan"), time, _outcome(card, stage))
    return table


def _outcome(card: Card, stage: str) -> Text:
    for problem in card.problems:
        if problem.stage == stage:
            return Text(printable(problem.reason), "red")
    if card.seconds[stage] is None:
        return Text("not reached", "dim")
    if stage in card.evidence:
        return _evidence(card.evidence[stage], quoted=stage.startswith(f"{TEXT}/"))
    if stage.startswith("prompts/") and card.prompt:
        return Text(f"{len(card.prompt):,} characters")
    if stage.startswith("captions/") and card.caption:
        cut = (" (cut off at max_tokens)", "yellow") if card.finish == "length" else ""
        return Text.assemble(printable(card.caption), cut)
    return Text()


def _evidence(found: Sequence[Found], quoted: bool) -> Text:
    form = '"{}" {:.2f}' if quoted else "{} {:.2f}"

    def listed(kept: bool, most: int) -> str:
        items = [form.format(_line(i.label), i.score) for i in found if i.kept is kept]
        more = [f"{len(items) - most} more"] if len(items) > most else []
        return printable(", ".join(items[:most] + more))

    text, weak = Text(listed(True, 8) or "none"), listed(False, 3)
    return text.append(f" (below the threshold: {weak})", "dim") if weak else text


def _fact(fact: Fact) -> Text:
    mark = ("ok      ", "green") if fact.seen else ("not seen", "yellow")
    return Text.assemble(mark, f"  {fact.expected} ", (f"in {fact.stage}", "dim"))
