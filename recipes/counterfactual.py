"""Does the answer go away if the examples that were found are removed from the training data?

    python recipes/counterfactual.py
    python recipes/counterfactual.py --network conv --share 0.05
    python recipes/counterfactual.py --task facts

With no option: the digits and network of `recipes/lds.py`, whose retraining it shares. For each of 40 answers the 2%
of the training examples that an attributor ranks first are removed and the network is trained again, with 3 seeds: how
much does the loss of the answer rise, and how often is another answer given? Random examples are the baseline.
`--task facts` explains 24 answers of a tiny mT5: 24 trainings of five seconds for each attributor. What is trained is
cached: an interrupted run resumes. `--help` lists all options.
"""

import sys
from typing import Any

import numpy as np
from experiments.counterfactual import (
    CAPTION,
    COLUMNS,
    HEAD,
    Counterfactual,
    CounterfactualOptions,
    Removal,
    answered_by,
    attributors,
    behind,
    line,
    remark,
    rise_figures,
)
from experiments.lds import choose_directions, load_task, retrain_subsets

from hf_forward_inf import ForwardInf
from hf_forward_inf.baselines import Random
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.image_task import captioned
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.evaluation.tables import REFERENCE, flat
from hf_forward_inf.scores.retraining import without_best
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.rows import sample_rows


def main(options: CounterfactualOptions) -> dict[str, Any]:
    """Trace the model's own answers, remove what was found, train again.

    `rise` of the default and `{name}/rise` of all others: how much the loss of the answer rises, mean over queries;
    `rise_median`: the median, since a few answers that a single candidate states rise twenty times as much;
    `rise_over_random`: how much more than without as many random candidates; `{name}/rise_behind`: how much less than
    after the default's removal; `answer_gone` and `wrong_answer_gone`: share of (wrong) answers no longer given.
    """
    run = Run(options)

    # The task and the models, one for each seed; settings of Forward-INF are chosen by queries that are not evaluated.
    task = load_task(options)
    _, others = retrain_subsets(task, options)
    adapters = [task.adapter(seed) for seed in range(options.seeds or 1)]
    directions, best = choose_directions(adapters[0], task, others, options)

    # The outputs to explain are the model's own answers, right or wrong.
    asked = sample_rows(task.queries, options.explained or len(task.queries), options.seed)
    queries, wrong = answered_by(adapters[0], asked)
    count = round(options.share * len(task.candidates))
    retraining = Counterfactual(task, queries, len(adapters))
    say(f"\n{count} of {len(task.candidates)} candidates are removed; {wrong.sum()} answers are wrong.")
    chance = retraining.without(without_best(Random().trace(queries, task.candidates).dense(), count))

    # Trace, remove the best candidates, train again.
    say(HEAD)
    table: dict[str, dict[str, float]] = {}
    removals: dict[str, Removal] = {}
    for name, attributor in attributors(adapters, directions, best).items():
        if name in (options.without or ()):
            continue
        found = attributor.trace(queries, task.candidates)
        removals[name] = retraining.without(without_best(found.dense(), count))
        table[name] = rise_figures(removals[name], chance, wrong)
        if name == REFERENCE:
            shown = found
        else:
            table[name] |= behind(removals[REFERENCE], removals[name])
        say(line(name, table[name]))

    truth = asked[adapters[0].columns[-1]]
    metrics = {
        "wrong_answers": int(wrong.sum()),
        "removed": count,
        "tuned/direction": best,
        **flat(table),
    }
    return run.write(
        captioned(shown, {i: f"really {truth[i]}" for i in np.flatnonzero(wrong).tolist()}),
        metrics,
        ForwardInf(adapter=adapters[0]),
        table=table,
        columns=COLUMNS,
        intervals="rise",
        plot_caption=CAPTION,
        remarks=[remark(removals[REFERENCE], chance, i, count) for i in range(len(queries))],
        title="Does the answer go away without what was found?",
    )


if __name__ == "__main__":
    sys.exit(run_command(main, CounterfactualOptions, bars=False))
