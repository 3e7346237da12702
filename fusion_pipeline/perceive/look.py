"""What an image looks like, measured: sharpness, exposure, JPEG quality, colours, layout.

No model is asked. The numbers are for choosing images (`open(...).select(..., where=...)`), and for
finding out what a data set is made of; nothing is dropped for them.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from fusion_pipeline.dataset.colours import name_colours, shares_of, small_lab
from fusion_pipeline.dataset.evidence import LOOK
from fusion_pipeline.dataset.images import RGB, DecodeError, decode, jpeg_tables, layout_of
from fusion_pipeline.dataset.rows import NotOk, Ok, Outcome, build_table
from fusion_pipeline.engine.stage import CPU_WORKER, Resources, ShardBlock, Worker

EDGE = 512
"""Short edge in pixels of the copy that sharpness and exposure are measured on."""
_DETAIL = 4
"""Pixels that a scaled decode keeps for each of that copy. With 1 the sharpness of a picture of
twice the size would be 40 % less as a JPEG than as a PNG."""
_DARK, _BRIGHT = 8, 247
"""Of 255: luma up to and from which there is nothing to be seen."""
_LEAST_SHARE = 0.04
"""Smaller shares of a colour are left out."""
_GREY_CHROMA = 6.0
"""CIELAB distance from grey under which nearly all pixels of a picture without colour are."""

COLUMNS = (
    pa.field("sharpness", pa.float32()),
    pa.field("brightness", pa.float32()),
    pa.field("contrast", pa.float32()),
    pa.field("dark", pa.float32()),
    pa.field("bright", pa.float32()),
    pa.field("jpeg_quality", pa.int32()),
    pa.field("grey", pa.bool_()),
    pa.field("colours", pa.list_(pa.struct([("name", pa.string()), ("share", pa.float32())]))),
    pa.field("layout", pa.string()),
)


@dataclass(frozen=True)
class Look:
    """Writes `look`:

    - `sharpness`: variance of the Laplacian of the luma (Pech-Pacheco et al., 2000) at a short edge
      of 512 pixels; smaller images are measured as they are. Sharp photos have hundreds, those
      blurred by a Gaussian of 2 pixels less than 15, scenes with few edges 30 to 100.
    - `brightness`, `contrast`: mean and standard deviation of the luma, 0..1.
    - `dark`, `bright`: shares of pixels in which nothing is to be seen, 0..1.
    - `jpeg_quality`: 1..100 on the scale of the Independent JPEG Group, of the file as it is; null
      for other formats. What was saved badly and then well again has a good one.
    - `grey`: whether it has no colour.
    - `colours`: names and shares, largest first, of those that fill 4 % or more.
    - `layout`: `portrait`, `square` or `landscape`.
    """

    resources: Resources = CPU_WORKER

    name = LOOK
    version = 1
    reads: tuple[str, ...] = ()
    columns: Sequence[pa.Field] = COLUMNS

    def settings(self) -> Mapping[str, Any]:
        return {}

    def revision(self) -> None:
        return None

    def open(self) -> Worker:
        cv2.setNumThreads(self.resources.threads)
        return self._work

    def _work(self, block: ShardBlock) -> pa.Table:
        outcomes: list[Outcome] = []
        widths, heights = (block.column("samples", name) for name in ("width", "height"))
        for data, width, height in zip(block.images, widths, heights, strict=True):
            block.tick()
            try:
                values = look_at(data)
            except DecodeError as error:
                outcomes.append(NotOk("failed", str(error)[:200]))
                continue
            outcomes.append(Ok({**values, "layout": layout_of(width, height)}))
        return build_table(block.keys, outcomes, self.columns)


def look_at(data: bytes) -> dict[str, Any]:
    """All that a file tells, by the names of the columns. Raises DecodeError."""
    quality = jpeg_quality(jpeg_tables(data))
    return {**measure(decode(data, min_short_edge=_DETAIL * EDGE)), "jpeg_quality": quality}


def measure(image: RGB) -> dict[str, Any]:
    """All that is measured on pixels, by the names of the columns."""
    scale = EDGE / min(image.shape[:2])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in image.shape[1::-1]]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    lab = small_lab(image)
    chroma = np.linalg.norm(lab[..., 1:], axis=-1)
    colours = shares_of(name_colours(lab), _LEAST_SHARE)
    return {
        "sharpness": float(cv2.Laplacian(luma, cv2.CV_64F).var()),
        "brightness": float(luma.mean()) / 255,
        "contrast": float(luma.std()) / 255,
        "dark": float((luma <= _DARK).mean()),
        "bright": float((luma >= _BRIGHT).mean()),
        "grey": bool(np.percentile(chroma, 99) < _GREY_CHROMA),
        "colours": [{"name": name, "share": share} for name, share in colours],
    }


def jpeg_quality(tables: Sequence[Sequence[int]]) -> int | None:
    """The quality at which the library of the Independent JPEG Group makes the first of such
    tables, or the one nearest to it; None without tables."""
    if not tables:
        return None
    distance = np.abs(_luma_tables() - np.array(tables[0])).sum(axis=1)
    return int(distance.argmin()) + 1


@cache
def _luma_tables() -> npt.NDArray[np.int64]:
    """int64 [100, 64], of the qualities 1 to 100: that of 50, scaled as the library does it."""
    sink = io.BytesIO()
    Image.new("L", (8, 8)).save(sink, "JPEG", quality=50)
    base = np.array(jpeg_tables(sink.getvalue())[0])
    scales = [5000 // quality if quality < 50 else 200 - 2 * quality for quality in range(1, 101)]
    tables: npt.NDArray[np.int64] = np.clip((np.outer(scales, base) + 50) // 100, 1, 255)
    return tables
