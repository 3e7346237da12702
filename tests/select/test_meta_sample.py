"""The draw of the rows to caption, and the step in the job."""

import shutil
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from experts.tagging.efficientnet_lite2 import EfficientNetLite2Tagger
from fusion_pipeline.cli import main
from fusion_pipeline.dataset.tables import FingerprintMismatchError
from fusion_pipeline.dataset.verify import verify
from fusion_pipeline.pipeline import Pipeline
from fusion_pipeline.report.flow import count_funnel
from fusion_pipeline.select.meta_sample import (
    META_SAMPLE,
    NoPromptsYetError,
    RepackedSinceError,
    allocate,
    draw,
    drawn_strata,
    key_hashes,
    read_drawn,
)
from fusion_pipeline.status import table_states
from tests.jobs import EXPERT, job, make_photos, run, seen_in
from tests.killing import killed_at

CAPTIONS = "captions/composer"

keys = st.lists(st.text("0123456789abcdef", min_size=1, max_size=6), unique=True, max_size=40)
strata = st.lists(st.integers(1, 60), min_size=1, max_size=20)


def drawn_keys(names: list[str], size: int, seed: int = 0) -> set[str]:
    chosen = draw(key_hashes(names, seed), np.zeros(len(names), np.int64), size)
    return {names[row] for row in np.flatnonzero(chosen)}


@given(keys, st.integers(0, 50), st.integers(0, 50), st.randoms(use_true_random=False))
def test_a_plain_draw_is_exact_nested_and_blind_to_order(
    names: list[str], size: int, more: int, order: Random
) -> None:
    drawn = drawn_keys(names, size)
    assert len(drawn) == min(size, len(names))
    assert drawn <= drawn_keys(names, size + more)
    shuffled = list(names)
    order.shuffle(shuffled)
    assert drawn_keys(shuffled, size) == drawn


def test_another_seed_draws_others_and_each_row_as_often() -> None:
    names = [f"{i:04x}" for i in range(200)]
    times = Counter(name for seed in range(300) for name in drawn_keys(names, 20, seed))
    assert drawn_keys(names, 20, 1) != drawn_keys(names, 20, 2)
    assert len(times) == 200
    assert np.std(list(times.values())) < 1.3 * np.sqrt(300 * 0.1 * 0.9)  # of a fair draw


@given(strata, st.integers(0, 700))
def test_strata_get_their_share(counts: list[int], size: int) -> None:
    rows = np.array(counts, np.int64)
    given_rows = allocate(rows, size)
    total = sum(counts)
    assert given_rows.sum() == min(size, total)
    assert (given_rows <= rows).all()
    if size >= len(counts):
        assert (given_rows >= 1).all()
    share = min(size, total) * rows / total
    if (share >= 1).all():  # none gets a row that its share does not give
        assert (np.abs(given_rows - share) < 1).all()
        remainders = min(size, total) * rows % total
        is_more = given_rows > np.floor(share + 1e-9)
        if is_more.any():  # the largest remainders get it
            assert remainders[is_more].min() >= remainders[~is_more].max(initial=0)
    larger = rows[:, None] > rows[None, :]
    assert (given_rows[:, None] >= given_rows[None, :])[larger].all()


@given(st.lists(st.tuples(st.text("0123456789abcdef", min_size=8, max_size=8),
                          st.integers(0, 5)), unique_by=lambda row: row[0], max_size=60),
       st.integers(0, 70), st.randoms(use_true_random=False))  # fmt: skip
def test_a_draw_by_strata_takes_of_each_the_first_by_hash(
    rows: list[tuple[str, int]], size: int, order: Random
) -> None:
    def by_strata(rows: list[tuple[str, int]]) -> set[str]:
        stratum = np.array([number for _, number in rows], np.int64)
        chosen = draw(key_hashes([name for name, _ in rows], 3), stratum, size)
        return {rows[row][0] for row in np.flatnonzero(chosen)}

    drawn = by_strata(rows)
    assert len(drawn) == min(size, len(rows))
    for number in {number for _, number in rows}:
        of_one = [name for name, other in rows if other == number]
        assert drawn & set(of_one) == drawn_keys(of_one, len(drawn & set(of_one)), 3)
    shuffled = list(rows)
    order.shuffle(shuffled)
    assert by_strata(shuffled) == drawn


