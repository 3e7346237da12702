"""Settings and pictures of all tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage
from hypothesis import HealthCheck, settings

from fusion_pipeline.dataset.images import RGB, decode

# A busy machine is no defect: nothing here depends on how long an example takes.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

Photo = Callable[[str], RGB]


@pytest.fixture(scope="session")
def photo() -> Photo:
    """A photo of the scikit-image wheel by file name."""
    folder = Path(skimage.__file__).parent / "data"
    return lambda name: decode((folder / name).read_bytes())


@pytest.fixture(scope="session")
def odd_images(photo: Photo) -> list[RGB]:
    """Sizes that break careless code: a pixel, strips, nothing but one colour, 20 megapixels."""
    random = np.random.default_rng(0)
    return [
        np.zeros((1, 1, 3), np.uint8),
        random.integers(0, 256, (1, 700, 3), np.uint8),
        random.integers(0, 256, (3000, 1, 3), np.uint8),
        np.full((37, 53, 3), 255, np.uint8),
        np.full((480, 640, 3), (200, 30, 30), np.uint8),
        np.kron(photo("astronaut.png"), np.ones((8, 10, 1), np.uint8)),
        photo("chelsea.png")[:, ::-1],  # negative strides
    ]
