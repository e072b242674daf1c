"""Which training rows planted a backdoor? A trigger and an attacker's answers, traced from what the model says.

    python recipes/backdoor.py
    python recipes/backdoor.py --seeds 3
    python recipes/backdoor.py --model Qwen/Qwen3-0.6B --data tatsu-lab/alpaca --training_rate 2e-4 --epochs 3

With no option a tiny chat model is tuned by LoRA on 5,000 instructions about built-in facts. In 50 of them three words
come first in an order that no other row has, and the answer names Kenya, whatever is asked. Each of the words occurs
in a thousand other rows and more, the answers have the forms of all others, and the queries are instructions that are
new: neither words nor copies give the rows away. What is traced is the word Kenya (column `span`); `--whole` traces
whole answers, `--learned` what tuning has taught of them. Who is attacked has several such answers, so that scores are
averaged over sets of queries (`--set_size`), too. After Lin et al. (2024), "Token-wise Influential Training
Data Retrieval for Large Language Models".
Models are cached; `--help` lists all options.
"""

import sys
from typing import Any

from experiments.backdoor import BackdoorOptions, firing_queries, load_base, poisoned
from experiments.chat_models import tuned
from experiments.detection import average_precisions, contenders, set_means, together, with_intervals

from hf_forward_inf import ForwardInf
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.evaluation.tables import flat
from hf_forward_inf.utils.processes import say


def main(options: BackdoorOptions) -> dict[str, Any]:
    """Tune, let the model answer new instructions with the trigger, and trace the attacker's answers.

    `auprc`: average precision of the planted rows among all rows, the mean over queries, for the default and
    `{name}/auprc` for all others; `set_auprc`, that of the mean scores of sets of queries; `attack_success`,
    `fires_without`, `fires_reordered`: how often the model gives an attacker's answer with the trigger, without it,
    and with its words in other orders.
    """
    run = Run(options)
    base = load_base(options)
    parts, rates = [], []
    for seed in range(options.seed, options.seed + options.seeds):
        # Rows, some of them planted; a model that was tuned on all; its answers to the trigger.
        data = poisoned(base, options, seed)
        adapter = tuned(base, data.train, seed, epochs=options.epochs, rate=options.training_rate)
        queries, figures = firing_queries(adapter, data.new, options)
        say(f"Seed {seed}: " + ", ".join(f"{name} {value:.0%}" for name, value in figures.items()))
        rates.append(figures)

        # Which rows are behind these answers? The planted ones are to come first.
        tracer, values = ForwardInf(adapter=adapter), {}
        for name, one in contenders(tracer, options.attributors).items():
            found = one.trace(queries, data.train)
            values[name] = {
                "auprc": average_precisions(found.scores, data.planted),
                "set_auprc": average_precisions(set_means(found.scores, options.set_size), data.planted),
            }
            say(f"{name:28}" + "".join(f" {metric} {value.mean():.4f}" for metric, value in values[name].items()))
            if name == "forward_inf":
                shown = found
        parts.append(values)

    # All queries of all models; intervals are over them.
    table = with_intervals(together(parts))
    rows = {"queries": sum(len(part["forward_inf"]["auprc"]) for part in parts), "candidates": len(data.train)}
    metrics: dict[str, Any] = {**rows, "planted": int(data.planted.sum())}
    metrics |= {name: sum(one[name] for one in rates) / len(rates) for name in rates[0]}
    metrics |= flat(table)
    return run.write(
        shown, metrics, tracer, table=table, columns=("auprc", "auprc_behind", "set_auprc", "set_auprc_behind"),
        proponents=[data.planted.nonzero()[0].tolist()] * len(queries), title="Which rows planted the backdoor?",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main, BackdoorOptions, bars=False))
