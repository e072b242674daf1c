"""Changes of low rank against changes of whole weights."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import CausalLMAdapter, Seq2SeqAdapter, TensorAdapter
from hf_forward_inf.ascent import parameters
from hf_forward_inf.ascent.layers import sites
from hf_forward_inf.ascent.low_rank import LowRank, added
from hf_forward_inf.ascent.parameters import in_full, names_for
from hf_forward_inf.ascent.steps import ascend
from hf_forward_inf.utils.models import linear_layers
from tests.helpers import digits
from tests.helpers.causal import questions, train_tokens, untrained
from tests.helpers.line import assert_same_state, state


@pytest.fixture(scope="module")
def tokens():
    return train_tokens()


@pytest.fixture(params=["llama", "gpt2", "qwen2, tied"])
def network(request, tokens):
    return untrained(request.param, len(tokens))


@pytest.fixture
def adapter(network, tokens):
    return CausalLMAdapter(network, tokens)


@pytest.fixture(scope="module")
def rows():
    return questions()


@pytest.fixture
def hooked(monkeypatch):
    """Changes stay low-rank, however small the weights."""
    monkeypatch.setattr(parameters, "SMALL", 0)


def drawn(rank, seed=0, ids=()):
    draw = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, 7, generator=draw), torch.randn(5, rank, generator=draw)
    return LowRank(down, up, torch.tensor(ids, dtype=torch.long), torch.randn(len(ids), 7, generator=draw))


def written_out(change):
    found = change.up @ change.down
    for i, row in zip(change.ids, change.rows, strict=True):
        found[i] = found[i] + row
    return found


def steps(mode="ascent", **options):
    """The same steps with low rank and in full."""
    options = {"direction": "gradient", "modules": ["all"], "mode": mode} | options
    return [AscentConfig(step=step, **options) for step in ("low_rank", "full")]


def assert_same_thetas(network, found, expected):
    found = in_full(network, found)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        moved = [(one - network.get_parameter(name)).detach() for one in (found[name], value)]
        torch.testing.assert_close(*moved, rtol=2e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("ids", [(), (1, 3)])
def test_a_changes_norm_is_that_of_the_matrix(ids):
    change = drawn(3, ids=ids)
    torch.testing.assert_close(change.dense(), written_out(change))
    assert change.norm() == pytest.approx(written_out(change).norm().item(), rel=1e-5)


def test_changes_add_up_and_stretch_as_matrices_do():
    both = drawn(2, ids=(0, 3)) + drawn(3, seed=1, ids=(3, 4)) * -2.0
    expected = written_out(drawn(2, ids=(0, 3))) - 2 * written_out(drawn(3, seed=1, ids=(3, 4)))
    torch.testing.assert_close(written_out(both), expected)
    assert both.ids.tolist() == [0, 3, 4]


def test_a_change_has_no_more_outer_products_than_the_matrix_has_rows():
    change = drawn(9, ids=(2,))
    assert len(change.compact().down) == 5
    torch.testing.assert_close(written_out(change.compact()), written_out(change))


def test_a_truncated_change_is_the_nearest_of_its_rank_and_says_what_is_lost():
    change = drawn(4)
    u, s, v = torch.linalg.svd(written_out(change), full_matrices=False)
    near, lost = change.truncated(2)
    torch.testing.assert_close(near.up @ near.down, u[:, :2] * s[:2] @ v[:2])
    assert lost == pytest.approx((s[2:].square().sum() / s.square().sum()).item(), rel=1e-4)


def test_no_higher_rank_is_taken_than_is_needed():
    twice, lost = (drawn(2) + drawn(2) * 0.5).truncated(5)
    assert len(twice.down) == 2
    assert lost < 1e-10
    torch.testing.assert_close(twice.up @ twice.down, 1.5 * drawn(2).up @ drawn(2).down)


@pytest.mark.parametrize("copied", [0, 2**20])
def test_an_added_change_is_a_change_of_the_weight_wherever_it_is(copied, adapter, rows, monkeypatch):
    monkeypatch.setattr("hf_forward_inf.ascent.low_rank.COPIED", copied)
    before = state(adapter.model)
    batch = adapter.collate(adapter.encode(rows[:]))
    model, layers = adapter.model, sites(adapter.model, names_for(adapter, steps()[0]))
    changes = {}
    for name, held in layers.items():
        transposed = "c_" in name
        outputs, inputs = model.get_parameter(name).T.shape if transposed else model.get_parameter(name).shape
        has_rows = any(isinstance(layer, nn.Embedding) for layer in held)
        ids = torch.tensor([2, 5, 7]) if has_rows else torch.zeros(0, dtype=torch.long)
        down, up = torch.randn(2, inputs) / 10, torch.randn(outputs, 2) / 10
        changes[name] = LowRank(down, up, ids, torch.randn(len(ids), inputs) / 10)
    with added(model, changes), torch.no_grad():
        given = adapter.loss(model, batch)
    assert_same_state(before, state(model))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, change in changes.items():
            changed.get_parameter(name).add_(written_out(change).T if "c_" in name else written_out(change))
        torch.testing.assert_close(given, adapter.loss(changed, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["ascent", "descent"])
def test_steps_of_low_rank_are_those_of_whole_weights(mode, adapter, rows):
    encoded = adapter.encode(rows[:1])
    low, full = (config.completed() for config in steps(mode, steps=3))
    names = names_for(adapter, low)
    assert names == [name for name, _ in adapter.model.named_parameters()]
    found, expected = (ascend(adapter, encoded, names, config) for config in (low, full))
    assert all(isinstance(found[name], LowRank) for name in linear_layers(adapter.model) if name in names)
    assert_same_thetas(adapter.model, found, expected)


@pytest.mark.parametrize("mode", ["ascent", "descent", "symmetric"])
def test_scores_through_hooks_are_those_of_changed_weights(mode, network, tokens, rows, hooked):
    before = state(network)
    tracers = [ForwardInf(network, tokens, ascent=config) for config in steps(mode, radius=0.5)]
    found = [tracer.trace(rows.select(range(2)), rows) for tracer in tracers]
    np.testing.assert_allclose(*(one.scores for one in found), rtol=1e-3, atol=1e-4)
    both = zip(tracers, found, strict=True)
    terms = [tracer.explain(one, k=2).details["term_scores"] for tracer, one in both]
    for one, other in zip(*terms, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-3)
    assert_same_state(before, state(network))


def test_small_weights_are_copied_with_the_same_scores(network, tokens, rows, monkeypatch):
    tracer = ForwardInf(network, tokens, ascent=steps(radius=0.5)[0])
    copied = tracer.trace(rows.select([0]), rows).scores
    perturbation = tracer.perturber(rows).perturbation(tracer.adapter.encode(rows[:1]))
    assert all(isinstance(value, torch.Tensor) for value in perturbation.thetas[0].values())
    monkeypatch.setattr(parameters, "SMALL", 0)
    tracer = tracer.with_options(ascent=steps(radius=0.5, seed=1)[0])  # another seed, nothing cached
    np.testing.assert_allclose(tracer.trace(rows.select([0]), rows).scores, copied, rtol=1e-3, atol=1e-4)


def test_a_seq2seq_models_decoder_moves(model, tokenizer, queries, candidates, hooked):
    tracers = [ForwardInf(model, tokenizer, ascent=config) for config in steps(modules=None)]
    names = names_for(tracers[0].adapter, tracers[0].ascent)
    assert all(name.startswith("decoder.") for name in names)
    found, whole = (tracer.trace(queries, candidates).scores for tracer in tracers)
    np.testing.assert_allclose(found, whole, rtol=1e-3, atol=1e-4)
    assert not tracers[0].adapter.shared_parameters() & set(names)
    assert isinstance(tracers[0].adapter, Seq2SeqAdapter)


class Everything(nn.Module):
    """Convolutions, attention that reads weights by itself, a layer that is called twice, experts, a checkpoint."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1, dilation=2)
        self.same = nn.Conv2d(4, 4, (2, 3), padding="same", bias=False)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.twice = nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.scale = nn.Parameter(torch.ones(4))
        self.last = nn.Linear(4, 10)

    def forward(self, x):
        x = self.norm(self.same(self.first(x.view(-1, 1, 8, 8)))).relu_()
        x = self.grouped(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x)[0]
        x = checkpoint(lambda x: self.twice(self.twice(x).tanh()), x, use_reentrant=False)
        chosen = x[..., 0] > 0
        y = torch.zeros_like(x)
        y[chosen], y[~chosen] = self.experts[0](x[chosen]), self.experts[1](x[~chosen])
        return self.last((x + y * self.scale).mean(1))


