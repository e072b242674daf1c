"""Cache keys: equal inputs have equal keys, in every process and every run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import disable_caching, enable_caching, is_caching_enabled
from datasets.fingerprint import Hasher
from torch import Tensor, nn


def fingerprint(*parts: Any) -> str:
    """Hash values that JSON can represent, and bytes.

    Their JSON text is hashed, not their pickle: that also depends on which equal strings are the same object.
    """
    return Hasher.hash_bytes(json.dumps(parts, sort_keys=True, default=_of_bytes).encode())


def _of_bytes(value: Any) -> str:
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} can't be hashed: give values that JSON can represent, or bytes.")
    return Hasher.hash_bytes(value)


def fingerprint_of_model(model: nn.Module) -> str:
    """Hash a model's class, configuration, parameters, buffers, and the state of its PEFT adapters."""
    config = getattr(model, "config", None)
    if isinstance(config, dict):  # diffusers has a list there whose order differs between processes
        config = sorted((key, str(value)) for key, value in config.items() if not key.startswith("_"))
    parts = [type(model).__name__.encode(), str(config).encode()]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        parts += [bytes_of(plain) for plain in _plain(tensor.detach())]
    return Hasher.hash_bytes([*parts, *_adapters(model)])


def _adapters(model: nn.Module) -> list[bytes]:
    """Return the active adapters of a PEFT model and their scaling, on which its losses depend."""
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return [
        f"{layer.active_adapters} {layer.disable_adapters} {layer.merged_adapters} "
        f"{getattr(layer, 'scaling', None)}".encode()
        for layer in layers
    ]


def _plain(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor consists of, such as quantised values and their scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _plain(getattr(tensor, name))]


def bytes_of(tensor: Tensor) -> bytes:
    """Return a tensor's values as bytes."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@contextmanager
def uncached() -> Iterator[None]:
    """Neither read nor write the cache of `datasets` within a `with` block."""
    cached = is_caching_enabled()
    disable_caching()
    try:
        yield
    finally:
        if cached:
            enable_caching()
