from collections.abc import Callable

import pytest

from experts.base import Context
from fusion_pipeline.dataset.images import RGB


@pytest.fixture(scope="session")
def context_of() -> Callable[[RGB], Context]:
    return lambda image: Context(width=image.shape[1], height=image.shape[0])