def test_layers_of_every_kind_move_as_whole_weights_do(hooked):
    network = Everything().eval()
    adapter = TensorAdapter(network)
    data = digits.rows(0, 20)
    query = adapter.encode(data[:1])
    low, full = (config.completed() for config in steps(steps=2))
    names = names_for(adapter, low)
    found, expected = (ascend(adapter, query, names, config) for config in (low, full))
    changed = {name for name, value in found.items() if isinstance(value, LowRank)}
    assert changed == {f"{name}.weight" for name in ("first", "same", "twice", "experts.0", "experts.1", "last")}
    assert_same_thetas(network, found, expected)
    x = torch.tensor(data["x"][:])
    with torch.no_grad():
        risen = functional_call(network, expected, (x,))
        torch.testing.assert_close(_run(network, found, x), risen, rtol=1e-3, atol=1e-4)


def _run(network, theta, x):
    whole = {name: value for name, value in theta.items() if isinstance(value, torch.Tensor)}
    with added(network, {name: value for name, value in theta.items() if isinstance(value, LowRank)}):
        return functional_call(network, whole, (x,))


@pytest.mark.parametrize("direction", ["gradient", "kfac"])
def test_under_autocast_changes_are_computed_in_float32(direction, tokens, rows):
    network = untrained("llama", len(tokens))
    ascent = AscentConfig(direction=direction, radius=0.3, modules=["all"])
    tracer = ForwardInf(network, tokens, ascent=ascent)
    theta = tracer.perturber(rows).perturbation(tracer.adapter.encode(rows[:1])).changes[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = tracer.perturber(rows).perturbation(tracer.adapter.encode(rows[:1])).changes[0]
        own = {name: (value.dense() if isinstance(value, LowRank) else value) for name, value in coarse.items()}
        squares = [
            (own[name] - (0 if isinstance(v, LowRank) else network.get_parameter(name))) for name, v in coarse.items()
        ]
    assert torch.cat([one.flatten() for one in squares]).norm().item() == pytest.approx(0.3, rel=1e-4)
    for name, value in theta.items():
        if isinstance(value, LowRank):
            assert torch.cosine_similarity(value.dense().flatten(), own[name].flatten(), dim=0) > 0.97


def test_hooks_of_the_users_own_come_after_a_change(hooked):
    network = digits.perceptron()
    network[0].register_forward_pre_hook(lambda layer, args: (args[0] / 3,))
    network[0].register_forward_hook(lambda layer, args, output: 2 * output)
    adapter, data = TensorAdapter(network), digits.rows(0, 20)
    low, full = (config.completed() for config in steps(steps=2))
    names = names_for(adapter, low)
    found, expected = (ascend(adapter, adapter.encode(data[:1]), names, config) for config in (low, full))
    assert_same_thetas(network, found, expected)
    x = torch.tensor(data["x"][:])
    with torch.no_grad():
        torch.testing.assert_close(_run(network, found, x), functional_call(network, expected, (x,)))


def test_an_input_that_is_overwritten_is_refused():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 10)

        def forward(self, x):
            x = self.one(x)
            y = self.two(x)
            x.mul_(2)
            return y

    adapter = TensorAdapter(Overwriting())
    query = adapter.encode(digits.rows(0, 1)[:])
    with pytest.raises(ValueError, match=r"What a Linear has read is overwritten afterwards.*take step='full'"):
        ascend(adapter, query, ["two.weight"], steps()[0].completed())


