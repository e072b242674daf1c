"""Which of a model's parameters are perturbed."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from hf_forward_inf.adapters.base import Adapter
from hf_forward_inf.lora import linear_layers


def perturbed_names(adapter: Adapter, modules: list[str] | None, lora: bool = False) -> list[str]:
    """List the parameters that ascent will change.

    Args:
        adapter (`Adapter`): Knows the model and its preferred modules.
        modules (`list[str]`, *optional*): As in [`AscentConfig`].
        lora (`bool`, defaults to `False`): Only weights of linear layers, and not of the output layer unless named.

    Raises:
        ValueError: If a pattern names nothing, or only parameters that go by another module's name.
    """
    trainable: Mapping[str, Any]
    if lora:
        trainable = linear_layers(adapter.model)
        modules = modules or _inner(adapter, list(trainable))
    else:
        trainable = {name: p for name, p in adapter.model.named_parameters() if p.is_floating_point()}
    if modules is None:
        return _after_prefix(adapter, _matching(trainable, adapter.default_modules()))
    for pattern in modules:
        if not _matching(trainable, [pattern]):
            raise ValueError(_nothing_matches(adapter.model, pattern, trainable))
    return _matching(trainable, modules)


def _inner(adapter: Adapter, layers: list[str]) -> list[str]:
    """Of linear layers those that the adapter prefers, as far as they are within the model."""
    output = getattr(adapter.model, "get_output_embeddings", lambda: None)()
    own = next((f"{name}.weight" for name, module in adapter.model.named_modules() if module is output), None)
    inner = [name for name in layers if name != own]
    return _after_prefix(adapter, _matching(inner, adapter.default_modules()) or inner)


def _after_prefix(adapter: Adapter, names: list[str]) -> list[str]:
    """Leave out what is tied to, or stands in, the prefix, unless nothing else is there."""
    prefix = adapter.prefix_parameters()
    return [name for name in names if name not in prefix] or names


def _matching(names: Iterable[str], patterns: list[str]) -> list[str]:
    def named_by(name: str, pattern: str) -> bool:
        return pattern == "all" or fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")

    return [name for name in names if any(named_by(name, pattern) for pattern in patterns)]


def _nothing_matches(model: nn.Module, pattern: str, names: Iterable[str]) -> str:
    tied = _matching([n for n, _ in model.named_parameters(remove_duplicate=False)], [pattern])
    if tied:
        holder = dict(model.named_parameters(remove_duplicate=False))[tied[0]]
        owner = next(n for n, p in model.named_parameters() if p is holder)
        return f"{tied[0]} is tied to {owner}: perturbing it changes both. Name {owner} if that is wanted."
    known = [name for name, _ in model.named_modules() if name] + list(names)
    close = get_close_matches(pattern, known, n=3)
    tops = sorted({name.split(".")[0] for name in names})
    hint = f" Close: {', '.join(close)}." if close else ""
    return f"No parameter is named by modules={pattern!r}.{hint} The model's top-level modules: {', '.join(tops)}."


def held_at_once(model: nn.Module, names: list[str]) -> int:
    """How many copies of the perturbed parameters are held: few enough not to count beside the model itself."""
    size = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    room = max(64 * 2**20, sum(size.values()) // 10)
    return max(1, min(32, room // max(1, sum(size.get(name, 0) for name in names))))
