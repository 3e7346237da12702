"""docs/how-to/add-an-expert.md, followed to the letter in a copy of the sources."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tests.serving import ROOT

PAGE = ROOT / "docs" / "how-to" / "add-an-expert.md"
COPIED = ("experts", "fusion_pipeline", "tests", "pyproject.toml", "configs")


def test_one_file_one_line_one_test(tmp_path: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tmp_path / name)
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    places = re.findall(r"^`((?:experts|tests)/\S+\.py)`:$", PAGE.read_text(encoding="utf-8"), re.M)
    (expert, line, test), (expert_place, test_place) = code, places
    (tmp_path / expert_place).write_text(expert, encoding="utf-8")
    (tmp_path / test_place).write_text(test, encoding="utf-8")
    register = tmp_path / "experts" / "__init__.py"
    before = register.read_text(encoding="utf-8")
    opening = "EXPERTS: dict[str, str] = {\n"
    register.write_text(before.replace(opening, opening + line), encoding="utf-8")

    tests = [test_place, "tests/experts/test_experts_contract.py"]
    run(
        tmp_path,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *tests,
        "-k",
        "colours or gray or blue",
    )
    config = tmp_path / "colours.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "run": "out", "source": {"folder": "photos"}, "filter": {"min_short_edge": 64},
                "select": {"clusters": 1}, "experts": ["colours"],
            }
        )
    )  # fmt: skip
    (tmp_path / "photos").mkdir()
    shutil.copy(ROOT / "docs" / "images" / "report.png", tmp_path / "photos" / "one.png")
    run(tmp_path, "-m", "fusion_pipeline", "run", str(config), "--no-ray", "--until", "hints")
    assert list((tmp_path / "out" / "selected" / "tables" / "tags" / "colours").rglob("*.parquet"))


def run(folder: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=240,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_an_expert_of_another_package(tmp_path: Path) -> None:
    (expert, *_) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "colours.py").write_text(expert, encoding="utf-8")
    settings = {
        "run": "out", "source": {"folder": "photos"}, "filter": {"min_short_edge": 64},
        "select": {"clusters": 1}, "experts": [{"shelf.colours:Colours": {"score_floor": 0.2}}],
        "runner": {"workers": 1},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "photos").mkdir()
    shutil.copy(ROOT / "docs" / "images" / "report.png", tmp_path / "photos" / "one.png")
    paths = f"{ROOT}:{tmp_path}"
    command = [sys.executable, "-m", "fusion_pipeline", "run", "mine.yaml", "--until", "hints"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert list((tmp_path / "out" / "selected" / "tables" / "tags" / "colours").rglob("*.parquet"))
