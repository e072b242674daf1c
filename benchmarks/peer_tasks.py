"""The tasks for this library and its peers, as plain files that are read without any of them."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peer_runs.task import IGNORED
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, LlamaForCausalLM

from hf_forward_inf import ForwardInf
from hf_forward_inf.data import builtin_facts, load_rows, proponents
from hf_forward_inf.evaluation.candidate_sets import candidate_pool
from hf_forward_inf.evaluation.fact_tracing import with_answered
from hf_forward_inf.toys.tiny_models import tiny_mt5, train_llama, train_tokenizer
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.rows import SENTINEL, fill_in, without_sentinels

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
from experiments.retrainable_sentences import SIZES

QUERIES, CANDIDATES = 47, 1200
"""Rows of the tasks without a truth."""
POSITIONS = 4096
"""Of the written Llamas: rotary positions have no weights, and bergson's batches have at most so many tokens."""
VOCABULARY, EPOCHS = 1024, 20
"""Of the Llama that learns the built-in facts by heart, about a minute."""


@dataclass(frozen=True)
class Truth:
    """What training on subsets of the candidates did to the first queries.

    Args:
        subsets (`np.ndarray`): Booleans, `[subsets, candidates]`.
        losses (`np.ndarray`): Losses, `[subsets, queries]`: first of the queries that are judged, then of those by
            which settings are chosen.
    """

    subsets: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class Training:
    """The models on the way to the explained one.

    Args:
        steps (`list[int]`): Steps from one to the next.
        rates (`list[float]`): The mean learning rate of these steps.
        folder (`Path`): Has a folder for each, `0`, `1`, ..., with the model and its optimizer's state.
    """

    folder: Path
    steps: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


