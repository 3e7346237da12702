"""The report of a run: one HTML file without scripts, without links and without requests.

All that comes from outside (alt texts, recognised text, captions, URLs, reasons) is hostile: it is
escaped by the template engine, control and direction characters are made visible, and a content
security policy in the page's head forbids every request.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fusion_pipeline.dataset.artifacts import inputs_of
from fusion_pipeline.dataset.evidence import (
    ALT_TEXTS,
    LOOK,
    MERGED_OBJECTS,
    MERGED_TAGS,
    RELEVANCE,
    RELEVANT_ALT_TEXTS,
)
from fusion_pipeline.dataset.fingerprints import canonical_json, short_hash
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.schemas import SAMPLES
from fusion_pipeline.dataset.storage import Storage
from fusion_pipeline.report.agreement import count_agreement
from fusion_pipeline.report.cards import colours_of, make_cards
from fusion_pipeline.report.failures import list_failures
from fusion_pipeline.report.flow import POOL_TABLES, count_funnel
from fusion_pipeline.report.groups import make_groups
from fusion_pipeline.report.lengths import measure_captions, nice_step
from fusion_pipeline.report.timing import read_timing

VERSION = 5
"""Raised when the page changes for the same inputs."""
FILE = "report.html"
TEMPLATES = Path(__file__).parent / "templates"

_HEAD_BYTES = 1024
_INPUTS = re.compile(rb'<meta name="fusion-inputs" content="([0-9a-f]{32})">')


@dataclass(frozen=True)
class Report:
    title: str
    pool: Dataset
    selected: Dataset
    evidence: tuple[str, ...]
    """Tables of the experts and the merged ones, for example `objects/nanodet`."""
    prompts: str
    """Table of prompts, for example `prompts/engine-v1`."""
    captions: str
    """Table of captions, for example `captions/composer`."""
    settings: str
    """The resolved config, as YAML."""
    cards: int
    """Samples shown with all their evidence."""
    groups: int
    """Duplicate groups shown."""
    seed: int
    """Of the draw of both."""
    out: Storage
    """Folder that `report.html` goes into."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Scores from which evidence is believed, by kind."""
    sample: tuple[str, ...] = ()
    """The table of the rows drawn for captions, if there is one."""
    exported: Mapping[str, int] = field(default_factory=dict)
    """Counts of what the export holds and leaves out; empty when there is none of these tables."""

    @property
    def experts(self) -> list[str]:
        """Tables of the experts alone."""
        others = (ALT_TEXTS, RELEVANT_ALT_TEXTS, MERGED_TAGS, MERGED_OBJECTS, LOOK)
        return [
            name for name in self.evidence if name not in others and not name.startswith(RELEVANCE)
        ]

    def inputs(self) -> dict[str, Any]:
        """What the page is made of, but for the run logs: other times alone don't outdate it.

        O(shards): footers are read, not tables.
        """
        return {
            "version": VERSION,
            "title": self.title,
            "settings": self.settings,
            "show": [self.cards, self.groups, self.seed],
            "pool": inputs_of(self.pool, POOL_TABLES),
            "selected": inputs_of(self.selected, self._selected_tables()),
            "exported": self.exported,
        }

    def is_current(self) -> bool:
        """Whether the page that is there was made of the same inputs."""
        try:
            head = self.out.read_range(FILE, 0, _HEAD_BYTES)
        except FileNotFoundError:
            return False
        found = _INPUTS.search(head)
        return found is not None and found[1].decode() == self._digest()

    def run(self) -> None:
        """Make the page anew; it appears whole or not at all."""
        page = environment().get_template("report.html.jinja").render(self._content())
        self.out.put(FILE, page.encode())

    def _content(self) -> dict[str, Any]:
        colours = colours_of(self.evidence)
        digest = self._digest()  # first: a table that changes from here on outdates the page
        stages = (*self._selected_tables()[1:],)
        of_pool = ("ingest", "resolution", "embeddings", "centroids", "clusters", "selection")
        steps = (*of_pool, "repack", *stages)
        tables = [(self.pool, name) for name in POOL_TABLES]
        tables += [(self.selected, name) for name in self._selected_tables()]
        return {
            "digest": digest,
            "report": self,
            "funnel": count_funnel(
                self.pool, self.selected, self.evidence, self.prompts, self.captions, self.sample
            ),
            "timing": read_timing((self.pool, self.selected), steps),
            "lengths": measure_captions(self.selected, self.captions),
            "failures": list_failures(tables),
            "groups": make_groups(self.pool, self.groups, self.seed),
            "agreements": count_agreement(self.selected, self.evidence, self.thresholds),
            "colours": colours,
            "cards": make_cards(
                self.pool,
                self.selected,
                self.prompts,
                self.captions,
                self.cards,
                self.seed,
                colours,
                [n for n in self.evidence if n.startswith(("text/", "scores/")) or n == LOOK],
            ),
        }

    def _selected_tables(self) -> tuple[str, ...]:
        return (SAMPLES, *self.evidence, "hints", self.prompts, *self.sample, self.captions)

    def _digest(self) -> str:
        return short_hash(canonical_json(self.inputs()))


@cache
def environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["percent"] = _percent
    environment.filters["words"] = lambda name: name.replace("_", " ")
    environment.filters["duration"] = _duration
    environment.filters["rate"] = _rate
    environment.filters["bytes"] = _bytes
    environment.globals["nice_step"] = nice_step
    return environment


_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters; tab and line feed are harmless
    "\xad\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"  # invisible, or turn the direction
    "\ud800-\udfff\ufff9-\uffff]"  # halves of a pair, not encodable; no characters at all
)


def _visible(value: object) -> object:
    """Characters that a reader can't see, or that would mix up the text around them, by code."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _HIDDEN.sub(lambda found: f"\N{REPLACEMENT CHARACTER}{ord(found[0]):02X}", value)


def _percent(part: float, whole: float) -> str:
    """For CSS: a width."""
    return f"{100 * part / whole:.3f}%" if whole else "0%"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _rate(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _bytes(value: int) -> str:
    return f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.0f} kB"
