"""TrackStar-like (Chang et al., 2024): gradients corrected by second moments, at unit norm."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer

from hf_forward_inf.ascent import evaluating, perturbed_names, to_device
from hf_forward_inf.baselines.gradients import GradientBaseline, Transform
from hf_forward_inf.candidate_pass import encode
from hf_forward_inf.datasets.ftrace import sample_rows
from hf_forward_inf.example_gradients import ExampleGradients
from hf_forward_inf.fingerprints import fingerprint


class TrackStar(GradientBaseline):
    """Scores a candidate by the cosine of its gradient with the query's, both divided by root second moments.

    Args:
        model (`torch.nn.Module`): The trained model.
        processor (*optional*): Its tokenizer.
        second_moments (`str` or `Path`, *optional*): A Trainer's `optimizer.pt` (or its folder), from Adam or AdamW.
            By default they are estimated: the mean square of the gradients of some candidates.
        sample (`int`, defaults to 1024): Candidates of that estimate.
        damping (`float`, defaults to 1e-3): Part of the mean second moment that is added to every one: without it,
            what the sample never touched would count most.
        projection (`int`, *optional*): Gradients of a weight `[out, in]` are projected to `[projection, projection]`
            by random normal matrices on both sides, vectors to `projection`: less memory, noisier scores. By default
            products are exact.
        seed (`int`, defaults to 0): Draws the sample and the projections.
        **options: `adapter`, `modules`, `cache_dir`, `max_batch_length` of
            [`baselines.gradients.GradientBaseline`].

    Raises:
        FileNotFoundError: If there is no such optimizer state.
        ValueError: If the optimizer state does not match the model.
    """

    name = "trackstar"

    def __init__(
        self,
        model: nn.Module | None = None,
        processor: Any = None,
        *,
        second_moments: str | Path | None = None,
        sample: int = 1024,
        damping: float = 1e-3,
        projection: int | None = None,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__(model, processor, **options)
        if projection is not None and projection < 1:
            raise ValueError(f"projection={projection} must be at least 1.")
        self.sample, self.damping, self.projection, self.seed = sample, damping, projection, seed
        self.second_moments = None if second_moments is None else optimizer_file(second_moments)

    @property
    def config(self) -> dict[str, Any]:
        """Where second moments come from, projection, modules and seed."""
        source = f"{self.sample} candidates" if self.second_moments is None else str(self.second_moments)
        own = {"damping": self.damping, "projection": self.projection, "seed": self.seed}
        return {"second_moments": source, **own, "modules": self.modules}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Cosines of corrected gradients, `[queries, candidates]`."""
        if self.second_moments is None:
            moments = self._estimated(candidates)
        else:
            moments = read_second_moments(self.second_moments, self.adapter.model)
        mean = sum(m.sum().item() for m in moments.values()) / sum(m.numel() for m in moments.values())
        transform = self._corrected_by({n: (m + self.damping * mean).rsqrt() for n, m in moments.items()})
        sums = {name: m.sum().item() for name, m in moments.items()}
        key = fingerprint("trackstar", self.config, sums)
        products, own, theirs = self.products(queries, candidates, key, transform=transform)
        with np.errstate(invalid="ignore", divide="ignore"):
            return products / own[:, None] / theirs[None]

    def _estimated(self, candidates: Dataset) -> dict[str, Tensor]:
        adapter = self.adapter
        sample = encode(adapter, sample_rows(candidates, self.sample, self.seed), "candidates", self.cache_dir)
        gradients = ExampleGradients(adapter, perturbed_names(adapter, self.modules or ["all"]), sample[:1])
        moments: dict[str, Tensor] = {}
        with evaluating(adapter.model):
            for start in range(0, len(sample), 32):
                batch = to_device(adapter.collate(sample[start : start + 32]), adapter.model)
                for name, _, values in gradients.of(batch):
                    squares = values.square().sum(0) / len(sample)
                    moments[name] = moments[name] + squares if name in moments else squares
        return moments

    def _corrected_by(self, scales: dict[str, Tensor]) -> Transform:
        projections: dict[str, list[Tensor]] = {}

        def transform(name: str, values: Tensor) -> Tensor:
            values = values * scales[name].to(values.device)
            if self.projection is None:
                return values
            shape = self.adapter.model.get_parameter(name).shape
            if name not in projections:
                projections[name] = self._projections(name, shape, values.device)
            values = values.reshape(len(values), *shape)
            for matrix in projections[name]:  # the first axis left is projected, and becomes the last
                values = torch.tensordot(values, matrix, dims=([1], [1]))
            return values.flatten(1)

        return transform

    def _projections(self, name: str, shape: torch.Size, device: torch.device) -> list[Tensor]:
        assert self.projection is not None
        generator = torch.Generator().manual_seed(int(fingerprint(name, self.seed), 16) % 2**63)
        sides = [torch.randn(self.projection, side, generator=generator) for side in shape]
        return [side.div_(self.projection**0.5).to(device) for side in sides]


def optimizer_file(where: str | Path) -> Path:
    """Find `optimizer.pt`, given it or its folder."""
    path = Path(where) / "optimizer.pt" if Path(where).is_dir() else Path(where)
    if not path.exists():
        raise FileNotFoundError(f"There is no optimizer state {path}: give a Trainer's checkpoint folder.")
    return path


def read_second_moments(file: Path, model: nn.Module) -> dict[str, Tensor]:
    """Read Adam's second moments by parameter, flat, from a Trainer's `optimizer.pt`; nothing is unpickled.

    Raises:
        ValueError: If there are none, or they do not match the model's parameters.
    """
    saved = torch.load(file, map_location="cpu", weights_only=True)
    state, groups = saved["state"], saved["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    names = [name for group in groups for name in group.get("param_names", [])] or _trainer_order(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if len(names) != len(numbers) or not set(names) <= set(shapes):
        raise ValueError(
            f"{file} speaks of {len(numbers)} parameters, the model has {len(shapes)} (in the Trainer's order, "
            f"{len(names)}): is it from this model's training?"
        )
    moments = {}
    for number, name in zip(numbers, names, strict=True):
        moment = state.get(number, {}).get("exp_avg_sq")
        if moment is None:
            raise ValueError(f"{file} holds no second moment of {name}: only Adam and its kin keep them.")
        if tuple(moment.shape) != shapes[name]:
            raise ValueError(
                f"{file} does not match the model: {name} has shape {tuple(moment.shape)} there, {shapes[name]} here."
            )
        moments[name] = moment.float().flatten()
    return moments


def _trainer_order(model: nn.Module) -> list[str]:
    """Names as a Trainer hands parameters to its optimizer: those with weight decay first."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return [n for n in names if n in decayed] + [n for n in names if n not in decayed]
