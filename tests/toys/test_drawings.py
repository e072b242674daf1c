from functools import partial

import numpy as np
import torch

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.toys.drawings import Drawing, drawings
from hf_forward_inf.toys.pixel_mlp import PixelMLP
from hf_forward_inf.toys.pixel_pipeline import pipeline_of


def test_tiny_pictures_drawn_at_once_are_those_drawn_one_caption_after_another():
    captions = ["a red square", "a circle", ""]
    adapter = DiffusionAdapter(pipeline_of(partial(PixelMLP, 4, 1, 8), captions, 0), timesteps=2)
    torch.manual_seed(0)
    for weight in adapter.model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    together = drawings(adapter, captions, Drawing(num_images=2, seed=3))
    alone = adapter.answer({"caption": captions}, num_images=2, seed=3)
    pixels = np.array([[np.array(one, dtype=int) for one in row] for row in together["image"]])
    np.testing.assert_allclose(pixels, [[np.array(one) for one in row] for row in alone], atol=1)
    assert (pixels[0] != pixels[1]).any() and (pixels[0, 0] != pixels[0, 1]).any()
