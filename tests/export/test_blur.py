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
    assert (image == noise()).all(), "the picture itself stays"


def test_nothing_but_averages_is_left() -> None:
    """Other pixels with the same averages give the same picture."""
    image = np.repeat(np.repeat(noise(10, 10), 10, axis=0), 10, axis=1)
    other = image.copy()
    for y in range(0, 100, 20):
        for x in range(0, 100, 20):
            other[y : y + 20, x : x + 20] = image[y : y + 20, x : x + 20][::-1, ::-1]
    assert (other != image).any()
    whole = [(0.0, 0.0, 1.0, 1.0)]
    assert (blur(other, whole) == blur(image, whole)).all()


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
    assert Blur((), (" Face",), 0.4).hides(found[0]), "a slip in a label must not show a face"
