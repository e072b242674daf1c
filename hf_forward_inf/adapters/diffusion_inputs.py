"""What runs before the denoiser, once a row: the VAE, and the text encoders, which tell it what to draw."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.tokenization_utils_base import LARGE_INTEGER

from hf_forward_inf.adapters.base import Batch
from hf_forward_inf.adapters.language import tokenizer_state
from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model
from hf_forward_inf.utils.images import UnreadableImage, pixels, read_image
from hf_forward_inf.utils.models import device_of, evaluating

DENOISERS = ("unet", "transformer")
"""A pipeline's component that removes noise: the first that it has."""
ENCODERS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
"""A pipeline's components that images and captions go through before the denoiser."""
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
NESTED = "added_cond_kwargs."
"""Begins the names of conditions that a UNet takes in a dictionary (SDXL)."""


def conditions(pipe: Any, told: list[Any], size: tuple[int, int]) -> dict[str, Tensor]:
    """Give what a denoiser is told beside the noisy image, without classifier-free guidance: a loss has none.

    Args:
        pipe (`diffusers.DiffusionPipeline`): With an `encode_prompt` of its own, for captions; or of a model of
            classes.
        told (`list`): Captions of the rows, an empty prompt where there is none; or classes, and the class that
            stands for none.
        size (`tuple[int, int]`): Height and width of the images in pixels, which SDXL is told.

    Returns:
        `dict[str, Tensor]`: By the denoiser's argument, `[rows, ...]`.
    """
    if not reads_captions(pipe):
        return {"class_labels": torch.tensor([count_classes(pipe) if label is None else int(label) for label in told])}
    captions = texts_of(told)
    asked = {"prompt": captions, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    known = inspect.signature(pipe.encode_prompt).parameters
    asked |= {name: None for name in ("prompt_2", "prompt_3") if name in known}
    embeddings, _, *more = pipe.encode_prompt(**asked, device=device_of(pipe.text_encoder))
    found = {"encoder_hidden_states": embeddings}
    if more and denoiser_name(pipe) == "unet":
        ids = torch.tensor([*size, 0, 0, *size], dtype=more[0].dtype, device=more[0].device)
        found[f"{NESTED}text_embeds"], found[f"{NESTED}time_ids"] = more[0], ids.expand(len(captions), -1)
    elif more:
        found["pooled_projections"] = more[0]
    return found


def reads_captions(pipe: Any) -> bool:
    """Whether a pipeline draws what a text says."""
    return hasattr(pipe, "encode_prompt") and getattr(pipe, "text_encoder", None) is not None


def denoiser_name(pipe: Any) -> str | None:
    """Name the component that removes noise, `None` where there is none."""
    return next((name for name in DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)), None)


def denoiser_of(pipe: Any) -> Any:
    """Give the module that removes noise, `None` where there is none."""
    name = denoiser_name(pipe)
    return name and getattr(pipe, name)


def count_classes(pipe: Any) -> int:
    """How many classes a pipeline draws by number (DiT), 0 if it draws none; the next number stands for no class."""
    return 0 if reads_captions(pipe) else getattr(denoiser_of(pipe).config, "num_embeds_ada_norm", None) or 0


def as_arguments(conditions: Batch) -> Batch:
    """Put conditions into the form in which a denoiser takes them."""
    nested = {name.removeprefix(NESTED): value for name, value in conditions.items() if name.startswith(NESTED)}
    plain = {name: value for name, value in conditions.items() if not name.startswith(NESTED)}
    return {**plain, NESTED[:-1]: nested} if nested else plain


def state_of_encoders(pipe: Any) -> str:
    """Name everything that encodings depend on."""
    modules = [getattr(pipe, name, None) for name in ENCODERS]
    tokenizers = [getattr(pipe, name, None) for name in TOKENIZERS]
    return fingerprint(
        [module and fingerprint_of_model(module) for module in modules],
        [tokenizer and tokenizer_state(tokenizer) for tokenizer in tokenizers],
    )


@contextmanager
def encoders_evaluating(pipe: Any) -> Iterator[None]:
    """Switch dropout off in what runs before the denoiser, and keep no graph.

    diffusers' warnings are held back: it tells of every caption that it cuts off.

    A VAE in float16 whose configuration says that it overflows there (SDXL's) runs in float32, as in its pipeline.
    """
    encoders = (getattr(pipe, name, None) for name in ENCODERS)
    vae: Any = getattr(pipe, "vae", None)
    overflows = vae is not None and vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    from diffusers.utils import logging

    told = logging.get_verbosity()
    with evaluating(*(encoder for encoder in encoders if encoder is not None)), torch.no_grad():
        try:
            logging.set_verbosity_error()
            if overflows:
                vae.float()
            yield
        finally:
            logging.set_verbosity(told)
            if overflows:
                vae.half()  # bit for bit what it was


def values_of(images: list[Any], size: tuple[int, int], channels: int) -> tuple[list[np.ndarray], str]:
    """Read the images of a row.

    Returns:
        `tuple`: Pixels from -1 to 1 of those that can be read, float32 `[channels, height, width]` each; of a row
        without any, NaN. And why the others can't be, empty where there are none.
    """
    values, why = [], []
    for i, image in enumerate(images):
        try:
            values.append(pixels(read_image(image), size, channels).astype(np.float32) / 127.5 - 1)
        except UnreadableImage as error:
            name = image.get("path") if isinstance(image, dict) else image if isinstance(image, str) else None
            place = f"image {i + 1} of {len(images)}, " if len(images) > 1 else ""
            why.append(f"{place}{f'{name}, ' if name and name not in str(error) else ''}{error}")
    return values or [np.full((channels, *size), np.nan, dtype=np.float32)], "; ".join(why)


def too_long(pipe: Any, captions: list[Any]) -> list[bool]:
    """Tell which captions have more tokens than the text encoder reads: their ends are cut off."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None or not reads_captions(pipe) or tokenizer.model_max_length >= LARGE_INTEGER:
        return [False] * len(captions)
    most = tokenizer.model_max_length
    read = tokenizer(texts_of(captions), truncation=True, max_length=most + 1)
    return [len(ids) > most for ids in read.input_ids]


def texts_of(captions: list[Any]) -> list[str]:
    """Make prompts of captions; one that is missing is empty."""
    return ["" if caption is None else str(caption) for caption in captions]


def latents_of(vae: Any, images: np.ndarray) -> Tensor:
    """Encode images; without a VAE they are their own latents.

    Args:
        vae (`torch.nn.Module`, *optional*): The mean of its latents is taken, so that a row has one loss.
        images (`np.ndarray`): float32 from -1 to 1, `[images, channels, height, width]`.

    Returns:
        `Tensor`: float32 on the CPU, scaled as the denoiser reads them.
    """
    tensor = torch.from_numpy(images)
    if vae is None:
        return tensor
    given = vae.encode(tensor.to(device_of(vae), vae.dtype))
    latents = given.latent_dist.mode() if hasattr(given, "latent_dist") else given.latents
    shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, getattr(vae.config, "scaling_factor", 1.0)
    return ((latents - shift) * scale).float().cpu()
