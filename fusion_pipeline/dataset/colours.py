"""Names of colours, as people say them."""

from collections import Counter

import cv2
import numpy as np
import numpy.typing as npt

from fusion_pipeline.dataset.images import RGB

Lab = npt.NDArray[np.float32]
Names = npt.NDArray[np.str_]
"""Of each pixel, [64, 64]."""

_CODES = """black: 0c0c0c 1e1e1e; dark grey: 3c3c3c 555555; grey: 808080 999999;
    light grey: b8b8b8 d0d0d0; white: ececec ffffff; red: c81e1e e63c32; dark red: 781419;
    pink: f0aabe e66ea0; orange: f08c1e e67832; brown: 6e411e 8c5f3c 503728 8c4128;
    beige: e1cdaa c8af8c; yellow: f5dc32 ffff00; olive green: 6e6928; green: 328c3c 5aaa46 00c800;
    dark green: 19461e; light green: aadc96; teal: 148282; light blue: 96c8eb 78aadc;
    blue: 285ac8 4682be 0000ff; dark blue: 0f1e50 1e3c78; purple: 6e3296 961e96 bea0dc"""
_NAME_OF = {
    code: name.strip()
    for name, codes in (entry.split(":") for entry in _CODES.split(";"))
    for code in codes.split()
}


def small_lab(image: RGB) -> Lab:
    """A small copy in CIELAB, float32 [64, 64, 3]."""
    small = cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    lab: Lab = cv2.cvtColor(small, cv2.COLOR_RGB2LAB)
    return lab


def name_colours(lab: Lab) -> Names:
    """The name of the nearest colour at each pixel of such a copy, [64, 64]."""
    known = np.array([[list(bytes.fromhex(code)) for code in _NAME_OF]], np.float32) / 255
    distance = np.linalg.norm(lab[:, :, None] - cv2.cvtColor(known, cv2.COLOR_RGB2LAB), axis=-1)
    names: Names = np.array(list(_NAME_OF.values()))[distance.argmin(axis=-1)]
    return names


def shares_of(region: Names, least: float) -> list[tuple[str, float]]:
    """Colours that have at least that share of a region, and their shares, largest first."""
    counts = Counter(sorted(region.ravel().tolist())).most_common()
    found = [(name, round(count / region.size, 3)) for name, count in counts]
    return [(name, share) for name, share in found if share >= least]
