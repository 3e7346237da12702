"""Scores, looks and blurred faces stand beside the evidence: no prompt and no caption changes."""

from pathlib import Path

import numpy as np
import skimage
from PIL import Image

import fusion_pipeline
from fusion_pipeline.dataset.images import decode
from tests.jobs import job, make_photos, run, seen_in

PORTRAIT = Path(skimage.__file__).parent / "data" / "astronaut.png"
MORE = ("experts=[efficientnet-lite2, nsfwjs]", "look=true", "blur={}")


def test_what_is_measured_later_leaves_the_rest_alone(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", count=5)
    (photos / "portrait.png").write_bytes(PORTRAIT.read_bytes())
    run(job(photos))
    before = seen_in(job(photos))
    pipeline = job(photos, *MORE)
    run(pipeline)
    after = seen_in(pipeline)
    changed = {name for name in before if before[name] != after.get(name)}
    faces = {name for name in changed if name.startswith("export/images/")}
    # Of provenance the export tells the new models' revisions, too.
    assert changed - faces == {"export/densefusion.jsonl", "export/manifest.json"}
    assert len(faces) == 1
    made = {name for name in after if name not in before and name.endswith(".parquet")}
    tables = ("scores/nsfwjs", "look", "blur/centerface")
    assert all(any(f"/tables/{table}/" in name for table in tables) for name in made)

    selected = fusion_pipeline.open(tmp_path / "out" / "selected")
    [row] = selected.select(
        ["image", "look", "scores/nsfwjs.scores", "blur/centerface.objects[face]"],
        where=[("blur/centerface.objects[face]", ">", 0.5)],
    ).to_arrow().to_pylist()  # fmt: skip
    assert row["image"] == PORTRAIT.read_bytes(), "the data set keeps its images"
    assert row["look.layout"] == "square"
    blurred = np.asarray(Image.open(tmp_path / "out" / faces.pop()))
    differs = (blurred != decode(row["image"])).any(axis=-1)
    assert 0.01 < differs.mean() < 0.25
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(word in page for word in ("nsfwjs", "sharpness", "blur / centerface"))