def test_large_weights_that_change_in_full_are_named(monkeypatch):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(torch.randn(64, 10) / 8)

        def forward(self, x):
            return x @ self.weights

    tracer = ForwardInf(adapter=TensorAdapter(Experts()), ascent=steps()[0])
    data = digits.rows(0, 5)
    assert np.isfinite(tracer.trace(data, data).scores).all()
    monkeypatch.setattr(parameters, "LARGE", 1000)
    with pytest.warns(
        UserWarning, match=r"1 of the perturbed parameters \(weights, ...\) belong to layers of unknown"
    ):
        tracer.perturber(data)


def test_a_lora_moves_as_whole_weights_do(tokens, rows, hooked):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = get_peft_model(untrained("llama", len(tokens)), config).eval()
    found, whole = (
        ForwardInf(tuned, tokens, ascent=one).trace(rows.select([1]), rows).scores for one in steps(modules=None)
    )
    np.testing.assert_allclose(found, whole, rtol=1e-3, atol=1e-4)


def test_half_precision_weights_are_not_rounded(tokens, rows, hooked):
    network = untrained("llama", len(tokens))
    whole = ForwardInf(network, tokens, ascent=steps(radius=0.03)[0]).trace(rows.select([0]), rows).scores[0]
    half = copy.deepcopy(network).bfloat16()
    tracer = ForwardInf(half, tokens, ascent=AscentConfig(direction="gradient", radius=0.03, modules=["*proj.weight"]))
    theta = tracer.perturber(rows).perturbation(tracer.adapter.encode(rows[:1])).thetas[0]
    assert all(isinstance(value, LowRank) and value.up.dtype == torch.float32 for value in theta.values())
    assert np.isfinite(whole).all()


