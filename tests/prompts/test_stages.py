"""Evidence of several tables: lines of text that two experts read are told once."""

from typing import Any

from fusion_pipeline.dataset.evidence import TextLine
from fusion_pipeline.prompts.stages import _joined


def line(text: str, score: float, y: float, **more: Any) -> TextLine:
    return TextLine(text, score, (0.1, y, 0.5, y, 0.5, y + 0.1, 0.1, y + 0.1), **more)


def test_the_surer_of_two_readings_stays() -> None:
    latin = [line("OPEN", 0.9, 0.1), line("HACCAY", 0.5, 0.3), line("", 0.99, 0.5, script="Hang")]
    korean = [line("0PEN", 0.7, 0.11), line("한국", 0.9, 0.31), line("서울", 0.4, 0.5)]
    others = [line("left", 0.3, 0.7)]
    assert _joined([*latin, *others], korean) == [latin[0], others[0], *korean[1:]]
    assert _joined([], korean) == korean
    assert _joined(latin, []) == latin


def test_of_equal_ones_the_first_expert_is_told() -> None:
    first, second = [line("OPEN", 0.9, 0.1)], [line("OPEN!", 0.9, 0.1)]
    assert _joined(first, second) == first
    unread = [line("", 0.9, 0.1)]
    assert _joined(unread, unread) == unread
