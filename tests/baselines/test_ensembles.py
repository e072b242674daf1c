from dataclasses import dataclass

import numpy as np
import pytest

from hf_forward_inf import Attribution, ForwardInf
from hf_forward_inf.baselines import BM25, Ensemble, Fusion
from tests.helpers.line import points


@dataclass
class Fixed:
    """Gives the scores that it holds, by the rows' y."""

    scores: list
    name: str = "fixed"

    @property
    def config(self):
        return {"scores": self.scores}

    def trace(self, queries, candidates, top_k=None):
        rows = [int(y) for y in candidates["y"]]
        scores = np.array([[self.scores[row] for row in rows]] * len(queries), dtype=np.float32)
        return Attribution(scores, queries, candidates).keep(top_k)


ROWS = points(*(((0, 0), y) for y in range(4)))
QUERY = points(((0, 0), 0))


def test_reciprocal_ranks_are_added_and_ties_share_their_mean_rank():
    found = Fusion([Fixed([4, 3, 2, 1]), Fixed([1, 5, 5, np.nan])], k=60).trace(QUERY, ROWS)
    expected = [1 / 61 + 1 / 63, 1 / 62 + 1 / 61.5, 1 / 63 + 1 / 61.5, 1 / 64 + 1 / 64]
    np.testing.assert_allclose(found.scores[0], expected, rtol=1e-6)
    assert found.ranking(0).tolist() == [1, 0, 2, 3]


def test_an_ensemble_is_the_mean_of_scores():
    found = Ensemble([Fixed([4, 3, 2, 1]), Fixed([10, 50, 50, np.nan])]).trace(QUERY, ROWS)
    np.testing.assert_allclose(found.scores[0], [7, 26.5, 26, np.nan])
    assert found.method == "mean(fixed)"


def test_standardised_scores_weigh_the_same_whatever_their_unit():
    one, other = Fixed([4, 3, 2, 1]), Fixed([0, 2, 1, 3])
    expected = Ensemble([one, other], standardise=True).trace(QUERY, ROWS).scores
    scaled = Ensemble([one, Fixed([0, 200, 100, 300])], standardise=True).trace(QUERY, ROWS).scores
    np.testing.assert_allclose(scaled, expected, rtol=1e-6)
    constant = Ensemble([one, Fixed([2, 2, 2, 2])], standardise=True).trace(QUERY, ROWS)
    assert constant.ranking(0).tolist() == [0, 1, 2, 3]


def test_weights_say_how_much_each_counts():
    one, other = [4.0, 3, 2, 1], [10.0, 50, 40, 20]
    found = Ensemble([Fixed(one), Fixed(other)], standardise=True, weights=[1, 0.25]).trace(QUERY, ROWS)
    expected = (np.array(one) / np.std(one) + 0.25 * np.array(other) / np.std(other)) / 1.25
    np.testing.assert_allclose(found.scores[0], expected, rtol=1e-6)
    assert found.config["weights"] == [0.8, 0.2]
    for weights in ([1.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match="must be one number for each of the 2 attributors"):
            Ensemble([Fixed(one), Fixed(other)], weights=weights)


def test_an_ensemble_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one attributor"):
        Ensemble([])


def test_bm25_and_forward_inf_join_in_a_line(model, tokenizer, queries, candidates):
    found = Fusion([BM25(), ForwardInf(model, tokenizer)]).trace(queries, candidates, top_k=3)
    assert found.scores.shape == (len(queries), 3)
    assert "bm25" in found.method
    assert "forward_inf" in found.method


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="at least one attributor"):
        Fusion([])
