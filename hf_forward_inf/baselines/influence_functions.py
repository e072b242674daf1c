"""Influence functions (Koh and Liang, 2017): products of gradients through the inverse curvature."""

from functools import partial
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from torch import nn

from hf_forward_inf.ascent.steps import Correction
from hf_forward_inf.baselines.gradients import Directions, GradientBaseline, corrected, cosines
from hf_forward_inf.curvature.example_gradients import ExampleGradients
from hf_forward_inf.curvature.gauss_newton import GaussNewton, hessian_product
from hf_forward_inf.curvature.sample import Sample
from hf_forward_inf.curvature.solvers import Product, conjugate_gradients, lissa
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import to_device


class InfluenceFunctions(GradientBaseline):
    """Scores a candidate by g(candidate) . H^-1 g(query): the rise of the query's loss if it is left out.

    The inverse is applied to each query's gradient, by conjugate gradients on Gauss-Newton products (`"cg"`) or by
    LiSSA on Hessians of random batches (`"lissa"`, the paper's baseline).

    Args:
        model (`torch.nn.Module`, *optional*): The trained model.
        processor (*optional*): Its tokenizer or image processor.
        solver (`str`, defaults to `"cg"`): `"cg"` or `"lissa"`.
        similarity (`str`, defaults to `"dot"`): `"cosine"` divides by the norms of both, so that candidates with large
            gradients don't rank first for every query: the better choice for a model that has memorised most of its
            training data.
        damping (`float`, *optional*): `"cg"`: a multiple of the query gradient's Rayleigh quotient, 0.1 by default.
            `"lissa"`: damping x scale is added to the Hessian, 0.01 by default.
        iterations (`int`, defaults to 10): Number of products with the curvature matrix for `"cg"`.
        sample (`int`, defaults to 128): Number of candidates that the curvature is computed on.
        scale (`float`, defaults to 100.0): LiSSA's scale, above the largest eigenvalue of any batch's Hessian.
        depth (`int`, defaults to 100): LiSSA's number of steps.
        repeats (`int`, defaults to 1): Number of LiSSA's estimates that are averaged.
        batch_size (`int`, defaults to 32): Rows in LiSSA's random batches.
        seed (`int`, defaults to 0): Seed of the sample and the batches.
        **options: `adapter`, `modules`, `cache_dir`, `max_batch_length` of
            [`baselines.gradients.GradientBaseline`].

    Raises:
        FloatingPointError: By `trace`, if LiSSA diverges.
        ValueError: If `solver` or `similarity` is unknown.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        processor: Any = None,
        *,
        solver: Literal["cg", "lissa"] = "cg",
        similarity: Literal["dot", "cosine"] = "dot",
        damping: float | None = None,
        iterations: int = 10,
        sample: int = 128,
        scale: float = 100.0,
        depth: int = 100,
        repeats: int = 1,
        batch_size: int = 32,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__(model, processor, **options)
        if solver not in ("cg", "lissa"):
            raise ValueError(f"solver={solver!r} must be 'cg' or 'lissa'.")
        if similarity not in ("dot", "cosine"):
            raise ValueError(f"similarity={similarity!r} must be 'dot' or 'cosine'.")
        self.solver, self.similarity = solver, similarity
        suffixes = ["lissa"] * (solver == "lissa") + ["cosine"] * (similarity == "cosine")
        self.name = "_".join(["influence_functions", *suffixes])
        self.damping = damping if damping is not None else {"cg": 0.1, "lissa": 0.01}[solver]
        self.iterations, self.sample, self.seed = iterations, sample, seed
        self.scale, self.depth, self.repeats, self.batch_size = scale, depth, repeats, batch_size

    @property
    def config(self) -> dict[str, Any]:
        """The solver and its options, and modules."""
        options = {"cg": ("iterations",), "lissa": ("scale", "depth", "repeats", "batch_size")}[self.solver]
        own = {name: getattr(self, name) for name in options}
        shared = {"damping": self.damping, "sample": self.sample, "seed": self.seed, "modules": self.modules}
        return {"solver": self.solver, "similarity": self.similarity, **own, **shared}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Return products through the inverse, or their cosines, `[queries, candidates]`."""
        key = fingerprint("influence functions", self.config, candidates._fingerprint)
        sample = Sample(self.adapter, candidates, self.sample, self.seed, self.cache_dir)
        directions = partial(self._solved, sample)
        norms = self.similarity == "cosine"
        products, own, theirs = self.products(queries, candidates, key, directions=directions, norms=norms)
        if not norms:
            return products
        return cosines(products, own, theirs)

    def self_influence(self, rows: Dataset) -> np.ndarray:
        """Return each training example's influence on itself, float32 `[rows]`: g . H^-1 g, with H of these rows."""
        sample = Sample(self.adapter, rows, self.sample, self.seed, self.cache_dir)
        return self.own_products(rows, partial(self._solved, sample))

    def _solved(self, sample: Sample, raw: Directions, gradients: ExampleGradients) -> Directions:
        adapter, names = self.adapter, list(raw)

        def drawn(number: int) -> Product:
            draw = np.random.default_rng((self.seed, number)).choice(len(sample), size=self.batch_size)
            batch = to_device(adapter.collate(sample.features[np.sort(draw)]), adapter.model)
            return partial(hessian_product, adapter, batch, names)

        correct: Correction
        if self.solver == "cg":
            matrix = GaussNewton(adapter, sample.batches(set(names)), names)
            correct = partial(conjugate_gradients, matrix, iterations=self.iterations, damping=self.damping)
        else:
            correct = partial(
                lissa, drawn, depth=self.depth, scale=self.scale, damping=self.damping, repeats=self.repeats
            )
        return corrected(raw, gradients, correct)
