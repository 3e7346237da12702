import numpy as np
import pytest

from experts.scores import ranked, softmax


def test_softmax_is_a_distribution() -> None:
    scores = softmax(np.array([[1000, 0, -1000], [1, 1, 1]], np.float32))
    np.testing.assert_allclose(scores, [[1, 0, 0], [1 / 3] * 3], atol=1e-6)
    assert scores.dtype == np.float32


def test_labels_that_reach_their_floors_best_first() -> None:
    scores = np.array([0.2, 0.5, 0.2, 0.9], np.float32)
    assert [t.label for t in ranked("abcd", scores, 9)] == ["d", "b", "a", "c"]
    assert [t.label for t in ranked("abcd", scores, 9, 0.5)] == ["d", "b"]
    floors = np.array([0.1, 0.6, 0.3, 0])
    assert [t.label for t in ranked("abcd", scores, 9, floors)] == ["d", "a"]
    assert [t.label for t in ranked("abcd", scores, 1)] == ["d"]


def test_what_is_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="not_finite"):
        ranked("ab", np.array([0.5, np.nan], np.float32), 2)
