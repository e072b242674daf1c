"""Fact tracing (the paper's section 5.2): which sentences taught an mT5 the facts that it states?

    accelerate launch recipes/ftrace.py
    accelerate launch recipes/ftrace.py --model google/mt5-base --num_candidates 15000 --candidates ekinakyurek/ftrace
        --queries ekinakyurek/ftrace
    accelerate launch recipes/ftrace.py --train --candidates sentences.parquet --queries questions.parquet --compare

With no option it traces the built-in facts with a tiny mT5 that it trains once. `--help` lists all options. For a
model and data of your own, of which the true sources are unknown, use `hf-forward-inf trace`.
"""

import sys
from typing import Any

from datasets import Dataset
from experiments.fact_tracing import FtraceOptions

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.baselines import attributors_for
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.outputs import Run, plotted
from hf_forward_inf.data import builtin_facts, load_rows
from hf_forward_inf.evaluation import cost
from hf_forward_inf.evaluation.comparison import run_baselines, run_comparison
from hf_forward_inf.evaluation.fact_tracing import draw_candidates, draw_task, with_answered, with_proponents
from hf_forward_inf.evaluation.tables import as_text, average, compare, flat
from hf_forward_inf.report.plots import budget_plot
from hf_forward_inf.toys.tiny_models import tiny_mt5
from hf_forward_inf.utils.loading import load_model
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.rows import sample_rows


def load(options: FtraceOptions) -> tuple[Any, Any, Dataset, Dataset, int | None]:
    """Load or train the model: model, tokenizer, sentences, queries with proponents, number of candidates to draw."""
    if options.candidates is None or options.queries is None:
        say("Tracing the built-in facts with a tiny mT5 trained on them; --model, --candidates, --queries for yours.")
        corpus = builtin_facts()
        queries = with_proponents(corpus["queries"], corpus["abstracts"], options.strict)
        count = None if options.own_candidates else options.num_candidates or 1200
        return *tiny_mt5(corpus["abstracts"], epochs=options.epochs), corpus["abstracts"], queries, count
    sentences = load_rows(options.candidates, "abstracts")
    queries = with_proponents(load_rows(options.queries, "queries"), sentences, options.strict)
    if options.model is not None:
        say(f"Tracing {options.queries} over {options.candidates} with {options.model}.")
        return *load_model(options.model), sentences, queries, options.num_candidates
    say(f"Tracing {options.queries} over {options.candidates} with a tiny mT5 trained on the candidates.")
    queries = sample_rows(queries, 4 * options.num_queries, options.seed)  # it won't answer them all
    sentences = draw_candidates(queries, sentences, options.num_candidates, options.seed)
    return *tiny_mt5(sentences, epochs=options.epochs), sentences, queries, None


def main(options: FtraceOptions, ascent: AscentConfig) -> dict[str, Any]:
    """Load, let the model answer, trace what it answers, and compare with the sentences that state the facts."""
    run = Run(options)
    model, tokenizer, sentences, queries, count = load(options)
    tracer = ForwardInf(model, tokenizer, ascent=ascent)
    queries = with_answered(tracer.adapter, queries)

    tables, costs, plot = [], {}, ""
    for repeat in range(options.repeats):
        task = draw_task(
            queries, sentences, num_queries=options.num_queries, num_candidates=count, own=options.own_candidates,
            unanswered=options.unanswered, paraphrased=options.paraphrased, strict=options.strict,
            seed=options.seed + repeat,
        )  # fmt: skip

        say(f"Tracing {len(task.queries)} queries over {len(task.candidates):,} candidates ...")
        found = {"forward_inf": tracer.trace(task.queries, task.candidates)}
        if options.baselines:
            found |= run_baselines(task, tracer)
        if options.compare and repeat == 0:  # timed, nothing taken from the cache
            comparison = run_comparison(task, tracer)
            found |= comparison.found
            costs, plot = comparison.costs, plotted(budget_plot, comparison.curves) if comparison.curves else ""
        elif options.compare:
            others = attributors_for(tracer)
            found |= {name: one.trace(task.queries, task.candidates) for name, one in others.items()}
        tables.append(compare(found, task))
        if repeat == 0:
            first, shown = task, found

    table = average(tables)
    say(as_text(table, costs) if table else "No facts are known: no figures.")
    metrics: dict[str, Any] = {**flat(table), **costs}
    if "answered" in queries.column_names:
        metrics["answered"] = sum(queries["answered"]) / len(queries)
    if "fixed_learning_rate" in shown:
        chosen = shown["fixed_learning_rate"].config
        metrics |= {f"fixed_learning_rate/{key}": chosen[key] for key in ("learning_rate", "steps")}
    metrics |= cost.measure(tracer, first.queries, first.candidates)
    say(f"A query costs {metrics['forward_passes_per_query']:.2f} forward passes over the candidates in this process.")
    best = shown["forward_inf"].keep(min(options.top_k, len(first.candidates)))
    if options.tokens:
        best = tracer.explain(best)
    return run.write(best, metrics, tracer, table=table, proponents=first.proponents, plot=plot)


if __name__ == "__main__":
    sys.exit(run_command(main, FtraceOptions, AscentConfig))
