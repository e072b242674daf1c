import numpy as np
import pytest
import torch

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import TensorAdapter
from hf_forward_inf.scores.corrections import standardised
from tests.helpers import digits
from tests.helpers.line import assert_same_state, state


def tracer_of(network, **ascent):
    return ForwardInf(adapter=TensorAdapter(network), ascent=AscentConfig(**ascent))


def test_by_a_small_radius_it_is_the_length_of_the_rows_gradient():
    network, rows = digits.perceptron(), digits.rows(90, 110)
    before = state(network)
    count = sum(p.numel() for p in network.parameters())
    found = tracer_of(network, radius=1e-3).sensitivity(rows, draws=400)
    for row, value in zip(rows, found, strict=True):
        batch = TensorAdapter(network)
        loss = batch.loss(network, batch.collate(batch.encode({name: [row[name]] for name in rows.column_names})))
        gradient = torch.autograd.grad(loss.sum(), list(network.parameters()))
        length = torch.cat([g.flatten() for g in gradient]).norm().item()
        # A unit vector drawn from all alike has a share of 1 / count of its square along any direction.
        assert value == pytest.approx(1e-3 * length / count**0.5, rel=0.15)
    assert_same_state(before, state(network))


def test_each_draw_is_the_same_whatever_the_blocks(monkeypatch):
    network, rows = digits.perceptron(), digits.rows(90, 100)
    tracer = tracer_of(network, radius=0.1)
    whole = tracer.sensitivity(rows, draws=5)
    monkeypatch.setattr("hf_forward_inf.passes.sensitivity.copies_in_memory", lambda *_: 2)
    np.testing.assert_array_equal(tracer.with_options(cache_dir=None).sensitivity(rows, draws=5), whole)
    assert (tracer_of(network, radius=0.1, seed=1).sensitivity(rows, draws=5) != whole).all()


def test_steps_without_a_radius_are_refused():
    with pytest.raises(ValueError, match="needs a radius"):
        tracer_of(digits.perceptron(), learning_rate=0.1).sensitivity(digits.rows(90, 92))
    with pytest.raises(ValueError, match="draws=0"):
        tracer_of(digits.perceptron(), radius=0.1).sensitivity(digits.rows(90, 92), draws=0)


def test_scores_are_divided_by_it_on_request():
    network, rows = digits.perceptron(), digits.rows(90, 100)
    tracer = tracer_of(network, radius=0.1)
    plain, found = (
        one.trace(rows.select(range(3)), rows) for one in (tracer, tracer.with_options(units="sensitivity"))
    )
    np.testing.assert_allclose(found.scores, plain.scores / tracer.sensitivity(rows), rtol=1e-5)
    assert (plain.config["units"], found.config["units"]) == ("loss", "sensitivity")
    np.testing.assert_allclose(found.standardised().scores, found.scores - found.scores.mean(axis=0), atol=1e-5)
    with pytest.raises(ValueError, match="units='loss'"):
        tracer.rerank(found)
    with pytest.raises(ValueError, match="units='nats'"):
        ForwardInf(adapter=TensorAdapter(network), units="nats")


def test_standardised_scores_take_a_given_deviation():
    scores = np.array([[4.0, 1.0], [2.0, 5.0]], dtype=np.float32)
    np.testing.assert_allclose(standardised(scores, np.array([0.5, 2.0])), [[2.0, -1.0], [-2.0, 1.0]])
    with pytest.raises(ValueError, match="at least 2"):
        standardised(scores[:1], np.ones(2))
    with pytest.raises(ValueError, match="at least 3"):
        standardised(scores)
