"""What runs before the denoiser, once a row: the VAE and the text encoders."""

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


def conditions(pipe: Any, given: list[Any], size: tuple[int, int]) -> dict[str, Tensor]:
    """Return what a denoiser reads besides the noisy image, without classifier-free guidance: a loss has none.

    Args:
        pipe (`diffusers.DiffusionPipeline`): With an `encode_prompt` of its own, for captions; or of a model of
            classes.
        given (`list`): Captions of the rows, an empty prompt where there is none; or classes, and the class that
            stands for none.
        size (`tuple[int, int]`): Height and width of the images in pixels, which SDXL reads.

    Returns:
        `dict[str, Tensor]`: By the denoiser's argument, `[rows, ...]`.
    """
    if not reads_captions(pipe):
        return {
            "class_labels": torch.tensor([count_classes(pipe) if label is None else int(label) for label in given])
        }
    captions = texts_of(given)
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
    """Return the name of the component that removes noise, `None` where there is none."""
    return next((name for name in DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)), None)


def denoiser_of(pipe: Any) -> Any:
    """Return the module that removes noise, `None` where there is none."""
    name = denoiser_name(pipe)
    return name and getattr(pipe, name)


def count_classes(pipe: Any) -> int:
    """Return how many classes a pipeline draws by number (DiT, a UNet with `num_class_embeds`), 0 if it draws none."""
    config = denoiser_of(pipe).config
    counts = (getattr(config, name, None) for name in ("num_embeds_ada_norm", "num_class_embeds"))
    return 0 if reads_captions(pipe) else next((count for count in counts if count), 0)


def has_no_class(pipe: Any) -> bool:
    """Whether a pipeline of classes draws without one too: in DiT, the number after the last class means none."""
    return bool(getattr(denoiser_of(pipe).config, "num_embeds_ada_norm", None))


def unknown_input(pipe: Any) -> str | None:
    """Return what a UNet reads or was trained on that is not given to it here, `None` where there is nothing."""
    config = denoiser_of(pipe).config
    if kind := getattr(config, "class_embed_type", None):
        return f"classes of class_embed_type={kind!r}"
    if reads_captions(pipe) and getattr(config, "num_class_embeds", None):
        return "a class besides the caption"
    if getattr(config, "time_cond_proj_dim", None) is not None:
        return "the scale of guidance (it was distilled, not trained by this loss)"
    if getattr(config, "addition_embed_type", None) not in (None, "text", "text_time"):
        return f"conditions of addition_embed_type={config.addition_embed_type!r}"
    if kind := getattr(config, "encoder_hid_dim_type", None):
        return f"conditions of encoder_hid_dim_type={kind!r}"
    if getattr(pipe.config, "requires_aesthetics_score", False):
        return "an aesthetics score"
    return None


def as_arguments(conditions: Batch) -> Batch:
    """Return conditions in the form in which a denoiser takes them."""
    nested = {name.removeprefix(NESTED): value for name, value in conditions.items() if name.startswith(NESTED)}
    plain = {name: value for name, value in conditions.items() if not name.startswith(NESTED)}
    return {**plain, NESTED[:-1]: nested} if nested else plain


def state_of_encoders(pipe: Any) -> str:
    """Return a fingerprint of everything that encodings depend on."""
    modules = [getattr(pipe, name, None) for name in ENCODERS]
    tokenizers = [getattr(pipe, name, None) for name in TOKENIZERS]
    return fingerprint(
        [module and fingerprint_of_model(module) for module in modules],
        [tokenizer and tokenizer_state(tokenizer) for tokenizer in tokenizers],
    )


@contextmanager
def encoders_evaluating(pipe: Any) -> Iterator[None]:
    """Switch off dropout in what runs before the denoiser, and record no graph.

    diffusers' warnings are silenced: there is one for every caption that it truncates.

    A VAE in float16 whose configuration says that it overflows there (SDXL's) runs in float32, as in its pipeline.
    """
    encoders = (getattr(pipe, name, None) for name in ENCODERS)
    vae: Any = getattr(pipe, "vae", None)
    overflows = vae is not None and vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    with evaluating(*(encoder for encoder in encoders if encoder is not None)), torch.no_grad():
        try:
            logging.set_verbosity_error()
            if overflows:
                vae.float()
            yield
        finally:
            logging.set_verbosity(verbosity)
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
    """Return which captions have more tokens than the text encoder reads: their ends are cut off."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None or not reads_captions(pipe) or tokenizer.model_max_length >= LARGE_INTEGER:
        return [False] * len(captions)
    most = tokenizer.model_max_length
    read = tokenizer(texts_of(captions), truncation=True, max_length=most + 1)
    return [len(ids) > most for ids in read.input_ids]


def texts_of(captions: list[Any]) -> list[str]:
    """Return captions as prompts; one that is missing is empty."""
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
    encoded = vae.encode(tensor.to(device_of(vae), vae.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, getattr(vae.config, "scaling_factor", 1.0)
    mean, deviation = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
    if mean is not None and deviation is not None:  # by channel, instead of one shift for all
        shift, by_channel = (latents.new_tensor(value).view(1, -1, 1, 1) for value in (mean, deviation))
        scale = scale / by_channel
    return ((latents - shift) * scale).float().cpu()
