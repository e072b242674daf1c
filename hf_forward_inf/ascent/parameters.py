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
from hf_forward_inf.utils.models import check_in_memory, is_quantised, linear_layers, peft_parameters

Parameters: TypeAlias = dict[str, Tensor | LowRank]
"""theta_K: the perturbed parameters by name, or low-rank changes of them; all others are theta's."""


def rank_of_ascent(adapter: Adapter, config: AscentConfig) -> int | None:
    """Return the rank of the new LoRA that is perturbed; `None` if the weights themselves are.

    Raises:
        ValueError: If weights are quantised and the direction needs their gradients.
    """
    if config.lora_rank is not None:
        return config.lora_rank
    if not is_quantised(adapter.model) or peft_parameters(adapter.model):
        return None
    if config.direction != "gradient" or config.optimizer != "sgd" or config.relative:
        raise ValueError(
            "The model's weights are quantised, so it is perturbed through a new LoRA, which works along the gradient "
            "only and with an absolute radius: leave out direction, optimizer and relative, or load the model "
            "unquantised."
        )
    return RANK


def radius_of(config: AscentConfig, parameters: Iterable[Tensor]) -> float:
    """Return the length of the path from theta to theta_K in weight space."""
    assert config.radius is not None
    return config.radius * norm([value.detach() for value in parameters]) if config.relative else config.radius


def names_for(adapter: Adapter, config: AscentConfig) -> list[str]:
    """List the parameters that ascent changes, or adds a LoRA to ([`parameters.perturbed_names`])."""
    return perturbed_names(adapter, config.modules, lora=rank_of_ascent(adapter, config) is not None)


def norm(vector: Sequence[Tensor]) -> float:
    """Return a vector's Euclidean norm; in float32, since a half-precision sum of squares overflows."""
    norms = [part.float().norm() for part in vector]
    return torch.stack([one.to(norms[0].device) for one in norms]).norm().item()  # a model may lie on several devices


def call(model: nn.Module, theta: Mapping[str, Tensor | LowRank], **inputs: Any) -> Any:
    """Run the model with the parameters theta in place of its own; with an empty theta, unchanged."""
    whole = {name: value for name, value in theta.items() if isinstance(value, Tensor)}
    with added(model, {name: value for name, value in theta.items() if isinstance(value, LowRank)}):
        if not whole:
            return model(**inputs)
        return functional_call(model, _everywhere(model, whole), (), inputs, tie_weights=False)


def _everywhere(model: nn.Module, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name every place of a parameter, so that tied ones change together.

    A module that has two names is in one place: `functional_call`, left to find ties itself, would replace its
    parameters twice and restore the replaced ones.
    """
    own = dict(model.named_parameters())
    values = {id(own[name]): value for name, value in theta.items()}
    return {
        f"{prefix}.{name}" if prefix else name: values[id(p)]
        for prefix, module in model.named_modules()
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(p) in values
    }


def perturbed_names(adapter: Adapter, modules: list[str] | None, lora: bool = False) -> list[str]:
    """List the parameters that ascent changes.

    Args:
        adapter (`Adapter`): Knows the model and its preferred modules.
        modules (`list[str]`, *optional*): As in [`AscentConfig`].
        lora (`bool`, defaults to `False`): Only weights of linear layers, the output layer's only if named.

    Raises:
        ValueError: If a pattern matches nothing, or only tied parameters that have another name.
    """
    trainable: Mapping[str, Any]
    if lora:
        trainable = linear_layers(adapter.model)
        modules = modules or _inner(adapter, list(trainable))
    else:
        trainable = {name: p for name, p in adapter.model.named_parameters() if p.is_floating_point()}
    if modules is None:
        names = _beyond_shared(adapter, _matching(trainable, adapter.default_modules()))
    else:
        for pattern in modules:
            if not _matching(trainable, [pattern]):
                raise ValueError(_nothing_matches(adapter.model, pattern, trainable))
        names = _matching(trainable, modules)
    check_in_memory(adapter.model, names)
    return names


def _inner(adapter: Adapter, layers: list[str]) -> list[str]:
    """Return the linear layers that the adapter prefers, without the output layer."""
    output = getattr(adapter.model, "get_output_embeddings", lambda: None)()
    own = next((f"{name}.weight" for name, module in adapter.model.named_modules() if module is output), None)
    inner = [name for name in layers if name != own]
    return _beyond_shared(adapter, _matching(inner, adapter.default_modules()) or inner)


def _beyond_shared(adapter: Adapter, names: list[str]) -> list[str]:
    """Leave out parameters of the shared part, unless there are no others."""
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
    return f"No parameter matches modules={pattern!r}.{hint} The model's top-level modules: {', '.join(tops)}."


def copies_in_memory(model: nn.Module, names: list[str], each: int = 1) -> int:
    """Number of models held in memory, each as `each` copies of what is perturbed: a tenth of the model, or 64 MiB."""
    size = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    room = max(64 * 2**20, sum(size.values()) // 10)
    return max(1, min(32, room // max(1, each * sum(size.get(name, 0) for name in names))))


def has_length(adapter: Adapter, config: AscentConfig) -> bool:
    """Whether steps have a radius in weight space: a fixed learning rate, a trust and a LoRA step have none."""
    return config.radius is not None and config.trust is None and rank_of_ascent(adapter, config) is None
