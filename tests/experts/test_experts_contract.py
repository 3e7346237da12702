"""Every registered expert loads and fits the contract of `experts.base`."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from experts import EXPERTS, SHIPPED, load_expert
from experts.base import Context, Expert, ExpertConfig, Hardware
from fusion_pipeline.dataset import evidence
from fusion_pipeline.dataset.evidence import DetectedObject, EvidenceKind, Tag, TextLine
from fusion_pipeline.dataset.images import RGB
from tests.experts.tiny import tiny_config

ITEMS = {
    EvidenceKind.TAGS: (Tag, evidence.tags_from),
    EvidenceKind.SCORES: (Tag, evidence.tags_from),
    EvidenceKind.OBJECTS: (DetectedObject, evidence.objects_from),
    EvidenceKind.TEXT: (TextLine, evidence.text_from),
}


@pytest.fixture(scope="module", params=sorted(EXPERTS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def expert_class(name: str) -> type[Expert]:
    return load_expert(name)


@pytest.fixture(scope="module")
def config(name: str, tmp_path_factory: pytest.TempPathFactory) -> ExpertConfig:
    return tiny_config(name, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def expert(expert_class: type[Expert], config: ExpertConfig) -> Expert:
    return expert_class(config, Hardware())


@pytest.fixture
def context_of(expert: Expert, context_of: Callable[[RGB], Context]) -> Callable[[RGB], Context]:
    """With tags, for those that ask for them."""
    tags = (Tag("cat", 0.9), Tag("coffee cup", 0.8)) if expert.uses_tags else ()
    return lambda image: replace(context_of(image), tags=tags)


def test_class_attributes(expert: Expert) -> None:
    assert expert.kind in ITEMS
    assert expert.version >= 1
    assert expert.batch_size >= 1
    assert expert.min_short_edge is None or expert.min_short_edge > 0


def test_revision_is_a_content_hash(expert_class: type[Expert], config: ExpertConfig) -> None:
    revision = expert_class.revision(config)
    assert re.search("(sha256|folder):[0-9a-f]{16}|^no weights$", revision)
    assert revision == expert_class.revision(config)


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
                assert item.text == item.text.strip()  # empty: found, and not to be read
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
    name: str, expert: Expert, context_of: Callable[[RGB], Context]
) -> None:
    image = np.full((448, 600, 3), 127, np.uint8)
    [items] = expert([image], [context_of(image)])
    # A softmax always has a best class, and random weights see things anywhere.
    if expert.kind is not EvidenceKind.TAGS and name in SHIPPED:
        assert list(items) == []


def test_results_do_not_depend_on_slices_or_instances(
    expert: Expert, expert_class: type[Expert], config: ExpertConfig,
    photo: Callable[[str], RGB], context_of: Callable[[RGB], Context],
) -> None:  # fmt: skip
    images = [photo(n) for n in ("coffee.png", "astronaut.png", "page.png", "chelsea.png")]
    contexts = [context_of(image) for image in images]
    whole = list(expert(images, contexts))
    halves = [*expert(images[:3], contexts[:3]), *expert(images[3:], contexts[3:])]
    again = expert_class(config, Hardware())
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
