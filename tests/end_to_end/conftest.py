"""One run over fresh demo data, undisturbed and in this process: what others are compared with."""

import io
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from fusion_pipeline.config import load_config
from fusion_pipeline.demo import make_demo_data
from fusion_pipeline.demo.evaluate import Truth
from fusion_pipeline.pipeline import Pipeline, build_pipeline
from fusion_pipeline.runner import Options, Runner

FRESH_SEED = 29
"""No threshold was tuned on it."""
CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@dataclass(frozen=True)
class DemoRun:
    folder: Path
    pipeline: Pipeline
    truth: Truth

    def overrides(self, run: Path) -> list[str]:
        return [f"run={run}", f"source.webdataset={self.folder}/demo/shards"]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    folder = tmp_path_factory.mktemp("reference")
    make_demo_data(folder / "demo", FRESH_SEED)
    overrides = [f"run={folder}/run", f"source.webdataset={folder}/demo/shards"]
    pipeline = build_pipeline(load_config(CONFIG, overrides))
    Runner(pipeline, Options(in_process=True), Console(file=io.StringIO())).run()
    return DemoRun(folder, pipeline, Truth.read(folder / "demo" / "truth.json"))
