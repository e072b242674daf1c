"""Save a perturbed model theta_K as an ordinary PEFT adapter, for any engine that serves LoRA."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_forward_inf.adapters import CausalLMAdapter, Seq2SeqAdapter
from hf_forward_inf.adapters.contrast import query_adapter
from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.ascent.layers import holders
from hf_forward_inf.ascent.low_rank import LowRank
from hf_forward_inf.ascent.parameters import Parameters, in_full, names_for
from hf_forward_inf.curvature.perturber import Perturber
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.utils.models import evaluating, linear_layers, peft_parameters
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.storage import Tensors, write_folder

PREFIX = "base_model.model."
"""What PEFT puts before a parameter's name."""
CARD = """---
library_name: peft
base_model: {base}
tags:
- data-attribution
- hf-forward-inf
---

# A model perturbed for one output

This is not a model to chat with. Added to its base model, this LoRA of rank {rank} is the perturbation of Forward-INF
(Ko et al., CVPR 2024) for the query below. Training examples whose loss it raises most are the proponents of that
output.

Query:

    {query}

Ascent:

    {ascent}

Share of the perturbation's squared norm beyond this rank: {lost:.3g}.
"""


def save_perturbation(tracer: Scorer, query: Mapping[str, Any], folder: Path, rank: int | None) -> float:
    """Perturb the model for a query and save the change; see [`ForwardInf.save_perturbation`]."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Saving a perturbation needs the extra `peft`: pip install 'hf-forward-inf[peft]'."
        ) from error
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name another folder.")
    model: Any = tracer.adapter.model
    has_adapter = bool(peft_parameters(model))
    _check(tracer, names_for(tracer.adapter, tracer.ascent), has_adapter)
    theta = _theta(tracer, query, Perturber(tracer.adapter, tracer.ascent, tracer.training, tracer.cache_dir))
    changes, lost = ({}, 0.0) if has_adapter else _as_lora(model, theta, rank)
    needed = max((len(change.down) for change in changes.values()), default=0)

    def write(part: Path) -> None:
        if has_adapter:
            model.save_pretrained(str(part), state_dict={**model.state_dict(), **in_full(model, theta)})
        else:
            whole = {name: value for name, value in theta.items() if name not in changes and isinstance(value, Tensor)}
            _save_lora(tracer, changes, whole, max(1, needed), part)
        (part / "README.md").write_text(_card(tracer, query, needed, lost))

    if process_state().is_main_process:
        write_folder(folder, write)
    process_state().wait_for_everyone()
    return lost


def _save_lora(
    tracer: Scorer, changes: Mapping[str, LowRank], whole: Mapping[str, Tensor], rank: int, folder: Path
) -> None:
    """Write a fresh LoRA in PEFT's format, with whole copies of biases and of modules like normalisations."""
    import peft

    model: Any = tracer.adapter.model
    held = holders(model, changes)
    named = {module: name for name, module in model.named_modules()}
    targets = {named[layer]: (layer, changes[name]) for name, layers in held.items() for layer in layers}
    tensors: Tensors = {}
    for name, (layer, change) in targets.items():
        tensors |= _tensors(f"{PREFIX}{name}", layer, change, rank)
    biases = [name for name in whole if _owner(name) in targets or name in _biases(model)]
    copied = sorted({_owner(name) for name in whole if name not in biases})
    for name, value in whole.items():
        place = f"{_owner(name)}.base_layer.bias" if _owner(name) in targets else name
        tensors[f"{PREFIX}{place}"] = value.detach().clone().contiguous().cpu()
    for name in copied:  # PEFT copies whole modules
        for local, value in model.get_submodule(name).named_parameters(recurse=False):
            tensors.setdefault(f"{PREFIX}{name}.{local}", value.detach().clone().contiguous().cpu())
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM" if isinstance(tracer.adapter, Seq2SeqAdapter) else "CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        target_modules=list(targets),
        modules_to_save=copied or None,
        bias="all" if biases else "none",
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer, _ in targets.values()),
    )
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _biases(model: nn.Module) -> set[str]:
    """Return the names of the biases of linear layers."""
    return {f"{name.removesuffix('weight')}bias" for name in linear_layers(model)}