# In the job


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 pictures of coloured fields in three colours, every fourth one with a word; run up to
    their prompts."""
    folder = tmp_path_factory.mktemp("drawn") / "photos"
    folder.mkdir()
    for i in range(36):
        fields = np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8)
        fields[:, :, i % 3] = 255
        image = Image.fromarray(np.kron(fields, np.ones((64, 56, 1), np.uint8)))
        if i % 4 == 0:
            pen = ImageDraw.Draw(image)
            pen.rectangle((15, 95, 100, 125), fill="white")
            pen.text((20, 97), "BREAD", fill="black", font=ImageFont.load_default(22))
        image.save(folder / f"{i:02d}.png")
    run(of(folder), until="prompts/engine-v1")
    return folder


def of(photos: Path, *overrides: str) -> Pipeline:
    common = ["select.duplicates.rule=off", "select.shard_size=7", "select.per_cluster=100"]
    experts = "experts=[efficientnet-lite2, rapidocr]"
    return job(photos, *common, experts, "source.shard_size=12", *overrides)


@pytest.fixture
def photos(drawings: Path, tmp_path: Path) -> Path:
    """A copy, of which no other test knows."""
    shutil.copytree(drawings, tmp_path / "photos")
    shutil.copytree(drawings.parent / "out", tmp_path / "out")
    return tmp_path / "photos"


def rows_of(pipeline: Pipeline, table: str) -> list[dict[str, object]]:
    return [row for _, part in pipeline.selected.iterate(table) for row in part.to_pylist()]


def test_what_is_not_drawn_is_not_captioned(photos: Path) -> None:
    pipeline = of(photos, "caption.sample={size: 10}")
    assert "meta_sample: 10 of 36 rows are drawn" in run(pipeline)
    sample, captions = rows_of(pipeline, META_SAMPLE), rows_of(pipeline, CAPTIONS)
    drawn = [row["key"] for row in sample if row["status"] == "ok"]
    assert set(drawn) == drawn_keys([str(row["key"]) for row in sample], 10)
    assert {row["reason"] for row in sample} == {None, "not_drawn"}
    assert [row["key"] for row in captions if row["status"] == "ok"] == drawn
    others = {row["reason"] for row in captions if row["key"] not in drawn}
    assert others == {f"upstream:{META_SAMPLE}"}
    assert pipeline.selected.shards_of(CAPTIONS) == set(pipeline.selected.shards())

    clusters = {row["key"]: row["cluster"] for _, part in pipeline.pool.iterate("selection")
                for row in part.to_pylist()}  # fmt: skip
    texts = {row["key"]: bool(row["text"]) for row in rows_of(pipeline, "text/rapidocr")}
    assert [row["cluster"] for row in sample] == [clusters[row["key"]] for row in sample]
    assert [row["has_text"] for row in sample] == [texts[row["key"]] for row in sample]
    assert 8 <= sum(texts.values()) <= 12

    dataset = pipeline.selected
    export = (photos.parent / "out" / "export" / "densefusion.jsonl").read_text().splitlines()
    assert len(export) == 10
    funnel = count_funnel(pipeline.pool, dataset, pipeline.evidence, pipeline.export.prompts,
                          CAPTIONS, (META_SAMPLE,))  # fmt: skip
    assert [(o.kind, o.label, o.rows) for o in funnel.ledger.outcomes] == [
        ("filtered", "not_drawn", 26), ("ok", "captioned", 10),
    ]  # fmt: skip
    assert funnel.ledger.balanced
    assert "not drawn" in (photos.parent / "out" / "report.html").read_text()
    assert not [problem for problem in verify(dataset) if problem]
    assert [s.counts.table for s in table_states(pipeline, dataset)][-2:] == [META_SAMPLE, CAPTIONS]
    assert run(pipeline) == ""


def test_strata_are_drawn_in_proportion(photos: Path) -> None:
    pipeline = of(photos, "caption.sample={size: 12, by: strata}")
    run(pipeline, until=META_SAMPLE)
    sample = rows_of(pipeline, META_SAMPLE)
    there = Counter((row["cluster"], row["has_text"]) for row in sample)
    drawn = Counter((row["cluster"], row["has_text"]) for row in sample if row["status"] == "ok")
    assert len(there) >= 4
    assert drawn.total() == 12
    assert set(drawn) == set(there)
    expected = allocate(np.array(list(there.values())), 12)
    assert sorted(drawn.values()) == sorted(expected.tolist())
    assert sum(rows for rows, _ in drawn_strata(pipeline.selected).values()) == 12


def test_without_a_sample_nothing_changes_and_a_large_one_is_all(photos: Path) -> None:
    plain = of(photos)
    assert META_SAMPLE not in plain.step_names
    pipeline = of(photos, "caption.sample={size: 1000}")
    said = run(pipeline, until=CAPTIONS)
    assert "meta_sample: all 36 rows are drawn: there are no 1,000" in said
    assert read_drawn(pipeline.selected).drawn == 36
    with pytest.raises(FingerprintMismatchError, match=r"upstream\.meta_sample"):
        run(plain, until=CAPTIONS)
    run(plain, until=CAPTIONS, overwrite=True)
    assert all(row["status"] == "ok" for row in rows_of(plain, CAPTIONS))


def test_no_text_expert_no_has_text(photos: Path) -> None:
    options = ("experts=[efficientnet-lite2]", "caption.sample={size: 9, by: strata}")
    pipeline = of(photos, *options)
    run(pipeline, until=META_SAMPLE, overwrite=True)
    assert {row["has_text"] for row in rows_of(pipeline, META_SAMPLE)} == {None}
    assert list(drawn_strata(pipeline.selected)) == [None]


def test_another_size_is_other_settings(photos: Path) -> None:
    few, more = (of(photos, f"caption.sample={{size: {n}}}") for n in (8, 20))
    run(few)
    before = seen_in(few)
    with pytest.raises(FingerprintMismatchError, match=r"config\.size: 8 -> 20"):
        run(more)
    assert seen_in(few) == before
    small = {row["key"] for row in rows_of(few, META_SAMPLE) if row["status"] == "ok"}
    run(more, overwrite=True)
    large = {row["key"] for row in rows_of(more, META_SAMPLE) if row["status"] == "ok"}
    assert small < large
    assert {row["key"] for row in rows_of(more, CAPTIONS) if row["status"] == "ok"} == large


def test_a_draw_stays_when_rows_are_healed_and_refresh_draws_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was captioned, and maybe paid, is not thrown away for one row that came later."""
    well = EfficientNetLite2Tagger.__call__

    def sick(self, images, context):  # type: ignore[no-untyped-def]
        if any(image[0, 0, 0] == 100 for image in images):  # 05.png
            raise ValueError("sick")
        return well(self, images, context)

    pipeline = job(make_photos(tmp_path / "photos"), "select.duplicates.rule=off",
                   "select.shard_size=4", "caption.sample={size: 9}")  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(EfficientNetLite2Tagger, "__call__", sick)
        run(pipeline)
    drawn, captions = rows_of(pipeline, META_SAMPLE), rows_of(pipeline, CAPTIONS)
    assert f"upstream:{EXPERT}" in {row["reason"] for row in drawn}
    said = run(pipeline, retry_failed=True)
    assert "meta_sample is stale: its input changed since. It is kept; --refresh" in said
    assert rows_of(pipeline, META_SAMPLE) == drawn
    assert rows_of(pipeline, CAPTIONS) == captions
    stale = {s.counts.table for s in table_states(pipeline, pipeline.selected) if s.stale}
    assert META_SAMPLE in stale
    run(pipeline, refresh=True)
    assert read_drawn(pipeline.selected).eligible == 12
    healed = tables_in(pipeline)
    assert run(pipeline, refresh=True) == ""
    shutil.rmtree(tmp_path / "out")
    run(pipeline)
    assert tables_in(pipeline) == healed


