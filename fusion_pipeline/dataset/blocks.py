"""Reading order of text lines, and their blocks: paragraphs, and columns without gaps.

Everything is measured along and across the text, not the frame, so that a page that was
photographed turned or askew reads like one that lies straight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

import numpy as np
import numpy.typing as npt

from fusion_pipeline.dataset.evidence import Box, TextLine

COLUMN_GAP = 0.04
"""Narrowest white space between two columns, as a share of the frame."""
LINE_GAP = 1.0
"""Widest white space between two lines of a block, in heights of the lower line. Boxes of a
detector have a margin: in a paragraph they mostly overlap, and the white space is negative."""
UNEVEN = 0.4
"""By how much it may be wider than the one before or after, in the same unit."""
HEIGHTS = 1.6
"""Most that the height of lines differs from row to row of a block."""
LONG = 2.0
"""Lines that are this many times longer than high tell in which direction text runs."""

Vectors = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Placed:
    line: TextLine
    box: Box
    """As in a frame in which the text runs to the right; not limited to 0..1."""

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]

    @property
    def middle(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


Row = list[_Placed]


def reading_order(lines: Sequence[TextLine]) -> list[TextLine]:
    """The lines as a person reads them, their blocks numbered from 0 in that order.

    Lines go from top to bottom, column by column where white space separates columns. Text set in
    columns of characters goes from right to left. Lines across the main direction (a margin note
    beside a page) come after the others, in blocks of their own. The order of `lines` is of no
    account.
    """
    ordered: list[TextLine] = []
    blocks = 0
    for group in _directions(sorted(lines, key=lambda line: (line.quad, line.text, line.score))):
        for block in _blocks(list(_rows(group))):
            ordered += [replace(placed.line, block=blocks) for placed in block]
            blocks += 1
    return ordered


# --- direction -----------------------------------------------------------------------------------


def _directions(lines: Sequence[TextLine]) -> Iterator[list[_Placed]]:
    """Lines that run across the frame and lines that run down it, those of which there is more
    text first. Short lines, of which a detector can't tell, go with the first."""
    quads = np.array([line.quad for line in lines]).reshape(-1, 4, 2)
    along = (quads[:, 1] + quads[:, 2] - quads[:, 0] - quads[:, 3]) / 2
    down = (quads[:, 3] + quads[:, 2] - quads[:, 0] - quads[:, 1]) / 2
    length = np.linalg.norm(along, axis=1)
    is_long = (length > 0) & (length >= LONG * np.linalg.norm(down, axis=1))
    upright = np.abs(along[:, 1]) > np.abs(along[:, 0])
    more_upright = length[is_long & upright].sum() > length[is_long & ~upright].sum()
    first = np.where(is_long, upright == more_upright, True)
    for chosen in (first, ~first):
        axes = _axes(along[chosen & is_long], down[chosen & is_long])
        corners = quads[chosen] @ np.linalg.inv(axes)
        low, high = corners.min(axis=1).tolist(), corners.max(axis=1).tolist()
        part = [line for line, here in zip(lines, chosen.tolist(), strict=True) if here]
        yield [
            _Placed(line, (*start, *end)) for line, start, end in zip(part, low, high, strict=True)
        ]


def _axes(along: Vectors, down: Vectors) -> Vectors:
    """Unit vectors along and down the text of some lines, [2, 2]. Where they disagree, as when one
    of them was taken for upside down, the larger half wins."""
    if not len(along):
        return np.eye(2)
    axis = int(np.abs(along).sum(axis=0).argmax())
    signs = np.where(along[:, axis] < 0, -1.0, 1.0)[:, None]
    if along[:, axis].sum() < 0:
        signs = -signs
    right = np.median(along * signs / np.linalg.norm(along, axis=1, keepdims=True), axis=0)
    right /= np.linalg.norm(right)
    below = np.median(down * signs, axis=0)
    below /= max(float(np.linalg.norm(below)), 1e-12)
    if abs(right[0] * below[1] - right[1] * below[0]) < 0.5:  # lines without height
        below = np.array([-right[1], right[0]])
    return np.stack([right, below])


# --- rows ----------------------------------------------------------------------------------------


