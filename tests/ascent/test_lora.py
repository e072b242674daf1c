import copy

import numpy as np
import pytest
import torch

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import CausalLMAdapter, Seq2SeqAdapter
from hf_forward_inf.ascent.lora import LowRank, added, slopes
from hf_forward_inf.ascent.parameters import names_for
from hf_forward_inf.ascent.steps import ascend
from hf_forward_inf.utils.models import linear_layers
from tests.helpers.causal import questions, train_tokens, untrained
from tests.helpers.line import assert_same_state, state


@pytest.fixture(scope="module")
def tokens():
    return train_tokens()


@pytest.fixture(params=["llama", "gpt2"])
def network(request, tokens):
    return untrained(request.param, len(tokens))


@pytest.fixture
def adapter(network, tokens):
    return CausalLMAdapter(network, tokens)


@pytest.fixture(scope="module")
def rows():
    return questions()


def drawn(rank, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, 7, generator=draw), torch.randn(5, rank, generator=draw))


def test_a_changes_norm_is_that_of_the_product():
    change = drawn(3)
    assert change.norm() == pytest.approx((change.up @ change.down).norm().item(), rel=1e-5)


def test_changes_add_up_and_stretch_as_matrices_do():
    both = drawn(2) + drawn(3, seed=1) * -2.0
    expected = drawn(2).up @ drawn(2).down - 2 * drawn(3, seed=1).up @ drawn(3, seed=1).down
    torch.testing.assert_close(both.up @ both.down, expected)


def test_a_truncated_change_is_the_nearest_of_its_rank_and_tells_what_is_lost():
    change = drawn(4)
    whole = change.up @ change.down
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    near, lost = change.truncated(2)
    torch.testing.assert_close(near.up @ near.down, u[:, :2] * s[:2] @ v[:2])
    assert lost == pytest.approx((s[2:].square().sum() / s.square().sum()).item(), rel=1e-4)


def test_no_higher_rank_is_taken_than_is_needed():
    twice, lost = (drawn(2) + drawn(2) * 0.5).truncated(5)
    assert len(twice.down) == 2
    assert lost < 1e-10
    torch.testing.assert_close(twice.up @ twice.down, 1.5 * drawn(2).up @ drawn(2).down)


def test_slopes_are_the_weights_gradients(adapter, rows):
    batch = adapter.collate(adapter.encode(rows[:2]))
    names = list(linear_layers(adapter.model))
    found = slopes(adapter.model, names, lambda: adapter.loss(adapter.model, batch).sum())
    adapter.loss(adapter.model, batch).sum().backward()
    for name in found.keys() - {"lm_head.weight"}:  # of a tied one, half of the gradient is the embedding's
        change = found[name].up @ found[name].down
        gradient = adapter.model.get_parameter(name).grad
        torch.testing.assert_close(change.T if "c_" in name else change, gradient, rtol=1e-4, atol=1e-6)


def test_an_added_change_is_a_change_of_the_weight(adapter, rows):
    batch = adapter.collate(adapter.encode(rows[:]))
    name = next(name for name in linear_layers(adapter.model) if ".1." in name)
    weight = adapter.model.get_parameter(name)
    inputs, outputs = weight.shape if "c_" in name else weight.shape[::-1]
    change = LowRank(torch.randn(3, inputs), torch.randn(outputs, 3))
    with added(adapter.model, {name: change}), torch.no_grad():
        given = adapter.loss(adapter.model, batch)
    with torch.no_grad():
        weight += (change.up @ change.down).T if "c_" in name else change.up @ change.down
        torch.testing.assert_close(given, adapter.loss(adapter.model, batch))


