import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import TensorAdapter
from hf_forward_inf.adapters.labels import Numbers, OneClass, SeveralClasses
from hf_forward_inf.curvature.perturber import Perturber
from hf_forward_inf.curvature.trust import ROWS
from tests.helpers import digits

TRAINING = digits.rows(0, ROWS)  # as many as the divergence is measured on: all of them
QUERIES = digits.rows(100, 103)


def perturbed(network, **options):
    """The perturbed parameters of each query."""
    adapter = TensorAdapter(network)
    ascent = AscentConfig(modules=["all"], **options).completed(adapter.default_ascent)
    return Perturber(adapter, ascent, TRAINING).perturbation(adapter.encode(QUERIES[:])).thetas


def divergence(network, theta):
    """KL(before, after) on the training rows, written out."""
    x = torch.tensor(TRAINING["x"][:])
    before, after = network(x).softmax(-1), functional_call(network, theta, (x,)).softmax(-1)
    return (before * (before / after).log()).sum(-1).mean().item()


def change(network, theta):
    own = dict(network.named_parameters())
    return torch.cat([(theta[name] - own[name]).flatten() for name in own]).detach()


@pytest.mark.parametrize("direction", ["gradient", "kfac", "cg"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("mode", ["ascent", "descent"])
def test_every_query_moves_the_predictions_by_as_many_nats(direction, steps, mode):
    network = digits.perceptron()
    for trust in (1e-3, 3e-2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # factors of so few rows are singular
            thetas = perturbed(network, direction=direction, steps=steps, mode=mode, trust=trust)
        for theta in thetas:
            assert divergence(network, theta) == pytest.approx(trust, rel=0.2)


def test_one_step_keeps_its_direction_whatever_its_length():
    network = digits.perceptron()
    pairs = zip(
        perturbed(network, direction="gradient"), perturbed(network, direction="gradient", trust=0.01), strict=True
    )
    lengths = []
    for step, scaled in pairs:
        one, other = change(network, step), change(network, scaled)
        assert torch.cosine_similarity(one, other, dim=0) > 0.9999
        lengths.append((other.norm() / one.norm()).item())
    assert len({round(length, 3) for length in lengths}) == len(lengths)  # no radius would do for all


def test_where_the_search_begins_does_not_matter():
    network = digits.perceptron()
    far, near = (perturbed(network, direction="gradient", trust=0.01, radius=radius) for radius in (30.0, 1e-3))
    for one, other in zip(far, near, strict=True):
        assert change(network, one).norm() == pytest.approx(change(network, other).norm().item(), rel=0.1)


@pytest.mark.parametrize(("direction", "steps"), [("gradient", 1), ("kfac", 3)])
def test_low_rank_changes_are_scaled_too(direction, steps, model, tokenizer, queries, candidates, monkeypatch):
    monkeypatch.setattr("hf_forward_inf.ascent.parameters.SMALL", 0)
    ascent = AscentConfig(direction=direction, step="low_rank", steps=steps, trust=0.01)
    tracer = ForwardInf(model, tokenizer, ascent=ascent)
    perturber = tracer.perturber(candidates)
    encoded = tracer.adapter.encode(queries[:2])
    for theta in perturber.perturbation(encoded).thetas:
        assert perturber.length.divergence(theta) == pytest.approx(0.01, rel=0.2)
    assert tracer.trace(queries, candidates).config["trust"] == 0.01


def test_a_trust_that_cannot_be_reached_is_reported_once():
    class Flat(nn.Linear):
        def forward(self, x):
            return 0.01 * super().forward(x).tanh()  # its predictions can hardly move

    network = Flat(64, 10)
    with pytest.warns(UserWarning, match="can't be scaled to trust=5 nats") as caught:
        perturbed(network, direction="gradient", trust=5.0)
    assert len(caught) == 1


def test_trust_needs_training_data_and_excludes_a_learning_rate():
    adapter = TensorAdapter(digits.perceptron())
    with pytest.raises(ValueError, match="trust is measured on training data"):
        Perturber(adapter, AscentConfig(direction="gradient", trust=0.1).completed())
    with pytest.raises(ValueError, match="Give either a trust or a learning_rate"):
        AscentConfig(trust=0.1, learning_rate=0.1)


def test_divergences_are_those_of_the_predicted_distributions():
    before, after = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    kl = torch.distributions.kl_divergence
    categorical, bernoulli = torch.distributions.Categorical, torch.distributions.Bernoulli
    torch.testing.assert_close(
        OneClass(3, {}).divergence(before, after), kl(categorical(logits=before), categorical(logits=after))
    )
    torch.testing.assert_close(
        SeveralClasses(3, {}).divergence(before, after), kl(bernoulli(logits=before), bernoulli(logits=after)).mean(1)
    )
    # The loss, the mean squared error, is the negative log-likelihood of independent normals of variance count / 2.
    normals = [torch.distributions.Normal(mean, (3 / 2) ** 0.5) for mean in (before, after)]
    torch.testing.assert_close(Numbers(3).divergence(before, after), kl(*normals).sum(1))
