"""Directions of a step, corrected by curvature: C^-1 g, with g the query's gradient.

Training with another weight of the query is, to first order, a step along C^-1 g, with C the curvature of the training
loss: it mirrors training better than a step along g. Only the query's step changes: candidates are still only
forwarded.
"""

import math
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from accelerate.utils import gather_object
from datasets import Dataset, is_caching_enabled
from safetensors import SafetensorError
from torch import Tensor

from hf_forward_inf.adapters.base import Adapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.ascent.parameters import norm
from hf_forward_inf.ascent.slopes import Changes
from hf_forward_inf.ascent.steps import Correction, Direction
from hf_forward_inf.curvature.gauss_newton import GaussNewton
from hf_forward_inf.curvature.inverse import damped_inverse, factored_inverse, factored_inverse_of, rayleigh_quotient
from hf_forward_inf.curvature.kronecker import KroneckerFit
from hf_forward_inf.curvature.sample import Sample
from hf_forward_inf.curvature.solvers import KrylovSpace, conjugate_gradients, warn_of_residual
from hf_forward_inf.passes.freshness import agree, is_first_use, tolerance_of
from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model, foreign_hooks
from hf_forward_inf.utils.models import device_of, is_sharded
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.storage import StoredTensors, Tensors, cache_tensors, default_cache_dir

WITNESS = "witness"
"""Name of the numbers by which a cached fit is checked."""


def direction_for(
    config: AscentConfig, adapter: Adapter, training: Dataset | None, names: list[str], cache_dir: Path | None = None
) -> Direction | None:
    """Return what corrects gradients, fitted if it is fitted once for all queries; `None` for the gradient itself.

    Args:
        config (`AscentConfig`): Direction, damping, sample; completed ([`AscentConfig.completed`]).
        adapter (`Adapter`): Knows the model.
        training (`datasets.Dataset`, *optional*): The training data, or a part of it.
        names (`list[str]`): Parameters to perturb.
        cache_dir (`Path`, *optional*): Factors are cached in its folder `curvature`. Defaults to
            [`storage.default_cache_dir`].

    Raises:
        ValueError: If the direction needs training data and there is none.
    """
    if config.direction == "gradient":
        return None
    if training is None:
        raise ValueError(
            f"direction={config.direction!r} needs the training data: give ForwardInf(..., training=...)."
        )
    assert config.sample is not None
    sample = Sample(adapter, training, config.sample, config.seed, cache_dir)
    cache = FitCache(cache_dir, adapter, sample, names, config.seed)
    if config.direction == "cg":
        return ConjugateGradients(config, sample, names)
    if config.direction == "pcg":
        return PreconditionedGradients(config, cache)
    return KroneckerFactors(config, cache)


class ConjugateGradients:
    """Solves (G + lambda I) x = g for each query, by products with G, the Gauss-Newton matrix of the sample's loss.

    The matrix's graph is built for a block of queries and freed with it, so that the loss pass has the memory. A query
    costs `iterations` products, of 2 to 2.5 forward passes over the sample each.
    """

    def __init__(self, config: AscentConfig, sample: Sample, names: list[str]):
        self.config, self.sample, self.names = config, sample, names
        self.fingerprint = sample.fingerprint
        self.warned = False

    def correction(self, gradients: Iterable[Sequence[Tensor]] = ()) -> Correction:
        """Build the matrix, and return the solver."""
        matrix = GaussNewton(self.sample.adapter, self.sample.batches(set(self.names)), self.names)
        config = self.config
        assert config.damping is not None and config.iterations is not None
        return partial(
            conjugate_gradients,
            matrix,
            iterations=config.iterations,
            damping=config.damping,
            tolerance=config.tolerance,
            on_unconverged=self._warn_once,
        )

    def _warn_once(self, residual: float, products: int) -> None:
        if not self.warned:
            warn_of_residual(residual, products)
        self.warned = True


class KroneckerFactors:
    """K-FAC or EK-FAC: factors fitted once, for all queries of all runs ([`kronecker.KroneckerFit`])."""

    def __init__(self, config: AscentConfig, cache: "FitCache"):
        self.config, self.names = config, cache.names
        fit = KroneckerFit(cache.sample, cache.names, config.seed, config.memory)
        self.layers = fit.layers
        kind = f"{fit.draws}-{fit.rank}"
        self.parts = [cache.get(f"kfac-{kind}", fit.factors, fit.witness)]
        if config.direction == "ekfac":
            self.parts.append(cache.get(f"ekfac-{kind}", lambda: fit.corrected(self.fitted), fit.witness))
        self.fingerprint = fingerprint(cache.fingerprint, kind)

    @property
    def fitted(self) -> Mapping[str, Tensor]:
        """Everything fitted; read from the cache layer by layer, as it is used."""
        return ChainMap(*(read() for read in reversed(self.parts)))  # type: ignore[arg-type]

    def correction(self, gradients: Iterable[Sequence[Tensor]] = ()) -> Correction:
        """Return the product with the damped inverse, of vectors or [`slopes.Changes`]; each factor's for low rank."""
        fitted, damping = self.fitted, self.config.damping
        assert damping is not None
        if self.config.step == "full":
            return partial(damped_inverse, layers=self.layers, names=self.names, fitted=fitted, damping=damping)

        def solved(gradient: Changes | Sequence[Tensor]) -> Changes | list[Tensor]:
            if isinstance(gradient, dict):
                return factored_inverse(gradient, self.layers, fitted, damping)
            return factored_inverse_of(gradient, self.layers, self.names, fitted, damping)

        return solved


