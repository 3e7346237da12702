import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experts.base import ASSETS
from experts.ocr.rapidocr import WEIGHTS
from tests.serving import ROOT

SHIPPED = sorted(p for p in ASSETS.iterdir() if p.name != "NOTICE.txt")


@pytest.mark.parametrize("path", [*SHIPPED, *WEIGHTS.values()], ids=lambda path: path.name)
def test_the_notice_names_each_file_with_its_hash(path: Path) -> None:
    notice = (ASSETS / "NOTICE.txt").read_text(encoding="utf-8")
    entry = re.search(rf"^ *{re.escape(path.name)}\n(?:.*\n)*? *sha256: (\w+)$", notice, re.M)
    assert entry is not None
    assert entry[1] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_onnx_runtime_reports_to_nobody(tmp_path: Path) -> None:
    """It keeps an id of the machine for that, in the home folder."""
    code = (
        "import time; import numpy as np; from experts.base import Hardware; "
        "from experts.tagging.efficientnet_lite2 import EfficientNetLite2 as Net; "
        "Net(Hardware()).embed([np.zeros((300, 300, 3), np.uint8)]); time.sleep(3)"
    )
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)
    assert [p for p in tmp_path.rglob("*") if "onnxruntime" in str(p)] == []
