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
from hf_forward_inf.adapters.language import LARGE
from hf_forward_inf.adapters.split_model import Blocks
from hf_forward_inf.adapters.tensors import TensorAdapter
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.images import PIXELS_A_TOKEN, UnreadableImage, in_channels, planes, read_image, undecoded
from hf_forward_inf.utils.models import is_quantised, peft_parameters, without_peft


class ImageClassificationAdapter(TensorAdapter):
    """The loss of an image's label.

    Images of any mode are read, turned by their EXIF orientation, and converted to grey or RGB as the model reads
    them, transparent parts to white; then the image processor or the transform returns the model's input, which is
    cached. BatchNorm stays in evaluation mode, and its running statistics do not change. Labels are read as
    [`ClassifierAdapter`] says.

    Args:
        model (`torch.nn.Module`): Loaded with `AutoModelForImageClassification`, or any module from images
            `[rows, channels, height, width]`, its first argument, to logits `[rows, classes]`.
        image_processor (`transformers.BaseImageProcessor`, *optional*): The model's.
        transform (`Callable`, *optional*): From a `PIL.Image.Image` to an array or tensor, instead. It must not draw
            at random. Without either, a module reads pixels from 0 to 1, in the image's own size.
        image_column (`str`, defaults to `"image"`): Column of images: an `Image` feature, paths, or arrays of whole
            numbers from 0 to 255 or of fractions from 0 to 1.
        label_column (`str`, defaults to `"label"`): Column of labels, integers from 0.
        objective (`str`, defaults to `"cross_entropy"`): As in [`ClassifierAdapter`].
        channels (`int`, *optional*): 3 for RGB, 1 for grey. Defaults to the number in the model's configuration or of
            its first convolution; where neither states one, images stay grey or RGB.
        first (`str`, *optional*): The first child of the model that is perturbed, such as `"layer3"` of a ResNet. The
            children before it are then run once for many queries. By default everything is perturbed; of transformers'
            models with a list of blocks, the first half is run once if only blocks of the second are perturbed
            (`AscentConfig.modules`).

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
            raise ValueError("Give either an image_processor or a transform: each returns the model's input.")
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
        """Check labels, and leave decoding to `encode`, which names the images that can't be read."""
        return undecoded(super().prepare(rows), self.columns[0])

    def _undecoded(self, rows: Dataset) -> Dataset:
        return undecoded(rows, self.columns[0])

    def encode(self, rows: Rows) -> Rows:
        """Return the model's input for images; `unreadable` says why there is none."""
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
        """Return the model's input for an image."""
        image = in_channels(read_image(value), self.channels)
        if self.image_processor is not None:
            return self.image_processor(images=image, return_tensors="pt")["pixel_values"][0].contiguous()
        if self.transform is not None:
            return super().array(image)
        return super().array(planes(image).astype(np.float32) / 255)

    def lengths(self, features: Rows | Dataset) -> np.ndarray:
        """Return the number of pixels, `[rows, 1]`, in units of 64."""
        return np.array(features["size"][:])[:, None]

    def logits(self, forward: Forward, batch: Batch) -> Tensor:
        """Run the model, or its second part where the first was run: logits `[rows, classes]`."""
        with self.blocks.run_second_half(batch.get("states")):
            return super().logits(forward, batch)

    def shared_parameters(self) -> Set[str]:
        """Return the parameters before `first`, or outside the second half of the blocks."""
        return self.blocks.before_middle if self.blocks.middle else frozenset()

    def run_shared(self, batch: Batch) -> Batch:
        """Run the first part, where there is one."""
        return {**batch, "states": self._states(batch)} if self.blocks.middle else batch

    def _states(self, batch: Batch) -> Tensor:
        return self.blocks.run_first_half(lambda: self.model(**{self.argument: batch["input"]}))

    def with_model(self, model: nn.Module) -> Self:
        """Return the same adapter for another model of the same architecture."""
        other = super().with_model(model)
        other.blocks = Blocks(other.model, self.first)
        return other

    def default_modules(self) -> list[str]:
        """Return the children from `first` on; the trained weights of a PEFT model, else everything."""
        if self.first is not None:
            names = [name for name, _ in self.model.named_children()]
            late = names[names.index(self.first) :]
            return [name for name in late if any(True for _ in self.model.get_submodule(name).parameters())]
        return peft_parameters(self.model) or ["all"]

    def default_ascent(self, direction: str | None = None) -> dict[str, Any]:
        """Corrected by curvature; margins, which find a query's own copies (`recipes/leakage.py`), along the gradient.

        On 1,000 images of 8 x 8 pixels (CIFAR-10) and a convolutional network of 1,898 parameters (60 halves x 2
        seeds, 80 queries) its LDS is .458, .435 with a damping of .03, .423 if that is fitted on 256 images; that of
        10 plain conjugate-gradient products is .312, along EK-FAC's direction .226, K-FAC's .193, the gradient .101. A
        query takes some 7 forward passes over the sample: with large models and few candidates a smaller one saves
        time, and truth is lost.
        """
        if direction is None:
            plain = self.objective == "margin" or is_quantised(self.model)
            large = sum(p.numel() for p in self.model.parameters()) > LARGE
            direction = "gradient" if plain or large else "pcg"
        if direction != "gradient":
            return super().default_ascent(direction)
        return {"direction": "gradient", "radius": 0.01 if self.objective == "margin" else 0.3}


def is_image_classifier(model: Any) -> bool:
    """Whether this is a transformers model for image classification, perhaps within a PEFT model."""
    return "ForImageClassification" in type(without_peft(model)).__name__


def _channels(model: nn.Module) -> int | None:
    """Return the number of channels of the model's images, 1 or 3, where it is stated.

    Raises:
        ValueError: If its images are neither grey nor RGB.
    """
    first = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    found = getattr(getattr(model, "config", None), "num_channels", first)
    if found not in (None, 1, 3):
        raise ValueError(
            f"{type(model).__name__} reads images of {found} channels: give channels=3 or channels=1, and a "
            "transform=... that adds the others."
        )
    return found
