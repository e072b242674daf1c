"""Kronecker factors against explicit matrices and one backward pass an example."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_forward_inf.adapters import CausalLMAdapter, Seq2SeqAdapter, TensorAdapter
from hf_forward_inf.ascent.low_rank import LowRank
from hf_forward_inf.ascent.slopes import length_of
from hf_forward_inf.curvature.inverse import damped_inverse, factored_inverse
from hf_forward_inf.curvature.kronecker import KroneckerFit
from hf_forward_inf.curvature.sample import Sample
from hf_forward_inf.curvature.sides import Side, Sketch, Whole
from hf_forward_inf.utils.models import evaluating
from tests.helpers import digits
from tests.helpers.causal import questions, train_tokens, untrained
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


@pytest.fixture(scope="module")
def tokens():
    return train_tokens()


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


def written_out(factors, name):
    """A factor as a matrix: of `inputs/<weight>` or `outputs/<weight>`."""
    side = Side.read(factors, name)
    if side.vectors is None:
        return torch.diag(side.values)
    known = side.vectors @ torch.diag(side.values) @ side.vectors.T
    return known + side.rest * (torch.eye(len(side.vectors)) - side.vectors @ side.vectors.T)


def block(layer, factors):
    """A layer's curvature as a matrix."""
    return torch.kron(written_out(factors, f"outputs/{layer.weight}"), written_out(factors, f"inputs/{layer.inputs}"))


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
    torch.testing.assert_close(block(fit.layers[1], factors), expected, rtol=1e-4, atol=1e-5)


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
        outer, inner = (factors[f"{side}/{layer.weight}/vectors"] for side in ("outputs", "inputs"))
        turned = outer.T @ matrices @ inner
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
        if name.endswith("/values"):
            torch.testing.assert_close(kept[0][name], kept[1][name], rtol=2e-3, atol=1e-5)


def test_an_embedding_has_a_curvature_by_row_and_the_output_layer_tied_to_it_its_factors(tokens):
    network = untrained("qwen2, tied", len(tokens))
    adapter, rows = CausalLMAdapter(network, tokens), questions()
    names = [name for name, _ in network.named_parameters()]
    fit = KroneckerFit(Sample(adapter, rows, 5, 0), names, 0)
    factors = fit.factors()
    embedding = "model.embed_tokens.weight"
    (tied,) = [layer for layer in fit.layers if layer.is_tied]
    assert tied.weight == embedding
    assert tied.shape == (len(tokens), 32)
    read = {token for row in adapter.encode(rows[:])["input_ids"] for token in row}
    assert set(factors[f"ids/{embedding}"].tolist()) <= read
    assert (factors[f"rows/{embedding}"] >= 0).all()
    assert embedding not in fit.rest


def test_a_weight_of_both_stacks_is_an_embedding_alone(model, tokenizer, candidates):
    sample = Sample(Seq2SeqAdapter(model, tokenizer), candidates, 12, 0)
    fit = KroneckerFit(sample, [name for name, _ in model.named_parameters()], 0)
    assert "shared.weight" in fit.embeddings
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in fit.embeddings
    layers = [layer for layer in fit.layers if not layer.is_tied]
    assert len(layers) == 2 * (4 + 3) + 2 * (4 + 4 + 3)  # attention and gated feed-forward of both stacks


def test_layers_that_read_the_same_inputs_share_a_factor(tokens):
    network = untrained("llama", len(tokens))
    adapter = CausalLMAdapter(network, tokens)
    fit = KroneckerFit(Sample(adapter, questions(), 5, 0), [name for name, _ in network.named_parameters()], 0)
    readers = {layer.weight.removeprefix("model.layers.1."): layer.inputs for layer in fit.layers}
    assert (
        readers["self_attn.q_proj.weight"] == readers["self_attn.k_proj.weight"] == readers["self_attn.v_proj.weight"]
    )
    assert readers["mlp.gate_proj.weight"] == readers["mlp.up_proj.weight"]
    assert len(set(readers.values())) == 2 * 4 + 1
    factors = fit.factors()
    assert sum(name.startswith("inputs/") and name.endswith("/values") for name in factors) == 2 * 4 + 1


