"""How a diffusion model was trained: how much noise is added, and what is to be predicted."""

from typing import Any, Protocol

import torch
from torch import Tensor

from hf_forward_inf.utils.fingerprints import fingerprint


class Noising(Protocol):
    """Adds noise as in training. Times are those that the denoiser reads, `[n]`, for images `[n, channels, ...]`."""

    def times(self, parts: Tensor) -> Tensor:
        """Return the times at parts (from 0, no noise, up to 1) of the schedule."""
        ...

    def noisy(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return images with the noise of their times."""
        ...

    def target(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return what the denoiser is to predict."""
        ...

    @property
    def cache_key(self) -> str:
        """Everything that it depends on, as text."""
        ...


class Diffusion:
    """DDPM's noise: x_t = sqrt(a_t) x + sqrt(1 - a_t) e; the target is e, v or x, as the scheduler's config says."""

    def __init__(self, scheduler: Any):
        from diffusers import DDPMScheduler

        # Samplers rescale and reorder; DDPM's scheduler adds noise as trainers do, from the same configuration.
        self.scheduler: Any = DDPMScheduler.from_config(scheduler.config)
        self.kind = self.scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"prediction_type={self.kind!r} is not supported: epsilon, v_prediction and sample are.")

    @property
    def cache_key(self) -> str:
        """The schedule and the target."""
        return fingerprint(self.kind, self.scheduler.alphas_cumprod.tolist())

    def times(self, parts: Tensor) -> Tensor:
        """Return whole timesteps from 0."""
        steps = self.scheduler.config.num_train_timesteps
        return (parts * steps).long().clamp(max=steps - 1)

    def noisy(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return x_t."""
        return self.scheduler.add_noise(images, noise, times)

    def target(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return e, v = sqrt(a_t) e - sqrt(1 - a_t) x, or x."""
        if self.kind == "v_prediction":
            return self.scheduler.get_velocity(images, noise, times)
        return noise if self.kind == "epsilon" else images


class Flow:
    """Flow matching: x_t = (1 - t) x + t e, and the target is e - x; the denoiser reads t x 1000."""

    def __init__(self, scheduler: Any):
        self.steps = scheduler.config.num_train_timesteps

    @property
    def cache_key(self) -> str:
        """The scale of times."""
        return fingerprint("flow", self.steps)

    def times(self, parts: Tensor) -> Tensor:
        """Return times from 0 to the number of steps."""
        return parts * self.steps

    def noisy(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return x_t."""
        t = (times / self.steps).view(-1, *[1] * (images.dim() - 1))
        return (1 - t) * images + t * noise

    def target(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return e - x."""
        return noise - images


def noising_for(scheduler: Any) -> Noising:
    """Return how a model was trained, according to its pipeline's scheduler.

    Raises:
        TypeError: If the scheduler is of neither kind.
    """
    if hasattr(scheduler, "alphas_cumprod"):
        return Diffusion(scheduler)
    if "FlowMatch" in type(scheduler).__name__:
        return Flow(scheduler)
    raise TypeError(
        f"{type(scheduler).__name__} is not supported: schedulers of DDPM's family (with alphas_cumprod) and of flow "
        "matching are."
    )


def draw(key: int, parts: int, shape: tuple[int, ...], first: int | None = None) -> tuple[Tensor, Tensor]:
    """Return an image's times and noises, the same for the same key on every machine.

    Args:
        key (`int`): Seeds the draw.
        parts (`int`): Strata of the schedule; one time is drawn in each.
        shape (`tuple[int, ...]`): Of the image.
        first (`int`, *optional*): A divisor of `parts`: the times and noises of that many strata come first, and the
            rest are drawn in the finer strata that these leave empty.

    Returns:
        `tuple`: Parts of the schedule, from 0 to 1, `[parts]`; noise, `[parts, *shape]`.
    """
    generator = torch.Generator().manual_seed(key)
    coarse = first or parts
    strata = torch.arange(coarse)
    within = torch.rand(coarse, generator=generator)
    times, noise = (strata + within) / coarse, torch.randn(coarse, *shape, generator=generator)
    if coarse == parts:
        return times, noise
    finer = parts // coarse
    empty = torch.ones(parts, dtype=torch.bool)
    empty[strata * finer + (within * finer).long()] = False
    rest = (empty.nonzero().flatten() + torch.rand(parts - coarse, generator=generator)) / parts
    return torch.cat([times, rest]), torch.cat([noise, torch.randn(parts - coarse, *shape, generator=generator)])
