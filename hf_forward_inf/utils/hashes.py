"""Hashes of plain values and tensors: equal values have equal ones, in every process and every run."""

import json
from typing import Any

import torch
from datasets.fingerprint import Hasher
from torch import Tensor


def fingerprint(*parts: Any) -> str:
    """Hash values that JSON can represent, and bytes.

    Their JSON text is hashed, not their pickle: that also depends on which equal strings are the same object.
    """
    return Hasher.hash_bytes(json.dumps(parts, sort_keys=True, default=_of_bytes).encode())


def _of_bytes(value: Any) -> str:
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} can't be hashed: give values that JSON can represent, or bytes.")
    return Hasher.hash_bytes(value)


def bytes_of(tensor: Tensor) -> bytes:
    """Return a tensor's values as bytes."""
    return bytes(view_of(tensor))


def view_of(tensor: Tensor) -> memoryview:
    """Return a tensor's values as bytes that, on a CPU, are not copied: an embedding may be a fifth of the model."""
    if tensor.device.type == "meta":  # offloaded: accelerate holds the values elsewhere
        return memoryview(b"")
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
