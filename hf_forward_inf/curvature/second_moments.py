"""Second moments of gradients: read from an Adam optimizer's state, or estimated on a sample."""

from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from hf_forward_inf.curvature.example_gradients import ExampleGradients
from hf_forward_inf.curvature.sample import Sample


def estimated_second_moments(sample: Sample, names: list[str]) -> dict[str, Tensor]:
    """Return the mean square of the examples' gradients by parameter, flat.

    Args:
        sample (`Sample`): Examples.
        names (`list[str]`): Parameters; those without example gradients ([`ExampleGradients`]) are left out.
    """
    gradients = ExampleGradients(sample.adapter, names, sample.features[:1])
    moments: dict[str, Tensor] = {}
    for batch in sample.batches():
        for name, _, values in gradients.of(batch):
            squares = values.square().sum(0) / len(sample)
            moments[name] = moments[name] + squares if name in moments else squares
    return moments


def optimizer_file(where: str | Path) -> Path:
    """Return the path of `optimizer.pt`, given it or its folder."""
    path = Path(where) / "optimizer.pt" if Path(where).is_dir() else Path(where)
    if not path.exists():
        raise FileNotFoundError(f"There is no optimizer state {path}: give a Trainer's checkpoint folder.")
    return path


def read_second_moments(file: Path, model: nn.Module) -> dict[str, Tensor]:
    """Read Adam's second moments by parameter, flat, from a Trainer's `optimizer.pt`; nothing is unpickled.

    Raises:
        ValueError: If the file is no optimizer's state, or has no second moments of the model's parameters.
    """
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        state, groups = saved["state"], saved["param_groups"]
    except (KeyError, TypeError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{file} is not an optimizer's state: give a Trainer's checkpoint folder.") from error
    numbers = [number for group in groups for number in group["params"]]
    names = [name for group in groups for name in group.get("param_names", [])] or _trainer_order(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if len(names) != len(numbers) or not set(names) <= set(shapes):
        raise ValueError(
            f"{file} has {len(numbers)} parameters, the model has {len(shapes)} (in the Trainer's order, "
            f"{len(names)}): is it from this model's training?"
        )
    moments = {}
    for number, name in zip(numbers, names, strict=True):
        moment = state.get(number, {}).get("exp_avg_sq")
        if moment is None:
            raise ValueError(f"{file} has no second moment of {name}: only Adam and its variants have them.")
        if tuple(moment.shape) != shapes[name]:
            raise ValueError(
                f"{file} does not match the model: {name} has shape {tuple(moment.shape)} there, {shapes[name]} here."
            )
        moments[name] = moment.float().flatten()
    return moments


def _trainer_order(model: nn.Module) -> list[str]:
    """Return the names in the order of a Trainer's optimizer: parameters with weight decay first."""
    from transformers import Trainer  # slow to import, and needed for few runs

    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return [n for n in names if n in decayed] + [n for n in names if n not in decayed]
