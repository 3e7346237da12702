"""Scores, looks and blurred faces stand beside the evidence: no prompt and no caption changes."""

import json
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image

import fusion_pipeline
from fusion_pipeline.dataset.filters import ReadingError
from fusion_pipeline.dataset.images import decode
from fusion_pipeline.dataset.tables import FingerprintMismatchError
from fusion_pipeline.export.captions import ExportError
from fusion_pipeline.runner import PipelineError
from fusion_pipeline.status import export_state, table_states
from tests.jobs import job, make_photos, run, seen_in

PORTRAIT = Path(skimage.__file__).parent / "data" / "astronaut.png"
MORE = ("scores=[nsfwjs]", "look=true", "blur=true")


def test_what_is_measured_later_leaves_the_rest_alone(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", count=5)
    (photos / "portrait.png").write_bytes(PORTRAIT.read_bytes())
    strip = Image.open(PORTRAIT).crop((300, 120, 512, 512)).resize((300, 560))
    strip.save(photos / "shuttle.jpg", quality=83)
    run(job(photos))
    before = seen_in(job(photos))
    pipeline = job(photos, *MORE)
    assert "7 captioned samples, 1 of them blurred, in" in run(pipeline)
    after = seen_in(pipeline)
    changed = {name for name in before if before[name] != after.get(name)}
    images = {name for name in changed if name.startswith("export/images/")}
    # Of provenance the export tells the new models' revisions, too.
    assert changed - images == {"export/densefusion.jsonl", "export/manifest.json"}
    assert len([name for name in after if name.startswith("export/images/")]) == 7
    made = {name for name in after if name not in before and name.endswith(".parquet")}
    tables = ("scores/nsfwjs", "look", "blur/centerface")
    assert all(any(f"/tables/{table}/" in name for table in tables) for name in made)

    selected = fusion_pipeline.open(tmp_path / "out" / "selected")
    names = ["key", "image", "look.layout", "look.jpeg_quality", "scores/nsfwjs.scores[neutral]"]
    rows = selected.select(names, where=[("blur/centerface.objects[face]", ">", 0.5)])
    [row] = rows.to_arrow().to_pylist()
    assert row["image"] == PORTRAIT.read_bytes(), "the data set keeps its images"
    assert row["scores/nsfwjs.scores[neutral]"] > 0.8
    upright = selected.select(names, where=[("look.layout", "==", "portrait")])
    assert upright.to_arrow()["look.jpeg_quality"].to_pylist() == [83]
    with pytest.raises(ReadingError, match=r"no image .* this score; there are drawing, he"):
        selected.select("key", where=[("scores/nsfwjs.scores[pron]", "<", 0.5)])
    [name] = [name for name in images if row["key"] in name]
    differs = (np.asarray(Image.open(tmp_path / "out" / name)) != decode(row["image"])).any(axis=-1)
    assert 0.01 < differs.mean() < 0.25
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(word in page for word in ("nsfwjs", "sharpness", "blur / centerface"))


def test_filters_choose_what_is_exported(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", count=5)
    Image.open(PORTRAIT).crop((0, 0, 300, 512)).save(photos / "upright.png")
    Image.open(PORTRAIT).crop((0, 100, 512, 400)).save(photos / "lying.png")
    with pytest.raises(PipelineError, match=r"export\.where: this config makes no table 'look'"):
        run(job(photos, "export.where=[[look.layout, ==, portrait]]"))
    assert not (tmp_path / "out").exists(), "told before a week of work"
    two = 'export.where=[["look.layout", in, [portrait, landscape]], ["samples.width", ">", 9]]'
    pipeline = job(photos, "select.shard_size=3", "look=true", two)
    assert export_state(pipeline) == {"state": "missing"}
    said = run(pipeline)
    counts = {"samples": 2, "withheld": 0, "blurred": 0, "unwanted": 5}
    assert "export: 2 captioned samples in" in said
    assert "export: 5 more are left out by export.where" in said
    assert export_state(pipeline) == {"state": "current", **counts}
    rows = json.loads(pipeline.export.out.read("llava.json"))
    chosen = fusion_pipeline.open(tmp_path / "out" / "selected").select(
        "key", where=[("look.layout", "!=", "square")]
    )
    assert [row["id"] for row in rows] == chosen.to_arrow()["key"].to_pylist()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Exported: <b>2</b>; left out by <code>export.where</code>: <b>5</b>" in page
    assert run(pipeline) == ""

    other = job(photos, "select.shard_size=3", "look=true", two.replace("landscape", "square"))
    assert export_state(other) == {"state": "outdated", **counts}
    look = other.selected.version("look")
    other.selected.storage.delete(look.path(1))
    with pytest.raises(ExportError, match=r"'look', of export\.where, is missing for 1 of 3"):
        run(other, only="export")
    assert json.loads(pipeline.export.out.read("llava.json")) == rows


def test_what_is_blurred_follows_the_config(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", count=3)
    (photos / "portrait.png").write_bytes(PORTRAIT.read_bytes())
    run(job(photos, "blur=true"))
    lower = "blur={score: 0.1, experts: [centerface: {score_floor: 0.1}]}"
    assert export_state(job(photos, "blur=true"))["state"] == "current"
    assert export_state(job(photos, lower))["state"] == "outdated"
    with pytest.raises(FingerprintMismatchError, match=r"score_floor: 0\.3 -> 0\.1"):
        run(job(photos, lower), only="export")
    larger = "blur={experts: [centerface: {long_side: 1024}]}"  # the same rule, another detector
    assert export_state(job(photos, larger))["state"] == "outdated"
    with pytest.raises(FingerprintMismatchError, match="long_side: 768 -> 1024"):
        run(job(photos, larger), only="export")
    people = "blur={labels: [face, person], experts: [centerface, nanodet]}"
    pipeline = job(photos, people)
    states = table_states(pipeline, pipeline.selected)
    assert {s.counts.table: s.pending for s in states}["blur/nanodet"] == 1
    said = run(job(photos, people.replace("person", "zebra")))
    assert "blur.labels: no box is called 'zebra', nothing is hidden for it; nearest: '" in said
    said = run(job(photos))
    assert "what the last one had blurred is shown now, as `blur` is off" in said