@pytest.mark.parametrize("mode", ["ascent", "descent", "symmetric"])
def test_a_fresh_lora_gives_the_scores_of_changed_weights(mode, network, tokens, rows):
    before = state(network)
    through = ForwardInf(network, tokens, ascent=AscentConfig(mode=mode, lora_rank=64))
    weights = [name for name in linear_layers(network) if ".1." in name]  # the second half, and no output layer
    assert names_for(through.adapter, through.ascent) == weights
    whole = through.with_options(ascent=AscentConfig(direction="gradient", mode=mode, modules=weights))
    found = [tracer.trace(rows.select(range(2)), rows) for tracer in (through, whole)]
    np.testing.assert_allclose(*(one.scores for one in found), rtol=1e-3, atol=1e-4)
    both = zip((through, whole), found, strict=True)
    terms = [tracer.explain(one, k=2).details["term_scores"] for tracer, one in both]
    for one, other in zip(*terms, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-3)
    assert_same_state(before, state(network))


def test_its_steps_are_those_of_changed_weights(adapter, rows):
    encoded = adapter.encode(rows[:1])
    names = [name for name in linear_layers(adapter.model) if name != "lm_head.weight"]
    through = ascend(adapter, encoded, names, AscentConfig(steps=3, lora_rank=64).completed())
    whole = ascend(adapter, encoded, names, AscentConfig(direction="gradient", steps=3).completed())
    for name, change in through.items():
        moved = (whole[name] - adapter.model.get_parameter(name)).detach()
        product = change.up @ change.down
        torch.testing.assert_close(product.T if "c_" in name else product, moved, rtol=1e-3, atol=1e-5)


def test_a_low_rank_still_points_where_the_gradient_does(network, tokens, rows):
    tracers = [ForwardInf(network, tokens, ascent=AscentConfig(radius=0.1, lora_rank=rank)) for rank in (1, 64)]
    scores = [tracer.trace(rows.select([1]), rows).scores[0] for tracer in tracers]
    assert np.corrcoef(*scores)[0, 1] > 0.9


def test_a_seq2seq_models_decoder_gets_it(model, tokenizer, queries, candidates):
    tracer = ForwardInf(model, tokenizer, ascent=AscentConfig(lora_rank=64))
    names = names_for(tracer.adapter, tracer.ascent)
    assert all(name.startswith("decoder.") for name in names)
    found = tracer.trace(queries, candidates)
    whole = tracer.with_options(ascent=AscentConfig(direction="gradient", modules=names)).trace(queries, candidates)
    np.testing.assert_allclose(found.scores, whole.scores, rtol=1e-3, atol=1e-4)
    assert not tracer.adapter.shared_parameters() & set(names)
    assert isinstance(tracer.adapter, Seq2SeqAdapter)


def test_after_an_exception_no_hook_is_left(adapter):
    before = state(adapter.model)
    known = next(iter(linear_layers(adapter.model)))
    with pytest.raises(KeyError), added(adapter.model, {known: drawn(1), "none": drawn(1)}):
        pass
    assert_same_state(before, state(adapter.model))


def test_weights_of_eight_bits_are_perturbed_without_being_asked(tokens, rows):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    network = untrained("llama", len(tokens))
    coarse = copy.deepcopy(network)
    torchao.quantize_(coarse, torchao.Int8WeightOnlyConfig())
    layers = {name: layer for name, layer in linear_layers(coarse).items() if "proj" in name}
    bits = {name: layer.weight.dequantize().clone() for name, layer in layers.items()}
    found = ForwardInf(coarse, tokens).trace(rows.select(range(2)), rows)
    whole = ForwardInf(network, tokens, ascent=AscentConfig(lora_rank=64)).trace(rows.select(range(2)), rows)
    assert np.corrcoef(found.scores.ravel(), whole.scores.ravel())[0, 1] > 0.99
    assert all(torch.equal(bits[name], layers[name].weight.dequantize()) for name in bits)
    with pytest.raises(ValueError, match="weights are quantised, so that it is perturbed through a fresh LoRA"):
        ForwardInf(coarse, tokens, ascent=AscentConfig(direction="cg")).trace(rows, rows)
