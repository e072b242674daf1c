import numpy as np
import pytest

from hf_forward_inf.scores.corrections import correct_hubs


def test_scores_are_divided_by_the_references_mean_without_the_highest():
    references = np.array([[1.0, 0.0], [3.0, 0.0], [100.0, 4.0]])
    # Highest left out: hubs 2 and 0, floor 1.
    np.testing.assert_allclose(correct_hubs(np.array([[6.0, 2.0]]), references), [[2.0, 2.0]])


def test_what_lowers_losses_is_no_hub_and_nan_references_count_as_zero():
    references = np.array([[-5.0, 2.0], [-5.0, np.nan], [-5.0, 2.0]])
    # Hubs 0 and 1, floor .5.
    np.testing.assert_allclose(correct_hubs(np.array([[1.0, 3.0]]), references), [[2.0, 2.0]])


def test_one_reference_is_not_enough():
    with pytest.raises(ValueError, match="at least 2"):
        correct_hubs(np.ones((1, 2)), np.ones((1, 2)))
