"""Which of a model's parameters are perturbed, and the model run with them."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hf_forward_inf.adapters.base import Adapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.ascent.layers import holders, sides_of, sites
from hf_forward_inf.ascent.low_rank import LowRank, added
from hf_forward_inf.utils.models import (
    bytes_of_model,
    check_in_memory,
    is_quantised,
    is_sharded,
    linear_layers,
    peft_parameters,
)
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.sizes import MB, size_text

Parameters: TypeAlias = dict[str, Tensor | LowRank]
"""theta_K: the perturbed parameters by name, or low-rank changes of them; all others are theta's."""
TOKENS = 64
"""Tokens of an ordinary query, and the rank of a step of low rank."""
LARGE = 256 * 2**20
"""Bytes of weights that change in full beyond which a warning says so."""
SMALL = 16 * 2**20
"""Bytes of weights of which changed copies are made once for all candidates."""


def is_low_rank(adapter: Adapter, config: AscentConfig) -> bool:
    """Return whether weight matrices change by outer products ([`low_rank.LowRank`]), and no copy of them is made.

    Raises:
        ValueError: If weights are quantised, or sharded, and the direction needs their gradients.
    """
    if is_sharded(adapter.model) and config.step != "low_rank":
        raise ValueError(
            "The model is sharded (FSDP), so that its weights are changed layer by layer: take "
            "AscentConfig(step='low_rank'), with direction='kfac' or 'gradient'."
        )
    if config.step == "low_rank" or not is_quantised(adapter.model) or peft_parameters(adapter.model):
        return config.step == "low_rank"
    raise ValueError(
        f"The model's weights are quantised, so that they have no gradients, and direction={config.direction!r} with "
        f"optimizer={config.optimizer!r} and step={config.step!r} needs them: take direction='kfac' or 'gradient' "
        "with step='low_rank', or load the model unquantised."
    )


def radius_of(config: AscentConfig, parameters: Iterable[Tensor]) -> float:
    """Return the length of the path from theta to theta_K in weight space."""
    assert config.radius is not None
    return config.radius * norm([value.detach() for value in parameters]) if config.relative else config.radius


def names_for(adapter: Adapter, config: AscentConfig) -> list[str]:
    """List the parameters that ascent changes ([`parameters.perturbed_names`])."""
    is_low_rank(adapter, config)  # refuses what quantised weights don't allow
    return perturbed_names(adapter, config.modules)


def norm(vector: Sequence[Tensor]) -> float:
    """Return a vector's Euclidean norm; in float32, since a half-precision sum of squares overflows."""
    norms = [part.float().norm() for part in vector]
    return torch.stack([one.to(norms[0].device) for one in norms]).norm().item()  # a model may lie on several devices


def call(model: nn.Module, theta: Mapping[str, Tensor | LowRank], **inputs: Any) -> Any:
    """Run the model with the parameters theta in place of its own; with an empty theta, unchanged."""
    with placed(model, theta):
        return model(**inputs)


@contextmanager
def placed(model: nn.Module, theta: Mapping[str, Tensor | LowRank]) -> Iterator[None]:
    """Put the parameters theta in place of the model's own for the length of a `with`, wherever they are.

    Not `torch.func.functional_call`: a checkpointed block runs again in the backward pass, which must come before the
    model's own parameters are back. And a module that has two names would get replaced parameters back.
    """
    own = dict(model.named_parameters()) if theta else {}
    values = {id(own[name]): value for name, value in theta.items() if isinstance(value, Tensor)}
    held = [
        (module._parameters, name, p)
        for module in (model.modules() if values else ())
        for name, p in module._parameters.items()
        if id(p) in values
    ]
    with added(model, {name: value for name, value in theta.items() if isinstance(value, LowRank)}):
        try:
            for parameters, name, p in held:
                parameters[name] = values[id(p)]  # type: ignore[assignment]
            yield
        finally:
            for parameters, name, p in held:
                parameters[name] = p