def _rows(lines: list[_Placed]) -> Iterator[Row]:
    """Recursive XY-cut: a group is split at its widest gap between rows, or between columns when
    that gap is about as wide and both sides hold two lines or more."""
    stack = [sorted(lines, key=lambda placed: (placed.box[1], placed.box[0]))]
    while stack:
        group = stack.pop()
        if not group:
            continue
        across, right = _widest_gap(group, 0)
        down, below = _widest_gap(group, 1)
        columns = (
            across > max(down / 1.5, COLUMN_GAP) and min(len(right), len(group) - len(right)) > 1
        )
        rest = right if columns else below
        if not rest:
            yield from _overlapping_rows(group)
            continue
        second = {id(placed) for placed in rest}
        stack += [rest, [placed for placed in group if id(placed) not in second]]


def _overlapping_rows(group: list[_Placed]) -> Iterator[Row]:
    """Rows without a gap between them: a line opens a new one when its middle lies below the first
    one's by half a height."""
    rows: list[Row] = []
    for placed in sorted(group, key=lambda placed: placed.middle[1]):
        first = rows[-1][0] if rows else None
        if first is None or placed.middle[1] - first.middle[1] > max(first.height / 2, 1e-6):
            rows.append([])
        rows[-1].append(placed)
    for row in rows:
        yield sorted(row, key=lambda placed: placed.box[0])


def _widest_gap(group: list[_Placed], axis: int) -> tuple[float, list[_Placed]]:
    """Width of the widest empty band on an axis (0: x, 1: y), and the lines beyond it."""
    by_start = sorted(group, key=lambda placed: placed.box[axis])
    # Letters' boxes overlap the next line's by a hair; a third of the height is let go.
    slack = (lambda placed: placed.height / 3) if axis else (lambda placed: 0.0)
    widest, cut, reach = 0.0, len(group), -np.inf
    for index, (last, placed) in enumerate(pairwise(by_start), start=1):
        reach = max(reach, last.box[axis + 2] - slack(last))
        gap = placed.box[axis] - reach
        if gap > widest:
            widest, cut = gap, index
    return widest, by_start[cut:]


# --- blocks --------------------------------------------------------------------------------------


def _blocks(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows that follow one another closely and evenly, at one height of letters, over one another.
    No block reaches around lines of another one, as a footer and the last of two columns would."""
    middles = np.array([placed.middle for row in rows for placed in row]).reshape(-1, 2)
    gaps = [_gap(last, row) for last, row in pairwise(rows)]
    block: Row = []
    for place, row in enumerate(rows):
        if block and (not _is_even(gaps, place - 1) or _inside(block + row, middles)):
            yield block
            block = []
        block = block + row
    if block:
        yield block


def _gap(last: Row, row: Row) -> float:
    """White space between two rows, in heights of the lower one; infinite when the second one does
    not continue the first."""
    above, box = _around(last), _around(row)
    low, high = sorted(median(placed.height for placed in part) for part in (last, row))
    gap = (box[1] - above[3]) / max(low, 1e-6)
    over = min(above[2], box[2]) > max(above[0], box[0])
    return gap if over and high <= HEIGHTS * low and abs(gap) <= LINE_GAP else np.inf


def _is_even(gaps: Sequence[float], place: int) -> bool:
    """Two rows alone may be as far apart as the text of signs is set: half a line."""
    beside = [gap for gap in (*gaps[max(place - 1, 0) : place], *gaps[place + 1 : place + 2])
              if gap < np.inf]  # fmt: skip
    return gaps[place] <= min(LINE_GAP, min(beside, default=0.2) + UNEVEN)


def _around(row: Row) -> Box:
    x1, y1, x2, y2 = zip(*(placed.box for placed in row), strict=True)
    return min(x1), min(y1), max(x2), max(y2)


def _inside(block: Row, middles: Vectors) -> bool:
    """Whether the box around a block holds the middle of a line that is not part of it."""
    x1, y1, x2, y2 = _around(block)
    inside = ((x1, y1) <= middles) & (middles <= (x2, y2))
    return int(inside.all(axis=1).sum()) > len(block)
