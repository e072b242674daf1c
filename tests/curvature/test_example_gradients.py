import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from hf_forward_inf.adapters import DiffusionAdapter, Seq2SeqAdapter, TensorAdapter
from hf_forward_inf.ascent.parameters import perturbed_names
from hf_forward_inf.baselines.gradients import query_factors
from hf_forward_inf.curvature.example_gradients import ExampleGradients
from hf_forward_inf.curvature.outer_products import QueryGradients
from hf_forward_inf.utils.models import evaluating
from tests.helpers import digits, drawing
from tests.helpers.gradients import by_autograd
from tests.helpers.line import assert_same_state, state


@pytest.fixture(scope="module")
def bart(tokenizer):
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(tokenizer), d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
            pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=1,
            scale_embedding=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["mt5", "bart"])
@pytest.mark.parametrize("chunk_bytes", [2**27, 2**17])
def test_every_examples_gradient_is_autograds(kind, chunk_bytes, request, monkeypatch, tokenizer, candidates):
    monkeypatch.setattr("hf_forward_inf.curvature.example_gradients.CHUNK_BYTES", chunk_bytes)
    model = request.getfixturevalue("model" if kind == "mt5" else "bart")
    adapter = Seq2SeqAdapter(model, tokenizer)
    features = adapter.encode(candidates[:7])
    before = state(model)
    with evaluating(model):
        gradients = ExampleGradients(adapter, perturbed_names(adapter, ["all"]), features)
        expected = by_autograd(adapter, features, gradients.names)
        found = {name: torch.full_like(values, torch.nan) for name, values in expected.items()}
        for name, rows, values in gradients.of(adapter.collate(features)):
            found[name][rows] = values
    assert_same_state(before, state(model))
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=3e-5, msg=lambda text, name=name: name + text)
    # What a batch shares: T5's relative biases, BART's learned positions. All the rest is there.
    shared = "relative_attention_bias" if kind == "mt5" else "embed_positions"
    assert gradients.left_out
    assert all(shared in name for name in gradients.left_out)


@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_convolutions_too(padding):
    torch.manual_seed(0)
    stride = 1 if padding == "same" else 2
    network = torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 8, 8)),
        torch.nn.Conv2d(1, 3, (3, 2), stride=stride, padding=padding, dilation=(1, 2)),
        torch.nn.Tanh(), torch.nn.Conv2d(3, 2, 2, bias=False), torch.nn.Flatten(), torch.nn.LazyLinear(10),
    )  # fmt: skip
    adapter = TensorAdapter(network)
    features = adapter.encode(digits.rows(0, 5)[:])
    adapter.loss(network, adapter.collate(features))  # the lazy layer learns its size
    gradients = ExampleGradients(adapter, perturbed_names(adapter, ["all"]), features)
    assert not gradients.left_out
    expected = by_autograd(adapter, features, gradients.names)
    for name, _, values in gradients.of(adapter.collate(features)):
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pixels", [False, True])
def test_a_picture_goes_through_a_denoiser_once_at_each_time(pixels):
    adapter = DiffusionAdapter(drawing.unconditional(3) if pixels else drawing.stable_diffusion(), timesteps=3)
    squares = [drawing.square(i) for i in range(4)]
    features = adapter.encode({"image": [squares[:2], squares[2:3], squares[3:]], "caption": ["red", "", "blue"]})
    gradients = ExampleGradients(adapter, perturbed_names(adapter, ["all"]), features)
    assert not gradients.left_out
    with evaluating(adapter.model):
        expected = by_autograd(adapter, features, gradients.names)
        found = {name: torch.full_like(values, torch.nan) for name, values in expected.items()}
        for name, rows, values in gradients.of(adapter.collate(features)):
            found[name][rows] = values
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-3, atol=1e-6 + 1e-3 * values.norm().item())


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("kind", ["mt5", "bart"])
def test_products_and_norms_are_autograds_though_gradients_are_not_written_down(
    kind, count, request, tokenizer, candidates
):
    model = request.getfixturevalue("model" if kind == "mt5" else "bart")
    adapter = Seq2SeqAdapter(model, tokenizer)
    features = adapter.encode(candidates[:7])
    with evaluating(model):
        gradients = ExampleGradients(adapter, perturbed_names(adapter, ["all"]), features)
        expected = by_autograd(adapter, features, gradients.names)
        torch.manual_seed(0)
        directions = {name: torch.randn(count, values.shape[1]) for name, values in expected.items()}
        products, squares = gradients.products(adapter.collate(features), directions)
        alone, none = gradients.products(adapter.collate(features), directions, squares=False)
    wanted = sum(values @ directions[name].T for name, values in expected.items())
    scale = sum(values.square().sum(1) for values in expected.values())
    assert ((products - wanted).norm() / wanted.norm()).item() < 1e-4
    torch.testing.assert_close(squares, scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, products)
    assert none is None


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("kind", ["mt5", "bart"])
def test_queries_gradients_are_autograds_in_either_form(kind, pays, request, monkeypatch, tokenizer, candidates):
    monkeypatch.setattr(QueryGradients, "is_cheaper", lambda laid: pays)
    model = request.getfixturevalue("model" if kind == "mt5" else "bart")
    adapter = Seq2SeqAdapter(model, tokenizer)
    rows, queries = adapter.encode(candidates[:7]), adapter.encode(candidates[7:10])
    with evaluating(model):
        gradients = ExampleGradients(adapter, perturbed_names(adapter, ["all"]), rows)
        directions = query_factors(gradients, queries)
        products, _ = gradients.products(adapter.collate(rows), directions)
        expected, asked = (by_autograd(adapter, some, gradients.names) for some in (rows, queries))
    assert pays == any(isinstance(one, QueryGradients) for one in directions.values())
    wanted = sum(expected[name] @ asked[name].T for name in gradients.names)
    assert ((products - wanted).norm() / wanted.norm()).item() < 1e-4


def test_frozen_parameters_have_gradients_too(model, tokenizer, candidates):
    adapter = Seq2SeqAdapter(model, tokenizer)
    features = adapter.encode(candidates[:2])
    expected = by_autograd(adapter, features, ["decoder.block.0.layer.0.SelfAttention.q.weight"])
    model.requires_grad_(False)
    gradients = ExampleGradients(adapter, list(expected), features)
    with evaluating(model):
        ((name, _, values),) = gradients.of(adapter.collate(features))
    torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=3e-5)


def test_layers_of_other_kinds_are_told(line):
    with pytest.raises(ValueError, match="Gradients of w can't be computed example by example"):
        ExampleGradients(line, ["w"], {"x": [[1.0, 2.0]], "y": [1.0], "terms": [1]})
