"""The main job over fresh demo data, held against the truth file."""

import json
from collections import Counter

import pytest
from PIL import Image

from fusion_pipeline.demo.evaluate import score_copies, score_semantic, score_text, wrong_statuses
from tests.end_to_end.conftest import DemoRun

pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("end_to_end")]


def test_each_row_has_its_expected_status_and_reason(reference: DemoRun) -> None:
    assert wrong_statuses(reference.pipeline.pool, reference.truth) == []


def test_rows_in_are_rows_out(reference: DemoRun) -> None:
    pipeline, planted = reference.pipeline, len(reference.truth.rows)
    sources = [r for _, t in pipeline.pool.iterate("sources") for r in t.to_pylist()]
    assert len(sources) == len({row["row_id"] for row in sources}) == planted
    for dataset, tables in (
        (pipeline.pool, pipeline.tables_of(pipeline.pool)[1:]),
        (pipeline.selected, pipeline.tables_of(pipeline.selected)[1:]),
    ):
        for shard, samples in dataset.iterate("samples"):
            assert set(dataset.read_images(shard)) == set(samples["key"].to_pylist())
            for name in tables:
                table, _ = dataset.read_table(name, shard)
                assert table["key"] == samples["key"], name
                for row in table.select(["status", "reason"]).to_pylist():
                    assert row["status"] in ("ok", "filtered", "failed")
                    assert (row["reason"] is None) == (row["status"] == "ok")
    merged = [r for _, t in pipeline.pool.iterate("samples") for r in t["row_ids"].to_pylist()]
    from_samples = Counter(row_id for row_ids in merged for row_id in row_ids)
    assert from_samples == Counter(r["row_id"] for r in sources if r["status"] == "ok")
    chosen = [
        key
        for _, t in pipeline.pool.iterate("selection")
        for key, status in zip(t["key"].to_pylist(), t["status"].to_pylist(), strict=True)
        if status == "ok"
    ]
    repacked = [k for _, t in pipeline.selected.iterate("samples") for k in t["key"].to_pylist()]
    assert chosen == repacked


def test_every_planted_copy_is_found_and_nothing_else(reference: DemoRun) -> None:
    score = score_copies(reference.pipeline.pool, reference.truth)
    assert score.missed == []
    assert score.merged == []
    assert sum(score.found.values()) >= 30


def test_the_semantic_rule_is_as_good_as_the_documents_say(reference: DemoRun) -> None:
    threshold = reference.pipeline.config.select.duplicates.threshold
    (score,) = score_semantic(reference.pipeline.pool, reference.truth, [threshold])
    # docs/selection.md quotes about 0.5 and 0.3; this holds the claim within what seeds vary.
    assert score.precision > 0.3
    assert score.recall > 0.15


def test_rendered_text_is_read(reference: DemoRun) -> None:
    score = score_text(
        reference.pipeline.selected, reference.pipeline.pool, reference.truth, "text/rapidocr"
    )
    assert score.lines > 200
    assert score.read >= 0.9 * score.lines, score.missed


def test_exports_can_be_loaded(reference: DemoRun) -> None:
    out = reference.folder / "run" / "export"
    llava = json.loads((out / "llava.json").read_text())
    dense = [json.loads(line) for line in (out / "densefusion.jsonl").read_text().splitlines()]
    assert len(llava) == len(dense) > 50
    samples = {
        row["key"]: row
        for _, table in reference.pipeline.selected.iterate("samples")
        for row in table.to_pylist()
    }
    for short, full in zip(llava, dense, strict=True):
        assert short["id"] == full["image_id"]
        assert short["image"] == full["image_path"]
        human, gpt = short["conversations"]
        assert human["value"].startswith("<image>\n")
        assert (human["value"] + gpt["value"]).count("<image>") == 1
        assert len(gpt["value"].split()) > 3
        assert full["hints"].keys() == {"tags", "objects", "text", "alt_texts", "counts"}
        assert full["engine"] == "composer"
        assert "sha256:" in full["revisions"]["text/rapidocr"]
        with Image.open(out / short["image"]) as image:
            image.load()
            assert image.format in ("JPEG", "PNG")
            assert image.mode in ("RGB", "L")
            assert image.getexif().get(0x0112, 1) == 1
            sample = samples[short["id"]]
            assert image.size == (sample["width"], sample["height"])  # upright
