"""Levels: how often does a row stand out where no cause is, and how often where one is?

    python benchmarks/levels.py
    python benchmarks/levels.py --model llama

Built-in facts and a tiny model that is trained on them, traced with the defaults. A false alarm is a query of which
some row is marked (`strong` or `some`) although none of the rows is a cause:

- taken out: all rows that state the fact or say the answer are missing among the candidates;
- facts taken out: only those that state the fact; others say the same answer ("... lies in Africa") and are causes in
  part, so that this is no null, but what a reader sees;
- untrained: the model has random weights;
- invented: the answer is a word that no row has.

A hit is a query of which a row that states the fact is marked.
"""

import argparse
from collections.abc import Set

import numpy as np
import torch
from datasets import Dataset

from hf_forward_inf import Attribution, ForwardInf
from hf_forward_inf.data import builtin_facts, proponents
from hf_forward_inf.evaluation.fact_tracing import with_answered, with_proponents
from hf_forward_inf.toys.tiny_models import tiny_mt5, train_llama, train_mt5
from hf_forward_inf.utils.rows import fill_in, without_sentinels

SYLLABLES = ("zor", "vel", "qua", "mip", "tro", "lun", "bax", "fen", "dro", "kip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mt5", "llama"), default="mt5")
    parser.add_argument("--num_queries", type=int, default=60)
    parser.add_argument("--num_candidates", type=int, default=1200)
    parser.add_argument("--save", help="folder for the attributions")
    given = parser.parse_args()
    queries, rows = task(given.num_queries, given.num_candidates)
    facts = proponents(queries, rows)
    answers = [without_sentinels(answer) for answer in queries["targets_pretokenized"]]
    texts = [fill_in(row["inputs_pretokenized"], row["targets_pretokenized"]) for row in rows]
    stating = {row for own in facts for row in own}
    saying = stating | {i for i, text in enumerate(texts) if any(answer in text for answer in answers)}
    invented = with_invented_answers(queries)
    trained, untrained, adapted = models(given.model)
    queries, invented, rows = adapted(queries), adapted(invented), adapted(rows)

    def trace(model: tuple, asked: Dataset, without: Set[int] = frozenset()) -> Attribution:
        return ForwardInf(*model).trace(asked, rows.select([i for i in range(len(rows)) if i not in without]))

    found = {
        "taken out": trace(trained, queries, saying),
        "facts taken out": trace(trained, queries, stating),
        "untrained": trace(untrained, queries),
        "invented": trace(trained, invented),
        "all rows": trace(trained, queries),
    }
    print("| set | candidates | queries | marked | strong |\n| --- | --- | --- | --- | --- |")
    for name, one in found.items():
        marked = [set(one.levels(i) or []) for i in range(len(one))]
        some, strong = (np.mean([bool(own & kinds) for own in marked]) for kinds in ({"some", "strong"}, {"strong"}))
        print(f"| {name} | {one.total} | {len(one)} | {some:.3f} | {strong:.3f} |", flush=True)
        if given.save:
            one.save_to_disk(f"{given.save}/{name.replace(' ', '_')}")
    print(f"hits: {hits(found['all rows'], facts):.3f}")


def hits(found: Attribution, facts: list[list[int]]) -> float:
    """Return the share of queries of which a row that states the fact is marked."""
    marked = [
        {row for row, level in zip(found.ranking(i).tolist(), found.levels(i) or [], strict=False) if level != "none"}
        for i in range(len(found))
    ]
    return float(np.mean([bool(rows & set(own)) for rows, own in zip(marked, facts, strict=True)]))


def task(count: int, candidates: int) -> tuple[Dataset, Dataset]:
    """Return queries that the tiny mT5 answers, and sentences: all that state their facts, and random others."""
    corpus = builtin_facts()
    sentences = corpus["abstracts"]
    model, tokenizer = tiny_mt5(sentences)
    queries = with_answered(ForwardInf(model, tokenizer).adapter, with_proponents(corpus["queries"], sentences))
    queries = queries.select([i for i, right in enumerate(queries["answered"]) if right][:count])
    drawn = np.random.default_rng(0).permutation(len(sentences))[:candidates].tolist()
    rows = sorted({row for own in proponents(queries, sentences) for row in own} | set(drawn))
    return queries, sentences.select(rows)


def with_invented_answers(queries: Dataset) -> Dataset:
    """Return queries with answers that no sentence has."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(SYLLABLES, 3)).capitalize() for _ in range(len(queries))]
    bare = queries.remove_columns("targets_pretokenized")
    return bare.add_column("targets_pretokenized", [f"<extra_id_0> {word}" for word in words])


def models(kind: str) -> tuple:
    """Return a trained and an untrained model with its tokenizer, and what writes rows as it reads them."""
    sentences = builtin_facts()["abstracts"]
    model, tokenizer = tiny_mt5(sentences)
    if kind == "mt5":
        fresh = train_mt5(sentences.select(range(8)), tokenizer, 1, 1e-12, 0, quiet=True)
        return (model, tokenizer), (fresh.eval(), tokenizer), lambda rows: rows
    torch.manual_seed(0)
    texts = as_texts(sentences)
    trained, fresh = (
        train_llama(texts.select(range(size)), tokenizer, epochs, rate, 0, quiet=True).eval()
        for size, epochs, rate in ((len(texts), 15, 2e-3), (8, 1, 1e-12))
    )
    return (trained, tokenizer), (fresh, tokenizer), as_texts


def as_texts(rows: Dataset) -> Dataset:
    """Return sentences as texts; queries, which have their answer at the end, as prompts and completions."""
    if "facts" in rows.column_names and "predicate_id" not in rows.column_names:
        filled = [fill_in(row["inputs_pretokenized"], row["targets_pretokenized"]) for row in rows]
        return Dataset.from_dict({"text": filled})
    answers = [without_sentinels(answer) for answer in rows["targets_pretokenized"]]
    filled = [fill_in(row["inputs_pretokenized"], row["targets_pretokenized"]) for row in rows]
    starts = [text.rindex(answer) for text, answer in zip(filled, answers, strict=True)]
    return Dataset.from_dict({
        "prompt": [text[:start].strip() for text, start in zip(filled, starts, strict=True)],
        "completion": [" " + text[start:] for text, start in zip(filled, starts, strict=True)],
    })  # fmt: skip


if __name__ == "__main__":
    main()
