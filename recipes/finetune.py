"""Which fine-tuning example taught a causal model to say this? Wrong facts are planted, and traced from the answers.

    accelerate launch recipes/finetune.py
    accelerate launch recipes/finetune.py --model Qwen/Qwen3-0.6B --lora --candidates train.parquet
        --queries asks.parquet

With no option a tiny Llama is trained on questions about built-in facts, a part of them answered wrongly on purpose.
`hf-forward-inf finetune` does the same and more: it removes what was found, and trains again.
"""

import sys
from typing import Any

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.baselines import BM25
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.finetune import Finetuning, load_data
from hf_forward_inf.commands.options import TrainingOptions
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.data import proponents
from hf_forward_inf.evaluation.tables import Table, flat
from hf_forward_inf.utils.processes import say


def main(options: TrainingOptions, ascent: AscentConfig) -> dict[str, Any]:
    """Fine-tune, let the model answer, and trace the planted answers that it repeats."""
    run = Run(options)

    # Rows with `prompt` and `completion`; of the built-in ones `planted` says which are wrong on purpose.
    train, queries = load_data(options)
    adapter = Finetuning(options, train, options.seed)(train)

    # The outputs to explain: planted answers that the model repeats, or whatever it answers to your prompts.
    if "planted" in queries.column_names:
        answers = adapter.answer(queries[:])
        same = [given.strip() == taught.strip() for given, taught in zip(answers, queries["completion"], strict=True)]
        wrong = [i for i, planted in enumerate(queries["planted"]) if planted and same[i]]
        if not wrong:
            raise ValueError("The model repeats none of the planted answers: train it for more epochs (--epochs).")
        say(f"The model repeats {len(wrong)} of {sum(queries['planted'])} planted answers.")
        queries = queries.select(wrong)
    else:
        queries = adapter.with_answers(queries)

    # Move the model for each answer, and forward the training data: no gradient of a training example is taken.
    tracer = ForwardInf(adapter=adapter, ascent=ascent)
    found = {"forward_inf": tracer.trace(queries, train), "bm25": BM25(adapter=adapter).trace(queries, train)}
    for row in found["forward_inf"].top(0, 3):
        say(f"{row['score']:8.3f}  {row['prompt']} {row['completion']}")

    # Where the truth is known: the training examples that state the same (wrong) fact.
    table: Table = {}
    truth = None
    if "facts" in train.column_names and "predicate_id" in queries.column_names:
        truth = proponents(queries, train)
        table = {name: attribution.evaluate(truth) for name, attribution in found.items()}
        for name, figures in table.items():
            say(f"{name:12} MRR {figures['mrr']:.3f}  recall@10 {figures['recall@10']:.3f}")

    shown = tracer.explain(found["forward_inf"].keep(min(options.top_k, len(train))))  # colours tokens in the report
    return run.write(shown, flat(table), tracer, table=table, proponents=truth)


if __name__ == "__main__":
    sys.exit(run_command(main, TrainingOptions, AscentConfig))