@pytest.mark.parametrize("network", [digits.perceptron, digits.convolutional])
@pytest.mark.parametrize("rank", [None, 4])
def test_the_joint_inverse_is_that_of_the_matrix_written_out(network, rank, monkeypatch):
    adapter, _, fit = fitted(network())
    fit.rank = rank or fit.rank
    factors = fit.factors()
    own = dict(adapter.model.named_parameters())
    vector = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(own.values())]
    found = dict(zip(own, damped_inverse(vector, fit.layers, fit.names, factors, damping=0.5), strict=True))
    given = dict(zip(own, vector, strict=True))
    blocks = [
        (block(layer, factors), layer.matrix(given).flatten(), layer.matrix(found).flatten()) for layer in fit.layers
    ]
    for name in fit.rest:
        blocks.append(
            (torch.diag(factors[f"diagonal/{name}"].flatten()), given[name].flatten(), found[name].flatten())
        )
    curved, squared = (sum(one) for one in zip(*((v @ c @ v, v @ v) for c, v, _ in blocks), strict=True))
    for c, v, x in blocks:
        expected = torch.linalg.solve(c + 0.5 * curved / squared * torch.eye(len(v)), v)
        np.testing.assert_allclose(x, expected, rtol=2e-3, atol=2e-3 * expected.abs().max())


@pytest.mark.parametrize("rank", [None, 4])
def test_the_factored_inverse_is_that_of_both_factors_written_out(rank):
    adapter, _, fit = fitted(digits.convolutional())
    fit.rank = rank or fit.rank
    factors = fit.factors()
    draw = torch.Generator().manual_seed(0)
    own, gradient = dict(adapter.model.named_parameters()), {}
    for name, p in own.items():
        gradient[name] = torch.randn(p.shape, generator=draw)
        if p.dim() > 1:
            height, width = p.flatten(1).shape
            gradient[name] = LowRank(torch.randn(2, width, generator=draw), torch.randn(height, 2, generator=draw))
    dense = {name: g.dense().view(own[name].shape) if isinstance(g, LowRank) else g for name, g in gradient.items()}
    found = factored_inverse(gradient, fit.layers, factors, damping=0.5)
    curved = squared = 0.0
    for layer in fit.layers:
        v = layer.matrix(dense).flatten()
        curved, squared = curved + v @ block(layer, factors) @ v, squared + v @ v
    for name in fit.rest:
        curved += (factors[f"diagonal/{name}"] * dense[name].square()).sum()
        squared += dense[name].square().sum()
    shift = 0.5 * curved / squared
    for layer in fit.layers:
        a, b = written_out(factors, f"inputs/{layer.inputs}"), written_out(factors, f"outputs/{layer.weight}")
        pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
        a, b = a + pi * shift.sqrt() * torch.eye(len(a)), b + shift.sqrt() / pi * torch.eye(len(b))
        expected = torch.linalg.solve(b, layer.matrix(dense)) @ torch.linalg.inv(a)
        change = found[layer.weight]
        assert len(change.down) <= 3
        np.testing.assert_allclose(
            change.dense(), expected[:, : change.shape[1]], rtol=5e-3, atol=5e-3 * expected.abs().max()
        )
        if layer.bias is not None:
            np.testing.assert_allclose(found[layer.bias], expected[:, -1], rtol=5e-3, atol=5e-3 * expected.abs().max())
    for name in fit.rest:
        expected = dense[name] / (factors[f"diagonal/{name}"].sqrt() + shift.sqrt()).square()
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-6)


