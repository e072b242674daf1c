"""Every attributor for one model, settings chosen by what retraining did to other queries than those judged."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset

from hf_forward_inf.adapters import Adapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines import Ensemble, FirstOrder, attributors_for
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.scores.retraining import Retrained
from hf_forward_inf.utils.processes import say

DIRECTIONS: dict[str, dict[str, Any]] = {
    "gradient": {"direction": "gradient"},
    "adam": {"direction": "adam"},
    "kfac": {"direction": "kfac"},
    "ekfac": {"direction": "ekfac"},
    "cg_5": {"direction": "cg", "iterations": 5},
    "cg_10": {"direction": "cg", "iterations": 10},
    "cg_20": {"direction": "cg", "iterations": 20},
}
"""Directions of Forward-INF's step that are tried."""
BASELINES = (
    "tracin", "tracin_cosine", "trackstar", "influence_functions", "influence_functions_lissa", "representation",
    "random", "bm25", "bm25_without_answer",
)  # fmt: skip
"""Attributors that Forward-INF is compared with, each with its own defaults."""


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
    """Choose every direction's damping and radius by the LDS of other queries ([`tuning.tune`]).

    Args:
        adapter (`Adapter`): Of the explained model.
        candidates (`datasets.Dataset`): The training data.
        others (`Retrained`): What retraining did to queries that are not judged.
        dampings (`Sequence[float]`): Dampings to try.
        radii (`Sequence[float]`): Radii to try.
        names (`Sequence[str]`, *optional*): Directions, of [`DIRECTIONS`].
        sample (`int`, *optional*): Candidates whose curvature counts.
        seed (`int`, defaults to 0): Draws them.

    Returns:
        `tuple`: Settings by direction, and the best direction.
    """
    found, heights = {}, {}
    for name in names:
        # Training moves every parameter, whatever the adapter's default.
        ascent = AscentConfig(**DIRECTIONS[name], modules=["all"], seed=seed)
        if name != "gradient":
            ascent = replace(ascent, sample=sample)
        tracer = ForwardInf(adapter=adapter, ascent=ascent)
        tuned = tracer.tune(candidates, retrained=others, dampings=dampings, radii=radii)
        assert tuned.tuning is not None
        say(f"\n{name}, by the LDS of other queries (* is used):\n{tuned.tuning}")
        found[name] = tuned.ascent
        heights[name] = max(trial["lds"] for trial in tuned.tuning.trials)
    return found, max(heights, key=lambda name: heights[name])


def contenders(adapters: Sequence[Adapter], directions: dict[str, AscentConfig]) -> dict[str, Attributor]:
    """Make every attributor.

    Args:
        adapters (`list[Adapter]`): Of models that were trained alike with several seeds; the first is explained, the
            others join it in ensembles.
        directions (`dict[str, AscentConfig]`): Settings of Forward-INF by name.

    Returns:
        `dict`: `forward_inf`, with the settings that a user gets who sets nothing; every direction as it is,
        `_symmetric`, to `_first_order`, and as mean over all `_seeds`; baselines.
    """
    first = adapters[0]
    found: dict[str, Attributor] = {"forward_inf": ForwardInf(adapter=first)}
    for name, ascent in directions.items():
        found[name] = ForwardInf(adapter=first, ascent=ascent)
        found[f"{name}_symmetric"] = ForwardInf(adapter=first, ascent=replace(ascent, mode="symmetric"))
        found[f"{name}_first_order"] = FirstOrder(adapter=first, ascent=ascent)
        if len(adapters) > 1:
            found[f"{name}_seeds"] = Ensemble([ForwardInf(adapter=one, ascent=ascent) for one in adapters])
    return {**found, **attributors_for(ForwardInf(adapter=first), BASELINES)}
