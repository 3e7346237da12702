"""The main job over a few made-up photos, in this process and without Ray."""

import io
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from fusion_pipeline.config import load_config
from fusion_pipeline.pipeline import Pipeline, build_pipeline
from fusion_pipeline.runner import Options, Runner
from tests.toy import files_of

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
EXPERT = "tags/efficientnet-lite2"


def make_photos(folder: Path, count: int = 12) -> Path:
    folder.mkdir()
    for i in range(count):
        noise = np.random.default_rng(i).normal(128, 20 + 10 * i, (260, 270))
        image = Image.fromarray(noise.clip(0, 255).astype(np.uint8)).convert("RGB")
        image.paste((20 * i, 255 - 20 * i, 90), (0, 0, 20 + 20 * i, 130))
        image.save(folder / f"{i:02d}.png")
    return folder


def job(photos: Path, *overrides: str) -> Pipeline:
    """Its `run` folder is `out`, beside the photos."""
    settings = [
        f"run={photos.parent / 'out'}",
        "source.webdataset=null",
        f"source.folder={photos}",
        "source.shard_size=3",
        "select.clusters=3",
        "experts=[efficientnet-lite2]",
        *overrides,
    ]
    return build_pipeline(load_config(QUICKSTART, settings))


def run(pipeline: Pipeline, **options: object) -> str:
    """What it says; nothing, when there is nothing to do."""
    shown = io.StringIO()
    settings = Options(in_process=True, **options)  # type: ignore[arg-type]
    Runner(pipeline, settings, Console(file=shown, width=200)).run()
    return shown.getvalue()


def seen_in(pipeline: Pipeline) -> dict[str, bytes]:
    """Files of both datasets, and of the export."""
    datasets = {"pool": pipeline.pool, "selected": pipeline.selected}
    return {
        f"{place}/{name}": data
        for place, dataset in datasets.items()
        for name, data in files_of(Path(dataset.storage.root)).items()
    } | {f"export/{n}": pipeline.export.out.read(n) for n in pipeline.export.out.files("")}
