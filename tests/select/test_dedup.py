"""De-duplication: the guarantees of the greedy pass, and the released SemDeDup rule."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_pipeline.select.dedup import greedy, semdedup, semdedup_order
from fusion_pipeline.select.neighbours import neighbour_pairs


@st.composite
def graphs(draw: st.DrawFn) -> tuple[int, np.ndarray, np.ndarray]:
    n = draw(st.integers(1, 25))
    node = st.integers(0, n - 1)
    edges = draw(st.lists(st.tuples(node, node).filter(lambda e: e[0] != e[1]), max_size=60))
    order = draw(st.permutations(range(n)))
    return n, np.array(edges, np.int64).reshape(-1, 2), np.array(order, np.int64)


def naive_greedy(n: int, pairs: np.ndarray, order: np.ndarray) -> list[int]:
    edges = {frozenset(p) for p in pairs.tolist()}
    dropped_by, kept = [-1] * n, []
    for row in order.tolist():
        dropped_by[row] = next((k for k in kept if frozenset((k, row)) in edges), -1)
        if dropped_by[row] == -1:
            kept.append(row)
    return dropped_by


@settings(max_examples=200, deadline=None)
@given(graphs(), st.randoms(use_true_random=False))
def test_greedy_equals_reference_and_keeps_its_guarantees(graph, random) -> None:  # type: ignore[no-untyped-def]
    n, pairs, order = graph
    dropped_by = greedy(n, pairs, order)
    assert dropped_by.tolist() == naive_greedy(n, pairs, order)

    edges = {frozenset(p) for p in pairs.tolist()}
    kept = [r for r in range(n) if dropped_by[r] == -1]
    assert not any(frozenset((a, b)) in edges for a in kept for b in kept if a != b)
    for row in set(range(n)) - set(kept):
        assert frozenset((row, int(dropped_by[row]))) in edges
        assert dropped_by[row] in kept

    shuffled = [p[::-1] if random.random() < 0.5 else p for p in pairs.tolist()]
    random.shuffle(shuffled)
    again = greedy(n, np.array(shuffled, np.int64).reshape(-1, 2), order)
    assert again.tobytes() == dropped_by.tobytes()

    moved = np.array(random.sample(range(n), n))  # row r is now called moved[r]
    renamed = greedy(n, moved[pairs], moved[order])
    assert [int(renamed[moved[r]]) for r in kept] == [-1] * len(kept)
    assert all(renamed[moved[r]] == moved[dropped_by[r]] for r in set(range(n)) - set(kept))


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_connected_groups_may_be_decided_apart(graph) -> None:  # type: ignore[no-untyped-def]
    n, pairs, order = graph
    group = np.arange(n)
    for _ in range(n):
        for a, b in pairs:
            group[[a, b]] = min(group[a], group[b])
    together, apart = greedy(n, pairs, order), np.full(n, -2)
    for name in set(group.tolist()):
        rows = np.flatnonzero(group == name)
        number = {int(r): i for i, r in enumerate(rows)}
        local_pairs = [[number[a], number[b]] for a, b in pairs.tolist() if group[a] == name]
        local_order = [number[r] for r in order.tolist() if group[r] == name]
        part = greedy(
            len(rows), np.array(local_pairs, np.int64).reshape(-1, 2), np.array(local_order)
        )
        apart[rows] = np.where(part == -1, -1, rows[part])
    assert apart.tolist() == together.tolist()


def released_rule(rows: np.ndarray, centroid: np.ndarray, eps: float) -> set[int]:
    """The released code, line by line: sort, matrix, zero diagonal, upper triangle, column max."""
    x = rows.astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    distance = 1 - x @ (centroid / np.linalg.norm(centroid))
    order = sorted(range(len(x)), key=lambda r: distance[r], reverse=True)
    matrix = x[order] @ x[order].T
    np.fill_diagonal(matrix, 0.0)
    largest = np.triu(matrix, 1).max(axis=0)
    return {order[i] for i in np.flatnonzero(largest > 1 - eps)}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 50), st.floats(0, 1), st.integers(1, 60))
def test_semdedup_equals_the_released_rule(seed, n, eps, block) -> None:  # type: ignore[no-untyped-def]
    random = np.random.default_rng(seed)
    rows = (random.normal(size=(n, 5)) + 0.7).astype(np.float16)
    dropped_by = semdedup(rows, rows.mean(axis=0).astype(np.float32), eps, block=block)
    expected = released_rule(rows, rows.mean(axis=0).astype(np.float32), eps)
    assert set(np.flatnonzero(dropped_by >= 0).tolist()) == expected
    place = np.argsort(semdedup_order(rows, rows.mean(axis=0).astype(np.float32)))
    assert all(place[dropped_by[row]] < place[row] for row in expected)


def directions(*degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def test_a_chain_shows_how_the_two_rules_differ() -> None:
    # Neighbours 30 degrees apart: cos 30 = 0.87 is above 0.8, cos 60 = 0.5 is not.
    chain, centroid = directions(60, 30, 0), directions(0)[0]
    order = semdedup_order(chain, centroid)
    assert order.tolist() == [0, 1, 2]
    # Released rule: row 1, itself dropped, drops row 2, which has no surviving neighbour.
    assert semdedup(chain, centroid, eps=0.2).tolist() == [-1, 0, 1]
    pairs, _ = neighbour_pairs(chain, np.zeros(3, np.int32), centroid[None, :], 0.8)
    assert greedy(3, pairs, order).tolist() == [-1, 0, -1]


def test_easy_keeps_the_row_nearest_to_the_centroid() -> None:
    rows, centroid = directions(0, 10, 20), directions(0)[0]
    assert semdedup(rows, centroid, 0.2, keep="hard").tolist() == [2, 2, -1]
    assert semdedup(rows, centroid, 0.2, keep="easy").tolist() == [-1, 0, 0]


@pytest.mark.parametrize("order", [[0, 1], [0, 0, 1], [0, 1, 3]])
def test_order_must_be_a_permutation(order: list[int]) -> None:
    with pytest.raises(ValueError, match="permutation"):
        greedy(3, np.array([[0, 1]]), np.array(order))