def write_task(
    folder: Path,
    kind: str,
    parts: tuple[Any, Any],
    queries: Dataset,
    candidates: Dataset,
    *,
    known: Sequence[Sequence[int]] | None = None,
    truths: Mapping[str, Truth] | None = None,
    judged: int | None = None,
    training: Training | None = None,
) -> None:
    """Write the model with its tokenizer, rows with their tokens, and what the scores are judged by.

    Args:
        folder (`Path`): Where to.
        kind (`str`): `"seq2seq"` or `"causal"`.
        parts (`tuple`): Model and tokenizer.
        queries (`datasets.Dataset`): Queries: `inputs_pretokenized` and `targets_pretokenized`, or `text`.
        candidates (`datasets.Dataset`): Candidates, with the same columns, or with `input_ids`.
        known (`list[list[int]]`, *optional*): The proponents of the first queries.
        truths (`dict[str, Truth]`, *optional*): Losses after training on subsets of some kinds, by their names.
        judged (`int`, *optional*): The number of queries that are judged by the truths.
        training (`Training`, *optional*): Saved models of the training, in `folder / "checkpoints"`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "causal":
        parts[0].config.max_position_embeddings = parts[1].model_max_length = POSITIONS
    for part in parts:
        part.save_pretrained(folder / "model")
    encode = {"seq2seq": _seq2seq_row, "causal": _causal_row}[kind]
    for name, rows, asked in (("queries", queries, True), ("candidates", candidates, False)):
        (folder / f"{name}.json").write_text(json.dumps([encode(parts[1], row, asked) for row in rows]))
    facts: dict[str, Any] = {"kind": kind, "proponents": known}
    if truths is not None:
        for name, truth in truths.items():
            np.savez(folder / f"truth_{name}.npz", subsets=truth.subsets, losses=truth.losses)
        facts |= {"truths": list(truths), "judged": judged}
    if training is not None:
        facts["checkpoints"] = {"steps": training.steps, "rates": training.rates}
    # Written last: a folder with this file is complete.
    (folder / "task.json").write_text(json.dumps(facts))


def _seq2seq_row(tokenizer: Any, row: dict[str, Any], asked: bool) -> dict[str, Any]:
    columns = ("inputs_pretokenized", "targets_pretokenized")
    ids, labels = (tokenizer(row[column])["input_ids"] for column in columns)
    return {"row": {column: row[column] for column in columns}, "input_ids": ids, "labels": labels}


def _causal_row(tokenizer: Any, row: dict[str, Any], asked: bool) -> dict[str, Any]:
    """Return the tokens of a row, text or filled-in sentence; the latter's query has its answer's labels alone."""
    if "input_ids" in row:
        # Blocks are scored as they were trained on: no text gives the same tokens.
        ids = list(row["input_ids"])
        return {"row": {"input_ids": ids}, "input_ids": ids, "labels": list(ids)}
    if "text" in row:
        ids = tokenizer(row["text"])["input_ids"]
        return {"row": {"text": row["text"]}, "input_ids": ids, "labels": list(ids)}
    inputs, target = row["inputs_pretokenized"], row["targets_pretokenized"]
    text, answer = fill_in(inputs, target), without_sentinels(target)
    read = tokenizer(text, return_offsets_mapping=True)
    ids = read["input_ids"]
    if not asked:
        return {"row": {"text": text}, "input_ids": ids, "labels": list(ids)}
    start = len(SENTINEL.split(inputs)[0])
    stop = start + len(answer)
    inside = [first < stop and start < last for first, last in read["offset_mapping"]]
    labels = [token if taken else IGNORED for token, taken in zip(ids, inside, strict=True)]
    columns = {"text": text, "prompt": text[:start], "completion": text[start:], "span": answer}
    return {"row": columns, "input_ids": ids, "labels": labels}


def seq2seq_task(folder: Path, data: Path | None) -> None:
    """Write the task of the built-in facts with a tiny mT5, or of a folder's model and answered queries."""
    model: Any
    tokenizer: Any
    if data is None:
        corpus = builtin_facts()
        model, tokenizer = tiny_mt5(corpus["abstracts"])
        queries = with_answered(ForwardInf(model, tokenizer).adapter, corpus["queries"])
        queries, candidates = _drawn(queries, corpus["abstracts"])
    else:
        model, tokenizer = (part.from_pretrained(data / "model") for part in (AutoModelForSeq2SeqLM, AutoTokenizer))
        queries, candidates = (load_rows(str(data / f"{name}.parquet"), name) for name in ("queries", "candidates"))
        queries = queries.select([i for i, right in enumerate(queries["answered"]) if right])
    write_task(folder, "seq2seq", (model, tokenizer), queries, candidates, known=proponents(queries, candidates))


def _drawn(queries: Dataset, abstracts: Dataset) -> tuple[Dataset, Dataset]:
    """Return answered queries, and candidates for them."""
    right = [i for i, right in enumerate(queries["answered"]) if right]
    queries = queries.select(right).shuffle(seed=0).select(range(min(QUERIES, len(right))))
    return queries, candidate_pool(queries, abstracts, CANDIDATES, 0)[0]


def causal_task(folder: Path) -> None:
    """Write the task of the built-in facts as sentences, with a small Llama that knows all of them by heart."""
    corpus = builtin_facts()
    texts = list(map(fill_in, corpus["abstracts"]["inputs_pretokenized"], corpus["abstracts"]["targets_pretokenized"]))
    tokenizer = train_tokenizer(texts, VOCABULARY)
    model = train_llama(Dataset.from_dict({"text": texts}), tokenizer, EPOCHS, 4e-3, 0, sizes=SIZES, quiet=True)
    right = [_says(model, _causal_row(tokenizer, row, True)) for row in corpus["queries"]]
    say(f"The Llama answers {sum(right)} of {len(right)} queries.")
    queries, candidates = _drawn(corpus["queries"].add_column("answered", right), corpus["abstracts"])
    write_task(folder, "causal", (model.eval(), tokenizer), queries, candidates, known=proponents(queries, candidates))


@torch.no_grad()
def _says(model: LlamaForCausalLM, row: dict[str, list[int]]) -> bool:
    """Return whether the answer's tokens are the likeliest ones at their positions."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    labels = torch.tensor(row["labels"][1:])
    return bool((logits.argmax(-1) == labels)[labels != IGNORED].all())
