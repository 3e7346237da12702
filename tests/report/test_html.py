import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from small_run import EVIDENCE, FAILED_SOURCES, HOSTILE, Run, build_run, put

from fusion_pipeline.dataset.accounting import count_table
from fusion_pipeline.report.html import Report

VOID = {"meta", "img", "input", "br"}


class Page(HTMLParser):
    """Checks nesting; keeps tags, attributes and the text of each element by class."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[tuple[list[str], str]] = []
        self.feed(page)
        self.close()
        assert self.open == [], "unclosed elements"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class") or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            names = [f"{tag}.{classes}" for tag, classes in self.open]
            self.texts.append((names, data.strip()))

    def of(self, element: str) -> list[str]:
        """Texts inside elements `tag.classes`."""
        return [text for names, text in self.texts if element in names]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = build_run(tmp_path)
    made.report.run()
    return made


def test_page_requests_nothing_and_runs_nothing(run: Run) -> None:
    page = Page(run.page)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "a[ping]"})
    for name, value in page.attributes:
        assert not name.startswith("on"), (name, value)
        if name in ("href", "src", "srcset", "data", "action", "xlink:href", "poster"):
            assert value.startswith(("#", "data:image/jpeg;base64,")), (name, value)
    css = run.page[run.page.index("<style>") : run.page.index("</style>")]
    assert "url(" not in css
    assert "@import" not in css
    assert any("default-src 'none'; img-src data:" in value for _, value in page.attributes)


def test_hostile_text_is_shown_as_text(run: Run) -> None:
    page = Page(run.page)
    shown = HOSTILE.replace("\x1b", "\ufffd1B").replace("\u202e", "\ufffd202E")
    (caption,) = [text for text in page.of("p.caption") if "apple" in text]
    assert caption == f"An apple beside the words {shown}"
    assert shown in page.of("ul.alts")
    assert f"EAT {shown}" in page.of("ol.lines")
    assert f"Describe. {shown}" in page.of("pre.")
    assert "https://example.com/a.jpg?<x>" in page.of("bdi.")
    assert page.of("h1.") == ["small & <odd>"]
    assert "run: <b>x</b>" in page.of("pre.")
    assert re.search("[\x00-\x08\x0e-\x1f\u202a-\u202e]", run.page) is None


def test_figures_are_those_of_the_accounting(run: Run) -> None:
    figures = [text for text in Page(run.page).of("dl.figures") if text.isdigit()]
    pool, selected = run.report.pool, run.report.selected
    tables = [(pool, name) for name in ("sources", "samples", "resolution", "selection")]
    tables += [(selected, name) for name in ("samples", *EVIDENCE, "captions/c")]
    counts = [count_table(*table) for table in tables]
    assert [int(text) for text in figures[:5]] == [
        counts[0].rows,
        counts[1].rows,
        counts[3].ok,
        counts[-1].ok,
        sum(count.total("failed") for count in counts),
    ]
    values = Page(run.page).of("span.value")
    assert values == ["10", "6", "5", "5", "5", "2", "2", "2", "2", "2", "2", "2", "1"]


def test_every_input_row_is_in_the_ledger(run: Run) -> None:
    page = Page(run.page)
    (line,) = [text for text in page.of("h3.") if "Rows" in text]
    assert line == "Rows in = rows out: 10 in, 10 accounted for"
    parts = page.of("ul.sum")
    assert dict(zip(parts[1::2], map(int, parts[::2]), strict=True)) == {
        "corrupt": 2,
        "no image": 1,
        "same bytes as another row of its shard": 1,
        "near exact copy": 2,
        "semantic duplicate": 1,
        "short edge": 1,
        "http 500": 1,
        "captioned": 1,
    }


def test_a_row_that_vanished_shows(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    captions, _ = run.report.selected.read_table("captions/c", 0)
    put(run.report.selected, "captions/c", captions.slice(0, 1))
    run.report.run()
    assert "Rows do not add up: 10 in, 9 accounted for" in run.page
    assert Page(run.page).of("span.lost") == ["1 rows lost"]


def test_every_failed_row_is_listed(run: Run) -> None:
    texts = Page(run.page).of("div.panel failures")
    sources, _ = run.report.pool.read_table("sources", 0)
    failed = sources.filter(pa.compute.equal(sources["status"], "failed"))
    for row_id in failed["row_id"].to_pylist():
        assert row_id in texts
    assert run.samples[1].key in texts
    for detail in (*FAILED_SOURCES, "http_500: <i>no</i>"):
        assert detail in texts


def test_regions_lie_where_the_evidence_says_in_the_upright_picture(run: Run) -> None:
    # The first sample is stored as 400 x 300 with EXIF orientation 6: it is 300 x 400 upright.
    page = Page(run.page)
    assert ("viewbox", "0 0 300 400") in page.attributes
    points = [value for name, value in page.attributes if name == "points"]
    assert (
        "75.0,200.0 225.0,200.0 225.0,400.0 75.0,400.0" in points
    )  # objects: 1/4 .. 3/4, 1/2 .. 1
    assert "30.0,40.0 150.0,40.0 150.0,80.0 30.0,80.0" in points
    styles = [value for name, value in page.attributes if name == "style"]
    assert "left:25.00%;bottom:50.00%" in styles
    images = [value for name, value in page.attributes if name == "src"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))).size for uri in images]
    assert sizes[:2] in ([(300, 400), (400, 300)], [(400, 300), (300, 400)])  # two cards
    assert all(max(size) <= 280 for size in sizes[2:])


def test_lines_that_nobody_could_read_are_marked(run: Run) -> None:
    assert Page(run.page).of("span.mark text unread") == ["Cyrl"]


def test_duplicates_follow_the_row_they_were_dropped_for(run: Run) -> None:
    page = Page(run.page)
    labels = [text for text in page.of("div.panel group s4") if not text[0].isdigit()]
    assert [text for text in labels if not text.startswith("cosine")] == [
        "kept",
        "semantic duplicate",
        "↳ near exact copy",
        "near exact copy",
    ]
    cosines = [text for text in labels if text.startswith("cosine")]
    assert cosines == ["cosine 0.960", "cosine 0.991", "cosine 0.934"]


def test_page_is_current_until_an_input_changes(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    assert not run.report.is_current()
    run.report.run()
    assert run.report.is_current()
    first = run.page
    run.report.run()
    assert run.page == first
    fewer = Report(**{**vars(run.report), "cards": 1})
    assert not fewer.is_current()
    hints, _ = run.report.selected.read_table("hints", 0)
    changed = hints.set_column(3, "hints", [hints["hints"].to_pylist()[::-1]])
    put(run.report.selected, "hints", changed)
    assert not run.report.is_current()


def test_steps_that_have_not_run_are_pending(tmp_path: Path) -> None:
    run = build_run(tmp_path, captioned=False)
    run.report.run()
    page = Page(run.page)
    assert "There are no captions yet." in page.of("p.empty")
    assert "Rows in = rows out: 10 in, 10 accounted for" in page.of("h3.")
    parts = page.of("ul.sum")
    assert dict(zip(parts[1::2], parts[::2], strict=True))["not captioned yet"] == "2"


def test_nothing_selected_and_no_duplicates(tmp_path: Path) -> None:
    run = build_run(tmp_path, chosen=0)
    run.report.run()
    page = Page(run.page)
    assert page.of("p.empty") == [
        "No sample is selected yet.",
        "No tags or objects are merged yet.",
        "No duplicates were found.",
        "There are no captions yet.",
        "No run is logged.",
    ]
    assert "Rows in = rows out: 10 in, 10 accounted for" in page.of("h3.")
