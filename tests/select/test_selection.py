"""Near-exact copies: the lazy pass decides as the plain one would, with fewer looks at pixels."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fusion_pipeline.select.dedup import greedy
from fusion_pipeline.select.selection import confirmed_copies


def test_chains_are_not_followed() -> None:
    # 1 is a crop of 0 and 2 is a crop of 1, but 2 was not confirmed against 0.
    pairs = np.array([[0, 1], [0, 2], [1, 2]])
    confirmed = {(0, 1), (1, 2)}
    by = confirmed_copies(
        4,
        pairs,
        np.array([0.9, 0.8, 0.9]),
        np.arange(4),
        lambda a, b: (min(a, b), max(a, b)) in confirmed,
    )
    assert by.tolist() == [-1, 0, -1, -1]


@given(data=st.data(), n=st.integers(1, 12))
def test_keeps_what_greedy_keeps_over_the_confirmed_pairs(data: st.DataObject, n: int) -> None:
    every = [(i, j) for i in range(n) for j in range(i + 1, n)]
    proposed = data.draw(st.lists(st.sampled_from(every), unique=True)) if every else []
    confirmed = {pair for pair in proposed if data.draw(st.booleans())}
    order = np.array(data.draw(st.permutations(range(n))))
    cosines = np.array(data.draw(st.lists(st.floats(0.5, 1), min_size=len(proposed),
                                          max_size=len(proposed))))  # fmt: skip
    looked: list[tuple[int, int]] = []

    def check(a: int, b: int) -> bool:
        looked.append((min(a, b), max(a, b)))
        return looked[-1] in confirmed

    pairs = np.array(proposed, np.int64).reshape(-1, 2)
    by = confirmed_copies(n, pairs, cosines, order, check)
    plain = greedy(n, np.array(sorted(confirmed), np.int64).reshape(-1, 2), order)
    assert ((by < 0) == (plain < 0)).all()
    for row in np.flatnonzero(by >= 0):
        assert by[by[row]] < 0
        assert (min(row, by[row]), max(row, by[row])) in confirmed
    assert len(looked) == len(set(looked)) <= len(proposed)
