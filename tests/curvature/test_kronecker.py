"""Kronecker factors against explicit matrices and one backward pass an example."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_forward_inf.adapters import Seq2SeqAdapter, TensorAdapter
from hf_forward_inf.curvature.kronecker import KroneckerFit, damped_inverse
from hf_forward_inf.curvature.sample import Sample
from hf_forward_inf.utils.models import evaluating
from tests.helpers import digits
from tests.helpers.line import assert_same_state, state


@pytest.fixture
def always_the_likeliest(monkeypatch):
    """Nothing is drawn: the target is the likeliest one, so that other computations can be compared."""

    def slopes(self, outputs, generator):
        chances = outputs.softmax(-1)
        return chances - nn.functional.one_hot(outputs.argmax(-1), outputs.shape[-1])

    for kind in ("base.Adapter", "classification.ClassifierAdapter"):
        monkeypatch.setattr(f"hf_forward_inf.adapters.{kind}.sampled_output_gradients", slopes)
    monkeypatch.setattr("hf_forward_inf.curvature.kronecker.TARGETS", 1)


def gradients_of_likeliest(adapter, sample, names):
    """Each example's gradient, were the likeliest target the true one; and the uses of no layer at all."""
    found = []
    for i in range(len(sample)):
        batch = adapter.collate(sample.features[i : i + 1])
        outputs, _ = adapter.outputs_and_loss(adapter.model, batch)
        loss = nn.functional.cross_entropy(outputs, outputs.argmax(-1), reduction="sum")
        parameters = [adapter.model.get_parameter(name) for name in names]
        found.append(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    return {name: torch.stack([row[j] for row in found]) for j, name in enumerate(names)}


def fitted(network, examples=80, names=None):
    adapter = TensorAdapter(network)
    sample = Sample(adapter, digits.rows(0, examples), examples, 0)
    return adapter, sample, KroneckerFit(sample, names or [n for n, _ in network.named_parameters()], 0)


def test_factors_of_a_linear_layer_are_mean_outer_products_of_inputs_and_slopes(always_the_likeliest):
    network = digits.perceptron()
    _, sample, fit = fitted(network)
    before = state(network)
    factors = fit.factors()
    assert_same_state(before, state(network))
    x = sample.adapter.collate(sample.features[:])["input"]
    hidden = torch.cat([network[1](network[0](x)), torch.ones(80, 1)], dim=1)
    logits = network(x)
    slopes = logits.softmax(-1) - nn.functional.one_hot(logits.argmax(-1), 10)
    expected = torch.kron(slopes.T @ slopes / 80, hidden.T @ hidden / 80).detach()
    basis = torch.kron(factors["outputs/2.weight"], factors["inputs/2.weight"])
    found = basis @ torch.diag(factors["curvature/2.weight"].flatten()) @ basis.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [digits.perceptron, digits.convolutional])
def test_eigenvalues_of_ekfac_are_mean_squares_of_gradients_in_the_eigenvectors_basis(always_the_likeliest, network):
    adapter, sample, fit = fitted(network())
    factors = fit.factors()
    corrected = fit.corrected(factors)
    gradients = gradients_of_likeliest(adapter, sample, fit.names)
    assert {layer.weight for layer in fit.layers} == {n for n in fit.names if adapter.model.get_parameter(n).dim() > 1}
    for layer in fit.layers:
        matrices = torch.stack(
            [layer.matrix({name: values[i] for name, values in gradients.items()}) for i in range(80)]
        )
        turned = factors[f"outputs/{layer.weight}"].T @ matrices @ factors[f"inputs/{layer.weight}"]
        torch.testing.assert_close(
            corrected[f"curvature/{layer.weight}"], turned.square().mean(0), rtol=1e-3, atol=1e-7
        )


