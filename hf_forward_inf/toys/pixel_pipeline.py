"""A diffusers pipeline that draws small pictures from captions in pixel space, made to be trained in minutes."""

from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import CLIPTextConfig, CLIPTextModel

from hf_forward_inf.toys.tiny_models import train_tokenizer
from hf_forward_inf.utils.models import device_of

TOKENS = 16
"""Tokens read of a caption."""
GRID = 8
"""Rows and columns that a UNet works on: larger pictures go through it folded."""


class FoldedUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A UNet on pictures whose neighbouring pixels are folded into channels: full size costs no convolution.

    Args:
        sample_size (`int`): Of pictures, in pixels.
        in_channels (`int`): 1 for grey, 3 for colours.
        fold (`int`): Pixels of a side of what becomes one place; it divides the size.
        width (`int`): Channels of the UNet, at half size twice as many.
    """

    @register_to_config
    def __init__(self, sample_size: int, in_channels: int, fold: int, width: int):
        super().__init__()
        self.fold = fold
        self.unet = _unet(sample_size // fold, in_channels * fold**2, width)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> UNet2DConditionOutput:
        """Predict, `[images, channels, height, width]`."""
        folded = self.unet(pixel_unshuffle(sample, self.fold), timestep, encoder_hidden_states).sample
        return UNet2DConditionOutput(sample=pixel_shuffle(folded, self.fold))


class Pictures(BaseOutput):
    """What the pipeline draws: `images`, a list of PIL images."""

    images: list[Any]


class PixelPipeline(DiffusionPipeline):
    """Draws from captions without a VAE.

    Args:
        unet (`diffusers.UNet2DConditionModel`): Removes noise from pictures in pixels.
        scheduler (`diffusers.DDIMScheduler`): The noise.
        text_encoder (`transformers.CLIPTextModel`): Embeds captions.
        tokenizer (`transformers.PreTrainedTokenizerFast`): Its tokenizer.

    Example:
        >>> pipe("a bold handwritten three", num_images_per_prompt=4).images
    """

    unet: Any
    scheduler: Any
    text_encoder: Any
    tokenizer: Any

    def __init__(self, unet: Any, scheduler: Any, text_encoder: Any, tokenizer: Any):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)

    def encode_prompt(
        self,
        prompt: list[str],
        device: torch.device,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Embed prompts, `[prompts x images, tokens, features]`, and for guidance the empty prompt too."""
        found = self._embed(prompt, device).repeat_interleave(num_images_per_prompt, 0)
        return found, self._embed([""] * len(found), device) if do_classifier_free_guidance else None

    def _embed(self, prompts: list[str], device: torch.device) -> Tensor:
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": TOKENS}
        ids = self.tokenizer(prompts, return_tensors="pt", **options).input_ids
        return self.text_encoder(ids.to(device)).last_hidden_state

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        guidance_scale: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> Pictures:
        """Draw pictures, `num_images_per_prompt` of each prompt; guidance 1 is none."""
        device = device_of(self.unet)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        told, untold = self.encode_prompt(prompts, device, num_images_per_prompt, guidance_scale != 1)
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        x = torch.randn(len(told), channels, size, size, generator=generator).to(device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.scheduler.timesteps:
            predicted = self.unet(x, t, told).sample
            if untold is not None:
                without = self.unet(x, t, untold).sample
                predicted = without + guidance_scale * (predicted - without)
            x = self.scheduler.step(predicted, t, x).prev_sample
        arrays = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return Pictures(images=[Image.fromarray(a[..., 0] if channels == 1 else a) for a in arrays])


def tiny_pipeline(captions: list[str], size: int, channels: int, width: int, seed: int) -> PixelPipeline:
    """Make a pipeline that is yet to be trained, for pictures of `size` x `size` pixels.

    The text encoder stays as it is drawn: of a few hundred words, random features tell enough.

    Args:
        captions (`list[str]`): The tokenizer learns them.
        size (`int`): Of pictures, a multiple of 8.
        channels (`int`): 1 for grey, 3 for colours.
        width (`int`): Channels of the UNet, at half size twice as many.
        seed (`int`): Draws the weights.

    Raises:
        ValueError: If pictures of this size can't be folded.
    """
    fold = size // GRID
    if not fold or size % GRID:
        raise ValueError(f"size={size} must be a multiple of {GRID}.")
    tokenizer = train_tokenizer(captions, 4096)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=TOKENS, pad_token_id=0, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        unet = FoldedUNet(size, channels, fold, width) if fold > 1 else _unet(size, channels, width)
        # Noise can't be told through fewer channels than are folded into a place, but what pictures look like can.
        scheduler = DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="sample", timestep_spacing="trailing"
        )
        return PixelPipeline(unet.eval(), scheduler, CLIPTextModel(text).eval(), tokenizer)


def _unet(size: int, channels: int, width: int) -> Any:
    unet: Any = UNet2DConditionModel(
        sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=(width, 2 * width),
        layers_per_block=1, cross_attention_dim=64, attention_head_dim=4, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        # By attention alone captions are hardly listened to in a short training: they scale and shift features too.
        addition_embed_type="text", addition_embed_type_num_heads=4, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    # A last layer of zeros: the first predictions are the mean, and training is steady from the start.
    torch.nn.init.zeros_(unet.conv_out.weight)
    return unet