def perturbed_names(adapter: Adapter, modules: list[str] | None) -> list[str]:
    """List the parameters that ascent changes.

    Args:
        adapter (`Adapter`): Knows the model and its preferred modules.
        modules (`list[str]`, *optional*): As in [`AscentConfig`].

    Raises:
        ValueError: If a pattern matches nothing, or only tied parameters that have another name.
    """
    layers = linear_layers(adapter.model)  # with weights of 8 or 4 bits, too
    trainable = [name for name, p in adapter.model.named_parameters() if p.is_floating_point() or name in layers]
    if modules is None:
        names = _beyond_shared(adapter, _matching(trainable, adapter.default_modules()))
    else:
        for pattern in modules:
            if not _matching(trainable, [pattern]):
                raise ValueError(_nothing_matches(adapter.model, pattern, trainable))
        names = _matching(trainable, modules)
    if is_sharded(adapter.model):  # a layer's weight is whole only while the layer runs, which a hook makes use of
        _warn_of_left_out([name for name in names if name not in layers])
        names = [name for name in names if name in layers]
    check_in_memory(adapter.model, names)
    return names


def _warn_of_left_out(names: list[str]) -> None:
    if names and process_state().is_main_process:
        warnings.warn(
            f"The model is sharded (FSDP): only its linear layers are perturbed, and {len(names)} other parameters "
            f"({', '.join(names[:3])}{', ...' if names[3:] else ''}) are not.",
            stacklevel=4,
        )


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


def copies_in_memory(model: nn.Module, size: int) -> int:
    """Number of perturbed models of some bytes that are held in memory: a tenth of the model, or 64 MB."""
    room = max(64 * MB, bytes_of_model(model) // 10)
    return max(1, min(32, room // max(1, size)))


def bytes_of_change(model: nn.Module, names: list[str], rank: int | None = None) -> int:
    """Return the bytes of a perturbed model: copies of its parameters, or changes of a rank ([`materialised`])."""
    own = dict(model.named_parameters())
    size = {name: own[name].numel() * own[name].element_size() for name in names}
    found = sites(model, names) if rank is not None else {}
    if sum(size[name] for name in found) > SMALL:
        for name, layers in found.items():
            outputs, inputs = sides_of(layers[0])
            size[name] = 4 * min((rank or 0) * (outputs + inputs), 2 * outputs * inputs)
    return sum(size.values())


def warn_of_full_steps(model: nn.Module, names: list[str]) -> None:
    """Warn of matrices whose change is not of low rank, if they are large: layers of unknown kind hold them."""
    own, found = dict(model.named_parameters()), sites(model, names)
    rest = {name: own[name].nbytes for name in names if name not in found and own[name].dim() > 1}
    if sum(rest.values()) > LARGE:
        warnings.warn(
            f"{len(rest)} of the perturbed parameters ({', '.join(list(rest)[:3])}, ...) belong to layers of unknown "
            f"kind: they change in full, for which a gradient and a copy of each are made, "
            f"{size_text(sum(rest.values()))} for a query. Choose others with modules=[...] if memory is short.",
            stacklevel=3,
        )


def materialised(model: nn.Module, theta: Parameters) -> Parameters:
    """Return theta with changed weights in place of low-rank changes, where hooks would take longer than all else.

    Up to [`SMALL`] bytes of weights are copied once for all candidates: with layers of width 64, calls of hooks nearly
    double a pass. Larger weights, and those that a copy would round, are left alone ([`low_rank.added`]).
    """
    own = dict(model.named_parameters())
    changed = [own[name] for name, value in theta.items() if isinstance(value, LowRank)]
    plain = all(type(p.data) is Tensor and p.dtype in (torch.float32, torch.float64) for p in changed)
    if not plain or sum(p.numel() * p.element_size() for p in changed) > SMALL:
        return theta
    return dict(in_full(model, theta))


def in_full(model: nn.Module, theta: Parameters) -> dict[str, Tensor]:
    """Return theta with changed weights in place of all low-rank changes."""
    own, layers = dict(model.named_parameters()), holders(model, theta)
    return {
        name: value.added_to(own[name], layers[name][0]) if isinstance(value, LowRank) else value
        for name, value in theta.items()
    }


def has_length(adapter: Adapter, config: AscentConfig) -> bool:
    """Whether a dense step has a length in weight space.

    A fixed learning rate and a trust have none, and to quantised weights no dense step can be added.
    """
    quantised = is_quantised(adapter.model) and not peft_parameters(adapter.model)
    return config.radius is not None and config.trust is None and not quantised