def test_after_an_exception_no_hook_is_left(adapter):
    before = state(adapter.model)
    known = next(iter(linear_layers(adapter.model)))
    with pytest.raises(KeyError), added(adapter.model, {known: drawn(1), "none": drawn(1)}):
        pass
    with pytest.raises(RuntimeError), added(adapter.model, {known: drawn(1)}):
        adapter.model(torch.zeros(1, 2, dtype=torch.long))
    assert_same_state(before, state(adapter.model))


def eight_bits(network):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    coarse = copy.deepcopy(network)
    torchao.quantize_(coarse, torchao.Int8WeightOnlyConfig())
    return coarse


@pytest.mark.parametrize("direction", ["gradient", "kfac"])
def test_weights_of_eight_bits_are_perturbed_without_being_asked(direction, tokens, rows):
    network = untrained("llama", len(tokens))
    coarse = eight_bits(network)
    layers = linear_layers(coarse)
    bits = {name: layer.weight.dequantize().clone() for name, layer in layers.items()}
    ascent = AscentConfig(direction=direction, modules=["all"])
    found, whole = (
        ForwardInf(one, tokens, ascent=ascent).trace(rows.select(range(2)), rows) for one in (coarse, network)
    )
    assert np.corrcoef(found.scores.ravel(), whole.scores.ravel())[0, 1] > 0.99
    assert all(torch.equal(bits[name], layers[name].weight.dequantize()) for name in bits)
    with pytest.raises(ValueError, match="weights are quantised, so that they have no gradients"):
        ForwardInf(coarse, tokens, ascent=AscentConfig(direction="cg")).trace(rows, rows)


def test_a_lora_on_a_base_of_eight_bits_moves_along_the_corrected_gradient(tokens, rows):
    network = untrained("llama", len(tokens))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    found = []
    for base in (eight_bits(network), network):
        torch.manual_seed(0)
        tracer = ForwardInf(get_peft_model(base, config).eval(), tokens)
        assert tracer.ascent.direction == "kfac" and tracer.ascent.step == "low_rank"
        found.append(tracer.trace(rows.select(range(2)), rows).scores.ravel())
    assert np.corrcoef(*found)[0, 1] > 0.98
