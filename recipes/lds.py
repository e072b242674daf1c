"""The linear datamodeling score (LDS): which scores predict what training on random halves of the data does?

    python recipes/lds.py
    python recipes/lds.py --network conv
    python recipes/lds.py --task facts    # a tiny mT5 in place of a classifier
    python recipes/lds.py --task sentences    # a tiny Llama

With no option: scikit-learn's digits and a network of 1,810 parameters, trained again on 120 random halves of 800
examples with 3 seeds. Compared are all directions of Forward-INF, first order along the same directions, means over
seeds, and all baselines. What is trained is cached: an interrupted run resumes. `--help` lists all options.
"""

import sys
import time
from functools import partial
from typing import Any

from experiments.attributor_sets import contenders
from experiments.lds import (
    CAPTION,
    HEAD,
    LdsOptions,
    choose_directions,
    line,
    load_task,
    retrain_halves,
    step_of,
    tune_without_labels,
)

from hf_forward_inf import ForwardInf
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.image_task import captioned
from hf_forward_inf.commands.outputs import Run, plotted
from hf_forward_inf.evaluation.tables import REFERENCE, flat
from hf_forward_inf.report.plots import interval_plot
from hf_forward_inf.scores.metrics import lds
from hf_forward_inf.utils.processes import say


def main(options: LdsOptions) -> dict[str, Any]:
    """Train on random halves, trace, and correlate: `lds` of the default, `{name}/lds` of all others."""
    run = Run(options)

    # The task, and the losses of its queries after training on each half of the candidates.
    task = load_task(options)
    measured, others = retrain_halves(task, options)

    # The models to explain, one for each seed; settings of Forward-INF are chosen by queries that are not evaluated.
    adapters = [task.adapter(seed) for seed in range(options.seeds or 1)]
    directions, best = choose_directions(adapters[0], task, others, options)
    attributors = contenders(adapters, directions)
    if "self_retrieval" not in (options.without or ()):
        attributors["self_retrieval"] = tune_without_labels(adapters[0], task.candidates, directions, options)

    # The same three lines for every attributor: trace, compare with the truth, report.
    say(f"\n{HEAD}")
    table: dict[str, dict[str, float]] = {}
    for name, attributor in attributors.items():
        if name in (options.without or ()):
            continue
        started = time.perf_counter()
        found = attributor.trace(task.queries, task.candidates)
        seconds = time.perf_counter() - started
        figures = lds(found.dense(), measured.subsets, measured.losses)
        table[name] = {**figures, "trace_seconds": seconds, **step_of(attributor)}
        say(line(name, table[name]))
        if name == REFERENCE:
            shown = found

    metrics: dict[str, Any] = {"queries": len(task.queries), "candidates": len(task.candidates), **flat(table)}
    metrics |= {f"tuned/{key}": value for key, value in table.get(best, {}).items()} | {"tuned/direction": best}
    return run.write(
        captioned(shown),
        metrics,
        ForwardInf(adapter=adapters[0]),
        table=table,
        columns=("lds", "lds_low", "lds_high"),
        plot=plotted(partial(interval_plot, "lds"), table),
        plot_caption=CAPTION,
        title="Which scores predict what retraining does?",
    )


if __name__ == "__main__":
    sys.exit(run_command(main, LdsOptions, bars=False))
