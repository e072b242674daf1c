"""Rivals on denoisers: TRAK and D-TRAK with exact kernels, and unlearning that retains the rest (MUCS)."""

from fnmatch import fnmatch
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.adapters.base import Batch, Forward, Rows
from hf_forward_inf.ascent.parameters import Parameters, call, perturbed_names
from hf_forward_inf.baselines.base import ModelBaseline
from hf_forward_inf.curvature.example_gradients import ExampleGradients, Objective
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.utils.models import evaluating, to_device

ROWS = 16
"""Pictures whose gradients are computed at once."""
FEED_FORWARD = ("*_blocks.?.up.*", "*_blocks.?.down.*", "*.ff.net.*")
"""Feed-forward weights of a perceptron's blocks, and those of a UNet's transformers."""


class GradientKernel(ModelBaseline):
    """Scores by TRAK's formula, phi(query) (Phi'Phi + lambda I)^-1 phi(candidate), with phi a gradient.

    With as many candidates as a tiny model has, nothing is projected: in the kernel's form the inverse is of the
    candidates' products, `[candidates, candidates]`.

    Args:
        adapter (`DiffusionAdapter`): Knows the model, times and noise.
        output (`bool`, defaults to `False`): Take the gradient of the squared norm of the model's output (D-TRAK;
            Zheng et al., 2024) in place of the loss's (TRAK; Park et al., 2023).
        damping (`float`, defaults to 1.0): lambda, as a multiple of the candidates' mean squared norm.
    """

    adapter: DiffusionAdapter

    def __init__(self, adapter: DiffusionAdapter, *, output: bool = False, damping: float = 1.0):
        super().__init__(adapter=adapter)
        self.output, self.damping = output, damping
        self.name = "d_trak" if output else "trak"

    @property
    def config(self) -> dict[str, Any]:
        """Damping, and what is differentiated."""
        return {"output": self.output, "damping": self.damping}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Return scores, float32 `[queries, candidates]`."""
        return self.damped(*self.products(queries, candidates))

    def damped(self, cross: Tensor, own: Tensor) -> np.ndarray:
        """Return scores from the products of gradients: `cross [queries, candidates]`, `own` among candidates."""
        ridge = self.damping * own.diagonal().mean() * torch.eye(len(own), dtype=own.dtype)
        return torch.linalg.solve(own + ridge, cross.T).T.float().numpy()

    def products(self, queries: Dataset, candidates: Dataset) -> tuple[Tensor, Tensor]:
        """Return products of the queries' and of the candidates' gradients with those of the candidates, float64."""
        with evaluating(self.adapter.model):
            of_queries = self._gradients(self.adapter.for_queries(()), queries)
            of_candidates = self._gradients(self.adapter, candidates)
        cross = sum(a.double() @ b.double().T for a, b in zip(of_queries, of_candidates, strict=True))
        own = sum(b.double() @ b.double().T for b in of_candidates)
        assert isinstance(cross, Tensor) and isinstance(own, Tensor)
        return cross.cpu(), own.cpu()

    def _gradients(self, adapter: DiffusionAdapter, rows: Dataset) -> list[Tensor]:
        """Return each picture's gradients by parameter, `[rows, numel]`."""
        encoded = encode(adapter, rows, "candidates", self.cache_dir)
        gradients = ExampleGradients(adapter, perturbed_names(adapter, ["all"]), encoded[:1])
        weights = {name: adapter.model.get_parameter(name) for name in gradients.names}
        found = {name: one.new_empty(len(rows), one.numel()) for name, one in weights.items()}
        for start in range(0, len(rows), ROWS):
            batch = to_device(adapter.collate(encoded[start : start + ROWS]), adapter.model)
            for name, part, values in gradients.of(batch, self._objective(adapter, batch)):
                found[name][start : start + ROWS][part] = values
        return list(found.values())

    def _objective(self, adapter: DiffusionAdapter, batch: Batch) -> Objective | None:
        if not self.output:
            return None

        def squared_norm(forward: Forward) -> Tensor:
            predicted, _ = adapter.predicted(forward, batch)
            return (predicted.square().flatten(3).sum(3).mean(2) * batch["weights"]).sum()

        return squared_norm


