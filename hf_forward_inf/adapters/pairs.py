"""Rows that come in pairs: two halves that the model reads as rows of one batch."""

from itertools import chain

from torch import Tensor

from hf_forward_inf.adapters.base import Rows


def named(features: Rows, prefix: str) -> Rows:
    """Return features under names that begin with the name of their half."""
    return {prefix + name: values for name, values in features.items()}


def half(features: Rows, prefix: str) -> Rows:
    """Return the features of one half, by their own names."""
    return {name.removeprefix(prefix): values for name, values in features.items() if name.startswith(prefix)}


def interleaved(first: Rows, second: Rows) -> Rows:
    """Return both halves as rows, each row's second half right behind its first."""
    return {name: list(chain(*zip(first[name], values, strict=True))) for name, values in second.items()}


def halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return what belongs to the first and to the second halves, of values of interleaved rows."""
    first, second = values.unflatten(0, (-1, 2)).unbind(1)
    return first, second
