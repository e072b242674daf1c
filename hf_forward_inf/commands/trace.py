"""A whole run of fact tracing: load, trace, evaluate, write."""

from typing import Any

from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.baselines import attributors_for
from hf_forward_inf.commands.options import TraceOptions
from hf_forward_inf.commands.outputs import Run, plotted
from hf_forward_inf.commands.trace_source import load_source
from hf_forward_inf.evaluation import cost
from hf_forward_inf.evaluation.comparison import run_baselines, run_comparison
from hf_forward_inf.evaluation.tables import as_text, average, compare, flat
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.report.plots import budget_plot
from hf_forward_inf.utils.processes import say


def trace_run(options: TraceOptions, ascent: AscentConfig) -> dict[str, Any]:
    """Run it all and write `metrics.json`, `attribution/` and `report.html` into the output folder.

    Losses are cached as they are computed: a run that was interrupted goes on from there when it is started again.

    Returns:
        `dict`: What `metrics.json` holds.

    Raises:
        FileExistsError: If the folder holds a finished run and `overwrite` is not set.
        OSError: If the folder can't be written to. Both before anything is computed.
    """
    run = Run(options)
    source = load_source(options, options.seed)
    first = source.draw(options, options.seed)
    tracer = ForwardInf(source.model, source.tokenizer, ascent=ascent, reduction=options.reduction)
    if options.tune:
        tracer = tracer.tune(first.candidates)
        say(f"Self-retrieval among the candidates (* is used):\n{tracer.tuning}")
    tables, costs, plot = [], {}, ""
    for repeat in range(options.repeats):
        task = source.draw(options, options.seed + repeat) if repeat else first
        say(f"Tracing {len(task.queries)} queries over {len(task.candidates):,} candidates ...")
        found = {"forward_inf": tracer.trace(task.queries, task.candidates, time_budget=options.time_budget)}
        if options.baselines:
            found |= run_baselines(task, tracer)
        if options.compare and repeat == 0:
            comparison = run_comparison(task, tracer)
            found |= comparison.found
            costs = comparison.costs
            plot = plotted(budget_plot, comparison.curves) if comparison.curves else ""
        elif options.compare:
            others = attributors_for(tracer, training=task.candidates).items()
            found |= {name: other.trace(task.queries, task.candidates) for name, other in others}
        tables.append(compare(found, task))
        if repeat == 0:
            kept = found["forward_inf"].keep(options.top_k)
            if options.tokens:
                kept = tracer.explain(kept)
            chosen = found.get("fixed_learning_rate")
    table = average(tables)
    metrics: dict[str, Any] = {**source.figures, "queries": len(first.queries), "candidates": len(first.candidates)}
    metrics |= flat(table)
    if chosen is not None:
        metrics |= {f"fixed_learning_rate/{key}": chosen.config[key] for key in ("learning_rate", "steps")}
    metrics |= {**costs, **cost.measure(tracer, first.queries, first.candidates)}
    if table:
        say(as_text(table, costs))
    say(
        f"A query costs {metrics['forward_passes_per_query']:.2f} forward passes over the candidates, "
        f"measured in this process."
    )
    return run.write(kept, metrics, tracer, table=table, proponents=first.proponents, plot=plot)
