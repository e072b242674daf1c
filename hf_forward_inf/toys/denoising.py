"""Training of a denoiser on pictures: a tiny one from random weights, or fine-tuning of a pipeline's."""

from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load
from torch import Tensor
from tqdm.auto import tqdm

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.adapters.diffusion_inputs import as_arguments, state_of_encoders
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model
from hf_forward_inf.utils.models import device_of
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.storage import Tensors, cached_tensors, default_cache_dir


def trained(
    adapter: DiffusionAdapter,
    rows: Dataset,
    *,
    steps: int,
    rate: float,
    batch_size: int,
    unprompted: float = 0.1,
    seed: int = 0,
    cache_dir: Path | None = None,
) -> None:
    """Train an adapter's denoiser in place; weights are cached under a fingerprint of all that they depend on.

    Args:
        adapter (`DiffusionAdapter`): Adapter of the pipeline.
        rows (`datasets.Dataset`): Pictures with captions.
        steps (`int`): Steps of AdamW, with a one-cycle schedule.
        rate (`float`): Peak learning rate.
        batch_size (`int`): Pictures in a training step.
        unprompted (`float`, defaults to 0.1): Share of pictures trained on without caption, for guidance.
        seed (`int`, defaults to 0): Seed of pictures, timesteps and noise.
        cache_dir (`Path`, *optional*): Defaults to [`storage.default_cache_dir`].
    """
    recipe = (steps, rate, batch_size, unprompted, seed)
    # Not the adapter's own cache key: training does not depend on the timesteps of its losses.
    settings = (adapter.columns, adapter.size, adapter.noising.cache_key, state_of_encoders(adapter.pipe))
    key = fingerprint(fingerprint_of_model(adapter.model), settings, rows._fingerprint, recipe)
    file = (cache_dir or default_cache_dir()) / "models" / f"{key}.safetensors"
    with process_state().main_process_first():
        weights = cached_tensors(
            file, lambda: _train(adapter, encode(adapter, rows, "candidates", cache_dir), *recipe)
        )
    adapter.model.load_state_dict(weights)


def _train(
    adapter: DiffusionAdapter,
    encoded: Dataset,
    steps: int,
    rate: float,
    batch_size: int,
    unprompted: float,
    seed: int,
) -> Tensors:
    model, noising = adapter.model, adapter.noising
    device = device_of(model)
    data, blank = stacked(encoded["tensors"][:], device), without_caption(adapter, device)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    model.train()
    with tqdm(range(steps), desc=f"training on {len(encoded)} pictures", unit="step") as bar:
        for step in bar:
            picked = torch.randint(len(encoded), (batch_size,), generator=draw)
            images = data["latents"][picked]
            noise = torch.randn(images.shape, generator=draw).to(device)
            times = noising.times(torch.rand(batch_size, generator=draw)).to(device)
            hidden = (torch.rand(batch_size, generator=draw) < unprompted).to(device)
            prompts = {
                name: torch.where(hidden.view(-1, *[1] * empty.dim()), empty, data[name][picked])
                for name, empty in blank.items()
            }
            given = {adapter.argument: noising.noisy(images, noise, times), "timestep": times, **as_arguments(prompts)}
            loss = (model(**given).sample - noising.target(images, noise, times)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()
    return dict(model.state_dict())


def stacked(rows: list[bytes], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of encoded rows, stacked; the first image of each, without rows that can't be read."""
    tensors = [load(row) for row in rows]
    tensors = [row | {"latents": row["latents"][0]} for row in tensors if row["latents"].isfinite().all()]
    return {name: torch.stack([row[name] for row in tensors]).to(device) for name in tensors[0] if name != "keys"}


def without_caption(adapter: DiffusionAdapter, device: torch.device) -> dict[str, Tensor]:
    """Return the denoiser's inputs for an empty caption."""
    if len(adapter.columns) == 1:
        return {}
    caption, image = adapter.columns
    blank = torch.zeros(*adapter.size, 3, dtype=torch.uint8).numpy()
    (row,) = adapter.encode({caption: [""], image: [blank]})["tensors"]
    return {name: value.to(device) for name, value in load(row).items() if name not in ("latents", "keys")}
