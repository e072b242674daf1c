"""How queries are traced: by the finite step on all candidates, or on those that a screen keeps."""

import sys
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
from datasets import Dataset
from datasets.utils import are_progress_bars_disabled, tqdm

from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.plan import Audit, Plan
from hf_forward_inf.tracing.audit import Scored, audit_of, failed
from hf_forward_inf.tracing.planning import plan_for
from hf_forward_inf.tracing.screened import ScreenedStep, assembled, background_scores, floored
from hf_forward_inf.tracing.time_budget import within
from hf_forward_inf.utils.processes import process_state

PILOT = 8
"""Queries by which `"auto"` judges a screen before it goes on with the others."""
LONG = 10_000
"""Forward passes over single candidates from which on a plan is printed."""


@dataclass(frozen=True)
class Traced:
    """What a trace has found.

    Args:
        scores (`np.ndarray`): float32 `[queries, candidates]`.
        plan (`Plan`): How.
        reached (`np.ndarray`): Row numbers of the candidates that have scores.
        stage (`np.ndarray`, *optional*): As in [`Attribution`].
        estimates (`list[np.ndarray]`, defaults to none): What all scores of each query look like without the floor,
            as far as it is known.
    """

    scores: np.ndarray
    plan: Plan
    reached: np.ndarray
    stage: np.ndarray | None = None
    estimates: list[np.ndarray] = field(default_factory=list)


def trace_planned(tracer: Scorer, queries: Dataset, candidates: Dataset, seconds: float | None = None) -> Traced:
    """Score candidates by the tracer's strategy, within a time budget where one is given."""
    loss = tracer.candidate_pass(candidates)
    plan, screen = plan_for(tracer, queries, candidates, loss, seconds)
    _announce(plan)
    if screen is not None:
        found = _screened(tracer, queries, candidates, plan, screen, loss, seconds)
        if found.stage is not None:
            return found
        plan = found.plan
        _announce(plan)
    everything = np.arange(len(candidates))
    if seconds is not None:
        alone = tracer if tracer.training is not None else tracer.with_options(training=candidates)
        order = np.random.default_rng(tracer.ascent.seed).permutation(len(candidates))
        scores, reached = within(
            seconds, order, len(queries), lambda rows: _of_all(alone, queries, candidates.select(rows))
        )
        return Traced(scores, plan, reached)
    scores = _of_all(tracer, queries, candidates, loss)
    if plan.keep is None:
        return Traced(scores, plan, everything)
    lowered, stage = floored(scores, plan.keep)
    return Traced(lowered, plan, everything, stage, [*scores])


def _of_all(tracer: Scorer, queries: Dataset, candidates: Dataset, loss: LossPass | None = None) -> np.ndarray:
    return tracer.in_units(tracer.score(queries, candidates, loss=loss), candidates)


def _screened(
    tracer: Scorer,
    queries: Dataset,
    candidates: Dataset,
    plan: Plan,
    screen: Attributor,
    loss: LossPass,
    seconds: float | None,
) -> Traced:
    """Score what the screen keeps; no stage, and the plan of the full pass, where `"auto"` finds that it fails."""
    step = ScreenedStep(tracer, queries, candidates, loss)
    everyone, found, audit = range(len(queries)), dict[int, Scored](), None
    assert plan.keep is not None
    best = step.ranking(screen, len(candidates) if seconds is not None else plan.keep)
    for part in (everyone[:PILOT], everyone[PILOT:]):
        found |= step.run(best, part, plan.audit, None if seconds is None else seconds * len(part) / len(everyone))
        audit = audit_of(screen.name, [found[i] for i in sorted(found)])
        if audit is not None and failed(audit) and tracer.strategy == "auto":
            return Traced(np.empty(0), _without_screen(tracer, queries, candidates, loss, audit), np.empty(0))
    if audit is not None and failed(audit):
        _warn(audit, "Give another screen, a larger keep, or strategy='full'.")
    scores, stage = assembled(found, ~np.isfinite(step.base))
    plan = replace(plan, audits=() if audit is None else (audit,))
    estimates = [background_scores(found[i]) for i in sorted(found)] if plan.audit else []
    return Traced(scores, plan, np.arange(len(candidates)), stage, estimates)


def _without_screen(tracer: Scorer, queries: Dataset, candidates: Dataset, loss: LossPass, audit: Audit) -> Plan:
    _warn(audit, "All candidates are scored instead.")
    plan, _ = plan_for(tracer.with_options(strategy="full", screen=None, keep=None), queries, candidates, loss)
    return replace(plan, reason=f"{audit.screen} failed", audits=(audit,))


def _warn(audit: Audit, advice: str) -> None:
    if process_state().is_main_process:
        warnings.warn(f"The screen fails: {audit}. {advice}", stacklevel=4)


def _announce(plan: Plan) -> None:
    """Print the plan of a long trace to stderr, unless progress bars are off."""
    long = plan.passes * plan.candidates >= LONG
    if long and process_state().is_main_process and not are_progress_bars_disabled():
        tqdm.write(str(plan), file=sys.stderr)
