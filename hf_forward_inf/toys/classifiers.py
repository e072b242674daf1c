"""Image classifiers for experiments: made, trained, or loaded."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_forward_inf.adapters import ImageClassificationAdapter
from hf_forward_inf.adapters.image_classification import is_image_classifier
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.toys.networks import ConvNet, ResNet
from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model
from hf_forward_inf.utils.images import in_channels, planes, read_image
from hf_forward_inf.utils.loading import load_model
from hf_forward_inf.utils.models import device_of, to_device
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.storage import Tensors, cached_tensors, default_cache_dir

Transform: TypeAlias = Callable[[Any], np.ndarray]
"""Returns a network's input for a PIL image."""


@dataclass(frozen=True)
class Normalised:
    """Converts an image to an array that has mean 0 and standard deviation 1 over the data in every channel.

    Args:
        mean (`tuple[float, ...]`): Mean of each channel, of pixels from 0 to 1.
        deviation (`tuple[float, ...]`): Standard deviation of each channel.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __call__(self, image: Any) -> np.ndarray:
        """Return a PIL image as a float32 array `[channels, height, width]`."""
        pixels = planes(image).astype(np.float32) / 255
        mean, deviation = (np.array(part, dtype=np.float32)[:, None, None] for part in (self.mean, self.deviation))
        return (pixels - mean) / deviation


IMAGENET = Normalised((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Normalisation that public weights of small ResNets were trained with."""


def normalised_over(rows: Dataset, images: int = 1000) -> Normalised:
    """Return the normalisation by mean and standard deviation of the first images."""
    arrays = [np.asarray(in_channels(read_image(image))) for image in rows["image"][:images]]
    parts = [array.reshape(-1, 1 if array.ndim == 2 else 3) / 255 for array in arrays]
    pixels = np.concatenate(parts)
    return Normalised(tuple(pixels.mean(axis=0).round(4).tolist()), tuple(pixels.std(axis=0).round(4).tolist()))


def untrained(
    kind: Literal["conv", "resnet"], rows: Dataset, classes: int, seed: int = 0, *, blocks: int = 3, width: int = 16
) -> ImageClassificationAdapter:
    """Return the adapter of an untrained network for some images.

    Args:
        kind (`str`): `"conv"` ([`ConvNet`]) or `"resnet"` ([`ResNet`]).
        rows (`datasets.Dataset`): Images, all of the size of the first.
        classes (`int`): Number of classes.
        seed (`int`, defaults to 0): Seed of the weights.
        blocks (`int`, defaults to 3): Blocks in each stage of a `"resnet"`.
        width (`int`, defaults to 16): Channels of the first layer.
    """
    first = in_channels(read_image(rows[0]["image"]))
    channels = 1 if first.mode == "L" else 3
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "conv":
            network: nn.Module = ConvNet(channels, (first.height, first.width), classes, width)
        else:
            network = ResNet(channels, classes, blocks, width)
    return ImageClassificationAdapter(network.eval(), transform=normalised_over(rows))


