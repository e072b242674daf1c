"""How queries are traced: by the finite step on all candidates, or on those that a screen keeps."""

import sys
import time
import warnings
from dataclasses import dataclass, field, replace

import numpy as np
from datasets import Dataset, is_caching_enabled
from datasets.utils import are_progress_bars_disabled, tqdm

from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines import Fusion
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.plan import Audit, Plan
from hf_forward_inf.tracing.audit import Scored, audit_of, failed
from hf_forward_inf.tracing.planning import floor_of, plan_for
from hf_forward_inf.tracing.screened import ScreenedStep, assembled, background_scores, floored, states_of
from hf_forward_inf.tracing.time_budget import within
from hf_forward_inf.utils.models import evaluating
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


@dataclass(frozen=True)
class Job:
    """What is traced.

    Args:
        tracer (`ForwardInf`): With the strategy.
        queries (`datasets.Dataset`): The queries.
        candidates (`datasets.Dataset`): The candidates.
        loss (`LossPass`): The pass over them.
        plan (`Plan`): What was decided.
        seconds (`float`, *optional*): The time budget.
        start (`float`): When it began, by `time.perf_counter()`.
    """

    tracer: Scorer
    queries: Dataset
    candidates: Dataset
    loss: LossPass
    plan: Plan
    seconds: float | None
    start: float

    def left(self) -> float | None:
        """Return the seconds that are left of the time budget, where there is one; more than 0."""
        return None if self.seconds is None else max(self.seconds - (time.perf_counter() - self.start), 1e-9)


def trace_planned(tracer: Scorer, queries: Dataset, candidates: Dataset, seconds: float | None = None) -> Traced:
    """Score candidates by the tracer's strategy, within a time budget where one is given."""
    if seconds is not None and not seconds > 0:
        raise ValueError(f"time_budget={seconds} must be above 0 seconds.")
    start, loss = time.perf_counter(), tracer.candidate_pass(candidates)
    plan, screen = plan_for(tracer, queries, candidates, loss, seconds)
    _announce(plan)
    job = Job(tracer, queries, candidates, loss, plan, seconds, start)
    if screen is None:
        return _full(job)
    found = _screened(job, screen)
    if found.stage is not None:
        return found
    _announce(found.plan)
    return _full(replace(job, plan=found.plan))


def _full(job: Job) -> Traced:
    """Score all candidates, or those that there is time for."""
    tracer, everything = job.tracer, np.arange(len(job.candidates))
    if job.seconds is not None:
        alone = tracer if tracer.training is not None else tracer.with_options(training=job.candidates)
        order = np.random.default_rng(tracer.ascent.seed).permutation(everything)
        scores, reached = within(
            job.seconds, order, len(job.queries),
            lambda rows: _of_all(alone, job.queries, job.candidates.select(rows)),
        )  # fmt: skip
        return Traced(scores, job.plan, reached)
    if job.loss.cached and is_caching_enabled() and job.loss.states is None:  # later queries begin there
        with evaluating(tracer.adapter.model):
            states = states_of(tracer, job.loss)
        job.loss.states = states if states.store is not None else None
    scores = _of_all(tracer, job.queries, job.candidates, job.loss)
    if job.plan.keep is None:
        return Traced(scores, job.plan, everything)
    lowered, stage = floored(scores, job.plan.keep)
    return Traced(lowered, job.plan, everything, stage, [*scores])


def _of_all(tracer: Scorer, queries: Dataset, candidates: Dataset, loss: LossPass | None = None) -> np.ndarray:
    loss = loss or tracer.candidate_pass(candidates)
    return tracer.in_units(tracer.score(queries, candidates, loss=loss), loss)


def _screened(job: Job, screen: Attributor) -> Traced:
    """Score what a screen keeps; no stage, and the plan of the full pass, where `"auto"` finds that all fail."""
    step = ScreenedStep(job.tracer, job.queries, job.candidates, job.loss)
    audits: list[Audit] = []
    for one in _screens(job.tracer, screen):
        found, audit = _scored_by(one, step, job)
        audits += [] if audit is None else [audit]
        fails = audit is not None and failed(audit)
        if fails:
            _warn(audits[-1], job.tracer.strategy == "auto")
        if not fails or job.tracer.strategy != "auto":
            return _traced(found, step, replace(job.plan, screen=one.name, audits=tuple(audits)))
    everything = job.tracer.with_options(strategy="full", screen=None, keep=None)
    plan, _ = plan_for(everything, job.queries, job.candidates, job.loss)
    reason = f"{' and '.join(audit.screen for audit in audits)} failed"
    plan = replace(plan, reason=reason, keep=floor_of(job.tracer, len(job.candidates)), audits=tuple(audits))
    return Traced(np.empty(0), plan, np.empty(0))


def _screens(tracer: Scorer, screen: Attributor) -> list[Attributor]:
    """Return the screen, and what `"auto"` tries where it fails: those that it joins, if it is the default."""
    default = tracer.strategy == "auto" and tracer.screen is None
    return [screen, *(screen.attributors if default and isinstance(screen, Fusion) else [])]


def _scored_by(screen: Attributor, step: ScreenedStep, job: Job) -> tuple[dict[int, Scored], Audit | None]:
    """Score what a screen keeps: of the first few queries alone where it fails, and `"auto"` tries another."""
    everyone, found, audit = range(len(job.queries)), dict[int, Scored](), None
    assert job.plan.keep is not None
    best = step.ranking(screen, len(job.candidates) if job.seconds is not None else job.plan.keep)
    for part in filter(len, (everyone[:PILOT], everyone[PILOT:])):
        left = job.left()
        share = None if left is None else left * len(part) / (len(everyone) - part.start)
        found |= step.run(best, part, job.plan.audit, share)
        audit = audit_of(screen.name, [found[i] for i in sorted(found)])
        if audit is not None and failed(audit) and job.tracer.strategy == "auto":
            break
    return found, audit


def _traced(found: dict[int, Scored], step: ScreenedStep, plan: Plan) -> Traced:
    scores, stage = assembled(found, ~np.isfinite(step.base))
    estimates = [background_scores(found[i]) for i in sorted(found)] if plan.audit else []
    return Traced(scores, plan, np.arange(scores.shape[1]), stage, estimates)


def _warn(audit: Audit, auto: bool) -> None:
    advice = "Another way is taken instead." if auto else "Give another screen, a larger keep, or strategy='full'."
    if process_state().is_main_process:
        warnings.warn(f"The screen fails: {audit}. {advice}", stacklevel=5)


def _announce(plan: Plan) -> None:
    """Print the plan of a long trace to stderr, unless progress bars are off."""
    long = plan.passes * plan.candidates >= LONG
    if long and process_state().is_main_process and not are_progress_bars_disabled():
        tqdm.write(str(plan), file=sys.stderr)
