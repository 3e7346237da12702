"""What is blurred can't be won back, and nothing else is touched."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fusion_pipeline.dataset.evidence import DetectedObject
from fusion_pipeline.export.blur import Blur, blur


def noise(height: int = 80, width: int = 120) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_a_box_keeps_twenty_five_averages_and_the_rest_its_pixels() -> None:
    image = noise()
    found = blur(image, [(0.25, 0.25, 0.75, 0.75)])
    changed = (found != image).any(axis=-1)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (14, 66, 21, 99)
    inside = found[14:66, 21:99].reshape(-1, 3).astype(float)
    assert np.linalg.matrix_rank(inside - inside.mean(axis=0)) <= 3
    steps = np.abs(np.diff(found[14:66, 21:99].astype(int), axis=1)).max()
    assert steps < 10  # no edge of what was there is left
    assert (image == noise()).all(), "the picture itself stays"


@given(
    st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=5),
    st.sampled_from([(1, 1), (1, 50), (40, 3), (60, 80)]),
)
def test_any_box_and_any_size(boxes, size) -> None:
    image = noise(*size)
    sorted_boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in boxes]
    assert blur(image, sorted_boxes).shape == image.shape


def test_what_is_hidden() -> None:
    boxes = [("face", 0.4), ("face", 0.39), ("person", 0.9), ("license plate", 0.8)]
    found = [DetectedObject(label, score, (0, 0, 1, 1)) for label, score in boxes]
    some = Blur((), ("face", "license plate"), 0.4)
    assert [some.hides(one) for one in found] == [True, False, False, True]
    assert [Blur((), (), 0.4).hides(one) for one in found] == [True, False, True, True]
