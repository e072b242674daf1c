"""A diffusers pipeline that draws small pictures from captions in pixel space, and is trained in minutes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import CLIPTextConfig, CLIPTextModel

from hf_forward_inf.toys.tiny_models import train_tokenizer
from hf_forward_inf.utils.models import device_of

TOKENS = 16
"""Number of tokens of a caption; longer ones are truncated."""
GRID = 8
"""Height and width of the UNet's input; larger pictures are folded to it."""

GROUPS = 8
"""Groups of a UNet's channels that are normed together."""


class FoldedUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A UNet on pictures whose neighbouring pixels are folded into channels, so that convolutions are small.

    Args:
        sample_size (`int`): Height and width of pictures in pixels.
        in_channels (`int`): 1 for grey, 3 for colours.
        fold (`int`): Height and width of the block of pixels that is folded; it divides `sample_size`.
        width (`int`): Channels of the UNet at full size, twice as many at half size.
    """

    @register_to_config
    def __init__(self, sample_size: int, in_channels: int, fold: int, width: int):
        super().__init__()
        self.fold = fold
        self.unet = _unet(sample_size // fold, in_channels * fold**2, width)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> UNet2DConditionOutput:
        """Return the prediction, `[images, channels, height, width]`."""
        folded = self.unet(pixel_unshuffle(sample, self.fold), timestep, encoder_hidden_states).sample
        return UNet2DConditionOutput(sample=pixel_shuffle(folded, self.fold))


class Pictures(BaseOutput):
    """Output of the pipeline: `images`, a list of PIL images."""

    images: list[Any]


class PixelPipeline(DiffusionPipeline):
    """Draws from captions without a VAE.

    Args:
        unet (`diffusers.UNet2DConditionModel`): Removes noise from pictures in pixels.
        scheduler (`diffusers.DDIMScheduler`): The noise schedule.
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
        """Return embedded prompts, `[prompts x images, tokens, features]`, and for guidance the empty prompt's."""
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
        latents: Tensor | None = None,
    ) -> Pictures:
        """Draw `num_images_per_prompt` pictures of each prompt; `guidance_scale=1` is no guidance.

        `latents` is the noise that they begin with, `[pictures, channels, height, width]`; by default it is drawn.
        """
        device = device_of(self.unet)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        prompted, blank = self.encode_prompt(prompts, device, num_images_per_prompt, guidance_scale != 1)
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        if latents is None:
            latents = torch.randn(len(prompted), channels, size, size, generator=generator)
        x = latents.to(device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.scheduler.timesteps:
            predicted = self.unet(x, t, prompted).sample
            if blank is not None:
                without = self.unet(x, t, blank).sample
                predicted = without + guidance_scale * (predicted - without)
            x = self.scheduler.step(predicted, t, x).prev_sample
        arrays = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return Pictures(images=[Image.fromarray(a[..., 0] if channels == 1 else a) for a in arrays])


def tiny_pipeline(captions: list[str], size: int, channels: int, width: int, seed: int) -> PixelPipeline:
    """Return an untrained pipeline for pictures of `size` x `size` pixels, around a UNet; see [`pipeline_of`].

    Args:
        captions (`list[str]`): Captions that the tokenizer is trained on.
        size (`int`): Height and width of pictures in pixels, a multiple of 8.
        channels (`int`): 1 for grey, 3 for colours.
        width (`int`): Channels of the UNet at full size, twice as many at half size.
        seed (`int`): Seed of the weights.

    Raises:
        ValueError: If `size` is not a multiple of 8.
    """
    return pipeline_of(partial(unet_of, size, channels, width), captions, seed)


def unet_of(size: int, channels: int, width: int) -> Any:
    """Return an untrained UNet of pixels, whose weights are drawn from torch's generator; see [`tiny_pipeline`]."""
    fold = size // GRID
    if not fold or size % GRID:
        raise ValueError(f"size={size} must be a multiple of {GRID}.")
    return FoldedUNet(size, channels, fold, width) if fold > 1 else _unet(size, channels, width)


def pipeline_of(make: Callable[[], nn.Module], captions: list[str], seed: int) -> PixelPipeline:
    """Return an untrained pipeline around a denoiser of pixels.

    The text encoder is never trained: random features suffice to distinguish a few hundred words.

    Args:
        make (`Callable`): Returns the denoiser; its weights are drawn from torch's generator.
        captions (`list[str]`): Captions that the tokenizer is trained on.
        seed (`int`): Seed of the weights.
    """
    tokenizer = train_tokenizer(captions, 4096)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=TOKENS, pad_token_id=0, bos_token_id=0, eos_token_id=1,
        )  # fmt: skip
        denoiser = make()
        # With fewer channels than folded pixels a denoiser can't represent noise, but it can represent pictures.
        scheduler = DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="sample", timestep_spacing="trailing"
        )
        return PixelPipeline(denoiser.eval(), scheduler, CLIPTextModel(text).eval(), tokenizer)


def _unet(size: int, channels: int, width: int) -> Any:
    unet: Any = UNet2DConditionModel(
        sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=(width, 2 * width),
        layers_per_block=1, cross_attention_dim=64, attention_head_dim=4, norm_num_groups=GROUPS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        # By attention alone, captions have little effect after a short training: they also scale and shift features.
        addition_embed_type="text", addition_embed_type_num_heads=4, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    # With a last layer of zeros the first predictions are the mean, and training is stable from the start.
    torch.nn.init.zeros_(unet.conv_out.weight)
    return unet
