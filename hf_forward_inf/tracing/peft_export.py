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
from hf_forward_inf.ascent.low_rank import LowRank
from hf_forward_inf.ascent.parameters import Parameters, in_full, names_for
from hf_forward_inf.curvature.perturber import Perturber
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.utils.models import evaluating, linear_layers, peft_parameters
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.storage import write_folder

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
            _save_lora(tracer, changes, needed, part)
        (part / "README.md").write_text(_card(tracer, query, needed, lost))

    if process_state().is_main_process:
        write_folder(folder, write)
    process_state().wait_for_everyone()
    return lost


def _save_lora(tracer: Scorer, changes: Mapping[str, LowRank], rank: int, folder: Path) -> None:
    """Write a fresh LoRA in PEFT's format."""
    import peft

    model: Any = tracer.adapter.model
    layers = linear_layers(model)
    config = peft.LoraConfig(
        task_type="SEQ_2_SEQ_LM" if isinstance(tracer.adapter, Seq2SeqAdapter) else "CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        target_modules=[name.removesuffix(".weight") for name in changes],
        fan_in_fan_out=any(isinstance(layers[name], Conv1D) for name in changes),
    )
    config.save_pretrained(str(folder))
    save_file(_tensors(changes, rank), folder / "adapter_model.safetensors", {"format": "pt"})


def _check(tracer: Scorer, names: list[str], has_adapter: bool) -> None:
    """Raise for a model or parameters whose change LoRA can't represent, before anything is computed."""
    if not isinstance(tracer.adapter, CausalLMAdapter | Seq2SeqAdapter):
        raise TypeError(
            f"Only perturbations of language models can be saved, not those of {type(tracer.adapter).__name__}."
        )
    layers = linear_layers(tracer.adapter.model)
    if has_adapter:
        foreign = [name for name in names if name in layers or ".base_layer." in name]
        hint = "This model has LoRA weights of its own: perturb those, or merge them first (merge_and_unload)."
    else:
        foreign = [name for name in names if name not in layers]
        hint = "Perturb only linear layers, such as ForwardInf(..., ascent=AscentConfig(modules=['*proj.weight']))."
    if foreign:
        more = ", ..." if len(foreign) > 3 else ""
        raise ValueError(f"LoRA can't represent the change of {', '.join(foreign[:3])}{more}. {hint}")


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
    """Return each layer's change in the lowest sufficient rank, and the share of the squared norm beyond `rank`."""
    layers = linear_layers(model)
    changes, squared_norms, lost = {}, [], []
    for name, value in theta.items():
        change = value if isinstance(value, LowRank) else _difference(layers[name], value)
        changes[name], share = change.truncated(min(change.shape) if rank is None else rank)
        squared_norm = change.norm() ** 2
        squared_norms.append(squared_norm)
        lost.append(share * squared_norm)
    return changes, math.fsum(lost) / math.fsum(squared_norms)


def _difference(layer: nn.Module, value: Tensor) -> LowRank:
    """Return the change of a layer's weight, in full rank."""
    weight: Any = layer.weight
    change = (value - weight.detach()).float()
    change = change.T if isinstance(layer, Conv1D) else change
    return LowRank(torch.eye(change.shape[1], device=change.device), change)


def _tensors(changes: Mapping[str, LowRank], rank: int) -> dict[str, Tensor]:
    """Return the factors under PEFT's names, all padded with zeros to the same rank."""
    tensors = {}
    for name, change in changes.items():
        missing = rank - len(change.down)
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{layer}.lora_A.weight"] = F.pad(change.down, (0, 0, 0, missing)).contiguous().cpu()
        tensors[f"{layer}.lora_B.weight"] = F.pad(change.up, (0, missing)).contiguous().cpu()
    return tensors


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