@dataclass(frozen=True)
class Training:
    """How a classifier is trained.

    Args:
        epochs (`int`, defaults to 30): Passes over the data.
        rate (`float`, defaults to 1e-2): Peak learning rate of a one-cycle schedule.
        optimizer (`str`, defaults to `"adam"`): `"adam"`, or `"sgd"` with momentum .9.
        weight_decay (`float`, defaults to 0.0): Weight decay of the optimizer.
        batch_size (`int`, defaults to 128): Images in a training step.
        augment (`bool`, defaults to `False`): Mirror images at random, and shift them by up to an eighth of
            their size.
        seed (`int`, defaults to 0): Seed of batches, mirrors and shifts.
        checkpoints (`int`, defaults to 1): Networks stored at equal distances; the last is the trained one.
    """

    epochs: int = 30
    rate: float = 1e-2
    optimizer: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.0
    batch_size: int = 128
    augment: bool = False
    seed: int = 0
    checkpoints: int = 1

    @property
    def stored_epochs(self) -> list[int]:
        """Return the epochs after which the network is stored."""
        return sorted({-(-self.epochs * (i + 1) // self.checkpoints) for i in range(self.checkpoints)})


def train(
    adapter: ImageClassificationAdapter, rows: Dataset, training: Training, cache_dir: Path | None = None
) -> dict[int, ImageClassificationAdapter]:
    """Train an adapter's network in place; weights are cached under a fingerprint of all that they depend on.

    Args:
        adapter (`ImageClassificationAdapter`): Adapter of the network with its initial weights.
        rows (`datasets.Dataset`): Images and labels.
        training (`Training`): Options of the training.
        cache_dir (`Path`, *optional*): Defaults to [`storage.default_cache_dir`].

    Returns:
        `dict[int, ImageClassificationAdapter]`: Adapters of the stored networks by epoch; the last is `adapter`
        itself.
    """
    encoded = encode(adapter, rows, "candidates", cache_dir)
    batch = adapter.collate(encoded[:])
    key = fingerprint(fingerprint_of_model(adapter.model), adapter.cache_key, encoded._fingerprint, repr(training))
    file = (cache_dir or default_cache_dir()) / "models" / f"{key}.safetensors"
    with process_state().main_process_first():
        weights = cached_tensors(file, lambda: _train(adapter.model, batch["input"], batch["label"], training))
    *on_the_way, last = training.stored_epochs
    found = {epoch: adapter.with_model(copy.deepcopy(adapter.model)) for epoch in on_the_way} | {last: adapter}
    for epoch, one in found.items():
        one.model.load_state_dict({name: weights[f"{epoch}/{name}"] for name in one.model.state_dict()})
        one.model.eval()
    return found


def _train(model: nn.Module, inputs: Tensor, labels: Tensor, training: Training) -> Tensors:
    device = device_of(model)
    draw = torch.Generator().manual_seed(training.seed)
    steps = training.epochs * -(-len(inputs) // training.batch_size)
    optimizer: torch.optim.Optimizer
    if training.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), training.rate, 0.9, weight_decay=training.weight_decay)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), training.rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.rate, total_steps=steps)
    model.train()
    weights: Tensors = {}
    with tqdm(total=training.epochs, desc=f"training on {len(inputs):,} images", unit="epoch") as bar:
        for epoch in range(1, training.epochs + 1):
            for rows in torch.randperm(len(inputs), generator=draw).split(training.batch_size):
                images = augmented(inputs[rows], draw) if training.augment else inputs[rows]
                loss = F.cross_entropy(model(images.to(device)), labels[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if epoch in training.stored_epochs:
                weights |= {f"{epoch}/{name}": value.clone() for name, value in model.state_dict().items()}
    model.eval()
    return weights


def augmented(images: Tensor, draw: torch.Generator) -> Tensor:
    """Return images `[rows, channels, height, width]` mirrored at random, and shifted by up to an eighth."""
    rows, _, height, width = images.shape
    mirrored = torch.rand(rows, generator=draw) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    far = (height // 8, width // 8)
    padded = F.pad(images, (far[1], far[1], far[0], far[0]))
    tops, lefts = (torch.randint(0, 2 * most + 1, (rows,), generator=draw) for most in far)
    ys, xs = tops[:, None] + torch.arange(height), lefts[:, None] + torch.arange(width)
    return padded[torch.arange(rows)[:, None, None], :, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(adapter: ImageClassificationAdapter, rows: Dataset, cache_dir: Path | None = None) -> float:
    """Return the share of rows that the model classifies correctly."""
    encoded = encode(adapter, rows, "candidates", cache_dir)
    hits = 0
    for start in range(0, len(rows), 256):
        batch = to_device(adapter.collate(encoded[start : start + 256]), adapter.model)
        hits += int((adapter.logits(adapter.model, batch).argmax(dim=1) == batch["label"]).sum())
    return hits / len(rows)


def load_classifier(source: str) -> ImageClassificationAdapter:
    """Load a trained classifier.

    Args:
        source (`str`): A hub name or folder of `AutoModelForImageClassification`, with its image processor; or a
            folder with the `model.safetensors` of a [`ResNet`], or that file, whose sizes follow from its weights.

    Raises:
        FileNotFoundError: If `source` is a path that does not exist.
        ValueError: If the weights are of another network, or the model does not classify images.
    """
    path = Path(source).expanduser()
    file = path / "model.safetensors" if path.is_dir() else path
    if file.is_file() and not (path / "config.json").exists():
        return ImageClassificationAdapter(_resnet(load_file(file), file), transform=IMAGENET)
    model, processor = load_model(source)
    if not is_image_classifier(model):
        raise ValueError(f"{source} is a {type(model).__name__}, not a classifier of images.")
    return ImageClassificationAdapter(model, processor)


def _resnet(weights: Tensors, file: Path) -> nn.Module:
    try:
        first, head = weights["conv1.weight"], weights["linear.weight"]
        blocks = len({name.split(".")[1] for name in weights if name.startswith("layer1.")})
        network = ResNet(first.shape[1], len(head), blocks, len(first))
        network.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise ValueError(
            f"{file} holds no weights of a ResNet with three stages (conv1, bn1, layer1 to layer3, linear), and its "
            f"folder has no config.json of a transformers model: {str(error)[:200]}"
        ) from error
    return network.to(process_state().device).eval()