def tables_in(pipeline: Pipeline) -> dict[str, bytes]:
    return {name: data for name, data in seen_in(pipeline).items() if "/tables/" in name}


def test_a_part_of_the_shards_is_captioned_by_the_draw_from_all(tmp_path: Path) -> None:
    """A draw from that part alone would take other rows and more, and pay for them."""
    pipeline = job(make_photos(tmp_path / "photos"), "select.duplicates.rule=off",
                   "select.shard_size=4", "caption.sample={size: 6}")  # fmt: skip
    dataset = pipeline.selected
    run(pipeline, until="repack")
    for _ in range(2):
        with pytest.raises(NoPromptsYetError, match=r"2 of 3 .* `fusion meta sample` first"):
            run(pipeline, limit=4, until=CAPTIONS)
        assert dataset.shards_of(pipeline.export.prompts) == {0}
        assert not {META_SAMPLE, CAPTIONS} & set(dataset.table_names())
    run(pipeline, until=META_SAMPLE)
    assert read_drawn(dataset).drawn == 6
    sample, _ = dataset.read_table(META_SAMPLE, 0)
    run(pipeline, limit=4, until=CAPTIONS)
    captions, _ = dataset.read_table(CAPTIONS, 0)
    assert captions["status"] == sample["status"]
    assert dataset.shards_of(CAPTIONS) == {0}
    before = seen_in(pipeline)
    run(pipeline)
    assert before.items() <= seen_in(pipeline).items()