class NoisierAdapter(DiffusionAdapter):
    """The denoising loss in the noisier part of the schedule alone.

    Args:
        pipe (`diffusers.DiffusionPipeline`): The pipeline.
        least (`float`, defaults to 0.3): Part of the schedule that is left out.
        **options: Options of [`DiffusionAdapter`].
    """

    def __init__(self, pipe: Any, *, least: float = 0.3, **options: Any):
        super().__init__(pipe, **options)
        self.least = least

    @property
    def cache_key(self) -> str:
        """That of the whole schedule's losses, and the part that is left out."""
        return f"{super().cache_key} {self.least}"

    def collate(self, features: Rows) -> Batch:
        """Stack latents, and draw each picture's noise and times."""
        batch = super().collate(features)
        batch["parts"] = self.least + (1 - self.least) * batch["parts"]
        return batch


class RetainedUnlearning(ModelBaseline):
    """Scores by the relative rise of a candidate's loss after the query is unlearnt and the rest retained (MUCS).

    A copy of the feed-forward weights descends L(random candidates) - `share` x min(L(query), `clamp` x its first
    value) for some steps of Adam, at timesteps from the noisier 70% of the schedule, where all is measured.

    Args:
        adapter (`DiffusionAdapter`): Knows the model; its timesteps and seed are used.
        modules (`list[str]`, defaults to [`FEED_FORWARD`]): Names of the weights, with `*`.
        share (`float`, defaults to 0.2): Weight of the query's loss.
        clamp (`float`, defaults to 3.0): The query's loss counts up to this multiple of its first value.
        steps (`int`, defaults to 10): Steps of Adam.
        rate (`float`, defaults to 1e-3): Its learning rate.
        batch_size (`int`, defaults to 32): Random candidates in a step.
    """

    name = "mucs"
    adapter: DiffusionAdapter

    def __init__(
        self,
        adapter: DiffusionAdapter,
        *,
        modules: tuple[str, ...] = FEED_FORWARD,
        share: float = 0.2,
        clamp: float = 3.0,
        steps: int = 10,
        rate: float = 1e-3,
        batch_size: int = 32,
    ):
        own = NoisierAdapter(adapter.pipe, timesteps=adapter.timesteps, seed=adapter.seed)
        super().__init__(adapter=own)
        self.modules, self.share, self.clamp = modules, share, clamp
        self.steps, self.rate, self.batch_size = steps, rate, batch_size

    @property
    def config(self) -> dict[str, Any]:
        """All options."""
        names = ("modules", "share", "clamp", "steps", "rate", "batch_size")
        return {name: getattr(self, name) for name in names}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Return relative rises, float32 `[queries, candidates]`."""
        asked, rows = (encode(self.adapter, some, "candidates", self.cache_dir) for some in (queries, candidates))
        batches = [
            to_device(self.adapter.collate(rows[start : start + 100]), self.adapter.model)
            for start in range(0, len(rows), 100)
        ]
        with evaluating(self.adapter.model):
            base = self._losses({}, batches)
            after = [self._losses(self._unlearnt(asked[i : i + 1], rows), batches) for i in range(len(asked))]
        return np.stack(after) / base - 1

    def _unlearnt(self, query: Rows, rows: Dataset) -> Parameters:
        """Return the weights after the query is unlearnt."""
        adapter, model = self.adapter, self.adapter.model
        theta = {
            name: p.detach().clone().requires_grad_()
            for name, p in model.named_parameters()
            if any(fnmatch(name, pattern) for pattern in self.modules)
        }
        forward, optimizer = partial(call, model, theta), torch.optim.Adam(theta.values(), lr=self.rate)
        forget = to_device(adapter.collate(query), model)
        draw, first = np.random.default_rng(adapter.seed), adapter.loss(partial(call, model, {}), forget).detach()
        for _ in range(self.steps):
            retained = adapter.collate(
                rows[np.sort(draw.choice(len(rows), min(self.batch_size, len(rows)), replace=False))]
            )
            loss = adapter.loss(forward, to_device(retained, model)).mean()
            loss = loss - self.share * adapter.loss(forward, forget).clamp(max=self.clamp * first).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {name: value.detach() for name, value in theta.items()}

    @torch.no_grad()
    def _losses(self, theta: Parameters, batches: list[Batch]) -> np.ndarray:
        forward = partial(call, self.adapter.model, theta)
        return np.concatenate([self.adapter.loss(forward, batch).cpu().numpy() for batch in batches])
