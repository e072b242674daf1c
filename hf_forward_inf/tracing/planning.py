"""The plan of a trace: which candidates get the finite step, by which screen, and what that costs."""

import math
from dataclasses import replace
from typing import Any

from datasets import Dataset
from torch import nn

from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.ascent.parameters import TOKENS, bytes_of_change, copies_in_memory, is_low_rank, names_for
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines import ATTRIBUTORS, BM25, Fusion, RepresentationSimilarity
from hf_forward_inf.passes.base_pass import KEY, is_joint
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.plan import Part, Plan
from hf_forward_inf.tracing.screened import has_representation
from hf_forward_inf.utils.models import is_sharded
from hf_forward_inf.utils.sizes import GB

KEEP, SHARE = 50, 0.05
"""Default number of candidates that a screen keeps: the larger of a number and a share of all."""
FEW = 1000
"""`"auto"` scores all candidates of up to so many: it costs little, and a screen loses some of the truth (LDS on 600
sentences .73 with 50 of them, .76 by the full pass with the same floor)."""
SAVES = 3
"""Where `keep` is given, `"auto"` screens if there are more than so many times the candidates that are then scored."""
SCREENS = ("bm25", "representation")
"""Attributors whose reciprocal ranks are the default screen, where they can trace a model."""
BACKWARD = 3
"""Cost of a gradient, in forward passes over the same rows."""


def plan_for(
    tracer: Scorer, queries: Dataset, candidates: Dataset, loss: LossPass, seconds: float | None = None
) -> tuple[Plan, Attributor | None]:
    """Decide how queries are traced, and what that takes. The model is not run.

    Args:
        tracer (`ForwardInf`): With the options.
        queries (`datasets.Dataset`): The queries.
        candidates (`datasets.Dataset`): The candidates.
        loss (`LossPass`): The pass over them.
        seconds (`float`, *optional*): A time budget.

    Returns:
        `tuple`: The plan, and the screen, `None` if all candidates are scored.

    Raises:
        TypeError: If the screen can't trace the model.
        ValueError: If there is no screen for the model.
    """
    rows = len(candidates)
    keep = kept(tracer, rows)
    audit = tracer.audit if seconds is None else 0
    strategy, reason = _decision(tracer, rows, keep + audit)
    screen = None
    if strategy == "screen":
        screen = tracer.screen or default_screen(tracer, queries, candidates)
        if screen is None:
            strategy, reason = "full", "the rows have neither texts nor representations to screen them by"
            if tracer.strategy == "screen":
                raise ValueError(f"strategy='screen': {reason}. Give screen=..., an attributor, or strategy='full'.")
    if strategy == "full" or screen is None:
        return _full(tracer, Plan("full", reason, len(queries), rows, keep=floor_of(tracer, rows)), loss), None
    made = screen_named(screen, tracer) if isinstance(screen, str) else screen
    plan = Plan("screen", reason, len(queries), rows, made.name, keep, audit)
    return _screened(tracer, plan, loss), made


def kept(tracer: Scorer, rows: int) -> int:
    """Return how many candidates of each query have scores of their own where the others have the floor."""
    return tracer.keep or max(KEEP, math.ceil(SHARE * rows))


def floor_of(tracer: Scorer, rows: int) -> int | None:
    """Return how many of each query's best scores a full pass leaves above the floor; `None` for all.

    `"auto"` sets a floor for language models: what is beyond the best is noise there. It adds .01 to .03 to the LDS
    (tiny mT5 .634 to .649, tiny Llama .748 to .765), and changes no ranking of the best.
    """
    wanted = tracer.keep is not None if tracer.strategy == "full" else _suits(tracer)
    keep = kept(tracer, rows)
    return keep if wanted and keep < rows else None


def screen_named(name: str, tracer: Scorer) -> Attributor:
    """Return a screen by its name: that of an attributor, or several joined by `+`, whose reciprocal ranks are added.

    Raises:
        TypeError: If it can't trace the tracer's model.
    """
    if "+" in name:
        return Fusion([screen_named(one, tracer) for one in name.split("+")])
    if reason := ATTRIBUTORS[name].misfit(tracer.adapter):
        raise TypeError(f"screen={name!r} does not fit: {reason}")
    if name == "representation":
        return RepresentationSimilarity(adapter=tracer.adapter, cache_dir=tracer.cache_dir, whitened=True)
    return ATTRIBUTORS[name].make(tracer)


def default_screen(tracer: Scorer, queries: Dataset, candidates: Dataset) -> str | None:
    """Return the screen that fits the model and its rows, `None` where none does."""
    adapter = tracer.adapter
    words = BM25.misfit(adapter) is None and BM25(adapter=adapter).reads_texts(queries, candidates)
    fits = dict(zip(SCREENS, (words, has_representation(adapter)), strict=True))
    return "+".join(name for name in SCREENS if fits[name]) or None


