import numpy as np
import pytest
import torch

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.baselines import DenoiserFeatures
from tests.helpers.drawing import rows, stable_diffusion, stable_diffusion_3


def test_a_denoiser_sees_a_picture_as_most_like_itself():
    found = DenoiserFeatures(adapter=DiffusionAdapter(stable_diffusion(), timesteps=2)).trace(
        rows(2, first=1), rows(5)
    )
    assert [found.ranking(i)[0] for i in range(2)] == [1, 2]
    np.testing.assert_allclose(found.scores.max(axis=1), 1, atol=1e-5)


def test_features_are_those_of_the_middle_block_whatever_stands_beside_in_the_batch():
    adapter = DiffusionAdapter(stable_diffusion(), timesteps=2)
    features = DenoiserFeatures(adapter=adapter)._features(rows(3))
    alone = adapter.collate(adapter.encode(rows(3).select([1])[:]))
    unet, noising = adapter.model, adapter.noising
    with torch.no_grad():
        middles = []
        unet.eval()
        unet.mid_block.register_forward_hook(lambda module, args, output: middles.append(output.mean(dim=(2, 3))))
        for part, noise in zip(alone["parts"][0, 0], alone["noise"][0, 0], strict=True):
            time = noising.times(part[None])
            unet(noising.noisy(alone["latents"][0], noise[None], time), time, alone["encoder_hidden_states"])
    np.testing.assert_allclose(features[:, 1], torch.cat(middles).mean(0), atol=1e-5)


def test_a_transformer_has_no_middle_block():
    with pytest.raises(TypeError, match="no mid_block"):
        DenoiserFeatures(adapter=DiffusionAdapter(stable_diffusion_3()))
