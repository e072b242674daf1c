"""The run of `trace` and `compare`: the user's model, queries and candidates."""

from typing import Any

from datasets import Dataset

from hf_forward_inf.adapters.classification import ClassifierAdapter
from hf_forward_inf.adapters.labels import OneClass
from hf_forward_inf.adapters.language import LanguageAdapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.baselines import Difference
from hf_forward_inf.commands.options import TraceOptions
from hf_forward_inf.commands.outputs import Run, plotted
from hf_forward_inf.data import proponents
from hf_forward_inf.data.inputs import as_dataset, named, read_inputs
from hf_forward_inf.evaluation import cost
from hf_forward_inf.evaluation.comparison import run_baselines, run_comparison
from hf_forward_inf.evaluation.tables import as_text, compare, flat
from hf_forward_inf.evaluation.task import MAIN, Task, has_facts
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.report.plots import budget_plot
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.rows import sample_rows

COMPARED = 4
"""Other attributors whose rows the page can show instead."""

EXPLAINED = 50
"""Queries whose rows are explained by tokens with defaults: each is perturbed once more."""


def trace_run(options: TraceOptions, ascent: AscentConfig) -> dict[str, Any]:
    """Trace, compare with other attributors, and write `metrics.json`, `attribution/` and `report.html`.

    Losses are cached as they are computed: an interrupted run resumes when it is started again.

    Returns:
        `dict`: What `metrics.json` holds, and `answers` ([`answers.answers`]).
    """
    run = Run(options)
    tracer, attributor = _attributors(options, ascent)
    task = load_task(tracer, options)

    say(f"Tracing {len(task.queries)} queries over {len(task.candidates):,} candidates with {options.model} ...")
    limits: dict[str, Any] = {} if options.time_budget is None else {"time_budget": options.time_budget}
    found = {"forward_inf": attributor.trace(task.queries, task.candidates, **limits)}
    plan = found["forward_inf"].plan
    costs: dict[str, float] = {}
    for audit in () if plan is None else plan.audits:
        say(f"{audit}.")
        costs |= {"screen/recall": audit.recall, "screen/recall_error": audit.error}
    plot = ""
    if options.baselines:
        found |= run_baselines(task, tracer)
    if options.compare:
        comparison = run_comparison(task, tracer)
        found |= comparison.found
        costs |= comparison.costs
        plot = plotted(budget_plot, comparison.curves) if comparison.curves else ""

    table = compare(found, task)
    metrics = {**flat(table), **costs}
    if "fixed_learning_rate" in found:
        chosen = found["fixed_learning_rate"].config
        metrics |= {f"fixed_learning_rate/{key}": chosen[key] for key in ("learning_rate", "steps")}
    if table:
        say(as_text(table, costs))
    if options.cost:
        metrics |= _measured_cost(tracer, task)

    shown = _explained(found["forward_inf"].keep(min(options.top_k, len(task.candidates))), tracer, options)
    others = [one for name, one in found.items() if name != "forward_inf"][:COMPARED]
    written = run.write(shown, metrics, tracer, table=table, compare=others, proponents=task.proponents, plot=plot)
    return {**written, "answers": run.answer(shown)}


def _attributors(options: TraceOptions, ascent: AscentConfig) -> tuple[ForwardInf, ForwardInf | Difference]:
    """Return the tracer of the model, and what scores: with a baseline model, the difference of both."""
    chosen = {name: getattr(options, name) for name in ("reduction", "strategy", "screen", "keep", "audit")}
    tracer = ForwardInf.from_pretrained(options.model, ascent=ascent, **chosen)
    if options.baseline_model is None:
        return tracer, tracer
    return tracer, Difference(tracer, ForwardInf.from_pretrained(options.baseline_model, ascent=ascent, **chosen))


def _measured_cost(tracer: ForwardInf, task: Task) -> dict[str, float]:
    """Measure what a query costs, and say it."""
    measured = cost.measure(tracer, task.queries, task.candidates)
    measured |= cost.measure_screened(tracer, task.queries, task.candidates)
    passes = measured["forward_passes_per_query"]
    say(f"A query costs {passes:.2f} forward passes over the candidates in this process.")
    if screened := measured.get("screened_forward_passes_per_query"):
        say(f"With the screen, a further query costs {screened:.2f}.")
    return measured


def _explained(found: Attribution, tracer: ForwardInf, options: TraceOptions) -> Attribution:
    """Add the scores of tokens where they are asked for or affordable, and a classifier's predictions."""
    tokens = options.tokens
    if tokens is None:  # they explain the scores of one model
        affordable = isinstance(tracer.adapter, LanguageAdapter) and len(found) <= EXPLAINED
        tokens = affordable and options.baseline_model is None
    if tokens:
        found = tracer.explain(found)
    if isinstance(tracer.adapter, ClassifierAdapter) and isinstance(tracer.adapter.labels, OneClass):
        found = tracer.predict(found)
    return found


def load_task(tracer: ForwardInf, options: TraceOptions) -> Task:
    """Load queries and candidates; the model answers queries that have no answer. Proponents go by facts, if known."""
    columns, adapter = (options.input_column, options.target_column), tracer.adapter
    candidates = named(as_dataset(options.candidates, "candidates"), adapter, columns, "candidates")
    queries = named(as_dataset(options.queries, "queries"), adapter, columns, "queries")
    queries, candidates = read_inputs(adapter, queries, candidates)
    if options.num_queries is not None:
        queries = sample_rows(queries, options.num_queries, options.seed)
    queries = _answered(tracer, queries)
    truth = proponents(queries, candidates) if has_facts(queries, candidates) else None
    known = [row for row, rows in enumerate(truth or []) if rows]
    return Task(queries, candidates, truth if known else None, {MAIN: known or list(range(len(queries)))})


def _answered(tracer: ForwardInf, queries: Dataset) -> Dataset:
    adapter = tracer.adapter
    if not adapter.answers_queries and adapter.columns[-1] in queries.column_names:
        return queries
    complete = adapter.with_answers(queries)
    if complete is not queries:
        say("Some queries have no answer: the model's own is traced.")
    return complete
