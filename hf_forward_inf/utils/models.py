"""What is asked of any torch module: its mode, its device, its linear layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter."""
    return next(model.parameters()).device


def batch_size(batch: dict[str, Any]) -> int:
    """Return the number of rows of a batch: the length of its first tensor."""
    return len(next(value for value in batch.values() if isinstance(value, Tensor)))


def to_device(batch: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Move a batch's tensors to the device of the model's first parameter.

    Raises:
        ValueError: If the model's weights are on the meta device, that is, not loaded.
    """
    device = device_of(model)
    if device.type == "meta":
        raise ValueError("The model's weights are not loaded (they are on the meta device).")
    return {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode within a `with` block, and restore the mode of every module afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's linear layers by the names of their weights, without the matrices of LoRA."""
    named = ((name, module) for name, module in model.named_modules() if "lora_" not in name)
    return {f"{name}.weight": module for name, module in named if isinstance(module, nn.Linear | Conv1D)}


def peft_parameters(model: Any) -> list[str]:
    """Return name patterns of the weights that PEFT (LoRA and others) trained; an empty list for other models."""
    if not getattr(model, "peft_config", None):  # empty after the last adapter was deleted
        return []
    prefixes = [getattr(getattr(model, "base_model", None), "prefix", None) or "lora_", "modules_to_save."]
    return [f"*{prefix}*" for prefix in prefixes]


def is_quantised(model: nn.Module) -> bool:
    """Return whether linear layers have weights that can't be differentiated, such as those of 8 or 4 bits."""
    weights = (layer.weight for layer in linear_layers(model).values())
    return any(not weight.is_floating_point() or type(weight.data) is not Tensor for weight in weights)  # type: ignore[operator]
