import json

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.baselines import TracIn
from hf_forward_inf.cli import run_command
from tests.helpers import digits
from tests.helpers.recipes import recipe

pytest.importorskip("quanda", reason="quanda is not installed")

from experiments.quanda_explainer import AttributorExplainer
from quanda.explainers.wrappers import CaptumTracInCP
from safetensors.torch import load_model, save_model


@pytest.fixture
def data():
    """A network, 60 training images as quanda reads them, and 5 queries with labels."""
    rows = digits.rows(0, 65).with_format("torch")[:]
    x, labels = rows["x"], rows["label"]
    return digits.perceptron(), TensorDataset(x[:60], labels[:60]), x[60:], labels[60:]


def test_explanations_are_those_of_captum_where_the_method_is_the_same(data, tmp_path):
    network, train, queries, targets = data
    save_model(network, str(tmp_path / "weights"))

    def load(model, file):
        load_model(model, file)
        return 1.0

    theirs = CaptumTracInCP(network, train, [str(tmp_path / "weights")], checkpoints_load_func=load, batch_size=20)
    ours = AttributorExplainer(network, train, make=TracIn)
    found = ours.explain(queries, targets)
    assert found.shape == (5, 60)
    torch.testing.assert_close(found, theirs.explain(queries, targets), rtol=1e-3, atol=1e-4)


def test_an_explainer_reads_the_last_checkpoint_and_scores_by_the_rise_of_losses(data, tmp_path):
    network, train, queries, targets = data
    save_model(network, str(tmp_path / "weights"))
    theta = {name: p.detach().clone() for name, p in network.named_parameters()}
    ascent = AscentConfig(direction="gradient", radius=0.1, modules=["all"])
    with torch.no_grad():
        network[0].weight.zero_()
    explainer = AttributorExplainer(
        network, train, checkpoints=[str(tmp_path / "weights")], checkpoints_load_func=load_model,
        make=lambda adapter: ForwardInf(adapter=adapter, ascent=ascent),
    )  # fmt: skip
    found = explainer.explain(queries[:1], [int(targets[0])])[0]
    gradient = torch.autograd.grad(cross_entropy(network(queries[:1]), targets[:1]), list(network.parameters()))
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    base = cross_entropy(network(train.tensors[0]), train.tensors[1], reduction="none")
    with torch.no_grad():
        for (name, p), g in zip(network.named_parameters(), gradient, strict=True):
            p.copy_(theta[name] + 0.1 * g / norm)
    moved = cross_entropy(network(train.tensors[0]), train.tensors[1], reduction="none")
    torch.testing.assert_close(found, (moved - base).detach(), rtol=1e-3, atol=1e-4)


def test_self_influence_is_a_rows_own_score(data):
    network, train, *_ = data
    ascent = AscentConfig(direction="gradient", radius=0.1)
    explainer = AttributorExplainer(network, train, make=lambda adapter: ForwardInf(adapter=adapter, ascent=ascent))
    scores = explainer.explain(*train.tensors)
    torch.testing.assert_close(explainer.self_influence(), scores.diag(), rtol=1e-3, atol=1e-4)
    alone = AttributorExplainer(network, train, make=TracIn)
    torch.testing.assert_close(alone.self_influence(batch_size=16), alone.explain(*train.tensors).diag())


def test_the_recipe_judges_every_explainer_by_every_metric(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.retrainable.STEPS", 30)
    module = recipe("quanda_metrics")
    sizes = ["--num_candidates", "60", "--num_queries", "6", "--halves", "3", "--repeats", "2"]
    slow = ["--without", "captum_arnoldi", "forward_inf_and_margins"]
    assert run_command(module.main, module.Options, arguments=["--output", str(tmp_path), *sizes, *slow]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert {*figures["columns"]} == {*module.COLUMNS}
    assert {*figures["rows"]["forward_inf"]} >= {*module.COLUMNS, "lds_se"}
    assert "mislabelling" not in figures["rows"]["captum, similarity of hidden states"]
    assert all(np.isfinite(value) for row in figures["rows"].values() for value in row.values())
