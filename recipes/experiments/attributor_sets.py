"""All attributors for one model, with settings chosen by the retraining of queries that are not evaluated."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset

from hf_forward_inf.adapters import Adapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines import ATTRIBUTORS, Ensemble, FirstOrder, attributors_for
from hf_forward_inf.evaluation.tables import REFERENCE
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.scores.retraining import Retrained
from hf_forward_inf.utils.processes import say

SOLVERS: dict[Any, str] = {"ekfac": "influence_functions_ekfac", "pcg": "influence_functions_kfac_cg"}
"""Influence functions whose inverse is EK-FAC's, or a few products that K-FAC preconditions."""
DIRECTIONS: dict[str, dict[str, Any]] = {
    "gradient": {"direction": "gradient"},
    "kfac": {"direction": "kfac"},
    "ekfac": {"direction": "ekfac"},
    "cg_5": {"direction": "cg", "iterations": 5},
    "cg_10": {"direction": "cg", "iterations": 10},
    "cg_20": {"direction": "cg", "iterations": 20},
    "pcg_3": {"direction": "pcg", "iterations": 3},
}
"""Directions of Forward-INF's step that are compared."""
BASELINES = (
    "tracin", "tracin_cosine", "trackstar", "influence_functions", "influence_functions_lissa", "representation",
    "random", "bm25", "bm25_without_answer",
)  # fmt: skip
"""Attributors whose best candidates are removed, each with its own defaults."""


def chosen_directions(
    adapter: Adapter,
    candidates: Dataset,
    others: Retrained,
    *,
    dampings: Sequence[float],
    radii: Sequence[float],
    names: Sequence[str] = tuple(DIRECTIONS),
    sample: int | None = None,
    seed: int = 0,
) -> tuple[dict[str, AscentConfig], str]:
    """Return each direction's damping and radius, chosen by the LDS of other queries ([`tuning.tune`]).

    Args:
        adapter (`Adapter`): Adapter of the explained model.
        candidates (`datasets.Dataset`): The training data.
        others (`Retrained`): Retrained losses of queries that are not evaluated.
        dampings (`Sequence[float]`): Dampings to try.
        radii (`Sequence[float]`): Radii to try.
        names (`Sequence[str]`, *optional*): Names in [`DIRECTIONS`]. Defaults to all.
        sample (`int`, *optional*): Number of candidates that the curvature is computed on.
        seed (`int`, defaults to 0): Seed of that sample.

    Returns:
        `tuple`: Settings by direction, and the best direction.
    """
    found, best = {}, {}
    for name in names:
        # Training changes every parameter, not only the adapter's default modules.
        ascent = AscentConfig(**DIRECTIONS[name], modules=["all"], seed=seed)
        if name != "gradient":
            ascent = replace(ascent, sample=sample)
        tracer = ForwardInf(adapter=adapter, ascent=ascent)
        tuned = tracer.tune(candidates, grid(tracer.ascent, dampings, radii), retrained=others)
        assert tuned.tuning is not None
        say(f"\n{name}, by the LDS of other queries (* is used):\n{tuned.tuning}")
        found[name] = tuned.ascent
        best[name] = max(trial["lds"] for trial in tuned.tuning.trials)
    return found, max(best, key=lambda name: best[name])


def grid(ascent: AscentConfig, dampings: Sequence[float], radii: Sequence[float]) -> list[AscentConfig]:
    """Return settings with every damping, where the direction has one, and every radius."""
    undamped = ascent.direction == "gradient"
    return [
        replace(ascent, damping=damping, radius=radius)
        for damping in ([None] if undamped else dampings)
        for radius in radii
    ]


def contenders(adapters: Sequence[Adapter], directions: dict[str, AscentConfig]) -> dict[str, Attributor]:
    """Return all attributors that are compared.

    Args:
        adapters (`list[Adapter]`): Adapters of models that were trained with several seeds; the first is explained,
            and ensembles average over all of them.
        directions (`dict[str, AscentConfig]`): Settings of Forward-INF by name.

    Returns:
        `dict[str, Attributor]`: `forward_inf`, with defaults; each direction alone, `_symmetric`, `_first_order`, and
        averaged over `_seeds`; all others that are registered.
    """
    first = adapters[0]
    found = registered(first)
    for name, ascent in directions.items():
        found[name] = ForwardInf(adapter=first, ascent=ascent)
        found[f"{name}_symmetric"] = ForwardInf(adapter=first, ascent=replace(ascent, mode="symmetric"))
        found[f"{name}_first_order"] = FirstOrder(adapter=first, ascent=ascent)
        if len(adapters) > 1:
            found[f"{name}_seeds"] = Ensemble([ForwardInf(adapter=one, ascent=ascent) for one in adapters])
    return found


def registered(adapter: Adapter, **options: Any) -> dict[str, Attributor]:
    """Return every registered attributor that fits a model, and influence functions with other inverses.

    All have their defaults. `forward_inf` scores every candidate by the finite step; `forward_inf_auto`, of language
    models, those that its screen finds.

    Args:
        adapter (`Adapter`): Adapter of the explained model.
        **options: Options of [`ForwardInf`], such as `training`.
    """
    tracer = ForwardInf(adapter=adapter, strategy="full", **options)
    found: dict[str, Attributor] = {REFERENCE: tracer}
    if adapter.default_strategy == "screen":
        found["forward_inf_auto"] = tracer.with_options(strategy="auto")
    found |= attributors_for(tracer, [name for name in ATTRIBUTORS if name != REFERENCE])
    for direction, name in SOLVERS.items():
        found[name] = FirstOrder(adapter=adapter, ascent=AscentConfig(direction=direction), **options)
    return found
