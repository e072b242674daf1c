"""The tasks for this library and its peers, as plain files that are read without any of them."""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peer_runs.task import IGNORED, Task, logits_of, losses
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_forward_inf import ForwardInf
from hf_forward_inf.data import builtin_facts, load_rows, proponents
from hf_forward_inf.evaluation.candidate_sets import candidate_pool
from hf_forward_inf.evaluation.fact_tracing import with_answered
from hf_forward_inf.toys.tiny_models import tiny_mt5, train_tokenizer
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.rows import SENTINEL, fill_in, without_sentinels

QUERIES = 47
CANDIDATES = 1200
VOCABULARY = 1024
EPOCHS = 20
"""Epochs of training the Llama, about a minute."""


def write_task(
    folder: Path, kind: str, parts: tuple[Any, Any], queries: Dataset, candidates: Dataset, truth: list[list[int]]
) -> None:
    """Write the model with its tokenizer, rows with their tokens, and the proponents."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        part.save_pretrained(folder / "model")
    encode = {"seq2seq": _seq2seq_row, "causal": _causal_row}[kind]
    for name, rows, asked in (("queries", queries, True), ("candidates", candidates, False)):
        (folder / f"{name}.json").write_text(json.dumps([{**row, **encode(parts[1], row, asked)} for row in rows]))
    # Written last: a folder with this file is complete.
    (folder / "task.json").write_text(json.dumps({"kind": kind, "proponents": truth}))


def _seq2seq_row(tokenizer: Any, row: dict[str, Any], asked: bool) -> dict[str, list[int]]:
    names = {"input_ids": "inputs_pretokenized", "labels": "targets_pretokenized"}
    return {name: tokenizer(row[column])["input_ids"] for name, column in names.items()}


def _causal_row(tokenizer: Any, row: dict[str, Any], asked: bool) -> dict[str, list[int]]:
    """Return the tokens of the filled-in sentence; a query's labels are those of its answer alone."""
    inputs, target = row["inputs_pretokenized"], row["targets_pretokenized"]
    read = tokenizer(fill_in(inputs, target), return_offsets_mapping=True)
    ids = read["input_ids"]
    if not asked:
        return {"input_ids": ids, "labels": list(ids)}
    start = len(SENTINEL.split(inputs)[0])
    stop = start + len(without_sentinels(target))
    inside = [first < stop and start < last for first, last in read["offset_mapping"]]
    return {
        "input_ids": ids,
        "labels": [token if taken else IGNORED for token, taken in zip(ids, inside, strict=True)],
    }


def seq2seq_task(folder: Path, data: Path | None) -> None:
    """Write the task of the built-in facts with a tiny mT5, or of a folder's model and answered queries."""
    if data is None:
        corpus = builtin_facts()
        model, tokenizer = tiny_mt5(corpus["abstracts"])
        queries = with_answered(ForwardInf(model, tokenizer).adapter, corpus["queries"])
        queries, candidates = _drawn(queries, corpus["abstracts"])
    else:
        model, tokenizer = (part.from_pretrained(data / "model") for part in (AutoModelForSeq2SeqLM, AutoTokenizer))
        queries, candidates = (load_rows(str(data / f"{name}.parquet"), name) for name in ("queries", "candidates"))
        queries = queries.select([i for i, right in enumerate(queries["answered"]) if right])
    write_task(folder, "seq2seq", (model, tokenizer), queries, candidates, proponents(queries, candidates))


def _drawn(queries: Dataset, abstracts: Dataset) -> tuple[Dataset, Dataset]:
    """Return answered queries, and candidates for them."""
    right = [i for i, right in enumerate(queries["answered"]) if right]
    queries = queries.select(right).shuffle(seed=0).select(range(min(QUERIES, len(right))))
    return queries, candidate_pool(queries, abstracts, CANDIDATES, 0)[0]


def causal_task(folder: Path) -> None:
    """Write the task of the built-in facts as sentences, with a small Llama trained on all of them."""
    corpus = builtin_facts()
    texts = map(fill_in, corpus["abstracts"]["inputs_pretokenized"], corpus["abstracts"]["targets_pretokenized"])
    tokenizer = train_tokenizer(list(texts), VOCABULARY)
    rows = [_causal_row(tokenizer, row, False) for row in corpus["abstracts"]]
    tokenizer.model_max_length = 4096
    model = train_llama(rows, len(tokenizer))
    asked = [_causal_row(tokenizer, row, True) for row in corpus["queries"]]
    right = [_says(model, row) for row in asked]
    say(f"The Llama answers {sum(right)} of {len(right)} queries.")
    queries, candidates = _drawn(corpus["queries"].add_column("answered", right), corpus["abstracts"])
    write_task(folder, "causal", (model, tokenizer), queries, candidates, proponents(queries, candidates))


def train_llama(rows: list[dict[str, list[int]]], vocabulary: int, epochs: int = EPOCHS) -> LlamaForCausalLM:
    """Return a Llama of two layers, trained on rows of tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=4096, pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=False,
        attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    steps = epochs * (len(rows) // 32 + 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    reader = Task(Path())
    reader.__dict__["kind"] = "causal"
    for _ in range(epochs):
        for cut in torch.randperm(len(rows)).split(32):
            batch = reader.collate([rows[i] for i in cut])
            loss = losses(logits_of(model, batch), batch["labels"]).sum() / (batch["labels"] != IGNORED).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def _says(model: LlamaForCausalLM, row: dict[str, list[int]]) -> bool:
    labels = torch.tensor(row["labels"][1:])
    said = model(torch.tensor([row["input_ids"]])).logits[0, :-1].argmax(-1)
    return bool((said == labels)[labels != IGNORED].all())
