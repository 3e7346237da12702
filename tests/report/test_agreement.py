"""Who stands behind the same evidence, as the report counts and colours it."""

from pathlib import Path

from fusion_pipeline.dataset.evidence import DetectedObject
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.dataset.rows import NotOk, Ok, build_table
from fusion_pipeline.perceive.merge_stages import MergeObjects
from fusion_pipeline.prompts.hints import Hints
from fusion_pipeline.report.agreement import count_agreement, finders
from fusion_pipeline.report.cards import colours_of
from fusion_pipeline.report.pictures import marks_of
from tests.report.small_run import put

CAT = {"label": "cat", "score": 0.9, "box": [0.1, 0.2, 0.30004, 0.4], "experts": ["a", "b", "t"]}
DOG = {"label": "dog", "score": 0.5, "box": [0.0, 0.0, 0.5, 0.5], "experts": ["b"]}
DOUBTFUL = {"label": "cow", "score": 0.1, "box": [0.0, 0.0, 0.5, 0.5], "experts": ["a", "b"]}
EVIDENCE = ("tags/t", "objects/a", "objects/b", "objects/merged")


def test_pairs_are_counted_over_what_is_believed(tmp_path: Path) -> None:
    dataset = Dataset.create(tmp_path)
    assert count_agreement(dataset, EVIDENCE, {"objects": 0.35})[0].items == 0  # not made yet
    rows = [Ok({"objects": [CAT, DOUBTFUL]}), Ok({"objects": [DOG]}), NotOk("failed", "x")]
    put(dataset, "objects/merged", build_table(["k1", "k2", "k3"], rows, MergeObjects.columns))
    [agreement] = count_agreement(dataset, EVIDENCE, {"objects": 0.35})
    assert (agreement.items, agreement.experts) == (2, ("a", "b", "t"))
    assert agreement.of("a", "b") == agreement.of("b", "a") == agreement.of("t", "b") == 1
    assert (agreement.of("a", "a"), agreement.of("b", "b")) == (1, 2)


def test_a_box_has_the_colour_of_its_detector_or_that_of_several() -> None:
    assert colours_of(EVIDENCE) == {"a": "found-1", "b": "found-2", "several": "found-many"}
    assert colours_of(("objects/a", "objects/merged")) == {}  # one detector needs no colours
    found = finders([CAT, DOG])
    box = (0.1, 0.2, 0.3, 0.4)
    assert found[("cat", box)] == ("a", "b", "t")  # boxes as hints round them
    hints = Hints(objects=(DetectedObject("cat", 0.9, box),))
    [mark] = marks_of(hints, 100, 100, {("cat", box): "found-many"})
    assert mark.style == "objects found-many"