def _decision(tracer: Scorer, rows: int, scored: int) -> tuple[str, str]:
    """Return the strategy and the reason for it."""
    if is_sharded(tracer.adapter.model):
        if tracer.strategy == "screen":
            raise ValueError(
                "A screen has every process score other candidates, and all must run a sharded model (FSDP) together: "
                "take strategy='full'."
            )
        return "full", "all processes run a sharded model together"
    if tracer.strategy == "screen":
        return ("screen", "as asked for") if rows > scored else ("full", "a screen would keep all candidates")
    if tracer.strategy == "full":
        return "full", "as asked for"
    wanted = tracer.screen is not None
    if not wanted and not _suits(tracer):
        return "full", "the best for shifts" if tracer.measure == "shift" else "the best for this kind of model"
    few = SAVES * scored if tracer.keep is not None else max(SAVES * scored, FEW)
    if rows <= (scored if wanted else few):
        return "full", "a screen would save little"
    return "screen", "a screen is given" if wanted else "the best for this kind of model"


def _suits(tracer: Scorer) -> bool:
    """Return whether a floor helps this kind of model, and what is measured of it."""
    return tracer.adapter.default_strategy == "screen" and tracer.measure != "shift"


def _full(tracer: Scorer, plan: Plan, loss: LossPass) -> Plan:
    parts = [
        Part("base losses", 1.0, loss.is_cached("base"), stored=4 * plan.candidates),
        *_of_ascents(tracer, plan),
        Part(
            "losses of all candidates under each query's model",
            plan.queries * perturbed_share(tracer),
            stored=4 * plan.queries * plan.candidates,
        ),
        Part("states before the perturbed part", stored=int(min(_state_bytes(tracer, loss), tracer.storage * GB))),
    ]
    return replace(plan, parts=tuple(parts), memory=_memory(tracer, plan.queries))


def _screened(tracer: Scorer, plan: Plan, loss: LossPass) -> Plan:
    assert plan.keep is not None
    share, width = perturbed_share(tracer), _width(tracer.adapter.model)
    scored = min(plan.keep + plan.audit, plan.candidates) * plan.queries / plan.candidates
    states = _state_bytes(tracer, loss)
    room = min(1.0, tracer.storage * GB / states) if states else 0.0
    key = KEY if tracer.measure != "shift" and is_joint(tracer.adapter) else "base"
    parts = [
        Part(KEY, 1.0, loss.is_cached(key), stored=4 * (1 + width) * plan.candidates),
        *_of_ascents(tracer, plan),
        Part("states before the perturbed part", scored * (1 - share) * (1 - room), stored=int(room * states)),
        Part(
            "losses of the kept under each query's model",
            scored * share * _runs(tracer),
            stored=int(12 * scored * plan.candidates),
        ),
    ]
    return replace(plan, parts=tuple(parts), memory=_memory(tracer, plan.queries))


def _runs(tracer: Scorer) -> int:
    """Return how often a candidate is run for a query: twice where each term's loss before is needed."""
    return 1 if tracer.falls == 1 else 2


def _of_ascents(tracer: Scorer, plan: Plan) -> list[Part]:
    """Return what perturbing the model costs: the fit of a corrected direction, and the steps of each query."""
    config, fits = tracer.ascent, []
    if config.direction != "gradient" and config.sample is not None:
        fits = [Part(f"{config.direction} on {config.sample} rows", BACKWARD * config.sample / plan.candidates)]
    return [*fits, Part("ascents", BACKWARD * config.steps * plan.queries / plan.candidates)]


def perturbed_share(tracer: Scorer) -> float:
    """Return the part of a forward pass that each query runs, by the number of parameters that it reads."""
    adapter = tracer.adapter
    shared = adapter.shared_parameters()
    if adapter.shares is False or shared & set(names_for(adapter, tracer.ascent)):
        return 1.0
    tables = {f"{name}.weight" for name, module in adapter.model.named_modules() if isinstance(module, nn.Embedding)}
    sizes = {name: p.numel() for name, p in adapter.model.named_parameters() if name not in tables}
    return 1 - sum(size for name, size in sizes.items() if name in shared) / max(1, sum(sizes.values()))


def _state_bytes(tracer: Scorer, loss: LossPass) -> float:
    """Return the bytes of the states of all candidates before the perturbed part; 0 where they can't be stored."""
    adapter = tracer.adapter
    lengths = adapter.shared_lengths(loss.lengths) if perturbed_share(tracer) < 1 else None
    itemsize = next(adapter.model.parameters()).element_size()
    return 0.0 if lengths is None else float(lengths.sum()) * _width(adapter.model) * itemsize


def _width(model: nn.Module) -> int:
    """Return the number of features of a model's hidden states; 0 where its configuration does not say it."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or 0)


def _memory(tracer: Scorer, queries: int) -> int:
    """Return the bytes of the perturbed models that are held at once."""
    model, ascent = tracer.adapter.model, tracer.ascent
    rank = TOKENS * ascent.steps if is_low_rank(tracer.adapter, ascent) else None
    size = bytes_of_change(model, names_for(tracer.adapter, ascent), rank)
    return min(queries, copies_in_memory(model, size)) * size