def test_the_rest_has_the_mean_squares_of_its_gradients(always_the_likeliest, monkeypatch):
    monkeypatch.setattr("hf_forward_inf.curvature.sample.MAX_BATCH_LENGTH", 1)  # batches of one: no cross terms
    adapter, sample, fit = fitted(digits.convolutional(), examples=50)
    assert fit.rest == ["4.weight", "4.bias"]  # the normalisation
    factors = fit.factors()
    gradients = gradients_of_likeliest(adapter, sample, fit.rest)
    for name in fit.rest:
        torch.testing.assert_close(factors[f"diagonal/{name}"], gradients[name].square().mean(0), rtol=1e-4, atol=1e-8)


def test_drawn_slopes_have_mean_zero_and_the_covariance_of_the_losss_hessian():
    logits = torch.tensor([[1.0, 0.0, -0.5]])
    drawn = digits_slopes(logits.expand(200_000, 3))
    p = logits[0].softmax(-1)
    torch.testing.assert_close(drawn.mean(0), torch.zeros(3), atol=5e-3, rtol=0)
    hessian = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), hessian, atol=5e-3, rtol=0)


def digits_slopes(outputs):
    return TensorAdapter(digits.perceptron()).sampled_output_gradients(outputs, torch.Generator().manual_seed(0))


def test_padding_is_in_no_factor(always_the_likeliest, model, tokenizer, candidates, monkeypatch):
    adapter = Seq2SeqAdapter(model, tokenizer)
    names = [name for name, _ in model.named_parameters()]
    kept = []
    with evaluating(model):
        for length in (10**6, 1):
            monkeypatch.setattr("hf_forward_inf.curvature.sample.MAX_BATCH_LENGTH", length)
            kept.append(KroneckerFit(Sample(adapter, candidates, 12, 0), names, 0).factors())
    for name in kept[0]:
        if name.startswith("curvature/"):
            torch.testing.assert_close(kept[0][name], kept[1][name], rtol=2e-3, atol=1e-5)


def test_a_weight_that_layers_share_has_a_diagonal(model, tokenizer, candidates):
    sample = Sample(Seq2SeqAdapter(model, tokenizer), candidates, 12, 0)
    fit = KroneckerFit(sample, [name for name, _ in model.named_parameters()], 0)
    assert "shared.weight" in fit.rest
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in fit.rest
    assert len(fit.layers) == 2 * (4 + 3) + 2 * (4 + 4 + 3)  # attention and gated feed-forward of both stacks


@pytest.mark.parametrize("network", [digits.perceptron, digits.convolutional])
def test_the_inverse_is_that_of_the_matrix_written_out(network):
    adapter, _, fit = fitted(network())
    factors = fit.factors()
    own = dict(adapter.model.named_parameters())
    vector = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(own.values())]
    found = dict(zip(own, damped_inverse(vector, fit.layers, fit.names, factors, damping=0.5), strict=True))
    given = dict(zip(own, vector, strict=True))
    blocks = []
    for layer in fit.layers:
        basis = torch.kron(factors[f"outputs/{layer.weight}"], factors[f"inputs/{layer.weight}"])
        block = basis @ torch.diag(factors[f"curvature/{layer.weight}"].flatten()) @ basis.T
        blocks.append((block, layer.matrix(given).flatten(), layer.matrix(found).flatten()))
    for name in fit.rest:
        blocks.append(
            (torch.diag(factors[f"diagonal/{name}"].flatten()), given[name].flatten(), found[name].flatten())
        )
    curved, squared = (sum(one) for one in zip(*((v @ c @ v, v @ v) for c, v, _ in blocks), strict=True))
    for block, v, x in blocks:
        expected = torch.linalg.solve(block + 0.5 * curved / squared * torch.eye(len(v)), v)
        np.testing.assert_allclose(x, expected, rtol=2e-3, atol=2e-3 * expected.abs().max())


def test_too_small_a_sample_is_told():
    _, _, fit = fitted(digits.perceptron(), examples=30)
    with pytest.warns(UserWarning, match=r"30 examples \(30 positions\) are too few .* 0.weight .* Raise sample"):
        fit.factors()
