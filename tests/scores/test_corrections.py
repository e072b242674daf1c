import numpy as np
import pytest

from hf_forward_inf.scores.corrections import standardised

SCORES = np.array([[1.0, 4.0, np.nan], [3.0, 4.0, 2.0], [8.0, 7.0, 6.0]])


def test_scores_are_relative_to_those_of_the_other_queries():
    found = standardised(SCORES)
    np.testing.assert_allclose(found[:, 0], (SCORES[:, 0] - 4) / np.std([1, 3, 8]), rtol=1e-6)
    np.testing.assert_allclose(found[:, 2], [np.nan, -1, 1])
    np.testing.assert_allclose(standardised(SCORES, 2.0)[:, 1], [-0.5, -0.5, 1])


def test_two_queries_need_a_deviation():
    with pytest.raises(ValueError, match="at least 3 of them, not 2"):
        standardised(SCORES[:2])
    np.testing.assert_allclose(standardised(SCORES[:2], 1.0)[:, 0], [-1, 1])
