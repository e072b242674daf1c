"""Checkpoints of a transformers `Trainer`: their folders, learning rates and weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig

from hf_forward_inf.utils.models import check_same_parameters


@dataclass(frozen=True)
class Checkpoint:
    """A folder with a model's weights, and the learning rate at that training step (NaN if unknown)."""

    folder: Path
    learning_rate: float


def find_checkpoints(
    where: str | Path | Sequence[str | Path], learning_rates: Sequence[float] | None = None, needed: bool = True
) -> list[Checkpoint]:
    """Return checkpoints in the order of their steps.

    Args:
        where (`str`, `Path` or a list): A Trainer's output folder with `checkpoint-*` in it, or checkpoint folders.
        learning_rates (`list[float]`, *optional*): One per checkpoint. Defaults to those in `trainer_state.json`.
        needed (`bool`, defaults to `True`): Whether an unknown learning rate is an error.

    Raises:
        FileNotFoundError: If there is no checkpoint, or a folder contains no model.
        ValueError: If a learning rate is needed and unknown, or their number differs from that of checkpoints.
    """
    if isinstance(where, (str, Path)):
        inside = sorted(Path(where).glob("checkpoint-*"), key=_step)
        folders = inside or [Path(where)]
    else:
        folders = [Path(folder) for folder in where]
    if not folders:
        raise FileNotFoundError("The list of checkpoints is empty.")
    for folder in folders:
        if not (folder / "config.json").exists():
            raise FileNotFoundError(
                f"{folder} contains no checkpoint (no checkpoint-* folders, no config.json): give a Trainer's output "
                "folder, or checkpoint folders."
            )
    if learning_rates is None:
        learning_rates = [_logged_rate(folder, needed) for folder in folders]
    if len(learning_rates) != len(folders):
        raise ValueError(f"{len(learning_rates)} learning rates for {len(folders)} checkpoints: give one for each.")
    return [Checkpoint(folder, rate) for folder, rate in zip(folders, learning_rates, strict=True)]


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _logged_rate(folder: Path, needed: bool) -> float:
    file = folder / "trainer_state.json"
    state = json.loads(file.read_text()) if file.exists() else {}
    rates = [entry["learning_rate"] for entry in state.get("log_history", []) if "learning_rate" in entry]
    if not rates and needed:
        raise ValueError(
            f"{file} logs no learning rate: give learning_rates=[...], one per checkpoint, or similarity='cosine'."
        )
    return rates[-1] if rates else float("nan")


def load_checkpoint(model: Any, folder: Path) -> nn.Module:
    """Return a checkpoint's model, of the same architecture, on the model's device and in its precision.

    Raises:
        ValueError: If the checkpoint has another architecture.
    """
    config = AutoConfig.from_pretrained(folder)
    if config.model_type != model.config.model_type:
        raise ValueError(f"{folder} contains a {config.model_type}; the model is a {model.config.model_type}.")
    other = type(model).from_pretrained(folder, torch_dtype=model.dtype).to(model.device).eval()
    try:
        check_same_parameters(model, other)
    except ValueError as error:
        raise ValueError(f"{folder} can't be used: {error}") from error
    return other
