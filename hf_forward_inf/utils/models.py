"""What is asked of any torch module: its mode, its device, its linear layers."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from hf_forward_inf.utils.sizes import MB

SMALL = 2**20
"""Elements of a buffer that is restored after a forward has written to it; larger ones hold quantised weights."""


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter that is in memory, or that of an offloaded model's inputs."""
    devices = (p.device for p in model.parameters() if p.device.type != "meta")
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    placed = (getattr(hook, "execution_device", None) for hook in hooks)
    return next(devices, None) or torch.device(next((place for place in placed if place is not None), "meta"))


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


def check_same_parameters(model: nn.Module, other: nn.Module) -> None:
    """Check that two models have the same parameters, by name and shape.

    Raises:
        ValueError: If not. It names the first that differs.
    """
    own, others = ({name: tuple(p.shape) for name, p in uncompiled(one).named_parameters()} for one in (model, other))
    for name in [*own, *others]:
        if own.get(name) != others.get(name):
            raise ValueError(
                f"The models are not of the same architecture: {name} has shape {own.get(name)} in one, "
                f"{others.get(name)} in the other. Give a model with the same parameters."
            )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Switch off dropout, compilation and inference mode: losses are repeatable, hooks run, gradients can be had.

    Every module gets its own mode back afterwards, whatever happens, and the buffers that its forward writes to.
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    buffers = [saved for model in models for saved in _small_buffers(model)]
    try:
        for model in models:
            model.eval()
        # A compiled module doesn't run hooks that were registered after its compilation.
        with torch.compiler.set_stance("force_eager"), _out_of_inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, buffer, values in buffers:
            _restore(module, name, buffer, values)


def _small_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor, Tensor]]:
    """Yield the buffers in memory that a forward may count or cache in, with a copy of their values."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta" and buffer.numel() <= SMALL:
                yield module, name, buffer, buffer.detach().clone()


def _restore(module: nn.Module, name: str, buffer: Tensor, values: Tensor) -> None:
    if not torch.equal(buffer, values):
        with torch.no_grad():
            buffer.copy_(values)
    if module._buffers.get(name) is not buffer:
        module._buffers[name] = buffer


@contextmanager
def _out_of_inference_mode() -> Iterator[None]:
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():  # leaving the one alone would switch gradients on
        yield


def bytes_of_model(model: nn.Module) -> int:
    """Return the bytes of a model's weights."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def room_beside(model: nn.Module) -> float:
    """Return the bytes that activations of a batch may take: a twentieth of the model's, or 64 MB."""
    return max(bytes_of_model(model) / 20, 64 * MB)


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch off a surrounding autocast: sums and solutions are to have the precision of their terms."""
    kinds = {"cpu", torch.device(torch.accelerator.current_accelerator() or "cpu").type}
    with ExitStack() as stack:
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` or DistributedDataParallel wraps, or the model itself.

    Raises:
        TypeError: If the model is DeepSpeed's or the first FSDP's, whose parameters are flattened into one.
    """
    if type(model).__name__ == "DeepSpeedEngine" or any(hasattr(p, "ds_id") for p in model.parameters()):
        raise TypeError(
            "DeepSpeed's engine and its partitioned parameters can't be traced: load the checkpoint as an ordinary "
            "model, or shard it by FSDP2 (fully_shard, or accelerate with fsdp_version=2)."
        )
    if type(model).__name__ == "FullyShardedDataParallel":
        raise TypeError("FSDP1 flattens parameters: shard the model by FSDP2 (accelerate with fsdp_version=2).")
    wrapped = type(model).__name__ == "DistributedDataParallel"
    inner = model.module if wrapped else getattr(model, "_orig_mod", None)
    return uncompiled(inner) if isinstance(inner, nn.Module) else model


def without_peft(model: Any) -> Any:
    """Return the model that a PEFT model wraps, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_sharded(model: nn.Module) -> bool:
    """Return whether parameters are sharded over processes (FSDP2): then all of them must run the model together."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Free the whole weights that a sharded model holds between its forward and its backward pass."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_backward"):  # FSDP2's
            free: Any = module.reshard
            free()


def check_in_memory(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to copy parameters that are elsewhere, or that autograd can't use.

    Raises:
        ValueError: If one of the parameters is offloaded, or a parameter of the model was made in inference mode.
    """
    absent = [name for name in names if model.get_parameter(name).device.type == "meta"]
    if absent:
        raise ValueError(
            f"{absent[0]} is not in memory (it is on the meta device"
            f"{f', as {len(absent) - 1} others are' if len(absent) > 1 else ''}), so that it can't be perturbed: load "
            "the model without offloading, or perturb only what is in memory with modules=[...]."
        )
    made = [name for name, p in model.named_parameters() if p.is_inference()]
    if made:
        raise ValueError(
            f"{made[0]} was made in inference mode, and autograd can't use it: load the model outside of "
            "torch.inference_mode()."
        )


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's linear layers by the names of their weights, without the matrices of LoRA."""
    named = ((name, module) for name, module in model.named_modules() if "lora_" not in name)
    return {f"{name}.weight": module for name, module in named if isinstance(module, nn.Linear | Conv1D)}


def peft_parameters(model: Any) -> list[str]:
    """Return the names of the weights that a PEFT model's adapters have trained; none for another model."""
    adapters = getattr(model, "peft_config", None)
    if not adapters:  # empty after the last adapter was deleted
        return []
    from peft import get_peft_model_state_dict

    if any(config.is_prompt_learning for config in adapters.values()):
        return [name for name, _ in model.named_parameters() if name.startswith("prompt_encoder.")]
    states = (get_peft_model_state_dict(model, adapter_name=one, save_embedding_layers=False) for one in adapters)
    saved = {tensor.data_ptr() for state in states for tensor in state.values()}
    return [name for name, p in model.named_parameters() if p.data_ptr() in saved]


def virtual_tokens(model: Any) -> int:
    """Return how many positions a PEFT model puts before a row's own tokens: those of a trained prompt.

    A trained prefix puts keys and values there, and no positions.
    """
    if not getattr(model, "peft_config", None) or not hasattr(model, "active_peft_config"):
        return 0
    config = model.active_peft_config
    return config.num_virtual_tokens if config.is_prompt_learning and config.peft_type != "PREFIX_TUNING" else 0


def is_quantised(model: nn.Module) -> bool:
    """Return whether linear layers have weights that can't be differentiated, such as those of 8 or 4 bits."""
    weights = (layer.weight for layer in linear_layers(model).values())
    return any(not weight.is_floating_point() or type(weight.data) is not Tensor for weight in weights)  # type: ignore[operator]