def _check(tracer: Scorer, names: list[str], has_adapter: bool) -> None:
    """Raise for a model or parameters whose change PEFT can't represent, before anything is computed."""
    model: Any = tracer.adapter.model
    if not isinstance(tracer.adapter, CausalLMAdapter | Seq2SeqAdapter):
        raise TypeError(
            f"Only perturbations of language models can be saved, not those of {type(tracer.adapter).__name__}."
        )
    layers = linear_layers(model)
    if has_adapter:
        foreign = [name for name in names if name in layers or ".base_layer." in name]
        hint = "This model has LoRA weights of its own: perturb those, or merge them first (merge_and_unload)."
    else:
        foreign = [name for name in names if any(True for _ in model.get_submodule(_owner(name)).children())]
        hint = "Perturb other parameters: ForwardInf(..., ascent=AscentConfig(modules=[...]))."
    if foreign:
        more = ", ..." if len(foreign) > 3 else ""
        raise ValueError(f"An adapter can't hold the change of {', '.join(foreign[:3])}{more}. {hint}")


def _theta(tracer: Scorer, query: Mapping[str, Any], perturber: Perturber) -> Parameters:
    """Return theta_K for the query."""
    adapter = tracer.adapter
    encoded = encode(adapter, Dataset.from_list([dict(query)]), "queries", tracer.cache_dir)
    with evaluating(adapter.model):
        (theta,) = perturber.perturbation(encoded[:]).changes
    if theta is None:
        raise ValueError("The query's gradient is zero or not finite: there is no perturbation to save.")
    return theta


def _as_lora(model: nn.Module, theta: Parameters, rank: int | None) -> tuple[dict[str, LowRank], float]:
    """Return each matrix's change in the lowest sufficient rank, and the share of the squared norm beyond `rank`."""
    matrices = {
        name: layers[0]
        for name, layers in holders(model, theta).items()
        if name.endswith(".weight") and all(isinstance(layer, nn.Linear | Conv1D | nn.Embedding) for layer in layers)
    }
    changes, squared_norms, lost = {}, [], []
    for name, layer in matrices.items():
        value = theta[name]
        change = value if isinstance(value, LowRank) else _difference(layer, value)
        changes[name], share = change.without_rows().truncated(min(change.shape) if rank is None else rank)
        squared_norm = change.norm() ** 2
        squared_norms.append(squared_norm)
        lost.append(share * squared_norm)
    return changes, math.fsum(lost) / (math.fsum(squared_norms) or 1.0)


def _difference(layer: nn.Module, value: Tensor) -> LowRank:
    """Return the change of a layer's weight, in full rank."""
    weight: Any = layer.weight
    change = (value - weight.detach()).float()
    change = change.T if isinstance(layer, Conv1D) else change
    return LowRank(torch.eye(change.shape[1], device=change.device), change)


def _tensors(name: str, layer: nn.Module, change: LowRank, rank: int) -> dict[str, Tensor]:
    """Return the factors of a layer's change under PEFT's names, padded with zeros to the rank."""
    missing = rank - len(change.down)
    down = F.pad(change.down, (0, 0, 0, missing)).contiguous().cpu()
    up = F.pad(change.up, (0, missing)).contiguous().cpu()
    if isinstance(layer, nn.Embedding):  # whose matrix PEFT has the other way round
        return {f"{name}.lora_embedding_A": up.T.contiguous(), f"{name}.lora_embedding_B": down.T.contiguous()}
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def _card(tracer: Scorer, query: Mapping[str, Any], rank: int, lost: float) -> str:
    """Return the model card."""
    model: Any = tracer.adapter.model
    columns = query_adapter(tracer.adapter, query).columns_in(query)
    ascent = {name: value for name, value in asdict(tracer.ascent).items() if value is not None}
    return CARD.format(
        base=json.dumps(str(model.name_or_path)),
        rank=rank,
        query=json.dumps({name: query[name] for name in columns}, ensure_ascii=False, default=str),
        ascent=json.dumps(ascent),
        lost=lost,
    )
