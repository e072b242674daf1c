"""Gradient baselines against one backward pass an example, and, on convex problems, against the exact inverse."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from hf_forward_inf.adapters import Adapter, Seq2SeqAdapter
from hf_forward_inf.baselines import InfluenceFunctions, RepresentationSimilarity, TracIn, TrackStar
from hf_forward_inf.baselines.checkpoints import find_checkpoints
from tests.helpers.gradients import by_autograd
from tests.helpers.line import assert_same_state, state


class LogisticAdapter(Adapter):
    """Logistic regression: a linear layer, and cross-entropy."""

    columns = ("x", "y")
    cache_key = "logistic"

    def encode(self, rows):
        count = len(rows["y"])
        return {**rows, "terms": [1] * count, "truncated": [False] * count}

    def lengths(self, features):
        return np.ones((len(features["y"]), 1), dtype=int)

    def collate(self, features):
        return {"x": torch.tensor(features["x"], dtype=torch.float32), "y": torch.tensor(features["y"])}

    def term_losses(self, forward, batch):
        return nn.functional.cross_entropy(forward(input=batch["x"]), batch["y"], reduction="none")[:, None]

    def outputs_and_loss(self, forward, batch):
        return forward(input=batch["x"]), partial(nn.functional.cross_entropy, target=batch["y"], reduction="sum")


class Logistic(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, input):
        return self.layer(input)


@pytest.fixture
def convex():
    draw = np.random.default_rng(0)
    rows = [Dataset.from_dict({"x": draw.normal(size=(n, 4)).tolist(), "y": draw.integers(0, 3, n)}) for n in (60, 5)]
    return LogisticAdapter(Logistic()), *rows


def exact_influence(adapter, candidates, queries, damping):
    """The Hessian entry by entry, and its inverse."""
    layer = adapter.model.layer
    flat = torch.cat([layer.weight.detach().flatten(), layer.bias.detach()])

    def loss(parameters, rows):
        weight, bias = parameters[:12].view(3, 4), parameters[12:]
        return nn.functional.cross_entropy(rows["x"] @ weight.T + bias, rows["y"], reduction="none")

    train, test = (adapter.collate(rows[:]) for rows in (candidates, queries))
    hessian = torch.autograd.functional.hessian(lambda p: loss(p, train).mean(), flat)
    gradients = [
        torch.autograd.functional.jacobian(lambda p, rows=rows: loss(p, rows), flat) for rows in (test, train)
    ]
    found = []
    for gradient in gradients[0]:
        extra = damping(gradient, hessian)
        found.append(gradients[1] @ torch.linalg.solve(hessian + extra * torch.eye(15), gradient))
    return torch.stack(found).numpy()


def test_conjugate_gradients_give_the_exact_inverse(convex):
    adapter, candidates, queries = convex
    expected = exact_influence(adapter, candidates, queries, lambda g, h: 0.1 * (g @ h @ g) / (g @ g))
    attributor = InfluenceFunctions(adapter=adapter, sample=60, iterations=30)
    np.testing.assert_allclose(attributor.score(queries, candidates), expected, rtol=1e-3, atol=1e-3)
    own = exact_influence(adapter, candidates, candidates, lambda g, h: 0.1 * (g @ h @ g) / (g @ g))
    np.testing.assert_allclose(attributor.self_influence(candidates), np.diag(own), rtol=1e-3)


def test_influence_cosines_do_not_know_the_gradients_norms(convex):
    adapter, candidates, queries = convex
    dots, found = (
        InfluenceFunctions(adapter=adapter, sample=60, similarity=kind).score(queries, candidates)
        for kind in ("dot", "cosine")
    )
    assert np.abs(found).max() < 1
    norms = dots / found  # |g(candidate)| |H^-1 g(query)|: an outer product
    np.testing.assert_allclose(norms * norms[0, 0], np.outer(norms[:, 0], norms[0]), rtol=1e-3)


def test_lissa_comes_near_the_exact_inverse(convex):
    adapter, candidates, queries = convex
    expected = exact_influence(adapter, candidates, queries, lambda g, h: 0.01 * 5)
    attributor = InfluenceFunctions(
        adapter=adapter, solver="lissa", sample=60, scale=5.0, damping=0.01, depth=400, repeats=4, batch_size=30
    )
    found = attributor.score(queries, candidates)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99


def test_lissa_says_when_it_diverges(convex):
    adapter, candidates, queries = convex
    attributor = InfluenceFunctions(adapter=adapter, solver="lissa", scale=0.01)
    with pytest.raises(FloatingPointError, match=r"LiSSA diverges .* Raise scale"):
        attributor.trace(queries, candidates)


@pytest.fixture
def gradients(model, tokenizer, queries, candidates):
    adapter = Seq2SeqAdapter(model.eval(), tokenizer)
    names = [n for n, _ in model.named_parameters() if "relative_attention_bias" not in n]
    found = [by_autograd(adapter, adapter.encode(rows[:]), names) for rows in (queries, candidates)]
    return [torch.cat(list(one.values()), dim=1).numpy() for one in found]


def test_tracin_gives_autograds_products(model, tokenizer, queries, candidates, gradients):
    before = state(model)
    expected = gradients[0] @ gradients[1].T
    found = TracIn(model, tokenizer).trace(queries, candidates).scores
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    norms = [np.linalg.norm(one, axis=1) for one in gradients]
    cosine = TracIn(model, tokenizer, similarity="cosine").trace(queries, candidates).scores
    np.testing.assert_allclose(cosine, expected / norms[0][:, None] / norms[1], atol=1e-4)
    assert_same_state(before, state(model))


def test_queries_in_blocks_have_the_same_products(model, tokenizer, queries, candidates, monkeypatch, tmp_path):
    expected = TracIn(model, tokenizer).trace(queries, candidates).scores
    monkeypatch.setattr("hf_forward_inf.baselines.gradients.QUERY_BYTES", 1)
    found = TracIn(model, tokenizer, cache_dir=tmp_path / "other").trace(queries, candidates).scores
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@pytest.fixture
def training(model, tokenizer, tmp_path):
    """Two checkpoints as a Trainer leaves them."""
    for step, rate in ((2, 0.5), (10, 0.25)):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        with torch.no_grad():
            model.decoder.block[0].layer[0].SelfAttention.q.weight.add_(0.01)
        model.save_pretrained(folder)
        log = [{"step": 1, "learning_rate": 1.0}, {"step": step, "learning_rate": rate}]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return tmp_path / "run"


def test_tracin_sums_over_checkpoints_by_their_learning_rates(training, model, tokenizer, queries, candidates):
    found = TracIn(model, tokenizer, checkpoints=training).trace(queries, candidates).scores
    parts = []
    for step in (2, 10):
        there = type(model).from_pretrained(training / f"checkpoint-{step}").eval()
        parts.append(TracIn(there, tokenizer).trace(queries, candidates).scores)
    np.testing.assert_allclose(found, 0.5 * parts[0] + 0.25 * parts[1], rtol=1e-4, atol=1e-4)


def test_checkpoints_that_cannot_be_used_are_told(training, model, tokenizer, queries, candidates, tmp_path):
    assert [one.folder.name for one in find_checkpoints(training)] == ["checkpoint-2", "checkpoint-10"]
    with pytest.raises(FileNotFoundError, match="contains no checkpoint"):
        TracIn(model, tokenizer, checkpoints=tmp_path / "nothing")
    with pytest.raises(ValueError, match="1 learning rates for 2 checkpoints"):
        TracIn(model, tokenizer, checkpoints=training, learning_rates=[1.0])
    (training / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="logs no learning rate"):
        TracIn(model, tokenizer, checkpoints=training)
    config = json.loads((training / "checkpoint-2" / "config.json").read_text())
    (training / "checkpoint-2" / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    with pytest.raises(ValueError, match="contains a t5; the model is a mt5"):
        TracIn(model, tokenizer, checkpoints=training, similarity="cosine").trace(queries, candidates)


def test_a_layer_that_is_not_there_is_told_with_close_names(model, tokenizer, queries, candidates):
    with pytest.raises(ValueError, match=r"modules='decoder.blok.1'. Close: .*decoder.block.1"):
        TracIn(model, tokenizer, modules=["decoder.blok.1"]).trace(queries, candidates)


def test_what_memory_cannot_hold_is_told_before_the_run(model, tokenizer, queries, candidates, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(MemoryError, match=r"gradient takes .* [kM]B, and 1.0 kB are free"):
        TracIn(model, tokenizer).trace(queries, candidates)


def test_trackstar_is_the_cosine_of_corrected_gradients(model, tokenizer, queries, candidates, gradients):
    moments = np.square(gradients[1]).mean(0)
    corrected = [one / np.sqrt(moments + 1e-3 * moments.mean()) for one in gradients]
    norms = [np.linalg.norm(one, axis=1) for one in corrected]
    expected = corrected[0] @ corrected[1].T / norms[0][:, None] / norms[1]
    found = TrackStar(model, tokenizer).trace(queries, candidates).scores
    np.testing.assert_allclose(found, expected, atol=1e-3)
    projected = TrackStar(model, tokenizer, projection=64).trace(queries, candidates).scores
    assert np.corrcoef(projected.ravel(), expected.ravel())[0, 1] > 0.8


def test_trackstar_reads_the_optimizers_second_moments(model, tokenizer, queries, candidates, tmp_path):
    optimizer = torch.optim.AdamW(dict(model.named_parameters()).items(), lr=0.0)
    adapter = Seq2SeqAdapter(model, tokenizer)
    adapter.loss(model, adapter.collate(adapter.encode(candidates[:4]))).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = TrackStar(model, tokenizer, second_moments=tmp_path).trace(queries, candidates).scores
    assert np.isfinite(found).all()
    broken = optimizer.state_dict()
    broken["state"][0]["exp_avg_sq"] = torch.ones(3)
    torch.save(broken, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="does not match the model"):
        TrackStar(model, tokenizer, second_moments=tmp_path).trace(queries, candidates)
    with pytest.raises(FileNotFoundError, match="no optimizer state"):
        TrackStar(model, tokenizer, second_moments=tmp_path / "nowhere")


def test_a_row_is_most_like_itself(model, tokenizer, candidates):
    found = RepresentationSimilarity(model, tokenizer).trace(candidates.select([3, 7]), candidates)
    assert [found.ranking(i)[0] for i in (0, 1)] == [3, 7]
    np.testing.assert_allclose([found.scores[0, 3], found.scores[1, 7]], 1, atol=1e-5)
