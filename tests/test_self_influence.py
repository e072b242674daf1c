import numpy as np
import pytest
import torch
from torch import nn

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import TensorAdapter
from hf_forward_inf.baselines import TracIn
from tests import digits
from tests.line import assert_same_state, state


@pytest.mark.parametrize("mode", ["ascent", "descent", "symmetric"])
def test_it_is_the_diagonal_of_a_trace_over_the_rows_themselves(mode):
    network, rows = digits.perceptron(), digits.rows(90, 110)
    before = state(network)
    tracer = ForwardInf(adapter=TensorAdapter(network), ascent=AscentConfig(radius=0.2, mode=mode))
    found = tracer.self_influence(rows)
    np.testing.assert_allclose(found, np.diag(tracer.trace(rows, rows).scores), rtol=1e-4, atol=1e-6)
    assert_same_state(before, state(network))


def test_tracins_is_the_squared_norm_of_the_gradient():
    network, rows = digits.perceptron(), digits.rows(90, 96)
    found = TracIn(adapter=TensorAdapter(network)).self_influence(rows)
    for row, score in zip(rows, found, strict=True):
        loss = nn.functional.cross_entropy(network(torch.tensor([row["x"]])), torch.tensor([row["label"]]))
        gradient = torch.autograd.grad(loss, list(network.parameters()))
        assert score == pytest.approx(sum(g.square().sum().item() for g in gradient), rel=1e-4)
    with pytest.raises(ValueError, match="cosine of an example with itself is 1"):
        TracIn(adapter=TensorAdapter(network), similarity="cosine").self_influence(rows)
