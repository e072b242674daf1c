import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers.models.attention import FeedForward
from experiments.diffusion_contenders import compared
from experiments.diffusion_lds import DenoiserOptions, load_truth
from experiments.diffusion_rivals import GradientKernel, NoisierAdapter, RetainedUnlearning

from hf_forward_inf.adapters import DiffusionAdapter
from tests.helpers.drawing import rows
from tests.helpers.recipes import recipe

pytestmark = pytest.mark.usefixtures("measured_once")


def options(tmp_path, **more):
    rows(24).to_parquet(tmp_path / "pictures.parquet")
    small = {
        "candidates": str(tmp_path / "pictures.parquet"), "size": 4, "num_candidates": 12, "num_queries": 2,
        "width": 4, "training_steps": 2, "subsets": 3, "seeds": 2, "timesteps": 2, "removed": 3,
        "retrained": 2, "removal_seeds": 1, "removed_by": ["forward_inf", "pixel_distance"], "top_k": 5,
    }  # fmt: skip
    return DenoiserOptions(output=str(tmp_path / "run"), **{**small, **more})


def test_a_run_compares_with_halves_and_with_training_without_the_best(tmp_path, monkeypatch):
    for name, tried in (("EKFAC_DAMPINGS", (0.1,)), ("KERNEL_DAMPINGS", (0.1, 1.0)), ("MUCS", ({"steps": 1},))):
        monkeypatch.setattr(f"experiments.diffusion_contenders.{name}", tried)
    metrics = recipe("diffusion_lds").main(options(tmp_path))
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    for name in (
        "",
        "forward_inf_pcg/",
        "forward_inf_short/",
        "forward_inf_long/",
        "unlearning/",
        "trak/",
        "d_trak/",
        "mucs/",
        "denoiser_features/",
        "random/",
    ):
        assert metrics[f"{name}lds_low"] <= metrics[f"{name}lds"] <= metrics[f"{name}lds_high"]
    assert metrics["trak/lds_behind"] == pytest.approx(metrics["lds"] - metrics["trak/lds"])
    assert metrics["lds"] == pytest.approx((metrics["unseen/lds"] + metrics["drawn/lds"]) / 2)
    assert {"rise", "rise_low", "pixel_distance/rise_behind"} <= metrics.keys() and "trak/rise" not in metrics
    assert -1 <= metrics["agreement"] <= 1


def test_halves_and_removals_are_trained_on_what_is_left(tmp_path):
    truth = load_truth(options(tmp_path))
    measured, others, by_seed = truth.halves(3, 2)
    np.testing.assert_allclose(by_seed.mean(0), measured.losses)
    assert measured.subsets.sum(1).tolist() == [6] * 3 and others.losses.shape == (3, 2)
    assert [len(images) for images in truth.queries["image"]] == [1, 1]
    scores = np.zeros((2, 12), dtype=np.float32)
    scores[0, :3] = scores[1, 3:6] = 1
    kept = np.ones((5, 12), dtype=bool)
    kept[1, :3] = kept[2, 3:6] = kept[3, 6:9] = kept[4, 6:9] = False
    training = truth._training(truth.queries.select(range(2)))
    losses = training(kept, np.zeros(5, dtype=int)) / training(kept[:1], np.array([0]))
    rises = truth.rises({"first": scores, "second": np.roll(scores[:1], 6, axis=1).repeat(2, axis=0)}, 3, 1)
    np.testing.assert_allclose(rises["first"], [losses[1, 0] - 1, losses[2, 1] - 1], rtol=1e-4)
    np.testing.assert_allclose(rises["second"], [losses[3, 0] - 1, losses[4, 1] - 1], rtol=1e-4)


