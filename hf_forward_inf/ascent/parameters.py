"""Which of a model's parameters are perturbed, and the model run with them."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_forward_inf.adapters.base import Adapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.ascent.lora import RANK, LowRank, added
from hf_forward_inf.utils.models import is_quantised, linear_layers, peft_parameters

Parameters: TypeAlias = dict[str, Tensor | LowRank]
"""Perturbed parameters by name, or changes of them: theta_K, without what it shares with theta."""


def rank_of_ascent(adapter: Adapter, config: AscentConfig) -> int | None:
    """Give the rank of the fresh LoRA that ascent goes through; `None` where it changes the weights themselves.

    Raises:
        ValueError: If weights are quantised and the direction needs their gradients.
    """
    if config.lora_rank is not None:
        return config.lora_rank
    if peft_parameters(adapter.model) or not is_quantised(adapter.model):
        return None
    if config.direction != "gradient" or config.optimizer != "sgd" or config.relative:
        raise ValueError(
            "The model's weights are quantised, so that it is perturbed through a fresh LoRA, and that goes along the "
            "gradient alone, by an absolute radius: leave out direction, optimizer and relative, or load the model "
            "unquantised."
        )
    return RANK


def radius_of(config: AscentConfig, parameters: Iterable[Tensor]) -> float:
    """Give the length of the path, which may be told relative to the norm of the perturbed parameters."""
    assert config.radius is not None
    return config.radius * norm([value.detach() for value in parameters]) if config.relative else config.radius


def names_for(adapter: Adapter, config: AscentConfig) -> list[str]:
    """List the parameters that ascent will change, or add a LoRA to ([`parameters.perturbed_names`])."""
    return perturbed_names(adapter, config.modules, lora=rank_of_ascent(adapter, config) is not None)


def norm(vector: Sequence[Tensor]) -> float:
    """Give a vector's Euclidean norm, in float32 tensor by tensor: a half-precision sum of squares overflows."""
    return torch.stack([part.float().norm() for part in vector]).norm().item()


def call(model: nn.Module, theta: Mapping[str, Tensor | LowRank], **inputs: Any) -> Any:
    """Run the model with the parameters theta in place of its own; without any, the model as it is."""
    whole = {name: value for name, value in theta.items() if isinstance(value, Tensor)}
    with added(model, {name: value for name, value in theta.items() if isinstance(value, LowRank)}):
        return functional_call(model, whole, (), inputs) if whole else model(**inputs)


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
        return _beyond_shared(adapter, _matching(trainable, adapter.default_modules()))
    for pattern in modules:
        if not _matching(trainable, [pattern]):
            raise ValueError(_nothing_matches(adapter.model, pattern, trainable))
    return _matching(trainable, modules)


def _inner(adapter: Adapter, layers: list[str]) -> list[str]:
    """Of linear layers those that the adapter prefers, as far as they are within the model."""
    output = getattr(adapter.model, "get_output_embeddings", lambda: None)()
    own = next((f"{name}.weight" for name, module in adapter.model.named_modules() if module is output), None)
    inner = [name for name in layers if name != own]
    return _beyond_shared(adapter, _matching(inner, adapter.default_modules()) or inner)


def _beyond_shared(adapter: Adapter, names: list[str]) -> list[str]:
    """Leave out what is tied to, or stands in, the prefix, unless nothing else is there."""
    prefix = adapter.shared_parameters()
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


def copies_in_memory(model: nn.Module, names: list[str]) -> int:
    """How many copies of the perturbed parameters are held: few enough not to count beside the model itself."""
    size = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    room = max(64 * 2**20, sum(size.values()) // 10)
    return max(1, min(32, room // max(1, sum(size.get(name, 0) for name in names))))


def has_length(adapter: Adapter, config: AscentConfig) -> bool:
    """Whether random steps can be as long as the ascent's: those of a learning rate, or of a LoRA, have no length."""
    return config.radius is not None and rank_of_ascent(adapter, config) is None