def test_a_draw_that_is_killed_at_any_write_is_done_again(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = of(photos, "caption.sample={size: 10}")
    shutil.copytree(photos.parent / "out", photos.parent / "kept")
    run(pipeline, until=CAPTIONS)
    expected = seen_in(pipeline)
    caption = partial(run, pipeline, until=CAPTIONS)
    for crash_at in range(200):
        shutil.rmtree(photos.parent / "out")
        shutil.copytree(photos.parent / "kept", photos.parent / "out")
        is_over = not killed_at(crash_at, monkeypatch, caption)
        caption()
        assert seen_in(pipeline) == expected
        if is_over:
            break
    assert crash_at > 2 * 6 + 3  # six shards of two tables, their descriptors, the artifact


def test_a_selection_that_changed_is_not_drawn_from(photos: Path) -> None:
    run(of(photos, "select.per_cluster=5"), until="selection", overwrite=True)
    pipeline = of(photos, "select.per_cluster=5", "caption.sample={size: 10}")
    with pytest.raises(RepackedSinceError, match=r"--refresh"):
        run(pipeline, only=META_SAMPLE)


def test_the_command_says_what_was_drawn(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fusion(*arguments: str) -> tuple[int, str, str]:
        config = photos.parent / "job.yaml"
        config.write_text(of(photos).config.to_yaml())
        command = ["fusion", "meta", "sample", str(config), *arguments, "--no-ray"]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        try:
            main()
        except SystemExit as end:
            return (int(end.code or 0), *capsys.readouterr())
        raise AssertionError("it did not end")

    code, out, err = fusion()
    assert (code, out) == (1, "")
    assert "caption.sample is not set" in err
    assert "set it to {size: 100000}" in err
    code, out, _ = fusion("caption.sample={size: 20}")
    drawn = drawn_strata(of(photos).selected)
    assert code == 0
    assert out.splitlines() == [
        "meta_sample: 20 of 36 rows are drawn",
        "without text: {:,} rows of {:,} clusters".format(*drawn[False]),
        "with text: {:,} rows of {:,} clusters".format(*drawn[True]),
    ]
    assert sum(rows for rows, _ in drawn.values()) == 20
    assert CAPTIONS not in of(photos).selected.table_names()
    assert fusion("caption.sample={size: 21}")[0] == 1
    code, out, _ = fusion("caption.sample={size: 21}", "--overwrite")
    assert (code, out.splitlines()[0]) == (0, "meta_sample: 21 of 36 rows are drawn")