def test_a_weight_tied_to_an_embedding_moves_by_the_curvature_of_both_parts(tokens):
    network = untrained("qwen2, tied", len(tokens))
    adapter = CausalLMAdapter(network, tokens)
    fit = KroneckerFit(Sample(adapter, questions(), 5, 0), ["model.embed_tokens.weight"], 0)
    factors, name = fit.factors(), "model.embed_tokens.weight"
    ids = factors[f"ids/{name}"][:2].clone()
    unread = next(i for i in range(len(tokens)) if i not in factors[f"ids/{name}"])
    ids = torch.sort(torch.cat([ids, torch.tensor([unread])]))[0]
    draw = torch.Generator().manual_seed(0)
    parts = torch.randn(1, 32, generator=draw), torch.randn(len(tokens), 1, generator=draw)
    output, rows = LowRank(*parts), torch.randn(3, 32, generator=draw)
    change = LowRank(*parts, ids, rows)
    found = factored_inverse({name: change}, fit.layers, factors, 0.1)[name]
    a, b = (written_out(factors, f"{kind}/{name}") for kind in ("inputs", "outputs"))
    known = torch.zeros(len(tokens), 32)
    known[factors[f"ids/{name}"]] = factors[f"rows/{name}"]
    whole = output.dense()
    curved = ((b @ whole @ a) * whole).sum() + (known[ids] * rows.square()).sum()
    shift = 0.1 * curved / (whole.square().sum() + rows.square().sum())
    pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
    inner = torch.linalg.inv(a + pi * shift.sqrt() * torch.eye(len(a)))
    expected = torch.linalg.solve(b + shift.sqrt() / pi * torch.eye(len(b)), whole) @ inner
    expected[ids] += rows / (known[ids].sqrt() + shift.sqrt()).square()
    np.testing.assert_allclose(found.dense(), expected, rtol=5e-3, atol=5e-3 * expected.abs().max())


def test_large_damping_leaves_the_gradient_whatever_is_factored():
    adapter, _, fit = fitted(digits.convolutional())
    factors, draw = fit.factors(), torch.Generator().manual_seed(0)
    gradient = {name: torch.randn(p.shape, generator=draw) for name, p in adapter.model.named_parameters()}
    gradient = {
        name: LowRank(torch.eye(g[0].numel()), g.flatten(1)) if g.dim() > 1 else g for name, g in gradient.items()
    }
    found = factored_inverse(gradient, fit.layers, factors, damping=1e9)
    lengths = [length_of(one) for one in (found, gradient)]
    for name, g in gradient.items():
        both = [(one.dense() if isinstance(one, LowRank) else one) for one in (found[name], g)]
        torch.testing.assert_close(both[0] / lengths[0], both[1] / lengths[1], rtol=1e-2, atol=1e-5)


def test_a_sketch_has_the_largest_eigenpairs_and_the_trace():
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(60, 60, generator=draw))[0]
    vectors = torch.randn(500, 60, generator=draw) * torch.tensor([10.0, 5, 3, 2] + [0.01] * 56) @ basis.T
    whole, sketch = Whole(60, torch.device("cpu")), Sketch(torch.randn(60, 12, generator=draw))
    for part in vectors.split(100):
        whole.add(part)
        sketch.add(part)
    exact, found = whole.side(500), sketch.side(500)
    expected = torch.linalg.eigvalsh(vectors.T.double() @ vectors.double() / 500)
    torch.testing.assert_close(exact.values.double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.values[-4:].double(), expected[-4:], rtol=1e-3, atol=1e-3)
    assert found.mean == pytest.approx(expected.mean().item(), rel=1e-3)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(found.vectors.shape[1]), rtol=0, atol=1e-3)
    given = vectors[:3]
    torch.testing.assert_close(found.solve(given, 0.5), exact.solve(given, 0.5), rtol=1e-2, atol=1e-2)


def test_memory_decides_how_many_eigenpairs_are_stored(monkeypatch):
    monkeypatch.setattr("hf_forward_inf.curvature.kronecker.LEAST_MEMORY", 0)
    network = digits.perceptron()  # 64 inputs and a bias
    adapter = TensorAdapter(network)
    sample, names = Sample(adapter, digits.rows(0, 80), 80, 0), [name for name, _ in network.named_parameters()]
    size = 4 * sum(p.numel() for p in network.parameters())
    for memory in (None, 0.5, 10.0):
        factors = KroneckerFit(sample, names, 0, memory).factors()
        held = 4 * sum(value.numel() for name, value in factors.items() if name.endswith("vectors"))
        assert held <= (0.25 if memory is None else memory) * size
    assert factors["inputs/0.weight/vectors"].shape == (65, 65)
    with pytest.raises(
        ValueError, match=r"memory=0.001 is .* [kM]?B, and a single eigenpair .* give at least memory=0\.\d+"
    ):
        KroneckerFit(sample, names, 0, 0.001)


def test_too_small_a_sample_is_reported():
    _, _, fit = fitted(digits.perceptron(), examples=30)
    with pytest.warns(UserWarning, match=r"30 examples \(30 positions\) are too few .* 0.weight .* Raise sample"):
        fit.factors()
