"""Cache keys: equal inputs have equal keys, in every process and every run."""

import functools
import inspect
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import disable_caching, enable_caching, is_caching_enabled
from datasets.fingerprint import Hasher
from torch import Tensor, nn

from hf_forward_inf.utils.callables import fingerprint_of_callable
from hf_forward_inf.utils.hashes import bytes_of, fingerprint, view_of
from hf_forward_inf.utils.memory import once
from hf_forward_inf.utils.models import is_sharded, reshard

__all__ = ["bytes_of", "fingerprint", "fingerprint_of_model", "foreign_hooks", "uncached"]

PACKAGES = ("hf_forward_inf", "torch", "transformers", "tokenizers", "peft", "diffusers")
"""Packages whose version may change a loss."""
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "diffusers")
"""Packages whose own forward hooks do what the model's attributes say."""
IRRELEVANT = (set(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}) | {
    "_compiled_call_impl", "_diffusers_version", "_gradient_checkpointing_func", "_hf_hook", "_is_hf_initialized",
    "_name_or_path", "_old_forward", "_use_default_values", "generation_config", "gradient_checkpointing",
    "hf_device_map", "hf_quantizer", "name_or_path", "warnings_issued",
}  # fmt: skip
"""Attributes that change no loss: where a model comes from, where it is, how it is trained or generates."""
SHARDING = ("__composable_api_state_key", "_fsdp_", "_is_fsdp_")
"""Begin the names of attributes in which FSDP2 has what it needs."""
PLAIN = str | bytes | int | float | complex | np.generic | torch.dtype | None
"""Values that their `repr` says all of."""
FINGERPRINT = "fingerprint"
"""Name of the model's fingerprint among the options that scores depend on."""


def fingerprint_of_model(model: nn.Module) -> str:
    """Hash all that a model's losses depend on, apart from its inputs and its forward hooks ([`foreign_hooks`]).

    That is the configuration, parameters, buffers and plain attributes of every module (a temperature, a replaced
    `forward`, which PEFT adapters are active and how strongly), the code of its class (of installed packages, version
    and source file), autocast, the precision of products, and the packages' versions.
    """
    sharded = is_sharded(model)
    if sharded:
        reshard(model)
    own = once("fingerprint", model, lambda: Hasher.hash_bytes(_all_parts(model)))
    if not sharded:
        return own
    every = [""] * dist.get_world_size()  # each process has hashed its shard
    dist.all_gather_object(every, own)
    return fingerprint(every)


def _all_parts(model: nn.Module) -> Iterator[bytes | memoryview]:
    yield f"{[_version(package) for package in PACKAGES]} {torch.get_float32_matmul_precision()}".encode()
    yield f"convolutions {torch.backends.cudnn.allow_tf32}".encode()
    for device in ("cpu", torch.accelerator.current_accelerator() or "cpu"):
        kind = torch.device(device).type
        if torch.is_autocast_enabled(kind):
            yield f"autocast {kind} {torch.get_autocast_dtype(kind)}".encode()
    yield from _parts("", model, {})


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its source
        return ""


def _parts(name: str, value: Any, seen: dict[int, Any]) -> Iterator[bytes | memoryview]:
    """Walk through an object, and yield all that it holds, in an order that is the same in every process."""
    yield name.encode()
    if id(value) in seen:
        yield b"again"
        return
    # Equal numbers, texts and lists may be one object or several.
    if not isinstance(value, PLAIN | list | tuple | Mapping | Set):
        seen[id(value)] = value
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield from (view_of(plain) for plain in _plain(value.detach()))
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode() + value.tobytes()
    elif isinstance(value, PLAIN):
        yield repr(value).encode()
    elif not isinstance(value, torch.device):
        for part, inner in _inside(value):
            yield from _parts(part, inner, seen)


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """Name what an object consists of."""
    yield "type", f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, nn.Module):
        yield "code", fingerprint_of_callable(type(value))
    # A configuration: diffusers' models have a `to_json_string` of their own, without their weights.
    if hasattr(value, "to_json_string") and not isinstance(value, nn.Module):
        yield "config", value.to_json_string()
        yield "attention", getattr(value, "_attn_implementation", None)
    elif isinstance(value, Mapping):
        yield from _sorted(value)
    elif isinstance(value, list | tuple):
        yield from ((str(i), inner) for i, inner in enumerate(value))
    elif isinstance(value, Set):
        yield "set", str(sorted(map(str, value)))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif inspect.ismethod(value):
        yield from (("func", value.__func__), ("self", value.__self__))
    elif inspect.isroutine(value) or isinstance(value, type):
        yield from _function(value)
    elif inspect.iscode(value):
        yield from (("code", value.co_code), ("names", value.co_names), ("constants", value.co_consts))
    else:
        yield from _attributes(value)


def _sorted(values: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    relevant = [(str(key), inner) for key, inner in values.items() if not _is_irrelevant(key)]
    return sorted(relevant, key=lambda item: item[0])


def _is_irrelevant(key: Any) -> bool:
    return key in IRRELEVANT or str(key).startswith(SHARDING)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    own = getattr(value, "__dict__", {})
    placed = {"forward"} if "_hf_hook" in own else set()  # accelerate's, which moves tensors
    yield from _sorted({key: inner for key, inner in own.items() if key not in placed})
    offloaded = getattr(own.get("_hf_hook"), "weights_map", None)
    if offloaded is not None:
        absent = [name for name, p in value.named_parameters(recurse=False) if p.device.type == "meta"]
        yield from ((name, offloaded[name]) for name in sorted(absent))


def _function(function: Any) -> Iterator[tuple[str, Any]]:
    """Name what a function does: its code, defaults, and the values that it has closed over; a class is its name."""
    yield "name", f"{getattr(function, '__module__', '')}.{function.__qualname__}"
    if inspect.isfunction(function):
        yield from (("code", function.__code__), ("defaults", function.__defaults__))
        yield "keywords", function.__kwdefaults__
        yield from ((f"closure {i}", cell.cell_contents) for i, cell in enumerate(function.__closure__ or ()))


def foreign_hooks(model: nn.Module) -> list[str]:
    """Return the names of modules with forward hooks, or a `forward`, of the user's own: what they do is not known."""
    found = []
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        hooks += [module.__dict__["forward"]] if "forward" in module.__dict__ else []
        if any(_package(hook) not in LIBRARIES for hook in hooks):
            found.append(name or type(module).__name__)
    return found


def _package(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", None) or type(hook).__module__).partition(".")[0]


def _plain(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor consists of, such as quantised values and their scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    parts = [getattr(tensor, name) for name in names]
    return [plain for part in parts if isinstance(part, Tensor) for plain in _plain(part)]


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
