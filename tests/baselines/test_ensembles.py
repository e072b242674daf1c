import copy
import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from hf_forward_inf import AscentConfig, Attribution, ForwardInf
from hf_forward_inf.adapters import Seq2SeqAdapter
from hf_forward_inf.baselines import BM25, Difference, Ensemble, Fusion
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


@pytest.fixture
def pair(model, tokenizer):
    """Tracers of two models of the same architecture, along the gradient."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight += 0.1 * torch.randn(
            other.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    ascent = AscentConfig(direction="gradient")
    return [ForwardInf(one, tokenizer, ascent=ascent, strategy="full") for one in (model, other)]


def test_a_difference_is_that_of_two_traces(pair, queries, candidates):
    one, other = (tracer.trace(queries, candidates).scores for tracer in pair)
    found = Difference(*pair).trace(queries, candidates)
    np.testing.assert_allclose(found.scores, one - other, atol=1e-5)
    assert np.abs(one - other).max() > 0.1
    assert found.stage is None
    assert found.method == "forward_inf_less_baseline"
    option = pair[0].with_options(baseline_model=pair[1].adapter.model)
    np.testing.assert_array_equal(option.trace(queries, candidates).scores, found.scores)
    best = option.trace(queries, candidates, top_k=3)
    assert best.indices[0].tolist() == np.argsort(-found.scores[0])[:3].tolist()
    assert option.trace(queries, candidates).config == found.config


@pytest.mark.parametrize("how", [{"strategy": "screen", "screen": "bm25", "audit": 4}, {"strategy": "full"}])
def test_a_baseline_scores_what_was_screened(pair, queries, candidates, how):
    one, other = (tracer.trace(queries, candidates).scores for tracer in pair)
    screened = pair[0].with_options(keep=10, **how)
    computed = screened.trace(queries, candidates).stage
    assert 10 <= computed.sum(axis=1).min() <= computed.sum(axis=1).max() < 16
    for method in (Difference(screened, pair[1]), screened.with_options(baseline_model=pair[1].adapter.model)):
        found = method.trace(queries, candidates)
        np.testing.assert_array_equal(found.stage, computed)
        expected = np.where(computed, one - other, np.inf)
        expected = np.where(computed, expected, expected.min(axis=1, keepdims=True))
        np.testing.assert_allclose(found.scores, expected, atol=1e-4)


def test_a_difference_says_which_model_it_subtracted(pair, queries, candidates, tmp_path):
    found = Difference(*pair).trace(queries, candidates, top_k=2)
    found.save_to_disk(tmp_path / "found")
    config = Attribution.load_from_disk(tmp_path / "found").config
    assert config["baseline"]["direction"] == config["attributor"]["direction"] == "gradient"
    reversed_config = Difference(*reversed(pair)).config
    assert config["baseline"]["model"] != reversed_config["baseline"]["model"]


def test_what_a_baseline_cannot_do_is_refused(pair, tokenizer, queries, candidates, model):
    with pytest.raises(ValueError, match="don't read rows in the same way"):
        Difference(pair[0], ForwardInf(adapter=Seq2SeqAdapter(model, tokenizer, max_length=12)))
    small = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="not of the same architecture: shared"):
        pair[0].with_options(baseline_model=small)
    tracer = pair[0].with_options(baseline_model=pair[1].adapter.model)
    with pytest.raises(ValueError, match="time_budget= does not work with baseline_model="):
        tracer.trace(queries, candidates, time_budget=1)
    with pytest.raises(TypeError, match="baseline_model= is subtracted by trace"):
        tracer.trace_stream(queries, candidates.to_iterable_dataset())
    with pytest.raises(TypeError, match="baseline_model= is subtracted by trace"):
        tracer.plan(queries, candidates)
    missing = Fixed([4, 3, 2, 1])
    partly = missing.trace(QUERY, ROWS)
    missing.trace = lambda *args: dataclasses.replace(partly, stage=np.array([[True, False, True, True]]))
    with pytest.raises(ValueError, match="has no scores for some candidates"):
        Difference(Fixed([1, 2, 3, 4]), missing).trace(QUERY, ROWS)
