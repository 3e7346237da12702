"""Representatives: the first kept rows of each cluster, by the caller's order."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fusion_pipeline.select.representatives import choose


def test_first_kept_rows_of_each_cluster() -> None:
    cluster = np.array([0, 0, 0, 1, 1, 7], np.int32)
    order = np.array([2, 1, 0, 3, 4, 5])
    kept = np.array([True, True, False, True, True, True])
    chosen = choose(cluster, order, kept, per_cluster=1)
    assert np.flatnonzero(chosen).tolist() == [1, 3, 5]


@given(st.data())
def test_equals_counting_reference(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 30))
    cluster = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    kept = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    order = data.draw(st.permutations(range(n)))
    budget = data.draw(st.integers(0, 5))
    taken: dict[int, list[int]] = {}
    for row in order:
        rows = taken.setdefault(cluster[row], [])
        if kept[row] and len(rows) < budget:
            rows.append(row)
    chosen = choose(
        np.array(cluster, np.int32), np.array(order, np.int64), np.array(kept, bool), budget
    )
    assert np.flatnonzero(chosen).tolist() == sorted(itertools.chain(*taken.values()))
