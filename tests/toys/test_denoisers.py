import copy
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.toys.denoisers import StackedDenoisers, _by_patches
from hf_forward_inf.toys.pixel_mlp import PixelMLP
from hf_forward_inf.toys.pixel_pipeline import pipeline_of, unet_of


def small_denoiser():
    return PixelMLP(4, 1, 8)


def pictures(count, seed=0, size=4):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size), dtype=np.uint8)
    columns = {"caption": [f"picture {i}" for i in range(count)], "image": list(pixels)}
    return Dataset.from_dict(columns, features=Features({"caption": Value("string"), "image": Image()}))


@pytest.fixture
def training():
    rows = pictures(6)
    adapter = DiffusionAdapter(pipeline_of(small_denoiser, rows["caption"][:], 0), timesteps=2)
    return StackedDenoisers(
        adapter, small_denoiser, rows, pictures(3, seed=1), steps=4, rate=1e-2, batch_size=5, timesteps=3
    )


def test_stacked_denoisers_learn_what_each_would_learn_alone(training):
    subsets = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]], dtype=bool)
    seeds = np.array([0, 0, 1])
    together = training.trained(subsets, seeds)
    for i in range(3):
        torch.manual_seed(int(seeds[i]))
        model = small_denoiser()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=4, pct_start=0.05)
        for given, target in training._batches(subsets[i : i + 1], seeds[i : i + 1]):
            loss = (model(**{name: value[0] for name, value in given.items()}).sample - target[0]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        for name, value in model.named_parameters():
            torch.testing.assert_close(together[name][i], value.detach(), atol=1e-5, rtol=1e-4)


def test_losses_are_those_of_an_adapter_with_as_many_timesteps(training):
    subsets = np.ones((2, 6), dtype=bool)
    weights = training.trained(subsets, np.array([0, 1]))
    found = training.losses(weights)
    finer = DiffusionAdapter(training.adapter.pipe, timesteps=3, seed=1)
    for i in range(2):
        model = copy.deepcopy(training.adapter.model)
        model.load_state_dict({name: value[i] for name, value in weights.items()})
        batch = finer.collate(finer.encode(training.queries[:]))
        torch.testing.assert_close(found[i], finer.loss(model, batch).detach())
    _, explained = training.explained([0, 1])
    torch.testing.assert_close(dict(explained.model.state_dict()), {n: value[1] for n, value in weights.items()})


def test_pictures_outside_a_subset_are_never_seen(training):
    subset = np.array([[1, 1, 1, 0, 0, 0]], dtype=bool)
    others = Dataset.from_dict(
        {name: [*training.rows[name][:3], *pictures(6, seed=2)[name][3:]] for name in ("caption", "image")},
        features=training.rows.features,
    )
    changed = StackedDenoisers(**{**vars(training), "rows": others})
    seed = np.array([0])
    torch.testing.assert_close(changed.trained(subset, seed), training.trained(subset, seed), atol=0, rtol=0)
    assert changed.key != training.key
    seen = {tuple(target.flatten().tolist()) for _, batch in training._batches(subset, seed) for target in batch[0]}
    assert len(seen) == 3  # predictions are of the pictures themselves


def test_one_seed_sees_the_same_noise_whatever_the_subset(training):
    subsets = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]], dtype=bool)
    (given, _), *_ = training._batches(subsets, np.array([3, 3]))
    (other, _), *_ = training._batches(subsets, np.array([3, 4]))
    torch.testing.assert_close(given["timestep"][0], given["timestep"][1])
    assert not torch.equal(other["timestep"][0], other["timestep"][1])


def test_unets_are_stacked_as_perceptrons_are():
    rows, make = pictures(4, size=8), partial(unet_of, 8, 1, 8)
    adapter = DiffusionAdapter(pipeline_of(make, rows["caption"][:], 0), timesteps=2)
    training = StackedDenoisers(adapter, make, rows, rows.select([0]), steps=2, batch_size=3, timesteps=2)
    subsets = np.array([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=bool)
    seeds = np.array([0, 1])
    together, alone = training(subsets, seeds), training(subsets[1:], seeds[1:])
    np.testing.assert_allclose(together[1], alone[0], rtol=1e-4)
    assert abs(together[0] / together[1] - 1) > 1e-3
    by_patches = StackedDenoisers(**{**vars(training), "untrained": lambda: _by_patches(make())})
    np.testing.assert_allclose(by_patches(subsets, seeds), together, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": (0, 1), "stride": 2, "bias": False}, {"padding": "same"}]
)
def test_convolutions_are_products_of_patches(options):
    layer = torch.nn.Conv2d(3, 5, (3, 2), **options)
    images = torch.randn(2, 3, 7, 6)
    torch.testing.assert_close(_by_patches(copy.deepcopy(layer))(images), layer(images))
