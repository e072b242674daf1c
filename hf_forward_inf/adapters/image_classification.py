"""Image classifiers: transformers' models with their image processor, and any torch module from images to logits."""

from collections.abc import Callable, Set
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save
from torch import Tensor, nn
from typing_extensions import Self

from hf_forward_inf.adapters.base import Batch, Forward, Rows
from hf_forward_inf.adapters.split_model import Blocks
from hf_forward_inf.adapters.tensors import TensorAdapter
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.images import PIXELS_A_TOKEN, UnreadableImage, in_channels, planes, read_image, undecoded
from hf_forward_inf.utils.models import peft_parameters


class ImageClassificationAdapter(TensorAdapter):
    """Cross-entropy of an image's label.

    Images are read whatever their mode, oriented as the camera says, and become grey or RGB as the model takes them,
    what is transparent white; then the image processor or the transform makes the model's input of them. They are
    read once: what the model takes is kept. BatchNorm stays in evaluation mode, and its running statistics as they
    are.

    Args:
        model (`torch.nn.Module`): Loaded with `AutoModelForImageClassification`, or any module from images
            `[rows, channels, height, width]`, its first argument, to logits `[rows, classes]`.
        image_processor (`transformers.BaseImageProcessor`, *optional*): The model's.
        transform (`Callable`, *optional*): From a `PIL.Image.Image` to an array or tensor, instead. Without
            randomness. Without either, a module gets pixels from 0 to 1, in the size that the image has.
        image_column (`str`, defaults to `"image"`): Column of images: an `Image` feature, paths, or arrays of integers
            from 0 to 255.
        label_column (`str`, defaults to `"label"`): Column of labels, integers from 0.
        objective (`str`, defaults to `"cross_entropy"`): As in [`TensorAdapter`].
        channels (`int`, *optional*): 3 for RGB, 1 for grey. Defaults to what the model's configuration or first
            convolution says; images of a model that says nothing keep to grey or RGB.
        first (`str`, *optional*): The child of the model with which perturbation begins, `"layer3"` of a ResNet. What
            its children before it compute is then computed once for many queries, and a query costs what the others
            cost. Defaults to all of it; of transformers' models with a list of blocks, the first half is run once if
            nothing but blocks of the second is perturbed (`AscentConfig.modules`).

    Raises:
        TypeError: If a transformers model comes without its image processor.
        ValueError: If both processor and transform are given, or `first` names no child.

    Example:
        >>> model = AutoModelForImageClassification.from_pretrained(name)
        >>> tracer = ForwardInf(model, AutoImageProcessor.from_pretrained(name))
        >>> tracer = ForwardInf(adapter=ImageClassificationAdapter(network, transform=to_tensor))
    """

    def __init__(
        self,
        model: nn.Module,
        image_processor: Any = None,
        *,
        transform: Callable[[Any], Any] | None = None,
        image_column: str = "image",
        label_column: str = "label",
        objective: Literal["cross_entropy", "margin"] = "cross_entropy",
        channels: int | None = None,
        first: str | None = None,
    ):
        if image_processor is not None and transform is not None:
            raise ValueError("Give either an image_processor or a transform: each makes the model's input.")
        if image_processor is None and transform is None and is_image_classifier(model):
            raise TypeError(
                f"{type(model).__name__} needs its image processor: AutoImageProcessor.from_pretrained(...), or "
                "a transform=..."
            )
        super().__init__(
            model, input_column=image_column, label_column=label_column, transform=transform, objective=objective
        )
        self.image_processor = image_processor
        self.first = first
        self.blocks = Blocks(self.model, first)
        self.channels = channels or _channels(model)

    @property
    def cache_key(self) -> str:
        """Columns, channels, the processor's configuration or the transform's code."""
        processor = self.image_processor and self.image_processor.to_json_string()
        return fingerprint(super().cache_key, self.channels, processor)

    def prepare(self, rows: Dataset) -> Dataset:
        """Check labels, and leave decoding to `encode`: it tells which images can't be read."""
        return undecoded(super().prepare(rows), self.columns[0])

    def encode(self, rows: Rows) -> Rows:
        """Make the model's input of images; `unreadable` tells why there is none."""
        readable, why, sizes = [], [], []
        for value in rows[self.columns[0]]:
            try:
                readable.append(self.array(value))
                why.append("")
            except UnreadableImage as error:
                readable.append(torch.zeros(0))
                why.append(str(error) or "it is corrupt")
            sizes.append(max(1, int(np.prod(readable[-1].shape[-2:])) // PIXELS_A_TOKEN))
        return {
            "input": [save({"input": array}) for array in readable],
            "size": sizes,
            "unreadable": why,
            **self.targets(rows[self.columns[1]]),
        }

    def array(self, value: Any) -> Tensor:
        """Read an image, and make the model's input of it."""
        image = in_channels(read_image(value), self.channels)
        if self.image_processor is not None:
            return self.image_processor(images=image, return_tensors="pt")["pixel_values"][0].contiguous()
        if self.transform is not None:
            return super().array(image)
        return super().array(planes(image).astype(np.float32) / 255)

    def lengths(self, features: Rows | Dataset) -> np.ndarray:
        """Pixels, `[rows, 1]`, in units of 64."""
        return np.array(features["size"][:])[:, None]

    def logits(self, forward: Forward, batch: Batch) -> Tensor:
        """Run the model, or what of it comes after the prefix: logits `[rows, classes]`."""
        with self.blocks.run_second_half(batch.get("states")):
            return super().logits(forward, batch)

    def shared_parameters(self) -> Set[str]:
        """Everything before `first`, or outside the second half of the blocks."""
        return self.blocks.before_middle if self.blocks.middle else frozenset()

    def run_shared(self, batch: Batch) -> Batch:
        """Run what comes before, where something does."""
        return {**batch, "states": self._states(batch)} if self.blocks.middle else batch

    def _states(self, batch: Batch) -> Tensor:
        return self.blocks.run_first_half(lambda: self.model(**{self.argument: batch["input"]}))

    def with_model(self, model: nn.Module) -> Self:
        """Give the same adapter for another model of the same architecture."""
        other = super().with_model(model)
        other.blocks = Blocks(other.model, self.first)
        return other

    def default_modules(self) -> list[str]:
        """From `first` on; of a PEFT model what it has trained, else everything."""
        if self.first is not None:
            names = [name for name, _ in self.model.named_children()]
            late = names[names.index(self.first) :]
            return [name for name in late if any(True for _ in self.model.get_submodule(name).parameters())]
        return peft_parameters(self.model) or ["all"]

    def default_ascent(self, direction: str | None = None) -> dict[str, Any]:
        """One normalised step along the gradient; margins tell copies apart at small radii (`recipes/leakage.py`)."""
        if direction not in (None, "gradient"):
            return super().default_ascent(direction)
        return {"radius": 0.01 if self.objective == "margin" else 0.3}


def is_image_classifier(model: Any) -> bool:
    """Whether this is a transformers model for image classification, perhaps within a PEFT model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "ForImageClassification" in type(base).__name__


def _channels(model: nn.Module) -> int | None:
    """How many channels the model's images have, 1 or 3, if it says so.

    Raises:
        ValueError: If it takes other images than grey or RGB ones.
    """
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    found = getattr(getattr(model, "config", None), "num_channels", first)
    if found not in (None, 1, 3):
        raise ValueError(
            f"{type(model).__name__} takes images of {found} channels: say channels=3 or channels=1, and make the "
            "others by transform=..."
        )
    return found
