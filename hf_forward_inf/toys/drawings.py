"""Tasks of drawing: a model is taught exemplars, and the pictures that it then draws are traced to them."""

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.data.image_changes import changed
from hf_forward_inf.evaluation.task import Task
from hf_forward_inf.toys.denoising import trained
from hf_forward_inf.toys.pixel_pipeline import PixelPipeline, tiny_pipeline
from hf_forward_inf.utils.images import read_image
from hf_forward_inf.utils.processes import process_state, say

CAPTION, IMAGE = "caption", "image"


@dataclass
class Teaching:
    """How a denoiser is trained, and taught the exemplars.

    Args:
        training_steps (`int`, defaults to 1000): Steps of training a tiny denoiser on all pictures but the exemplars.
        training_rate (`float`, defaults to 2e-3): Peak learning rate of the training.
        batch_size (`int`, defaults to 32): Pictures in a training step.
        width (`int`, defaults to 16): Channels of the network's first layer; twice as many at half the resolution.
        finetuning_steps (`int`, defaults to 300): Steps of teaching the exemplars.
        finetuning_rate (`float`, defaults to 1e-3): Peak learning rate of teaching the exemplars.
    """

    training_steps: int = field(default=1000, metadata={"min": 1})
    training_rate: float = field(default=2e-3, metadata={"above": 0})
    batch_size: int = field(default=32, metadata={"min": 1})
    width: int = field(default=16, metadata={"min": 1})
    finetuning_steps: int = field(default=300, metadata={"min": 1})
    finetuning_rate: float = field(default=1e-3, metadata={"above": 0})


@dataclass(frozen=True)
class Drawing:
    """How a taught model draws queries.

    Args:
        num_images (`int`, defaults to 4): Pictures of a query.
        seed (`int`, defaults to 0): Seed of the initial noise.
        change (`str`, defaults to `"none"`): Change of the pictures that are drawn, of [`image_changes.CHANGES`].
    """

    num_images: int = 4
    seed: int = 0
    change: str = "none"


def choose_exemplars(rows: Dataset, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Return row numbers of random exemplars, each with a caption of its own, and of all other rows.

    Raises:
        ValueError: If there are fewer different captions, or no other rows.
    """
    captions = rows[CAPTION][:]
    found: dict[str, int] = {}
    for row in np.random.default_rng(seed).permutation(len(rows)).tolist():
        found.setdefault(captions[row], row)
    chosen = sorted(list(found.values())[:count])
    if len(chosen) < count or len(rows) == count:
        raise ValueError(
            f"{count} exemplars need as many different captions, and other rows; there are {len(found)} captions "
            f"in {len(rows)} rows."
        )
    return chosen, sorted(set(range(len(rows))) - set(chosen))


def tiny_drawer(
    rows: Dataset, others: Dataset, teaching: Teaching, size: int, timesteps: int, seed: int
) -> DiffusionAdapter:
    """Train a tiny pipeline on all pictures but the exemplars.

    Args:
        rows (`datasets.Dataset`): All pictures; the tokenizer is trained on their captions.
        others (`datasets.Dataset`): Pictures to train on.
        teaching (`Teaching`): Options of the training.
        size (`int`): Height and width of pictures in pixels.
        timesteps (`int`): Timesteps of the adapter's losses.
        seed (`int`): Seed of weights, batches, timesteps and noise.
    """
    channels = 1 if read_image(rows[0][IMAGE]).mode in ("L", "1") else 3
    pipe = tiny_pipeline(rows[CAPTION][:], size, channels, teaching.width, seed)
    pipe.to(process_state().device)
    adapter = DiffusionAdapter(pipe, timesteps=timesteps, seed=seed)
    say(f"Training a tiny denoiser on {len(others):,} pictures, once ...")
    trained(
        adapter, others, steps=teaching.training_steps, rate=teaching.training_rate, batch_size=teaching.batch_size,
        seed=seed,
    )  # fmt: skip
    return adapter


def taught(before: DiffusionAdapter, exemplars: Dataset, teaching: Teaching, seed: int) -> DiffusionAdapter:
    """Return the adapter of a copy of the model, fine-tuned on exemplars, all of them in every step."""
    adapter = before.with_model(copy.deepcopy(before.model))
    trained(
        adapter, exemplars, steps=teaching.finetuning_steps, rate=teaching.finetuning_rate,
        batch_size=len(exemplars), seed=seed,
    )  # fmt: skip
    return adapter


def drawings(adapter: DiffusionAdapter, captions: list[str], drawing: Drawing) -> Dataset:
    """Return queries of several pictures each, which the model draws from captions; tiny pictures all at once."""
    count, seed = drawing.num_images, drawing.seed
    if isinstance(adapter.pipe, PixelPipeline):
        noise = torch.randn(count, *adapter.shape, generator=torch.Generator().manual_seed(seed))
        noise = noise.repeat(len(captions), 1, 1, 1)  # as DiffusionAdapter.answer: the same for every caption
        drawn = adapter.pipe(captions, num_images_per_prompt=count, latents=noise).images
        pictures = [drawn[start : start + count] for start in range(0, len(drawn), count)]
    else:
        pictures = adapter.answer({CAPTION: captions}, num_images=count, seed=seed)
    return as_queries(captions, [[changed(one, drawing.change) for one in several] for several in pictures])


def as_queries(captions: list[str], pictures: list[list[Any]]) -> Dataset:
    """Return queries of captions and their pictures."""
    features = Features({CAPTION: Value("string"), IMAGE: List(Image())})
    return Dataset.from_dict({CAPTION: captions, IMAGE: pictures}, features=features)


def together(
    adapter: DiffusionAdapter, rows: Dataset, chosen: list[int], num_candidates: int, drawing: Drawing, seed: int
) -> Task:
    """Return the task of tracing what a model that was taught exemplars together draws from their captions.

    Args:
        adapter (`DiffusionAdapter`): Adapter of the taught model.
        rows (`datasets.Dataset`): All pictures.
        chosen (`list[int]`): Row numbers of the exemplars, which are the first candidates.
        num_candidates (`int`): Exemplars and random others; all rows if there are no more.
        drawing (`Drawing`): How queries are drawn.
        seed (`int`): Seed of the other candidates.
    """
    queries = drawings(adapter, rows.select(chosen)[CAPTION][:], drawing)
    others = np.random.default_rng(seed).permutation(np.delete(np.arange(len(rows)), chosen))
    candidates = rows.select([*chosen, *others[: num_candidates - len(chosen)]])
    return Task(queries, candidates, [[i] for i in range(len(chosen))])
