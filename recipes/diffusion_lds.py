"""Which pictures taught a denoiser its drawings? Scores are compared with training again without some of them.

    python recipes/diffusion_lds.py
    python recipes/diffusion_lds.py --candidates emoji.parquet --size 16

With no option: scikit-learn's digits and a perceptron of pixels that learns to draw 600 of them from their captions,
trained again on 40 random halves with 2 seeds (the linear datamodeling score), and without each query's best 50 (the
rise of its loss). Queries are pictures that it has never seen, and its own drawings. What is trained is cached: an
interrupted run resumes. `--help` lists all options.
"""

import sys
from typing import Any

import numpy as np
from experiments.diffusion_contenders import compared, contenders, lds
from experiments.diffusion_lds import CAPTION, DenoiserOptions, load_truth

from hf_forward_inf import ForwardInf
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.evaluation.tables import REFERENCE, flat
from hf_forward_inf.scores.retraining import agreement
from hf_forward_inf.utils.processes import say


def main(options: DenoiserOptions) -> dict[str, Any]:
    """Train on random halves, trace, and correlate; then train without the best candidates of each query.

    `lds` and `rise` of the default, `{name}/lds` of all others, with 95% intervals over the queries; `unseen/...` and
    `drawn/...` of the two kinds of queries; `lds_behind` and `rise_behind`, the default's less another's, in pairs.
    """
    run = Run(options)

    # The models to explain, which draw half of the queries.
    truth = load_truth(options)
    adapters = truth.explained(options.models)

    # The truth: losses of the queries after training on each half of the candidates.
    measured, others, by_seed = truth.halves(options.subsets, options.seeds)
    metrics: dict[str, Any] = {
        "queries": len(measured.queries), "candidates": len(truth.candidates), "agreement": agreement(by_seed)
    }  # fmt: skip
    say(f"Losses after training with two seeds correlate by {metrics['agreement']:.3f} over the halves.")

    # The same lines for every attributor: trace, compare with the truth, report. Settings are chosen by queries that
    # are not evaluated.
    makers = contenders(adapters[0], truth.candidates, others)
    scores: dict[str, np.ndarray] = {}
    values: dict[str, np.ndarray] = {}
    for name, make in makers.items():
        found = [make(adapter).trace(measured.queries, truth.candidates) for adapter in adapters]
        values[name] = np.mean([lds(one.dense(), measured) for one in found], axis=0)
        say(f"{name:20} LDS {values[name].mean():.3f}")
        scores[name] = found[0].dense()
        if name == REFERENCE:
            shown = found[0]
    table = compared(values, "lds")

    # Without each query's best candidates, how much does its loss rise?
    if options.removed:
        best = {name: scores[name][: options.retrained] for name in options.removed_by or scores}
        rises = truth.rises(best, options.removed, options.removal_seeds)
        for name, values_of in rises.items():
            say(f"{name:20} without its best {options.removed}, losses rise by {values_of.mean():.1%}")
        for name, figures in compared(rises, "rise").items():
            table[name] |= figures

    return run.write(
        shown,
        metrics | flat(table),
        ForwardInf(adapter=adapters[0]),
        table=table,
        columns=("lds", "lds_low", "lds_high", "rise", "rise_low", "rise_high"),
        intervals="lds",
        plot_caption=CAPTION,
        title="Which scores predict what a denoiser's pictures did?",
    )


if __name__ == "__main__":
    sys.exit(run_command(main, DenoiserOptions, bars=False))
