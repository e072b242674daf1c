"""Leave-one-out: which scores predict what becomes of a query's loss if a single block of the data had weight 0?

    python recipes/loo.py
    python recipes/loo.py --data abstracts.parquet    # sentences with FTRACE's columns, of WebNLG for one
    python recipes/loo.py --model gpt2 --data Salesforce/wikitext:wikitext-2-raw-v1

With no option: a Llama of 2 million parameters, pretrained on some of the built-in facts and fine-tuned on 96 blocks
of 128 tokens about others; with `--data`, 512 blocks. 50 blocks are left out, one at a time: each time the model is
trained again with the same batches in the same order, in which the block has weight 0, and nothing else changes.
Compared are all registered attributors that fit. What is trained is cached: an interrupted run resumes. `--help` lists
all options.
"""

import sys
from typing import Any

from experiments.attributor_sets import registered
from experiments.lds import judge
from experiments.loo import CAPTION, COLUMNS, LooOptions, leave_out, load_blocks

from hf_forward_inf import ForwardInf
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.evaluation.tables import REFERENCE, flat


def main(options: LooOptions) -> dict[str, Any]:
    """Train without single blocks, trace, and correlate: `lds` of the default, `{name}/lds` of all others."""
    run = Run(options)

    # The task, and the losses of its queries after training without each block.
    task = load_blocks(options)
    measured, _ = leave_out(task, options)

    # Trace the models that were trained on everything with every attributor, and compare with the truth.
    adapters = [task.adapter(seed) for seed in range(options.models)]
    chosen = [{name: one for name, one in registered(own).items() if name not in options.without} for own in adapters]
    table, found = judge(chosen, task.candidates, measured)

    return run.write(
        found[0][REFERENCE], flat(table), ForwardInf(adapter=adapters[0]), table=table, columns=COLUMNS,
        intervals="lds", plot_caption=CAPTION, title="Which scores predict what leaving out a block does?",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main, LooOptions, bars=False))
