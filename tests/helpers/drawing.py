"""Diffusion pipelines with tiny random weights, and pictures."""

from functools import wraps

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image as Pillow
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hf_forward_inf.toys.tiny_models import train_tokenizer

SMALL = {"layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}


def stable_diffusion(prediction_type="epsilon"):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red square", "a green square", "a blue square"], 300)
    tokenizer.model_max_length = 6
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=6, bos_token_id=0, eos_token_id=1, attention_dropout=0.1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, cross_attention_dim=16, attention_head_dim=4, **SMALL,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, safety_checker=None,
        scheduler=PNDMScheduler(prediction_type=prediction_type, skip_prk_steps=True, steps_offset=1),
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def unconditional(channels=1):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, **SMALL, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return DDPMPipeline(unet, DDPMScheduler())


def square(i, size=16):
    """A picture that no other number has."""
    pixels = np.full((size, size, 3), 255, dtype=np.uint8)
    pixels[2 : 6 + i % 5, 2 + i % 7 : 10] = (40 * i % 256, 90 * i % 256, 200 - i)
    return Pillow.fromarray(pixels)


def rows(count, first=0):
    colours = ("red", "green", "blue")
    numbers = range(first, first + count)
    return Dataset.from_dict(
        {"image": [square(i) for i in numbers], "caption": [f"a {colours[i % 3]} square" for i in numbers]},
        features=Features({"image": Image(), "caption": Value("string")}),
    )


def _clip(kind, tokenizer):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=6, projection_dim=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return kind(config)


def stable_diffusion_xl():
    base = stable_diffusion()
    unet = UNet2DConditionModel(
        sample_size=8, cross_attention_dim=32, attention_head_dim=(2, 4), **SMALL, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=base.vae, unet=unet, scheduler=EulerDiscreteScheduler(timestep_spacing="leading"),
        tokenizer=base.tokenizer, tokenizer_2=base.tokenizer,
        text_encoder=_clip(CLIPTextModel, base.tokenizer),
        text_encoder_2=_clip(CLIPTextModelWithProjection, base.tokenizer),
    )  # fmt: skip


def stable_diffusion_3():
    base = stable_diffusion()
    base.vae.register_to_config(shift_factor=0.06)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=8,
    )  # fmt: skip
    encoders = [_clip(CLIPTextModelWithProjection, base.tokenizer) for _ in range(2)]
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), vae=base.vae,
        text_encoder=encoders[0], text_encoder_2=encoders[1], text_encoder_3=None,
        tokenizer=base.tokenizer, tokenizer_2=base.tokenizer, tokenizer_3=None,
    )  # fmt: skip


def classes(count=1000):
    """A pipeline that is told a class (its guidance is fixed to 1000 of them), and learns the variance too."""
    base = stable_diffusion()
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, num_embeds_ada_norm=count,
    )  # fmt: skip
    return DiTPipeline(transformer=transformer, vae=base.vae, scheduler=DDPMScheduler())


def counted(module, method="forward"):
    """Count the rows that a module's method is given."""
    calls, kind = [], type(module)
    inner = getattr(kind, method)

    @wraps(inner)
    def outer(self, *args, **kwargs):
        calls.append(len(args[0] if args else next(iter(kwargs.values()))))
        return inner(self, *args, **kwargs)

    # By its class: losses of a module with a `forward` of its own are not cached.
    module.__class__ = type(kind.__name__, (kind,), {method: outer, "__module__": kind.__module__})
    return calls