class PreconditionedGradients:
    """Solves (G + lambda I) x = g for a block of queries, by products with G that Kronecker factors precondition.

    The factors are fitted once for all queries, and all products of a block serve all of its queries
    ([`solvers.KrylovSpace`]), so that a query's direction depends a little on those that are traced with it. lambda is
    the same for the whole block: `damping` x the median of the queries' Rayleigh quotients, by the factors.

    It pays for classifiers ([`TensorAdapter.default_ascent`]). On facts and a tiny mT5 its LDS is .49 to .58, where
    that of K-FAC, without products, is .57 and .58 (40 queries; dampings of .01 to .3, samples of 128 and 400).
    """

    def __init__(self, config: AscentConfig, cache: "FitCache"):
        self.config, self.sample, self.names = config, cache.sample, cache.names
        self.factors = KroneckerFactors(config, cache)
        self.fingerprint = self.factors.fingerprint

    def correction(self, gradients: Iterable[Sequence[Tensor]] = ()) -> Correction:
        """Build the space of a block's gradients, and return its solver."""
        matrix = GaussNewton(self.sample.adapter, self.sample.batches(set(self.names)), self.names)
        rights = [gradient for gradient in gradients if 0 < norm(gradient) < math.inf]
        if rights:
            return self._space(matrix, rights).solve
        return lambda gradient: self._space(matrix, [gradient]).solve(gradient)

    def _space(self, matrix: GaussNewton, rights: Sequence[Sequence[Tensor]]) -> KrylovSpace:
        assert self.config.damping is not None and self.config.iterations is not None
        layers, names, fitted = self.factors.layers, self.names, self.factors.fitted
        middle = median(rayleigh_quotient(right, layers, names, fitted) for right in rights)
        shift = self.config.damping * middle or 1.0
        precondition = partial(damped_inverse, layers=layers, names=names, fitted=fitted, shift=shift)
        return KrylovSpace(matrix, precondition, rights, self.config.iterations, shift)


class FitCache:
    """Cache of what is fitted on a sample: safetensors files, named by a fingerprint of all that they depend on.

    The main process fits, the others wait and read; a sharded model is run by all.
    """

    def __init__(self, cache_dir: Path | None, adapter: Adapter, sample: Sample, names: list[str], seed: int):
        self.folder = (cache_dir or default_cache_dir()) / "curvature"
        self.adapter, self.sample, self.names = adapter, sample, names
        self.fingerprint = fingerprint(sample.fingerprint, names, seed)

    def get(
        self, kind: str, fit: Callable[[], Tensors], witness: Callable[[], Tensor]
    ) -> Callable[[], Mapping[str, Tensor]]:
        """Fit, unless it is cached, and return what reads the tensors from the cache, each when it is used.

        Args:
            kind (`str`): What is fitted, as a part of the file's name.
            fit (`Callable`): Fits it.
            witness (`Callable`): Computes a few numbers that are stored with it: what is cached is fitted again, with
                a warning, where the model gives others now.
        """
        if not is_caching_enabled() or foreign_hooks(self.adapter.model):
            fitted = fit()
            return lambda: fitted
        device = device_of(self.adapter.model)
        key = fingerprint(fingerprint_of_model(self.adapter.model), self.adapter.cache_key, self.fingerprint)
        file = self.folder / f"{key}-{kind}.safetensors"

        def made() -> Tensors:
            return {**fit(), WITNESS: witness()}

        def read() -> Mapping[str, Tensor]:
            cache_tensors(file, made)  # it may have been removed
            return StoredTensors(file, device)

        state = process_state()
        if is_sharded(self.adapter.model):
            self._fit_together(file, made)
            return read
        with state.main_process_first():
            if state.is_main_process and file.exists() and not self._is_current(file, witness):
                warnings.warn(
                    f"{file.name} is not what is fitted now (the model's code, or a file that it reads, has changed, "
                    "or the file is damaged), so curvature is fitted again.",
                    stacklevel=2,
                )
                file.unlink()
            cache_tensors(file, made)
        return read

    def _fit_together(self, file: Path, made: Callable[[], Tensors]) -> None:
        """Fit in all processes, which run a sharded model together, unless all machines have it cached."""
        state = process_state()
        if not all(gather_object([file.exists()])):
            fitted = made()
            if state.is_local_main_process:
                cache_tensors(file, lambda: fitted)
        state.wait_for_everyone()

    def _is_current(self, file: Path, witness: Callable[[], Tensor]) -> bool:
        """Compute the numbers of the adapter's first use of a file again, and compare."""
        if not is_first_use(self.adapter, file.stem):
            return True
        try:
            before = StoredTensors(file, torch.device("cpu"))[WITNESS]
        except (SafetensorError, OSError, KeyError):
            return False
        now = witness()
        return before.shape == now.shape and agree(
            before[None].numpy(), now[None].numpy(), tolerance_of(self.adapter.model)
        )
