import numpy as np
import pytest
import torch
from torch import nn

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import ImageClassificationAdapter, TensorAdapter
from hf_forward_inf.baselines import FirstOrder, TracIn
from hf_forward_inf.toys.networks import ResNet
from tests.helpers import digits
from tests.helpers.images import processor, vision_transformer
from tests.helpers.images import rows as pictures
from tests.helpers.line import assert_same_state, state


@pytest.mark.parametrize("mode", ["ascent", "descent", "symmetric"])
def test_it_is_the_diagonal_of_a_trace_over_the_rows_themselves(mode):
    network, rows = digits.perceptron(), digits.rows(90, 110)
    before = state(network)
    tracer = ForwardInf(
        adapter=TensorAdapter(network), ascent=AscentConfig(direction="gradient", radius=0.2, mode=mode)
    )
    found = tracer.self_influence(rows)
    np.testing.assert_allclose(found, np.diag(tracer.trace(rows, rows).scores), rtol=1e-4, atol=1e-6)
    assert_same_state(before, state(network))


@pytest.mark.parametrize(
    ("direction", "steps", "together"), [("gradient", 1, True), ("gradient", 2, False), ("kfac", 1, False)]
)
def test_a_single_step_along_the_gradient_is_taken_for_many_rows_at_once(direction, steps, together, monkeypatch):
    network, rows = digits.perceptron(), digits.rows(90, 130)
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    ascent = AscentConfig(radius=0.2, direction=direction, steps=steps)
    tracer = ForwardInf(adapter=TensorAdapter(network), ascent=ascent)
    found = tracer.self_influence(rows)
    assert (len(calls) == 2 * 2) == together  # forty rows in two batches, before and after the step
    np.testing.assert_allclose(found, np.diag(tracer.trace(rows, rows).scores), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("mode", ["ascent", "descent"])
def test_of_shifts_too_it_is_the_diagonal(mode, steps):
    network, rows = digits.perceptron(), digits.rows(90, 110)
    ascent = AscentConfig(radius=0.2, mode=mode, steps=steps)
    tracer = ForwardInf(adapter=TensorAdapter(network), ascent=ascent, measure="shift")
    found = tracer.self_influence(rows)
    np.testing.assert_allclose(found, np.diag(tracer.trace(rows, rows).scores), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("measure", "falls"), [("rise", 1), ("rise", 0.5), ("shift", 1)])
def test_the_best_are_sorted_by_score_over_self_influence(measure, falls):
    network, rows = digits.perceptron(), digits.rows(90, 130)
    # By itself: directions that share products depend on the rows that are traced together.
    ascent = AscentConfig(direction="cg", radius=0.2)
    tracer = ForwardInf(adapter=TensorAdapter(network), ascent=ascent, measure=measure, falls=falls)
    scores = tracer.trace(rows, rows).scores
    found = tracer.rerank(tracer.trace(rows.select(range(5)), rows), k=8)
    for i in range(5):
        best = np.argsort(-scores[i])[:8]
        shares = scores[i, best] / np.diag(scores)[best]
        np.testing.assert_array_equal(found.indices[i], best[np.argsort(-shares)])
        np.testing.assert_allclose(found.scores[i], np.sort(shares)[::-1], rtol=1e-3)
    assert found.config["reranked"]


def test_what_its_own_step_does_not_move_comes_last():
    network, rows = nn.Linear(64, 10, bias=False), digits.rows(0, 6)
    tracer = ForwardInf(adapter=TensorAdapter(network), ascent=AscentConfig(radius=0.2), measure="shift")
    still = rows.map(lambda row, i: {"x": [0.0] * 64 if i == 3 else row["x"]}, with_indices=True)
    found = tracer.rerank(tracer.trace(still.select([0]), still))
    assert found.indices[0, -1] == 3 and np.isnan(found.scores[0, -1])


@pytest.mark.parametrize("kind", ["resnet", "transformer", "from a value on"])
def test_images_are_scored_together_or_else_one_by_one(kind):
    class Deciding(nn.Module):
        """What it runs depends on a value, which torch.func can't batch."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3 * 8 * 8, 3)

        def forward(self, x):
            return self.linear(x.flatten(1)) if x.max() > 0.5 else self.linear(-x.flatten(1))

    torch.manual_seed(0)
    adapter = {
        "resnet": lambda: ImageClassificationAdapter(ResNet(blocks=1, width=4, classes=3), first="layer3"),
        "transformer": lambda: ImageClassificationAdapter(vision_transformer(), processor()),
        "from a value on": lambda: ImageClassificationAdapter(Deciding()),
    }[kind]()
    rows, tracer = pictures(5), ForwardInf(adapter=adapter, ascent=AscentConfig(direction="gradient", radius=0.2))
    found = tracer.self_influence(rows)
    np.testing.assert_allclose(found, np.diag(tracer.trace(rows, rows).scores), rtol=1e-3, atol=1e-5)


def test_a_row_without_a_gradient_has_no_score():
    network = nn.Linear(2, 2)
    with torch.no_grad():
        network.weight.zero_(), network.bias.copy_(torch.tensor([800.0, 0.0]))
    rows = digits.Dataset.from_dict({"x": [[1.0, 2.0], [1.0, 2.0]], "label": [0, 1]})
    found = ForwardInf(
        adapter=TensorAdapter(network), ascent=AscentConfig(direction="gradient", radius=0.1)
    ).self_influence(rows)
    assert np.isnan(found[0]) and found[1] > 0


def test_to_first_order_it_is_the_product_with_the_inverse_curvature():
    network, rows = digits.perceptron(), digits.rows(90, 110)
    for ascent in (AscentConfig(), AscentConfig(direction="ekfac"), AscentConfig(direction="cg")):
        attributor = FirstOrder(adapter=TensorAdapter(network), ascent=ascent)
        found = attributor.self_influence(rows)
        np.testing.assert_allclose(found, np.diag(attributor.trace(rows, rows).scores), rtol=1e-3)
        assert (found > 0).all()


def test_tracins_is_the_squared_norm_of_the_gradient():
    network, rows = digits.perceptron(), digits.rows(90, 96)
    found = TracIn(adapter=TensorAdapter(network)).self_influence(rows)
    for row, score in zip(rows, found, strict=True):
        loss = nn.functional.cross_entropy(network(torch.tensor([row["x"]])), torch.tensor([row["label"]]))
        gradient = torch.autograd.grad(loss, list(network.parameters()))
        assert score == pytest.approx(sum(g.square().sum().item() for g in gradient), rel=1e-4)
    with pytest.raises(ValueError, match="cosine of an example with itself is 1"):
        TracIn(adapter=TensorAdapter(network), similarity="cosine").self_influence(rows)


def test_scores_of_another_attributor_are_not_reranked():
    network, rows = digits.perceptron(), digits.rows(0, 12)
    tracer = ForwardInf(adapter=TensorAdapter(network), ascent=AscentConfig(direction="gradient", radius=0.2))
    other = tracer.with_options(ascent=AscentConfig(direction="gradient", radius=0.5))
    with pytest.raises(ValueError, match=r"not this attributor's own \(radius\): trace with it first"):
        tracer.rerank(other.trace(rows.select([0]), rows))
    with pytest.raises(ValueError, match="they are standardised"):
        tracer.rerank(tracer.trace(rows.select(range(3)), rows).standardised())
    found = tracer.trace(rows.select([0]), rows)
    with torch.no_grad():
        network[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"not this attributor's own \(fingerprint\)"):
        tracer.rerank(found)
