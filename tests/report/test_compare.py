"""Two engines' captions side by side: figures checked by hand, a page that stays harmless."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import HOSTILE, MADE_BY, picture, put, put_samples
from test_html import Page

from experts import load_expert
from fusion_pipeline.cli import main
from fusion_pipeline.dataset.evidence import (
    ARROW_TYPES,
    DetectedObject,
    Evidence,
    Tag,
    TextLine,
    to_arrow,
)
from fusion_pipeline.dataset.images import inspect
from fusion_pipeline.dataset.layout import Dataset, TableVersion
from fusion_pipeline.dataset.rows import NotOk, Ok, Outcome, build_table
from fusion_pipeline.dataset.samples import Sample, sample_key
from fusion_pipeline.dataset.tables import encode_table
from fusion_pipeline.engine.stage import ShardBlock, ShardImages
from fusion_pipeline.fuse.composer import ComposerConfig
from fusion_pipeline.fuse.engines import EngineChoice, engine_of
from fusion_pipeline.fuse.stage import Caption
from fusion_pipeline.prompts.hints import HintConfig
from fusion_pipeline.prompts.stages import HintsStage
from fusion_pipeline.report.compare import Compare, Shown, write_page
from fusion_pipeline.report.compare_measures import MISSING, Comparison, Known, Row, Side, Spread
from fusion_pipeline.report.compare_words import (
    Letters,
    count_sentences,
    difference,
    mark_differences,
    quotations,
    words,
)
from fusion_pipeline.report.draw import Draw

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
TAGS, OBJECTS, TEXT = EVIDENCE = ("tags/efficientnet-lite2", "objects/nanodet", "text/rapidocr")


# Words


@pytest.mark.parametrize(
    ("caption", "n_words", "n_sentences"),
    [
        ("", 0, 0),
        ("A cat. A dog", 4, 2),
        ("Dr. Ito paints.", 3, 1),
        ('A sign reads "Stop. Look." A car waits.', 8, 2),
        ('A sign reads "Stop." and a car waits.', 8, 1),
        ("灯台がある。船もある。", 5, 2),
    ],
)
def test_words_and_sentences(caption: str, n_words: int, n_sentences: int) -> None:
    assert len(words(caption)) == n_words
    assert count_sentences(caption) == n_sentences


@pytest.mark.parametrize(
    ("text", "part", "found"),
    [
        ('The board reads "QUARTERLY  results, 2024".', "Quarterly Results 2024", True),
        ("a price of 1842 coins", "8", False),
        ("platform 8 is empty", "8", True),
        ("Four new stores opened", "Fournewstores opened", True),  # recognition lost the spaces
        ("Fournewstores opened", "new", False),
        ("Fournewstores opened", "new stores", True),
        ("白い灯台が見える", "灯台", True),
        ("ﬁsh ＆ chips", "fish chips", True),
    ],
)
def test_a_text_is_found_as_whole_words_or_when_it_is_long(
    text: str, part: str, found: bool
) -> None:
    assert Letters.of(text).holds(Letters.of(part)) is found


def test_quotations() -> None:
    assert quotations('A “blue” sign reads "Main Street" beside the driver\'s door.') == [
        "“blue”",
        '"Main Street"',
    ]
    assert quotations('"A caption that is one quotation."') == []


def test_difference_of_words_by_hand() -> None:
    assert difference("A red cat, here.", "here: a red cat") == 0
    assert difference("a b c", "a b d e") == pytest.approx(1 - 2 * 2 / 7)
    assert difference("the cat the", "the cat") == pytest.approx(1 - 2 * 2 / 5)
    assert difference("one", "two") == 1
    assert difference("", "") == 0


captions = st.lists(st.sampled_from(["a", "cat", "Cat,", "dog.", "“x y”", "灯台", "—", "\n", "  "]))


@given(captions.map(" ".join), captions.map(" ".join))
def test_pieces_are_the_caption_and_what_is_not_marked_is_in_both(a: str, b: str) -> None:
    marked = mark_differences(a, b)
    kept = []
    for caption, pieces in zip((a, b), marked, strict=True):
        assert "".join(text for text, _ in pieces) == caption
        unmarked = " ".join(text for text, differs in pieces if not differs)
        kept.append("".join(filter(str.isalnum, unmarked)).lower())
    assert kept[0] == kept[1]
    if a == b:
        assert not any(differs for pieces in marked for _, differs in pieces)


def test_a_looping_caption_is_marked_at_once() -> None:
    one, two = mark_differences("ha " * 20_000, "A cat. " + "ha " * 20_000)
    assert "".join(text for text, _ in two).startswith("A cat. ha")
    assert len(one) >= 1


# Numbers


def row(
    caption: str, finish: str = "stop", violations: Sequence[str] = (), repairs: int = 0
) -> Row:
    return {
        "status": "ok",
        "reason": None,
        "caption": caption,
        "finish": finish,
        "violations": list(violations),
        "repairs": repairs,
    }


def failed(reason: str) -> Row:
    return {"status": "failed", "reason": reason, "caption": None}


def test_spread_by_hand() -> None:
    spread = Spread()
    spread.counts.update(range(1, 21))
    assert spread.as_dict() == {"mean": 10.5, "median": 10, "p95": 19}
    assert Spread().as_dict() == {"mean": 0, "median": 0, "p95": 0}


def test_figures_of_a_small_table_by_hand() -> None:
    comparison = Comparison(Side("one"), Side("two"))
    pairs = [
        (row("A cat sits."), row("A cat sits.")),
        (
            row("A red cat. A red mat", "length", ["hedging", "mood"], 1),
            row('A red cat on a "mat".', violations=["hedging"]),
        ),
        (row("Alone here, quite alone."), failed("http_500: <i>no</i>")),
        (failed("timeout"), failed("timeout")),
        (row("Six words stand in this caption."), MISSING),
    ]
    apart = [comparison.add(a, b) for a, b in pairs]
    # Of "a red cat a red mat" and "a red cat on a mat", 5 words of 6 are in both.
    assert apart == [0, pytest.approx(1 / 6), None, None, None]
    found = comparison.as_dict()
    assert (found["samples"], found["both"], found["identical"]) == (5, 2, 1)
    one, two = found["a"], found["b"]
    assert one["rows"] == {"ok": 4, "failed: timeout": 1}
    assert two["rows"] == {"ok": 2, "failed: http_500": 1, "failed: timeout": 1,
                           "missing: not captioned yet": 1}  # fmt: skip
    assert one["own"]["captions"] == 4
    assert one["own"]["words"] == {"mean": (3 + 6 + 4 + 6) / 4, "median": 4, "p95": 6}
    assert one["shared"]["words"] == {"mean": 4.5, "median": 3, "p95": 6}
    assert one["own"]["sentences"]["mean"] == (1 + 2 + 1 + 1) / 4
    assert one["own"]["characters"]["p95"] == len("Six words stand in this caption.")
    # a, cat, sits | a, red, cat, mat of six | alone, here, quite of four | six of six
    assert one["own"]["distinct_words"] == pytest.approx((1 + 4 / 6 + 3 / 4 + 1) / 4)
    assert one["own"]["finish"] == {"stop": 3, "length": 1}
    assert one["own"]["cut_by_length"] == 0.25
    assert one["shared"]["cut_by_length"] == 0.5
    assert one["own"]["violations_per_1000"] == {"hedging": 250, "mood": 250}
    assert two["own"]["violations_per_1000"] == {"hedging": 500}
    assert one["own"]["faulty"] == 1
    assert (one["own"]["repairs"], two["own"]["repairs"]) == (1, 0)


def test_faithfulness_by_hand() -> None:
    comparison = Comparison(Side("one"), Side("two"))
    known = Known(
        lines=["Main", "Street", "OPEN", "…"],  # of dots alone nothing can be said
        texts=["Main Street OPEN (blurred)", "Joe's coffee", "traffic light"],
    )
    a = row('A sign reads "Main Street" and another one "Nowhere Road".')
    b = row('"main  street, open" stands beside Joe\'s door, a “traffic light”, and "".')
    comparison.add(a, b)
    comparison.add_evidence(a, b, known)
    one, two = (side["faithfulness"] for side in map(comparison.as_dict().get, "ab"))
    assert (one["lines"], one["lines_said"]) == (3, 2)
    assert (one["quotes"], one["quotes_unknown"]) == (2, 1)
    assert (two["lines"], two["lines_said"]) == (3, 3)
    assert (two["quotes"], two["quotes_unknown"]) == (2, 0)


# A small run: two settings of the composer over hand-made evidence


def line(text: str, score: float, top: float) -> TextLine:
    return TextLine(text, score, (0.1, top, 0.5, top, 0.5, top + 0.1, 0.1, top + 0.1))


CAT = DetectedObject("cat", 0.5, (0.2, 0.2, 0.9, 0.9))
LINES = [line("Quarterly Results", 0.95, 0.1), line("Revenue", 0.65, 0.4), line("smudge", 0.3, 0.7)]


def stage_table(dataset: Dataset, stage: Any, tables: dict[str, Any]) -> Any:
    block = ShardBlock(dataset, 0, tables, ShardImages(dataset, 0))
    return stage.open()(block)


@pytest.fixture
def selected(tmp_path: Path) -> Dataset:
    """Four samples: plain lines, a cat that only one engine believes in, hostile texts, and one
    that engine `eager` failed on. `captions/careful` is the composer as it comes."""
    dataset = Dataset.create(tmp_path / "run" / "selected")
    samples = []
    for number in range(4):
        image = picture(number)
        alts = [HOSTILE] if number == 2 else []
        samples.append(Sample(sample_key(image), image, inspect(image), [f"{number}a"], alts, []))
    put_samples(dataset, samples)
    text: list[Evidence] = [LINES, [], [line(f"EAT {HOSTILE}", 0.9, 0.3)], []]
    objects: list[Evidence] = [[], [CAT], [], []]
    tags: list[Evidence] = [[Tag("slide", 0.9)], [], [], []]
    tables = {"samples": dataset.read_table("samples", 0)[0]}
    for name, rows in zip(EVIDENCE, (tags, objects, text), strict=True):
        kind = load_expert(name.split("/")[1]).kind
        values = to_arrow(kind, rows).to_pylist()
        outcomes = [Ok({kind.value: value}) for value in values]
        field = pa.field(kind.value, ARROW_TYPES[kind])
        tables[name] = build_table([s.key for s in samples], outcomes, [field])
        put(dataset, name, tables[name])
    tables["hints"] = stage_table(dataset, HintsStage(EVIDENCE, HintConfig()), tables)
    tables["prompts/p"] = build_table(
        [s.key for s in samples], [Ok({"prompt": ""})] * 4, [pa.field("prompt", pa.string())]
    )
    for name in ("hints", "prompts/p"):
        put(dataset, name, tables[name])
    eager = ComposerConfig(object_threshold=0.4, text_threshold=0.6)
    for name, config in (("careful", ComposerConfig()), ("eager", eager)):
        engine = engine_of(EngineChoice(composer=config, name=name), dataset)
        stage = Caption(name, engine, EVIDENCE, "prompts/p")
        made = stage_table(dataset, stage, tables)
        if name == "eager":
            lost: Outcome = NotOk("failed", "http_500: <i>no</i>")
            rest = [Ok(r) for r in made.to_pylist()[:3]]
            made = build_table([s.key for s in samples], [*rest, lost], stage.columns)
        put(dataset, stage.name, made)
    return dataset


def compare(dataset: Dataset, a: str = "careful", b: str = "eager") -> Compare:
    return Compare(dataset, a, b, EVIDENCE, HintConfig())


def test_a_real_run_of_two_settings(selected: Dataset) -> None:
    comparison, cards = compare(selected).run()
    found = comparison.as_dict()
    assert found["a"]["rows"] == {"ok": 4}
    assert found["b"]["rows"] == {"ok": 3, "failed: http_500": 1}
    assert (found["both"], found["identical"]) == (3, 1)
    # Lines above the hints' 0.6: "Quarterly Results", "Revenue" and the hostile one; the composer
    # as it comes believes lines from 0.8.
    careful, eager = found["a"]["faithfulness"], found["b"]["faithfulness"]
    assert (careful["lines"], careful["lines_said"]) == (3, 2)
    assert (eager["lines"], eager["lines_said"]) == (3, 3)
    assert careful["quotes_unknown"] == eager["quotes_unknown"] == 0
    by_key = {card.key: card for card in cards["drawn"]}
    assert len(by_key) == 3
    assert [len(cards[name]) for name in ("furthest", "single")] == [2, 1]
    (alone,) = cards["single"]
    assert alone.sides[0].caption is not None
    assert alone.sides[1].caption is None
    assert alone.sides[1].outcome == "failed: http_500: <i>no</i>"
    cats = [card for card in cards["furthest"] if "cat" in str(card.sides[1].caption)]
    assert [text for card in cats for text, differs in card.sides[1].pieces if differs]
    assert all("cat" not in str(card.sides[0].caption) for card in cats)
    assert [len(compare(selected).run(n)[1]["drawn"]) for n in (0, 2)] == [0, 2]


def test_the_twelve_furthest_apart_are_shown_first_those_that_differ_most() -> None:
    shown = Shown(Draw(0, seed=0), Draw(0, seed=0))
    for n in (3, 19, 0, 7, 11, 5, 18, 2, 9, 1, 14, 6, 16, 4, 12, 8, 17, 10, 15, 13):
        shown.add(f"{n:02}", n / 20, row("one"), row("two"))
    assert shown.lists["furthest"] == [f"{n:02}" for n in range(19, 7, -1)]


def test_the_draw_depends_on_the_seed_alone(selected: Dataset) -> None:
    def drawn(seed: int) -> list[str]:
        return [card.key for card in replace(compare(selected), seed=seed).run(2)[1]["drawn"]]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(12)}) > 1


def page_of(dataset: Dataset, out: Path) -> str:
    comparison, cards = compare(dataset).run()
    write_page(comparison, cards, "small & <odd>", str(out))
    return out.read_text()


def test_hostile_texts_stay_text_and_nothing_is_requested(
    selected: Dataset, tmp_path: Path
) -> None:
    source = page_of(selected, tmp_path / "page.html")
    page = Page(source)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    for name, value in page.attributes:
        assert not name.startswith("on"), (name, value)
        if name in ("href", "src", "srcset", "data", "action", "xlink:href", "poster"):
            assert value.startswith(("#", "data:image/jpeg;base64,")), (name, value)
    css = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in css
    assert "@import" not in css
    assert any("default-src 'none'; img-src data:" in value for _, value in page.attributes)
    shown = HOSTILE.replace("\x1b", "\ufffd1B").replace("\u202e", "\ufffd202E")
    assert shown in page.of("ul.alts")
    assert "small & <odd>" in page.of("b.")
    # As the composer quotes it: without what a prompt must not hold.
    quoted = "".join(page.of("p.caption"))
    assert "alert('alt')" in quoted
    assert "fdp.exe" in quoted
    assert "No caption · failed: http 500: <i>no</i>" in page.of("p.caption none")


def test_a_caption_from_outside_is_shown_as_text(selected: Dataset, tmp_path: Path) -> None:
    table, _ = selected.read_table("captions/eager", 0)
    rows = table.to_pylist()
    rows[1] |= {"caption": f"A cat </mark></p> {HOSTILE}", "violations": ["<b>rule</b>"]}
    put(selected, "captions/eager", pa.Table.from_pylist(rows, schema=table.schema))
    page = Page(page_of(selected, tmp_path / "page.html"))
    shown = HOSTILE.replace("\x1b", "\ufffd1B").replace("\u202e", "\ufffd202E")
    assert shown in " ".join(page.of("mark.b"))
    assert "<b>rule</b>" in page.of("ul.badges")
    assert "script" not in page.tags


def test_a_shard_not_captioned_yet_and_other_evidence_show(
    selected: Dataset, tmp_path: Path
) -> None:
    for name, digest in (("careful", "1"), ("eager", "2")):
        version = TableVersion.of(f"captions/{name}", MADE_BY)
        table, _ = selected.read_table(version, 0)
        data, _ = encode_table(
            table, version.name, 0, MADE_BY, {"tags/t": digest, "prompts/p": "0"}
        )
        selected.storage.put(version.path(0), data)
    assert "In 1 shards the two were made from different evidence" in page_of(
        selected, tmp_path / "page.html"
    )
    selected.storage.delete(TableVersion.of("captions/eager", MADE_BY).path(0))
    comparison, cards = compare(selected).run()
    assert comparison.b.outcomes == {"missing: not captioned yet": 4}
    assert comparison.both == comparison.other_inputs == 0
    assert len(cards["single"]) == 4
    page = Page(page_of(selected, tmp_path / "page.html"))
    assert "No sample has two captions." in page.of("p.empty")


# The command


def test_the_command(
    selected: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def call(code: int, *arguments: str) -> tuple[str, str]:
        run = f"run={tmp_path}/run"
        monkeypatch.setattr(sys, "argv", ["fusion", "compare", str(QUICKSTART), *arguments, run])
        with pytest.raises(SystemExit) as end:
            main()
        assert int(end.value.code or 0) == code
        shown = capsys.readouterr()
        return shown.out, shown.err

    out, _ = call(0, "careful", "eager", "--json")
    found: dict[str, Any] = json.loads(out)
    assert found["b"]["rows"] == {"ok": 3, "failed: http_500": 1}
    assert found["page"] == f"{tmp_path}/run/compare-careful-eager.html"
    assert "captions compared" in Path(found["page"]).read_text()
    out, _ = call(0, "careful", "eager", "--cards", "1", "--out", str(tmp_path / "other.html"))
    assert "Text lines said" in out
    assert out.strip().endswith("other.html")
    assert (tmp_path / "other.html").stat().st_size < Path(found["page"]).stat().st_size
    out, err = call(1, "careful", "nobody")
    assert out == ""
    assert "no captions of an engine 'nobody'; engines with captions: careful, eager" in err