@pytest.mark.parametrize("output", [False, True])
def test_kernels_are_traks_formula_with_whole_gradients(tmp_path, output):
    truth = load_truth(options(tmp_path))
    adapter = truth.explained(1)[0]
    kernel = GradientKernel(adapter, output=output, damping=0.5)

    def gradients(given, adapter=adapter):
        found = []
        for row in given:
            batch = adapter.collate(adapter.encode({name: [value] for name, value in row.items()}))
            if output:
                predicted, _ = adapter.predicted(adapter.model, batch)
                value = predicted.square().sum() / adapter.timesteps
            else:
                value = adapter.loss(adapter.model, batch).sum()
            found.append(
                torch.cat([g.flatten() for g in torch.autograd.grad(value, list(adapter.model.parameters()))])
            )
        return torch.stack(found).double()

    phi, asked = gradients(truth.candidates), gradients(truth.queries, adapter.for_queries(()))
    ridge = 0.5 * phi.square().sum(1).mean() * torch.eye(phi.shape[1], dtype=torch.float64)
    expected = asked @ torch.linalg.solve(phi.T @ phi + ridge, phi.T)
    found = kernel.trace(truth.queries, truth.candidates).scores
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_mucs_moves_feed_forward_weights_at_noisy_timesteps(tmp_path):
    truth = load_truth(options(tmp_path))
    adapter = truth.explained(1)[0]
    mucs = RetainedUnlearning(adapter, steps=1, rate=1e-2, batch_size=12)
    assert isinstance(mucs.adapter, NoisierAdapter)
    encoded = mucs.adapter.encode(truth.candidates[:])
    batch = mucs.adapter.collate(encoded)
    assert batch["parts"].min() >= 0.3
    query = mucs.adapter.collate(mucs.adapter.encode(truth.queries[:1]))
    weights = [p for name, p in adapter.model.named_parameters() if ".up." in name or ".down." in name]
    loss = mucs.adapter.loss(adapter.model, batch).mean() - 0.2 * mucs.adapter.loss(adapter.model, query).sum()
    before = mucs.adapter.loss(adapter.model, batch).detach()
    # The first step of Adam moves each weight by the rate against its gradient's sign.
    steps = [-1e-2 * g / (g.abs() + 1e-8) for g in torch.autograd.grad(loss, weights)]
    found = mucs.trace(truth.queries.select([0]), truth.candidates).scores[0]
    with torch.no_grad():
        for weight, step in zip(weights, steps, strict=True):
            weight += step
        after = mucs.adapter.loss(adapter.model, batch)
    np.testing.assert_allclose(found, (after / before - 1).numpy(), atol=1e-4)


def test_figures_are_compared_with_those_of_forward_inf_query_by_query():
    table = compared({"forward_inf": np.array([1.0, 3.0]), "other": np.array([1.0, 1.0])}, "lds")
    assert (table["forward_inf"]["unseen/lds"], table["forward_inf"]["drawn/lds"]) == (1, 3)
    assert table["other"]["lds_behind"] == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"removed": 12}, "--removed 12 leaves nothing of --num_candidates 12"),
        ({"removed_by": ["pixel_distance"]}, "--removed_by needs forward_inf"),
        ({"removed_by": ["lime"]}, "--removed_by must be one of forward_inf"),
        ({"network": "unet", "width": 20}, "--width 20 must be a multiple of 8"),
    ],
)
def test_impossible_options_are_refused(tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        options(tmp_path, **more)


def test_too_few_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Candidates and queries need 54 pictures; there are 24"):
        load_truth(options(tmp_path, num_candidates=50))


def test_a_unet_takes_the_place_of_the_perceptron(tmp_path):
    truth = load_truth(options(tmp_path, network="unet", width=8, size=16, num_candidates=4))
    (adapter,) = truth.explained(1)
    assert type(adapter.model).__name__ == "FoldedUNet" and adapter.model.config.width == 8
    mucs = RetainedUnlearning(adapter, steps=1)
    rows = mucs.adapter.encode(truth.candidates[:])
    moved = mucs._unlearnt(mucs.adapter.encode(truth.queries[:1]), Dataset.from_dict(rows))
    parts = [one for one in adapter.model.modules() if isinstance(one, FeedForward)]
    own = {id(weight) for part in parts for weight in part.parameters()}
    assert moved.keys() == {name for name, weight in adapter.model.named_parameters() if id(weight) in own}


def test_a_network_has_its_own_size_and_steps():
    assert (DenoiserOptions().width, DenoiserOptions().training_steps) == (128, 500)
    assert (DenoiserOptions(network="unet").width, DenoiserOptions(network="unet").training_steps) == (24, 700)
    assert DenoiserOptions(network="unet", width=8).width == 8


def test_noisier_losses_are_cached_apart(tmp_path):
    adapter = load_truth(options(tmp_path)).explained(1)[0]
    assert NoisierAdapter(adapter.pipe).cache_key != DiffusionAdapter(adapter.pipe).cache_key
