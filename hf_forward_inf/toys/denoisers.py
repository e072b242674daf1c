"""Many small denoisers that are trained at once, each on some of the pictures: the truth about what a picture did."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.adapters.base import Batch
from hf_forward_inf.adapters.diffusion_inputs import as_arguments
from hf_forward_inf.ascent.layers import padded
from hf_forward_inf.ascent.parameters import call
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.toys.denoising import stacked, without_caption
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import device_of, to_device
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.replay import Replayed
from hf_forward_inf.utils.storage import Tensors, cached_tensors, default_cache_dir

IMAGES_AT_ONCE = 512
"""Noisy pictures of the queries that each of the denoisers reads at once."""
TARGET = "target"
"""What is to be predicted, among the tensors of a step."""


@dataclass(frozen=True)
class StackedDenoisers:
    """Trains denoisers with stacked parameters, and measures the losses of some queries.

    Small networks take most of their time between operations; twenty together take two to three times less.

    All denoisers of one seed begin with the same weights, and see the same timesteps, noise and, as far as their
    subsets have them, pictures in the same order: their losses differ by the subset more than by chance.

    Args:
        adapter (`DiffusionAdapter`): Adapter of a pipeline with such a denoiser, which encodes the pictures.
        untrained (`Callable`): Returns an untrained denoiser; its weights are drawn from torch's generator.
        rows (`datasets.Dataset`): Pictures that are trained on.
        queries (`datasets.Dataset`): Pictures whose losses are measured.
        steps (`int`, defaults to 500): Steps of AdamW, with a one-cycle schedule.
        rate (`float`, defaults to 2e-3): Peak learning rate.
        batch_size (`int`, defaults to 32): Pictures in a training step.
        unprompted (`float`, defaults to 0.1): Share of pictures trained on without caption.
        timesteps (`int`, defaults to 64): Timesteps of a query's loss, each with its own noise, the same for all
            denoisers.
    """

    adapter: DiffusionAdapter
    untrained: Callable[[], nn.Module]
    rows: Dataset
    queries: Dataset
    steps: int = 500
    rate: float = 2e-3
    batch_size: int = 32
    unprompted: float = 0.1
    timesteps: int = 64

    @property
    def key(self) -> str:
        """Everything that outcomes depend on, besides subsets and seeds."""
        queries = encode(self._finer, self.queries, "queries")["tensors"][:]
        return fingerprint(self._training_key, self._finer.cache_key, queries)

    @property
    def _training_key(self) -> str:
        rows = encode(self.adapter, self.rows, "candidates")["tensors"][:]
        recipe = (self.steps, self.rate, self.batch_size, self.unprompted)
        weights = {name: value.cpu() for name, value in self._untrained(0).state_dict().items()}
        return fingerprint(save(weights), self.adapter.noising.cache_key, rows, recipe)

    @property
    def _finer(self) -> DiffusionAdapter:
        return DiffusionAdapter(self.adapter.pipe, timesteps=self.timesteps, seed=self.adapter.seed + 1)

    def __call__(self, subsets: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Train a denoiser on each subset, and return the queries' losses, float32 `[models, queries]`."""
        return self.losses(self.trained(subsets, seeds)).numpy()

    def explained(self, seeds: Sequence[int], cache_dir: Path | None = None) -> list[DiffusionAdapter]:
        """Return the adapters of denoisers trained on all pictures, one for each seed; their weights are cached."""
        folder = (cache_dir or default_cache_dir()) / "models"
        files = {seed: folder / f"{fingerprint(self._training_key, seed)}.safetensors" for seed in seeds}
        with process_state().main_process_first():
            missing = [seed for seed, file in files.items() if not file.exists()]
            everyone = np.ones((len(missing), len(self.rows)), dtype=bool)
            stack = self.trained(everyone, np.array(missing)) if missing else {}

            def weights(seed: int) -> Tensors:
                return {name: value[missing.index(seed)] for name, value in stack.items()}

            found = [cached_tensors(files[seed], partial(weights, seed)) for seed in seeds]
        return [self._with_weights(weights) for weights in found]

    def trained(self, subsets: np.ndarray, seeds: np.ndarray) -> Tensors:
        """Return the trained parameters of all denoisers, stacked."""
        networks = {seed: self._untrained(seed) for seed in dict.fromkeys(seeds.tolist())}
        parameters, _ = stack_module_state([networks[seed] for seed in seeds.tolist()])
        gradients = _gradients(_stackable(networks[int(seeds[0])]), parameters)
        optimizer = torch.optim.AdamW(parameters.values(), lr=self.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=self.steps, pct_start=0.05)
        for given, target in self._batches(subsets, seeds):
            for name, gradient in gradients({**given, TARGET: target}).items():
                parameters[name].grad = gradient
            optimizer.step()
            schedule.step()
        return {name: value.detach() for name, value in parameters.items()}

    @torch.no_grad()
    def losses(self, parameters: Tensors) -> Tensor:
        """Return the queries' losses under stacked parameters, `[models, queries]`, on the CPU."""
        finer = self._finer
        encoded = encode(finer, self.queries, "queries")
        model, found = _stackable(self._untrained(0)), []
        step = max(1, IMAGES_AT_ONCE // self.timesteps)
        for start in range(0, len(encoded), step):
            batch: Batch = to_device(finer.collate(encoded[start : start + step]), model)

            def loss(theta: Tensors, batch: Batch = batch) -> Tensor:
                return finer.loss(partial(call, model, theta), batch)

            with _without_fused_attention():
                found.append(vmap(loss)(parameters))
        return torch.cat(found, dim=1).cpu()

    def _with_weights(self, weights: Tensors) -> DiffusionAdapter:
        model = self._untrained(0)
        model.load_state_dict(weights)
        return self.adapter.with_model(model.eval())

    def _untrained(self, seed: int) -> nn.Module:
        """Return an untrained denoiser on the adapter's device; its weights are drawn on the CPU."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.untrained().eval().to(device_of(self.adapter.model))

    def _batches(self, subsets: np.ndarray, seeds: np.ndarray) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """Yield each step's inputs of the denoisers and their targets, `[models, batch, ...]`."""
        noising, device = self.adapter.noising, device_of(self.adapter.model)
        data = stacked(encode(self.adapter, self.rows, "candidates")["tensors"][:], device)
        blank = without_caption(self.adapter, device)
        inside = torch.from_numpy(subsets).to(device)
        # The rows of each subset come first.
        members, counts = inside.sort(dim=1, descending=True, stable=True).indices, inside.sum(1, keepdim=True)
        draws = {seed: torch.Generator().manual_seed(seed) for seed in dict.fromkeys(seeds.tolist())}
        size = self.batch_size
        for _ in range(self.steps):
            drawn = {
                seed: [one.to(device) for one in self._drawn(draw, data["latents"])] for seed, draw in draws.items()
            }
            some, other, noise, parts, hidden = (
                torch.stack([drawn[seed][i] for seed in seeds.tolist()]) for i in range(5)
            )
            # A picture that a subset lacks is replaced by one that it has.
            picked = torch.where(inside.gather(1, some), some, members.gather(1, (other * counts).long()))
            images, times = data["latents"][picked].flatten(0, 1), noising.times(parts.flatten())
            given = {
                self.adapter.argument: noising.noisy(images, noise.flatten(0, 1), times),
                "timestep": times,
                **{
                    name: torch.where(hidden.view(*hidden.shape, *[1] * empty.dim()), empty, data[name][picked])
                    for name, empty in blank.items()
                },
            }
            target = noising.target(images, noise.flatten(0, 1), times)
            for name in (self.adapter.argument, "timestep"):
                given[name] = given[name].unflatten(0, (-1, size))
            yield given, target.unflatten(0, (-1, size))

    def _drawn(self, draw: torch.Generator, latents: Tensor) -> tuple[Tensor, ...]:
        """Draw a batch: pictures, what replaces them, noise, parts of the schedule, and which captions are hidden."""
        size = self.batch_size
        return (
            torch.randint(len(latents), (size,), generator=draw),
            torch.rand(size, generator=draw),
            torch.randn(size, *latents.shape[1:], generator=draw),
            torch.rand(size, generator=draw),
            torch.rand(size, generator=draw) < self.unprompted,
        )


def _gradients(model: nn.Module, parameters: Tensors) -> Callable[[Tensors], Tensors]:
    """Return a function from a batch to each stacked model's gradients, scaled to a norm of at most 1."""

    def loss(theta: Tensors, given: Tensors, target: Tensor) -> Tensor:
        return (call(model, theta, **as_arguments(given)).sample - target).square().mean()

    def gradients(batch: Tensors) -> Tensors:
        given = {name: value for name, value in batch.items() if name != TARGET}
        with _without_fused_attention():
            losses = vmap(loss)(parameters, given, batch[TARGET])
        found = torch.autograd.grad(losses.sum(), list(parameters.values()))
        return dict(zip(parameters, _clipped(found), strict=True))

    return Replayed(gradients) if device_of(model).type == "cuda" else gradients


def _clipped(gradients: Sequence[Tensor]) -> list[Tensor]:
    norms = torch.stack([one.flatten(1).square().sum(1) for one in gradients]).sum(0).sqrt()
    scale = (1 / (norms + 1e-6)).clamp(max=1.0)
    return [one * scale.view(-1, *[1] * (one.dim() - 1)) for one in gradients]


def _stackable(model: nn.Module) -> nn.Module:
    """Have convolutions multiply patches on a GPU: with stacked weights they would be grouped, which is slow there."""
    return model if device_of(model).type == "cpu" else _by_patches(model)


def _by_patches(model: nn.Module) -> nn.Module:
    """Replace the products of a model's ordinary convolutions, in place."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and _is_ordinary(module):
            module.forward = partial(_convolved, module)  # type: ignore[method-assign]
    return model


def _is_ordinary(layer: nn.Conv2d) -> bool:
    return (layer.groups, layer.dilation, layer.padding_mode) == (1, (1, 1), "zeros")


def _convolved(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """Return a convolution's output as a product of patches and weights."""
    height, width = layer.kernel_size
    patches = padded(images, layer).unfold(2, height, layer.stride[0]).unfold(3, width, layer.stride[1])
    output = torch.einsum("bchwij,ocij->bohw", patches, layer.weight).contiguous()
    return output if layer.bias is None else output + layer.bias.view(-1, 1, 1)


def _without_fused_attention() -> Any:
    """Return a context in which attention is plain products, which can be stacked."""
    return sdpa_kernel(SDPBackend.MATH)
