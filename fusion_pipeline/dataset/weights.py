"""What identifies the weights of a model that lie in files."""

import hashlib
import json
from pathlib import Path

from fusion_pipeline.dataset.fingerprints import short_hash

_WHOLE_FILE, _SAMPLES, _SAMPLE = 16 * 2**20, 64, 64 * 2**10


def weights_hash(folder: Path) -> str:
    """Of names and contents of a folder's files, hidden ones left out, wherever it lies.

    Large files are told apart by `file_hash`: to read all weights would take a minute each time.
    """
    parts: dict[str, object] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if not any(part.startswith(".") for part in Path(name).parts):
            parts[name] = file_hash(path)
    return short_hash(json.dumps(parts))


def file_hash(path: Path) -> str:
    """sha256 (hex) of a file's size and contents; above 16 MiB, of its size and of 64 places."""
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE_FILE:
            found.update(file.read())
        else:
            for number in range(_SAMPLES):
                file.seek((size - _SAMPLE) * number // (_SAMPLES - 1))
                found.update(file.read(_SAMPLE))
    return found.hexdigest()
