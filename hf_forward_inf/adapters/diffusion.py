"""Diffusion models: Stable Diffusion and its kin, pixel-space and unconditional UNets, flow-matching transformers."""

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from hf_forward_inf.adapters.base import Adapter, Batch, Forward, Rows
from hf_forward_inf.adapters.diffusion_inputs import (
    ENCODERS,
    as_arguments,
    conditions,
    count_classes,
    denoiser_name,
    denoiser_of,
    encoders_evaluating,
    has_no_class,
    latents_of,
    reads_captions,
    state_of_encoders,
    too_long,
    unknown_input,
    values_of,
)
from hf_forward_inf.adapters.diffusion_noise import draw, noising_for
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.images import PIXELS_A_TOKEN, images_of, undecoded
from hf_forward_inf.utils.models import is_quantised, peft_parameters
from hf_forward_inf.utils.progress import shown
from hf_forward_inf.utils.validation import listed

ENCODED_TOGETHER = 16
"""Number of rows in one batch of the VAE and the text encoder."""
ASKED = "asked"
"""Feature of encoded queries that have other timesteps than candidates: their number, by which caches differ."""
UNUSED = ("safety_checker", "image_encoder")
"""Components that a pipeline may have and that the loss does not depend on."""


class DiffusionAdapter(Adapter):
    """The denoising loss, as in training: the mean squared error of what the denoiser predicts.

    A row is an image with its caption; for a model of classes (DiT, a UNet with `num_class_embeds`), an image with its
    class; for an unconditional model, an image. Images are resized to the model's size, their longer side cropped
    equally at both ends. The VAE (the mean of its latents) and the text encoder run once a row, and their output is
    cached; afterwards only the denoiser runs. Several images in one row, a list, share the caption: a query of
    pictures drawn from one prompt. Their losses are averaged.

    The loss is a mean over times, one drawn in each of `timesteps` equal strata of the schedule, and summed over
    latent pixels, its terms. Times and noise belong to the row: they come from `seed`, image and caption, so they are
    the same for every model, every query, any number of processes and after a resume. Guidance has no part in it.

    A row whose image can't be read (corrupt, missing, a web address, larger than [`images.MAX_PIXELS`]) is named, has
    no score, and the run continues. In a list of several images, only that image is left out.

    The weights are the pipeline's own. A pipeline that one of diffusers' trainers saved after training with an
    exponential moving average (`--use_ema`) holds the averaged weights. A checkpoint from the middle of training holds
    both: load its folder `unet_ema` with the denoiser's class, and put it into the pipeline.

    Args:
        pipe (`diffusers.DiffusionPipeline`): Its `unet` or `transformer` is the model; with `vae`, or in pixels.
        timesteps (`int`, defaults to 8): Number of times at which a candidate's loss is computed. More cost more and
            make scores less noisy, although theta and theta_K see the same noise.
        query_timesteps (`int`, *optional*): Number of times at which a query's loss is computed. Of a query only the
            gradient is taken, `timesteps` times at once: more cost little, and predict retraining better
            (`recipes/diffusion_lds.py`). A multiple of `timesteps` contains the times and noise of a candidate with
            the same image and caption. Defaults to four times as many.
        image_column (`str`, defaults to `"image"`): Column of images, or of lists of images: an `Image` feature,
            paths, or arrays of integers from 0 to 255.
        caption_column (`str`, defaults to `"caption"`): Column of captions; an empty one is an empty prompt.
        label_column (`str`, defaults to `"label"`): Column of classes, for a model of classes. `None` means no class,
            for a model that has such an input (DiT).
        size (`tuple[int, int]`, *optional*): Height and width of images in pixels. Defaults to the model's.
        seed (`int`, defaults to 0): Draws times and noise.

    Raises:
        TypeError: If the pipeline has no denoiser, or it is not known how it was trained or what it reads.
        ValueError: If the model states no size, or `timesteps` or `query_timesteps` is below 1.
    """

    skips_unreadable = True
    default_units = "base_loss"
    asked = False
    """Whether rows are queries, with timesteps of their own."""
    at_once: int
    """Number of a candidate's timesteps, which come first among a query's."""

    def __init__(
        self,
        pipe: Any,
        *,
        timesteps: int = 8,
        query_timesteps: int | None = None,
        image_column: str = "image",
        caption_column: str = "caption",
        label_column: str = "label",
        size: tuple[int, int] | None = None,
        seed: int = 0,
    ):
        if not is_diffusion(pipe):
            raise TypeError(f"{type(pipe).__name__} has no unet or transformer that removes noise from images.")
        self.query_timesteps = 4 * timesteps if query_timesteps is None else query_timesteps
        for name, count in (("timesteps", timesteps), ("query_timesteps", self.query_timesteps)):
            if count < 1:
                raise ValueError(f"{name}={count} must be at least 1.")
        super().__init__(denoiser_of(pipe))
        self.pipe, self.timesteps, self.seed = pipe, timesteps, seed
        self.at_once = timesteps
        self.model: Any
        self.vae = getattr(pipe, "vae", None)
        _check_kind(pipe)
        self.noising = noising_for(pipe.scheduler)
        # The noisy image is the denoiser's first argument, `sample` or `hidden_states`.
        self.argument = next(iter(inspect.signature(self.model.forward).parameters))
        self.classes = count_classes(pipe)
        conditions_column = [caption_column] if reads_captions(pipe) else [label_column] if self.classes else []
        self.columns = (*conditions_column, image_column)
        scale = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.size = size or _size(self.model, scale)
        self.shape = (self.model.config.in_channels, self.size[0] // scale, self.size[1] // scale)

    @cached_property
    def _state(self) -> str:
        return state_of_encoders(self.pipe)

    @property
    def cache_key(self) -> str:
        """Columns, size, times, seed, schedule, and the weights of VAE and text encoder."""
        asked = (ASKED, self.at_once) if self.asked else ()  # queries are encoded with one feature more
        return fingerprint(
            self.columns, self.size, self.timesteps, self.seed, self.noising.cache_key, self._state, *asked
        )

    def for_queries(self, columns: Iterable[str]) -> Self:
        """Return the adapter of queries, whose losses have timesteps of their own."""
        if self.asked or self.query_timesteps == self.timesteps:
            return self
        other = copy.copy(self)
        other.timesteps, other.asked = self.query_timesteps, True
        return other

    def for_encoded(self, features: Iterable[str]) -> Self:
        """Return what [`for_queries`] returned for queries with these features."""
        return self.for_queries(()) if ASKED in features else self

    def prepare(self, rows: Dataset) -> Dataset:
        """Leave decoding to `encode`: one corrupt image must not end the run.

        Raises:
            ValueError: If a class is none of the model's. It names the rows.
        """
        if self.classes:
            labels = rows[self.columns[0]][:]
            known = {*range(self.classes), *([None] if has_no_class(self.pipe) else [])}
            odd = [i for i, label in enumerate(labels) if label not in known]
            if odd:
                raise ValueError(
                    f"Column `{self.columns[0]}` holds {labels[odd[0]]!r} in {listed(np.array(odd))}; the model's "
                    f"classes are the integers from 0 to {self.classes - 1}."
                )
        return undecoded(rows, self.columns[-1])

    def encode(self, rows: Rows) -> Rows:
        """Encode images as latents and captions as embeddings, in bytes: Arrow reads them without a copy."""
        given = rows[self.columns[0]] if len(self.columns) > 1 else None
        pictures = [images_of(value) or [None] for value in rows[self.columns[-1]]]
        encoded: Rows = {"tensors": [], "images": [], "unreadable": []}
        channels = self.shape[0] if self.vae is None else self.vae.config.in_channels
        with encoders_evaluating(self.pipe):
            for start in range(0, len(pictures), ENCODED_TOGETHER):
                part = slice(start, start + ENCODED_TOGETHER)
                read, why = zip(*(values_of(images, self.size, channels) for images in pictures[part]), strict=True)
                encoded["tensors"] += map(save, self._encoded(read, None if given is None else given[part]))
                encoded["images"] += map(len, read)
                encoded["unreadable"] += why
        encoded["terms"] = [self.shape[1] * self.shape[2]] * len(pictures)
        encoded["truncated"] = too_long(self.pipe, given or [None] * len(pictures))
        return {**encoded, ASKED: [self.timesteps] * len(pictures)} if self.asked else encoded

    def _encoded(self, read: Sequence[list[np.ndarray]], given: list[Any] | None) -> list[dict[str, Tensor]]:
        counts = [len(images) for images in read]
        latents = latents_of(self.vae, np.stack([array for images in read for array in images])).split(counts)
        conditional = {} if given is None else conditions(self.pipe, given, self.size)
        found = []
        for i, images in enumerate(read):
            # An empty caption and none are one prompt, and so one noise.
            words = "" if given is None or given[i] is None else given[i]
            keys = [int(Hasher.hash_bytes([f"{self.seed} {words}".encode(), a.tobytes()])[:15], 16) for a in images]
            row = {name: values[i].cpu().contiguous() for name, values in conditional.items()}
            found.append(
                {
                    "latents": latents[i].clone(memory_format=torch.contiguous_format),
                    "keys": torch.tensor(keys, dtype=torch.int64),
                    **{name: value.float() if value.is_floating_point() else value for name, value in row.items()},
                }
            )
        return found

    def lengths(self, features: Rows | Dataset) -> np.ndarray:
        """Return the number of latent pixels that the denoiser reads, `[rows, 1]`, in units of 64."""
        pixels = self.timesteps * self.shape[1] * self.shape[2]
        return np.array([[max(1, images * pixels // PIXELS_A_TOKEN)] for images in features["images"]])

    def collate(self, features: Rows) -> Batch:
        """Stack latents, `[rows, images, ...]`, and draw each image's noise and times."""
        rows = [load(bytes(tensors)) for tensors in features["tensors"]]
        first = None if self.timesteps % self.at_once else self.at_once
        most = max(features["images"])
        batch: Batch = {
            "latents": torch.zeros(len(rows), most, *self.shape),
            "noise": torch.zeros(len(rows), most, self.timesteps, *self.shape),
            "parts": torch.zeros(len(rows), most, self.timesteps),
            "weights": torch.zeros(len(rows), most),
        }
        for i, row in enumerate(rows):
            count = len(row["latents"])
            batch["latents"][i, :count], batch["weights"][i, :count] = row.pop("latents"), 1 / count
            for j, key in enumerate(row.pop("keys").tolist()):
                batch["parts"][i, j], batch["noise"][i, j] = draw(key, self.timesteps, self.shape, first)
        return {**batch, **{name: torch.stack([row[name] for row in rows]) for name in rows[0]}}

    def term_losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Compute every latent pixel's squared error, averaged over channels, times and images, `[rows, pixels]`."""
        predicted, target = self.predicted(forward, batch)
        errors = (predicted - target).square().mean(dim=3).flatten(3)
        return torch.einsum("ritp,ri->rp", errors, batch["weights"]) / errors.shape[2]

    def predicted(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the denoiser's predictions and their targets, `[rows, images, times, channels, ...]`.

        With gradients, the times of a query are run in parts, and again in the backward pass: they take no more memory
        than those of a candidate.
        """
        if not (self.asked and torch.is_grad_enabled()):
            return self._predicted(forward, batch)
        drawn = zip(batch["noise"].split(self.at_once, dim=2), batch["parts"].split(self.at_once, dim=2), strict=True)
        some = [
            checkpoint(self._predicted, forward, {**batch, "noise": noise, "parts": parts}, use_reentrant=False)
            for noise, parts in drawn
        ]
        outputs, targets = (torch.cat(one, dim=2) for one in zip(*some, strict=True))
        return outputs, targets

    def _predicted(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        noise, shape = batch["noise"], batch["noise"].shape
        latents = batch["latents"][:, :, None].expand(shape).flatten(0, 2)
        times = self.noising.times(batch["parts"].flatten())
        copies = shape[1] * shape[2]
        own = ("latents", "noise", "parts", "weights")
        conditional = {name: value.repeat_interleave(copies, 0) for name, value in batch.items() if name not in own}
        flat = noise.flatten(0, 2)
        given = {self.argument: self.noising.noisy(latents, flat, times), **conditional}
        dtype = next(self.model.parameters()).dtype
        given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
        output = forward(timestep=times, **as_arguments(given)).sample.float()
        # Models that learn the variance too return it in further channels.
        output = output[:, : self.shape[0]].view(shape)
        return output, self.noising.target(latents, flat, times).view(shape)

    def outputs_and_loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Compute the predictions for rows that could be read, `[pixels, channels]`, and return with them their loss.

        At one of each row's times: the curvature is a mean over examples and times alike, and more examples are worth
        more than more times.
        """
        readable = batch["latents"].isfinite().flatten(1).all(dim=1)
        batch = {name: value[readable] for name, value in batch.items()}
        # The first time's place within its stratum draws which of the times counts.
        chosen = (batch["parts"][:, :, 0] * self.timesteps**2).long() % self.timesteps
        batch["parts"] = batch["parts"].gather(2, chosen[..., None])
        at = chosen.view(*chosen.shape, *[1] * (len(self.shape) + 1)).expand(-1, -1, 1, *self.shape)
        batch["noise"] = batch["noise"].gather(2, at)
        predicted, target = (
            value.movedim(3, -1).reshape(-1, self.shape[0]) for value in self.predicted(forward, batch)
        )
        shares = batch["weights"].flatten().repeat_interleave(self.shape[1] * self.shape[2]) / self.shape[0]
        return predicted, lambda outputs: ((outputs - target).square().sum(1) * shares).sum()

    def sampled_output_gradients(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Compute the loss's gradients for targets drawn around the predictions: their covariance is its Hessian."""
        drawn = torch.randn(outputs.shape, generator=generator).to(outputs.device)
        return drawn * (2 / self.shape[0]) ** 0.5

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Mean squared difference of predictions, the KL divergence if losses are negative log-likelihoods."""
        return (before - after).float().square().sum(1) / self.shape[0]

    @torch.no_grad()
    def representation(self, batch: Batch) -> Tensor:
        """Return latents, averaged over a row's images, `[rows, features]`."""
        return torch.einsum("richw,ri->rchw", batch["latents"], batch["weights"]).flatten(1)

    def term_texts(self, features: Rows) -> list[list[str]]:
        """Return each latent pixel's place, `row,column`."""
        places = [f"{y},{x}" for y in range(self.shape[1]) for x in range(self.shape[2])]
        return [places] * len(features["terms"])

    def answer(self, rows: Rows, num_images: int = 4, seed: int = 0, **options: Any) -> list[list[Any]]:
        """Draw pictures.

        Args:
            rows (`dict[str, list]`): With captions or classes; without columns for an unconditional model.
            num_images (`int`, defaults to 4): Number of pictures of each row.
            seed (`int`, defaults to 0): Draws the noise they begin with, the same for every row.
            **options: Of the pipeline: `num_inference_steps`, `guidance_scale`, ...

        Returns:
            `list[list[PIL.Image.Image]]`: Pictures of each row.

        Raises:
            NotImplementedError: If the pipeline does not draw by class.
        """
        if self.classes and "class_labels" not in inspect.signature(self.pipe.__call__).parameters:
            raise NotImplementedError(
                f"{type(self.pipe).__name__} does not draw by class: give queries their `{self.columns[-1]}`."
            )
        given = rows[self.columns[0]] if len(self.columns) > 1 else [None]
        self.pipe.set_progress_bar_config(disable=True)  # one for each picture
        return [
            self.pipe(
                **self._request(value, num_images), generator=torch.Generator().manual_seed(seed), **options
            ).images
            for value in shown(given, f"drawing {num_images} pictures each", len(given), "queries")
        ]

    def _request(self, given: Any, num_images: int) -> dict[str, Any]:
        """Return what the pipeline is asked to draw."""
        if reads_captions(self.pipe):
            return {"prompt": given, "num_images_per_prompt": num_images}
        return {"class_labels": [given] * num_images} if self.classes else {"batch_size": num_images}

    def with_model(self, model: nn.Module) -> Self:
        """Return the same adapter, with a pipeline of its own, for another denoiser."""
        other = super().with_model(model)
        other.pipe = type(self.pipe)(**{**self.pipe.components, str(denoiser_name(self.pipe)): model})
        return other

    def default_modules(self) -> list[str]:
        """Return the trained weights of a denoiser with LoRA, else everything."""
        return peft_parameters(self.model) or ["all"]

    def default_ascent(self, direction: str | None = None) -> dict[str, Any]:
        """Conjugate gradients: along the plain gradient all pictures point the same way.

        On 20 digits taught together and 200 candidates (`recipes/diffusion.py`), the exemplar ranks first for all 20
        queries, against 8 along the gradient, both as shares of the candidate's loss; as they are, for 1 and for none.
        (It is found by the caption more than by the picture: under another's caption, a drawing is traced to that
        caption's exemplar.) With a curvature of 128 pictures in place of 32, one time of each, training without some
        pictures is predicted better (`recipes/diffusion_lds.py`); preconditioned, better on digits, not on emoji.

        A step of a hundredth of the weights' norm, which is a little better on perceptrons of pixels, is too long on a
        UNet: it raises the losses of most pictures, by a third or more, and predicts little. In half precision it is
        as long nevertheless: a shorter step is lost to rounding (bfloat16, random UNet, 24 candidates: Spearman with
        float32's scores .81 to .91, against .99). A quantised denoiser moves along the gradient of a LoRA, since its
        weights have none.
        """
        if is_quantised(self.model):
            return {}
        radius = 1e-3 if next(self.model.parameters()).dtype == torch.float32 else 1e-2
        length = {"radius": radius, "relative": True}
        own = {"pcg": {"damping": 0.01, "sample": 256}, "cg": {"damping": 0.01, "sample": 128}}
        direction = direction or "cg"
        return length | {"direction": direction} | own.get(direction, {})


def is_diffusion(pipe: Any) -> bool:
    """Whether this is a pipeline around a denoiser."""
    return hasattr(pipe, "scheduler") and denoiser_of(pipe) is not None


def _check_kind(pipe: Any) -> None:
    """Raise a `TypeError` for pipelines with parts that are not run here, or whose denoiser reads more inputs."""
    denoiser, vae = denoiser_of(pipe), getattr(pipe, "vae", None)
    parts = {name for name, part in pipe.components.items() if isinstance(part, nn.Module) and part is not denoiser}
    if unknown := sorted(parts - {*ENCODERS, *UNUSED}):
        raise TypeError(f"{type(pipe).__name__} is not supported: it has {', '.join(unknown)}.")
    arguments = inspect.signature(denoiser.forward).parameters
    if vae is not None and denoiser.config.in_channels != vae.config.latent_channels:
        raise TypeError(
            f"{type(denoiser).__name__} reads {denoiser.config.in_channels} channels where the VAE returns "
            f"{vae.config.latent_channels}: inpainting and packed latents are not supported."
        )
    if denoiser_name(pipe) == "transformer" and (
        "pooled_projections" not in arguments if reads_captions(pipe) else not count_classes(pipe)
    ):
        raise TypeError(
            f"{type(denoiser).__name__} is not supported: of transformers, those of Stable Diffusion 3 and DiT are."
        )
    if what := unknown_input(pipe):
        raise TypeError(f"{type(denoiser).__name__} is not supported: it reads {what}.")


def _size(model: Any, scale: int) -> tuple[int, int]:
    sample = getattr(model.config, "sample_size", None)
    if sample is None:
        raise ValueError(f"{type(model).__name__} states no sample_size: give size=(height, width).")
    height, width = (sample, sample) if isinstance(sample, int) else sample
    return height * scale, width * scale
