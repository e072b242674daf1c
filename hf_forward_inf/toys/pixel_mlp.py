"""A denoiser of small pictures without convolutions: trained in seconds, so that it can be trained a hundred times."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

TIMES = 32
"""Number of features of a timestep."""


class Block(nn.Module):
    """A residual block: a normalisation, and two layers between which the condition is added.

    Args:
        width (`int`): Features that go in and out, and hidden ones.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.condition, self.down = (nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """Return the features after the block, `[images, width]`."""
        return hidden + self.down(nn.functional.gelu(self.up(self.norm(hidden)) + self.condition(condition)))


class PixelMLP(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A perceptron that removes noise from pictures, given the timestep and the mean embedding of a caption's tokens.

    Args:
        sample_size (`int`): Height and width of pictures in pixels.
        in_channels (`int`): 1 for grey, 3 for colours.
        width (`int`): Features of each hidden layer.
        depth (`int`, defaults to 1): Residual blocks before and behind the middle, whose features are an embedding.
        caption_width (`int`, defaults to 64): Features of a caption's token.
    """

    @register_to_config
    def __init__(self, sample_size: int, in_channels: int, width: int, depth: int = 1, caption_width: int = 64):
        super().__init__()
        pixels = in_channels * sample_size**2
        self.read = nn.Linear(pixels, width)
        self.time, self.caption = nn.Linear(TIMES, width), nn.Linear(caption_width, width)
        self.down_blocks, self.up_blocks = (nn.ModuleList(Block(width) for _ in range(depth)) for _ in range(2))
        self.mid_block = nn.Identity()
        self.norm = nn.LayerNorm(width)
        self.write = nn.Linear(width, pixels)
        # With a last layer of zeros the first predictions are the mean, and training is stable from the start.
        nn.init.zeros_(self.write.weight)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> UNet2DConditionOutput:
        """Return the prediction, `[images, channels, height, width]`."""
        times = get_timestep_embedding(timestep.expand(len(sample)), TIMES).to(sample.dtype)
        condition = torch.nn.functional.gelu(self.time(times) + self.caption(encoder_hidden_states.mean(1)))
        hidden = self.read(sample.flatten(1))
        for block in self.down_blocks:
            hidden = block(hidden, condition)
        hidden = self.mid_block(hidden)
        for block in self.up_blocks:
            hidden = block(hidden, condition)
        return UNet2DConditionOutput(sample=self.write(self.norm(hidden)).view(sample.shape))
