"""DATE-LM's tasks in small (Jiao et al., 2025): changed facts, rows of one kind, and training data for a target.

    python recipes/date_lm.py
    python recipes/date_lm.py --task filtering
    python recipes/date_lm.py --task selection
    python recipes/date_lm.py --model EleutherAI/pythia-1b --data DataAttributionEval/Counterfact:Pythia-1b

With no `--data`, a tiny chat model that knows some facts is tuned by LoRA on questions about them. `facts`: some
answers state another object; the rows that do are to be found from that object in the model's answer to a new
question. `filtering`: one answer in fifty is rude; the rude rows are to be found by a few references, whose scores are
averaged. `selection`: all facts are changed, and the model is trained again on a tenth of the rows, chosen by 20
references; the loss is that of the same facts in another wording. Models are cached; `--help` lists all options.
"""

import sys
from functools import partial
from typing import Any

from experiments.chat_models import tuned
from experiments.date_lm import DateOptions, filtering, load_base, load_task, repeated, retrieval, selection
from experiments.detection import OURS, contenders, together, with_intervals
from experiments.less import Less

from hf_forward_inf import ForwardInf
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.evaluation.tables import flat
from hf_forward_inf.utils.processes import say

METRICS = {"facts": ("recall@50", "mrr"), "filtering": ("auprc",), "selection": ("loss",)}
MORE = {**OURS, "less": lambda tracer: Less(adapter=tracer.adapter)}


def main(options: DateOptions) -> dict[str, Any]:
    """Tune, trace the references, and see what the best rows are, or what training on them gives.

    `recall@50` and `mrr` of the rows that state the changed fact; `auprc`, the average precision of the rows of the
    kind; `loss` of the target's test rows after training on the chosen rows, in nats. The default's have no prefix;
    `{name}/{metric}_behind` is the default's value minus another's, the mean over queries.
    """
    run = Run(options)
    base = load_base(options)
    train = partial(tuned, base, epochs=options.epochs, rate=options.training_rate)
    parts = []
    for seed in range(options.seed, options.seed + options.seeds):
        task = load_task(base, options, seed)
        adapter = train(task.train, seed)
        if options.task == "facts" and options.data is None:
            task = repeated(adapter, task, options)

        # Every attributor for the same references.
        tracer, values = ForwardInf(adapter=adapter), {}
        for name, one in contenders(tracer, options.attributors, MORE).items():
            found = one.trace(task.references, task.train)
            if options.task == "facts":
                values[name] = retrieval(found.scores, task)
            elif options.task == "filtering":
                values[name] = filtering(found.scores, task, options.set_size)
            else:
                values[name] = selection(found.scores, task, train, options.share, options.retrainings)
            say(f"{seed} {name:28}" + "".join(f" {key} {value.mean():.4f}" for key, value in values[name].items()))
            if name == "forward_inf":
                shown = found
        parts.append(values)

    table = with_intervals(together(parts))
    sizes = {"queries": len(task.references) * options.seeds, "candidates": len(task.train)}
    columns = [name for metric in METRICS[options.task] for name in (metric, f"{metric}_behind")]
    return run.write(
        shown, {**sizes, **flat(table)}, tracer, table=table, columns=columns,
        proponents=task.planted if any(task.planted) else None, title="Which training rows are behind it?",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main, DateOptions, bars=False))
