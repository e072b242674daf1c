"""Every attributor on human-written sentences: a tiny mT5 is trained on some, and queried with other wordings.

    python benchmarks/webnlg.py --data DIR
    python benchmarks/webnlg.py --data DIR --num_training 20000 --num_candidates 20000 --epochs 10

DIR contains WebNLG's `abstracts.parquet` in FTRACE's format, with a column `split`. The model is trained on the `dev`
split; with `--num_training` also on random sentences of `train`. Queries are sentences outside the training set that
state one fact of it: for each fact the first wording that the model answers. Candidates are their proponents and the
most similar sentences, all from the training set.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
from datasets import Dataset

from hf_forward_inf import ForwardInf
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.data import load_rows
from hf_forward_inf.evaluation.comparison import run_comparison
from hf_forward_inf.evaluation.fact_tracing import draw_task, with_answered
from hf_forward_inf.evaluation.tables import as_text, average, compare, flat
from hf_forward_inf.toys.tiny_models import tiny_mt5
from hf_forward_inf.utils.options import RunOptions
from hf_forward_inf.utils.processes import say

WORDINGS = 6
"""Maximum number of wordings that are tried for each fact."""
FACTS = 400
"""Maximum number of facts."""


def training_rows(abstracts: Dataset, count: int | None) -> Dataset:
    """Return the `dev` split, extended to `count` by random sentences of `train`."""
    splits = np.array(abstracts["split"][:])
    dev, train = np.flatnonzero(splits == "dev"), np.flatnonzero(splits == "train")
    more = max(0, (count or 0) - len(dev))
    return abstracts.select([*dev, *np.random.default_rng(0).permutation(train)[:more]])


def held_out(abstracts: Dataset, train: Dataset) -> dict[str, list[dict]]:
    """Return sentences outside the training set that state one of its facts, with the object masked, by fact."""
    taught = {fact for facts in train["facts"] for fact in facts}
    known = set(train["inputs_pretokenized"])
    found: dict[str, list[dict]] = defaultdict(list)
    for row in abstracts:
        fact = row["facts"][0]
        fits = len(row["facts"]) == 1 and row["masked_type"] == "object" and fact in taught
        if fits and row["inputs_pretokenized"] not in known and len(found[fact]) < WORDINGS:
            known.add(row["inputs_pretokenized"])
            predicate, rest = fact.split(",", 1)
            obj = row["masked_uri"]
            if rest.startswith(f"{obj},"):
                parts = {"predicate_id": predicate, "obj_uri": obj, "sub_uri": rest[len(obj) + 1 :], "uuid": fact}
                found[fact].append({**row, **parts})
    facts = [fact for fact, rows in found.items() if rows]
    return {facts[i]: found[facts[i]] for i in np.random.default_rng(0).permutation(len(facts))[:FACTS]}


def answered_queries(abstracts: Dataset, train: Dataset, epochs: int) -> tuple[ForwardInf, Dataset]:
    """Train the model, and return its attributor and the queries that it answers, one for each fact."""
    model, tokenizer = tiny_mt5(train, epochs=epochs)
    by_fact = held_out(abstracts, train)
    rows = [row for wordings in by_fact.values() for row in wordings]
    columns = {name: [row[name] for row in rows] for name in ("inputs_pretokenized", "targets_pretokenized")}
    tracer = ForwardInf(model, tokenizer)
    answers = tracer.adapter.answer(columns)
    picked: dict[str, dict] = {}
    for row, answer in zip(rows, answers, strict=True):
        if answer == row["targets_pretokenized"].strip():
            picked.setdefault(row["uuid"], row)
    say(f"{len(picked)} of {len(by_fact)} facts are answered in one of up to {WORDINGS} wordings.")
    return tracer, with_answered(tracer.adapter, Dataset.from_list(list(picked.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("outputs/webnlg"))
    parser.add_argument("--num_queries", type=int, default=100)
    parser.add_argument("--num_candidates", type=int, default=1800)
    parser.add_argument("--num_training", type=int, help="Sentences trained on; those of the dev split if unset.")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    run = Run(RunOptions(output=str(options.output), overwrite=True))
    abstracts = load_rows(str(options.data / "abstracts.parquet"), "abstracts")
    train = training_rows(abstracts, options.num_training)
    tracer, queries = answered_queries(abstracts, train, options.epochs)
    tables, costs = [], {}
    for seed in range(options.repeats):
        task = draw_task(
            queries, train, num_queries=options.num_queries, num_candidates=options.num_candidates, seed=seed
        )
        comparison = run_comparison(task, tracer)
        tables.append(compare(comparison.found, task))
        if seed == 0:
            first, found, costs = task, comparison.found["forward_inf"], comparison.costs
    table = average(tables)
    say(as_text(table, costs))
    metrics = {"queries": len(first.queries), "candidates": len(first.candidates), **flat(table), **costs}
    run.write(found, metrics, tracer, table=table, proponents=first.proponents)


if __name__ == "__main__":
    main()
