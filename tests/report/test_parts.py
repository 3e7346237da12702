"""The report's small algorithms: the draw, the shares of the failure list, steps, spans."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fusion_pipeline.dataset.evidence import DetectedObject, TextLine
from fusion_pipeline.dataset.layout import Dataset
from fusion_pipeline.prompts.hints import Hints
from fusion_pipeline.report.draw import Draw
from fusion_pipeline.report.failures import _shares
from fusion_pipeline.report.lengths import nice_step
from fusion_pipeline.report.pictures import marks_of
from fusion_pipeline.report.timing import read_timing

pairs = st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 40).map(str)), max_size=80)


def drawn(size: int, candidates: list[tuple[str, str]]) -> list[str]:
    draw = Draw(size, seed=1)
    for stratum, key in candidates:
        draw.add(stratum, key)
    return draw.keys()


@given(pairs, st.integers(0, 10), st.randoms(use_true_random=False))
def test_draw_depends_on_the_set_alone(candidates, size, random) -> None:
    expected = drawn(size, candidates)
    distinct = {key for _, key in candidates}
    assert len(expected) == len(set(expected)) <= min(size, len(distinct))
    assert set(expected) <= distinct
    if len({stratum for stratum, _ in candidates}) <= size:
        assert len(expected) == min(size, len(distinct))
    shuffled = candidates * 2
    random.shuffle(shuffled)
    assert drawn(size, shuffled) == expected


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 9), min_size=1), st.integers(6, 20)
)
def test_draw_takes_of_every_stratum_in_turn(sizes, size) -> None:
    keys = drawn(size, [(name, f"{name}{i}") for name, n in sizes.items() for i in range(n)])
    taken = [sum(key[0] == name for key in keys) for name in sizes]
    left = [n - t for n, t in zip(sizes.values(), taken, strict=True)]
    # A stratum that still has keys got no fewer than any other, but for the round under way.
    assert all(mine >= max(taken) - 1 for mine, rest in zip(taken, left, strict=True) if rest)


@given(st.lists(st.integers(1, 500), max_size=8), st.integers(8, 200))
def test_failure_list_is_full_and_no_group_is_starved(sizes, limit) -> None:
    shares = _shares(sizes, limit)
    assert sum(shares) == min(sum(sizes), limit)
    assert all(
        share == size or share >= max(shares) - 1 for share, size in zip(shares, sizes, strict=True)
    )


@given(st.integers(1, 10**7), st.integers(1, 30))
def test_nice_step_covers_with_no_smaller_step(reach, most) -> None:
    step = nice_step(reach, most)
    assert step * most >= reach
    assert str(step).rstrip("0") in ("1", "2", "5")
    smaller = step // 2 if str(step)[0] != "5" else step * 2 // 5
    assert step == 1 or smaller * most < reach


def test_wall_time_is_the_union_of_spans_over_all_runs(tmp_path: Path) -> None:
    def line(second: int, seconds: float, worked: int) -> str:
        at = f"2026-01-01T00:00:{second:02d}.000+00:00"
        return json.dumps({"at": at, "step": "hints", "shard": 0, "rows": 9, "worked": worked,
                           "failed": 0, "seconds": seconds, "first_error": None})  # fmt: skip

    dataset = Dataset.create(tmp_path)
    lines = [line(10, 4.0, 6), line(12, 4.0, 6)]  # 6..10 and 8..12 overlap
    dataset.storage.put("runs/1/shards-00000.jsonl", "\n".join(lines).encode())
    dataset.storage.put("runs/2/shards-00000.jsonl", line(40, 2.0, 8).encode())
    timing = read_timing([dataset], ["resolution", "hints"])
    (step,) = timing.steps
    assert (step.shards, step.samples, step.worker_seconds, step.wall_seconds) == (3, 20, 10, 8)
    assert step.rate == 2.0
    assert timing.wall_seconds == 8


@given(
    st.lists(st.tuples(*[st.integers(0, 100)] * 4), max_size=30),
    st.sampled_from([(640, 480), (480, 640), (640, 40)]),
)
def test_labels_start_inside_the_picture(corners, size) -> None:
    boxes = [
        (min(a, c) / 100, min(b, d) / 100, max(a, c) / 100, max(b, d) / 100)
        for a, b, c, d in corners
    ]
    hints = Hints(objects=tuple(DetectedObject("cup", 0.9, box) for box in boxes))
    for mark in marks_of(hints, *size):
        css = dict(part.split(":") for part in mark.anchor.split(";"))
        across = float(css.get("left", css.get("right", "")).rstrip("%"))
        assert 0 <= across <= 60  # a label is at most 40 % wide
        assert 0 <= float(css.get("top", css.get("bottom", "")).rstrip("%")) <= 100


def test_a_line_that_nobody_could_read_is_shown_with_its_script() -> None:
    quad = (0.1, 0.1, 0.4, 0.1, 0.4, 0.2, 0.1, 0.2)
    read, unread = TextLine("OPEN", 0.9, quad), [TextLine("", 0.9, quad, s) for s in ("Cyrl", "")]
    marks = marks_of(Hints(text=(read,)), 100, 100, unread=unread)
    assert [(m.label, m.style) for m in marks] == [
        ("1", "text"), ("Cyrl", "text unread"), ("?", "text unread"),
    ]  # fmt: skip
