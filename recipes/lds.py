"""The linear datamodeling score (LDS): which scores predict what training on parts of the data does?

    python recipes/lds.py
    python recipes/lds.py --network conv
    python recipes/lds.py --task facts    # a tiny mT5 in place of a classifier
    python recipes/lds.py --task sentences    # a tiny Llama
    python recipes/lds.py --task texts --data abstracts.parquet    # fine-tuned on 5,000 sentences, of WebNLG for one
    python recipes/lds.py --task texts --data abstracts.parquet --drop 0.01 --qld 20
    python recipes/lds.py --task texts --data abstracts.parquet --epochs 10    # known by heart
    python recipes/lds.py --task texts --model gpt2 --data Salesforce/wikitext:wikitext-2-raw-v1 --blocks --drop 0.01

With no option: scikit-learn's digits and a network of 1,810 parameters, trained again on 120 random halves of 800
examples with 3 seeds. Compared are all directions of Forward-INF, first order along the same directions, means over
seeds, and all baselines. `--drop 0.01` leaves out 1% in place of half, with the same batches in the same order;
`--qld 20` also trains without the best 1% of each of 20 queries, by each of a few attributors. What is trained is
cached: an interrupted run resumes. `--help` lists all options.
"""

import sys
from typing import Any

from experiments.attributor_sets import contenders
from experiments.lds import (
    CAPTION,
    COLUMNS,
    LdsOptions,
    choose_directions,
    judge,
    load_task,
    remove_best,
    retrain_subsets,
    tune_without_labels,
)

from hf_forward_inf import ForwardInf
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.image_task import captioned
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.evaluation.tables import REFERENCE, flat


def main(options: LdsOptions) -> dict[str, Any]:
    """Train on random halves, trace, and correlate: `lds` of the default, `{name}/lds` of all others."""
    run = Run(options)

    # The task, and the losses of its queries after training on each subset of the candidates.
    task = load_task(options)
    measured, others = retrain_subsets(task, options)

    # A model for each seed; settings of Forward-INF are chosen by queries that are not evaluated.
    adapters = [task.adapter(seed) for seed in range(max(options.seeds or 1, options.models))]
    directions, best = choose_directions(adapters[0], task, others, options)
    explained = [contenders(adapters[i:] + adapters[:i], directions) for i in range(options.models)]
    without = options.without or ()
    if "self_retrieval" not in without and directions:
        for attributors, adapter in zip(explained, adapters, strict=False):
            attributors["self_retrieval"] = tune_without_labels(adapter, task.candidates, directions, options)

    # Trace with every attributor, and compare with the truth.
    chosen = [{name: one for name, one in own.items() if name not in without} for own in explained]
    table, found = judge(chosen, task.candidates, measured)
    for name, figures in (remove_best(task, found[0], options) if options.qld else {}).items():
        table[name] |= figures

    metrics: dict[str, Any] = flat(table)
    if best:
        metrics |= {f"tuned/{key}": value for key, value in table.get(best, {}).items()} | {"tuned/direction": best}
    return run.write(
        captioned(found[0][REFERENCE]), metrics, ForwardInf(adapter=adapters[0]), table=table, columns=COLUMNS,
        intervals="lds", plot_caption=CAPTION, title="Which scores predict what retraining does?",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main, LdsOptions, bars=False))
