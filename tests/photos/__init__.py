"""Photos with labels made by eye (README.md), read where `make photos` and the wheels put them."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import matplotlib
import skimage
import yaml

from fusion_pipeline.dataset.evidence import Box
from fusion_pipeline.dataset.images import RGB, decode

FOLDER = Path(__file__).parents[2] / ".photos"
LABELS = Path(__file__).parent / "labels.yaml"
WHEELS = {"skimage": Path(skimage.__file__).parent, "matplotlib": Path(matplotlib.__file__).parent}


@dataclass(frozen=True)
class Thing:
    label: str
    box: Box
    ignore: bool = False
    """A detection of it is neither right nor wrong."""


@dataclass(frozen=True)
class Photo:
    id: str
    path: Path
    sha256: str
    half: Literal["development", "final"]
    tags: tuple[str, ...]
    imagenet: frozenset[str]
    objects: tuple[Thing, ...]

    @cached_property
    def data(self) -> bytes:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.path}: run `make photos`") from None
        assert hashlib.sha256(data).hexdigest() == self.sha256, f"{self.path} is another picture"
        return data

    @property
    def pixels(self) -> RGB:
        return decode(self.data)


def load_photos(half: str | None = None) -> list[Photo]:
    """All photos, or those of one half."""
    rows = yaml.safe_load(LABELS.read_text(encoding="utf-8"))
    return [_photo(row) for row in rows if half in (None, row["half"])]


def _photo(row: Mapping[str, Any]) -> Photo:
    if "debian" in row:
        path = FOLDER / row["debian"]
    else:
        package, _, inside = row["wheel"].partition("/")
        path = WHEELS[package] / inside
    return Photo(
        row["id"], path, row["sha256"], row["half"], tuple(row["tags"]), frozenset(row["imagenet"]),
        tuple(Thing(o["label"], tuple(o["box"]), o.get("ignore", False)) for o in row["objects"]),
    )  # fmt: skip
