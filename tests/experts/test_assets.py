import hashlib
import re
from pathlib import Path

import pytest

from experts.base import ASSETS
from experts.ocr.rapidocr import WEIGHTS

SHIPPED = sorted(p for p in ASSETS.iterdir() if p.name != "NOTICE.txt")


@pytest.mark.parametrize("path", [*SHIPPED, *WEIGHTS.values()], ids=lambda path: path.name)
def test_the_notice_names_each_file_with_its_hash(path: Path) -> None:
    notice = (ASSETS / "NOTICE.txt").read_text(encoding="utf-8")
    entry = re.search(rf"^ *{re.escape(path.name)}\n(?:.*\n)*? *sha256: (\w+)$", notice, re.M)
    assert entry is not None
    assert entry[1] == hashlib.sha256(path.read_bytes()).hexdigest()
