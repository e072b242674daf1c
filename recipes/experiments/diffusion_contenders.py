"""Attributors of a denoiser's pictures, with settings chosen by the retraining of queries that are not evaluated."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from experiments.diffusion_methods import unlearning
from experiments.diffusion_rivals import GradientKernel, RetainedUnlearning
from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines import attributors_for
from hf_forward_inf.evaluation.tables import REFERENCE
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.scores.intervals import with_interval
from hf_forward_inf.scores.retraining import Retrained, lds_by_query
from hf_forward_inf.utils.processes import say

BASELINES = (
    "tracin", "tracin_cosine", "trackstar", "representation", "denoiser_features", "pixel_distance", "bm25", "random",
)  # fmt: skip
"""Attributors without settings to choose."""
STEPS = {
    "forward_inf_gradient": AscentConfig(direction="gradient"),
    "forward_inf_pcg": AscentConfig(direction="pcg"),
    "forward_inf_short": AscentConfig(radius=1e-4, relative=True),
    "forward_inf_long": AscentConfig(radius=1e-2, relative=True),
}
"""Other steps of Forward-INF than the default."""
KERNEL_DAMPINGS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.01)
"""Dampings of TRAK and D-TRAK that are tried."""
MUCS = ({"steps": 10, "rate": 1e-3},)
"""Lengths of MUCS's unlearning that are tried."""
EKFAC_DAMPINGS = (0.01, 0.001)
"""Dampings of unlearning by an EK-FAC step (AbU+) that are tried."""
Make = Callable[[DiffusionAdapter], Attributor]
"""Makes an attributor for a model, by its adapter."""


def contenders(adapter: DiffusionAdapter, candidates: Dataset, others: Retrained) -> dict[str, Make]:
    """Return attributors by name; of those with settings, the ones whose LDS is the highest on other queries.

    Args:
        adapter (`DiffusionAdapter`): Adapter of the explained model.
        candidates (`datasets.Dataset`): What it was trained on.
        others (`Retrained`): Retrained losses of queries that are not evaluated.
    """
    found = {name: _stepping(ascent) for name, ascent in {REFERENCE: AscentConfig(), **STEPS}.items()}
    families: dict[str, dict[str, Make]] = {
        "unlearning": {f"damping={damping}": _unlearnt(damping) for damping in EKFAC_DAMPINGS},
        "mucs": {str(options): _mucs(options) for options in MUCS},
    }
    for name, family in families.items():
        found[name] = chosen(name, family, adapter, candidates, others)
    for name, output in {"trak": False, "d_trak": True}.items():
        found[name] = _kernel(output, chosen_damping(output, adapter, candidates, others))
    return found | {name: _baseline(name) for name in BASELINES}


def chosen(
    name: str, family: Mapping[str, Make], adapter: DiffusionAdapter, candidates: Dataset, others: Retrained
) -> Make:
    """Return the attributor of a family whose LDS is the highest on some queries."""
    measured = {
        settings: float(lds(make(adapter).trace(others.queries, candidates).dense(), others).mean())
        for settings, make in family.items()
    }
    best = max(measured, key=lambda one: measured[one])
    say(f"{name}, by the other queries: {best} of " + ", ".join(f"{k} {v:.3f}" for k, v in measured.items()))
    return family[best]


def chosen_damping(output: bool, adapter: DiffusionAdapter, candidates: Dataset, others: Retrained) -> float:
    """Return the damping of TRAK or D-TRAK whose LDS is the highest on some queries; gradients are computed once."""
    products = GradientKernel(adapter, output=output).products(others.queries, candidates)
    measured = {
        damping: float(lds(GradientKernel(adapter, damping=damping).damped(*products), others).mean())
        for damping in KERNEL_DAMPINGS
    }
    say(f"{'D-' * output}TRAK, by the other queries: " + ", ".join(f"{k} {v:.3f}" for k, v in measured.items()))
    return max(measured, key=lambda one: measured[one])


def lds(scores: np.ndarray, truth: Retrained) -> np.ndarray:
    """Return each query's linear datamodeling score, `[queries]`."""
    return lds_by_query(scores, truth.subsets, truth.losses)


def compared(by_query: Mapping[str, np.ndarray], name: str) -> dict[str, dict[str, float]]:
    """Return means over queries with 95% intervals, and by how much Forward-INF's are higher, in pairs.

    Args:
        by_query (`dict[str, np.ndarray]`): Values of each query by method; even rows are unseen pictures, odd ones
            drawings.
        name (`str`): Name of the figure.
    """
    table: dict[str, dict[str, float]] = {}
    for method, values in by_query.items():
        table[method] = with_interval(name, values)
        table[method] |= {f"unseen/{name}": float(values[::2].mean()), f"drawn/{name}": float(values[1::2].mean())}
        if method != REFERENCE:
            table[method] |= with_interval(f"{name}_behind", by_query[REFERENCE] - values)
    return table


def _stepping(ascent: AscentConfig) -> Make:
    return lambda one: ForwardInf(adapter=one, ascent=ascent)


def _unlearnt(damping: float) -> Make:
    def make(one: DiffusionAdapter) -> Attributor:
        tracer = unlearning(ForwardInf(adapter=one, units="loss"))
        return tracer.with_options(ascent=replace(tracer.ascent, damping=damping))

    return make


def _kernel(output: bool, damping: float) -> Make:
    return lambda one: GradientKernel(one, output=output, damping=damping)


def _mucs(options: Mapping[str, Any]) -> Make:
    return lambda one: RetainedUnlearning(one, **options)


def _baseline(name: str) -> Make:
    return lambda one: attributors_for(ForwardInf(adapter=one), (name,))[name]
