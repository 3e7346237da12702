"""Every registered expert loads and fits the contract of `experts.base`."""

import importlib
import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from pydantic import ValidationError

from experts import EXPERTS
from experts.base import Context, Expert
from fusion_pipeline.dataset import evidence
from fusion_pipeline.dataset.evidence import DetectedObject, EvidenceKind, Tag, TextLine
from fusion_pipeline.dataset.images import RGB

ITEMS = {
    EvidenceKind.TAGS: (Tag, evidence.tags_from),
    EvidenceKind.OBJECTS: (DetectedObject, evidence.objects_from),
    EvidenceKind.TEXT: (TextLine, evidence.text_from),
}


def load(name: str) -> type[Expert]:
    module, _, cls = EXPERTS[name].partition(":")
    return getattr(importlib.import_module(module), cls)


@pytest.fixture(scope="module", params=sorted(EXPERTS))
def expert_class(request: pytest.FixtureRequest) -> type[Expert]:
    return load(request.param)


@pytest.fixture(scope="module")
def expert(expert_class: type[Expert]) -> Expert:
    return expert_class(expert_class.Config(), threads=1)


def test_class_attributes(expert_class: type[Expert]) -> None:
    assert expert_class.kind in ITEMS
    assert expert_class.version >= 1
    assert expert_class.batch_size >= 1
    assert expert_class.min_short_edge is None or expert_class.min_short_edge > 0


def test_revision_is_a_content_hash(expert_class: type[Expert]) -> None:
    revision = expert_class.revision(expert_class.Config())
    assert "sha256:" in revision
    assert revision == expert_class.revision(expert_class.Config())


def test_unknown_settings_are_refused(expert_class: type[Expert]) -> None:
    with pytest.raises(ValidationError):
        expert_class.Config.model_validate({"no_such_setting": 1})


def test_any_size_gives_valid_evidence(
    expert: Expert, odd_images: Sequence[RGB], context_of: Callable[[RGB], Context]
) -> None:
    found = expert(odd_images, [context_of(image) for image in odd_images])
    item_type, read = ITEMS[expert.kind]
    assert len(found) == len(odd_images)
    for items in found:
        for item in items:
            assert isinstance(item, item_type)
            assert 0 < item.score <= 1
            assert type(item.score) is float
            if isinstance(item, TextLine):
                assert item.text.strip()
                assert all(0 <= value <= 1 for value in item.quad)
            else:
                assert item.label
            if isinstance(item, DetectedObject):
                x1, y1, x2, y2 = item.box
                assert 0 <= x1 < x2 <= 1
                assert 0 <= y1 < y2 <= 1
    table = evidence.to_arrow(expert.kind, found).to_pylist()
    assert [len(read(cell)) for cell in table] == [len(items) for items in found]


def test_solid_colour_holds_no_objects_and_no_text(
    expert: Expert, context_of: Callable[[RGB], Context]
) -> None:
    image = np.full((448, 600, 3), 127, np.uint8)
    [items] = expert([image], [context_of(image)])
    if expert.kind is not EvidenceKind.TAGS:  # a softmax always has a best class
        assert list(items) == []


def test_results_do_not_depend_on_slices_or_instances(
    expert: Expert, expert_class: type[Expert], photo: Callable[[str], RGB],
    context_of: Callable[[RGB], Context],
) -> None:  # fmt: skip
    images = [photo(n) for n in ("coffee.png", "astronaut.png", "page.png", "chelsea.png")]
    contexts = [context_of(image) for image in images]
    whole = list(expert(images, contexts))
    halves = [*expert(images[:3], contexts[:3]), *expert(images[3:], contexts[3:])]
    again = expert_class(expert_class.Config(), threads=1)
    backwards = [again([i], [c])[0] for i, c in reversed(list(zip(images, contexts, strict=True)))]
    assert whole == halves == backwards[::-1]
    assert any(whole)


def test_no_images_give_no_evidence(expert: Expert) -> None:
    assert list(expert([], [])) == []


def test_one_thread_is_one_thread(
    expert: Expert, photo: Callable[[str], RGB], context_of: Callable[[RGB], Context]
) -> None:
    image = photo("page.png").repeat(2, axis=0).repeat(2, axis=1)
    expert([image], [context_of(image)])
    wall, cpu = time.perf_counter(), time.process_time()
    expert([image] * 10, [context_of(image)] * 10)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert cpu <= 1.1 * wall + 0.02
