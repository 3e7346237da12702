"""The numbers of a comparison as small tables of text: the same on the page and in a terminal."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from fusion_pipeline.errors import printable
from fusion_pipeline.report.compare_measures import CaptionStats, Comparison, Spread

NOTHING = "–"


@dataclass(frozen=True)
class Line:
    label: str
    cells: tuple[str, ...]
    part: bool = False
    """Belongs to the line before, such as a median to a mean."""


@dataclass(frozen=True)
class Block:
    title: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """4: A and B over their own captions, A and B over those of both; 2: A and B; 1: a value
        of the pair."""
        return len(self.lines[0].cells)


def make_blocks(comparison: Comparison) -> dict[str, Block]:
    """By the name that the page's template knows them under."""
    return {
        "captions": Block("Captions", tuple(_captions(comparison)), (_DISTINCT,)),
        "rules": Block("Broken rules", tuple(_rules(comparison)), (_RULES,)),
        "rows": Block("Rows", tuple(_rows(comparison))),
        "overlap": Block("Overlap", tuple(_overlap(comparison)), (_DIFFERENCE,)),
        "faith": Block(
            "Faithful to the evidence", tuple(_faith(comparison)), (_LINES, _QUOTES, _COMPARED)
        ),
    }


def terminal_tables(comparison: Comparison) -> Iterator[Table]:
    """The blocks as tables for a terminal."""
    names = [f"A {comparison.a.name}", f"B {comparison.b.name}"]
    for block in make_blocks(comparison).values():
        table = Table(block.title, title_justify="left")
        heads = {4: [*names, "A, of both", "B, of both"], 2: names}.get(block.width, [""])
        for head in heads:
            table.add_column(Text(head), justify="right", overflow="fold")
        for line in block.lines:
            label = Text(f"  {printable(line.label)}" if line.part else printable(line.label))
            table.add_row(label, *map(Text, line.cells))
        yield table


_DISTINCT = (
    "Different words: the share of a caption's words that are different ones, averaged over the "
    "captions; longer captions have less of it."
)
_RULES = "Captions that break the rule, per 1,000; docs/policies.md says what each one asks for."
_DIFFERENCE = (
    "Word difference: the share of the words of both captions that the other one lacks; order, "
    "case and punctuation don't count."
)
_LINES = (
    "Text lines said: of the recognised lines above the hints' threshold, the share that stands in "
    "the caption."
)
_QUOTES = (
    "Unknown quotations: of the texts that a caption puts in quotation marks, the share that "
    "stands in no recognised line, alt text, tag or object label; it may be in the picture all the "
    "same, unread."
)
_COMPARED = (
    "Letters and digits alone are compared; one of fewer than eight must stand as whole words."
)


def _captions(of: Comparison) -> Iterator[Line]:
    def line(label: str, value: Callable[[CaptionStats], str], part: bool = False) -> Line:
        stats = (of.a.own, of.b.own, of.a.shared, of.b.shared)
        return Line(label, tuple(value(s) if s.captions else NOTHING for s in stats), part)

    def spread(name: str, pick: Callable[[CaptionStats], Spread]) -> Iterator[Line]:
        yield line(f"{name}, mean", lambda s: f"{pick(s).mean:,.1f}")
        yield line("median", lambda s: f"{pick(s).quantile(0.5):,}", part=True)
        yield line("95 % have at most", lambda s: f"{pick(s).quantile(0.95):,}", part=True)

    yield line("Captions", lambda s: f"{s.captions:,}")
    yield from spread("Words", lambda s: s.words)
    yield from spread("Characters", lambda s: s.characters)
    yield from spread("Sentences", lambda s: s.sentences)
    yield line("Different words", lambda s: f"{100 * s.distinct_words:.1f} %")
    for end in sorted(of.a.own.finish | of.b.own.finish):
        label = "Cut off at the length limit" if end == "length" else f"Finished: {end}"
        yield line(label, lambda s, end=end: share(s.finish[end], s.captions))  # type: ignore[misc]
    yield line("Asked for again", lambda s: f"{s.repairs:,}")


def _rules(of: Comparison) -> Iterator[Line]:
    stats = (of.a.own, of.b.own, of.a.shared, of.b.shared)

    def per_1000(count: Callable[[CaptionStats], int]) -> tuple[str, ...]:
        known = [f"{1000 * count(s) / s.checked:,.0f}" if s.checked else NOTHING for s in stats]
        return tuple(known)

    yield Line("any rule", per_1000(lambda s: s.faulty))
    broken: Counter[str] = of.a.own.broken + of.b.own.broken
    for rule, _ in sorted(broken.items(), key=lambda item: (-item[1], item[0])):
        yield Line(rule, per_1000(lambda s, rule=rule: s.broken[rule]))  # type: ignore[misc]


def _rows(of: Comparison) -> Iterator[Line]:
    every: Counter[str] = of.a.outcomes + of.b.outcomes
    for name in sorted(every, key=lambda name: (name != "ok", -every[name], name)):
        counts = (of.a.outcomes[name], of.b.outcomes[name])
        yield Line(name.replace("_", " "), tuple(f"{n:,}" for n in counts))
    yield Line("All", (f"{of.a.outcomes.total():,}", f"{of.b.outcomes.total():,}"))


def _overlap(of: Comparison) -> Iterator[Line]:
    yield Line("Samples with both captions", (f"{of.both:,}",))
    yield Line("Identical captions", (share(of.identical, of.both),))
    if of.both:
        parts = of.differences.as_dict()
        yield Line("Word difference, mean", (f"{parts['mean'] / 10:.1f} %",))
        yield Line("median", (f"{parts['median'] / 10:.1f} %",), part=True)
        yield Line("95 % have at most", (f"{parts['p95'] / 10:.1f} %",), part=True)


def _faith(of: Comparison) -> Iterator[Line]:
    faith = (of.a.faith, of.b.faith)
    yield Line("Text lines said", tuple(share(f.lines_said, f.lines) for f in faith))
    yield Line("of so many", tuple(f"{f.lines:,}" for f in faith), part=True)
    yield Line("Unknown quotations", tuple(share(f.quotes_unknown, f.quotes) for f in faith))
    yield Line("of so many", tuple(f"{f.quotes:,}" for f in faith), part=True)


def share(part: int, whole: int) -> str:
    """In percent; nothing of nothing is a dash."""
    return f"{100 * part / whole:.1f} %" if whole else NOTHING
