"""The tasks for this library and its peers, as plain files that are read without any of them."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from peer_runs.task import IGNORED
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from hf_forward_inf import ForwardInf
from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.data import builtin_facts, load_rows, proponents
from hf_forward_inf.evaluation.candidate_sets import candidate_pool
from hf_forward_inf.evaluation.fact_tracing import with_answered
from hf_forward_inf.scores.retraining import random_subsets
from hf_forward_inf.toys.tiny_models import fit, tiny_mt5, train_llama, train_tokenizer
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.rows import SENTINEL, fill_in, without_sentinels

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
from experiments.retrainable_facts import losses_and_answers
from experiments.retrainable_sentences import SIZES, TRAINING, sentences

ASKED = 200
"""Queries of a task with a truth: those that are judged, those by which settings are chosen, and more, by which the
cost is measured."""
SUBSETS, SEEDS = 60, 2
"""Random halves that are trained on, and trainings of each."""
CHECKPOINTS = 6
"""Models of the training that are saved, evenly spaced, the last one among them."""
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
        judged (`int`): The number of the former.
    """

    subsets: np.ndarray
    losses: np.ndarray
    judged: int


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
    truth: Truth | None = None,
    training: Training | None = None,
) -> None:
    """Write the model with its tokenizer, rows with their tokens, and what the scores are judged by.

    Args:
        folder (`Path`): Where to.
        kind (`str`): `"seq2seq"` or `"causal"`.
        parts (`tuple`): Model and tokenizer.
        queries (`datasets.Dataset`): Queries: `inputs_pretokenized` and `targets_pretokenized`, or `text`.
        candidates (`datasets.Dataset`): Candidates, with the same columns.
        known (`list[list[int]]`, *optional*): The proponents of the first queries.
        truth (`Truth`, *optional*): Losses after training on subsets.
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
    if truth is not None:
        np.savez(folder / "truth.npz", subsets=truth.subsets, losses=truth.losses)
        facts["judged"] = truth.judged
    if training is not None:
        facts["checkpoints"] = {"steps": training.steps, "rates": training.rates}
    # Written last: a folder with this file is complete.
    (folder / "task.json").write_text(json.dumps(facts))


def _seq2seq_row(tokenizer: Any, row: dict[str, Any], asked: bool) -> dict[str, Any]:
    columns = ("inputs_pretokenized", "targets_pretokenized")
    ids, labels = (tokenizer(row[column])["input_ids"] for column in columns)
    return {"row": {column: row[column] for column in columns}, "input_ids": ids, "labels": labels}


def _causal_row(tokenizer: Any, row: dict[str, Any], asked: bool) -> dict[str, Any]:
    """Return the tokens of a text, or of a filled-in sentence; its query's labels are those of its answer alone."""
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


def sentences_task(folder: Path) -> None:
    """Write the task of `recipes/lds.py --task sentences`: 600 sentences, a tiny Llama, 60 halves x 2 seeds.

    The others, by which our defaults were chosen, choose settings here too (`benchmarks/defaults.py`).
    """
    task = sentences()
    subsets = random_subsets(len(task.candidates), SUBSETS)
    everyone = concatenate_datasets([task.queries, task.others])
    losses = task.retrained(everyone, subsets, SEEDS)[..., 0].mean(axis=0)

    columns = {"text": everyone["text"][:]}
    used = {*columns["text"], *task.candidates["text"]}
    corpus = builtin_facts()["abstracts"].shuffle(seed=0)
    for row in corpus:
        text = fill_in(row["inputs_pretokenized"], row["targets_pretokenized"])
        if len(columns["text"]) < ASKED and text not in used:
            columns["text"].append(text)
    queries = Dataset.from_dict(columns)
    known = proponents(task.queries, task.candidates)
    model, tokenizer, training = trained_again(
        lambda: task.adapter(0), task.candidates, queries, folder / "checkpoints"
    )
    write_task(
        folder,
        "causal",
        (model, tokenizer),
        queries,
        task.candidates,
        known=known,
        truth=Truth(subsets, losses, len(task.queries)),
        training=training,
    )


def trained_again(
    train: Callable[[], Any], rows: Dataset, queries: Dataset, folder: Path
) -> tuple[PreTrainedModel, Any, Training]:
    """Train the explained model, and once more to save models on the way.

    Raises:
        ValueError: If it is not the same model again.
    """
    steps: list[Any] = []
    with after_each_step(steps.append):
        explained = train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        explained.model.config.max_position_embeddings = POSITIONS
        model = LlamaForCausalLM(explained.model.config)
        adapter = CausalLMAdapter(model, explained.tokenizer)
        training = Training(folder)
        with after_each_step(Saving(training, model, len(steps))):
            fit(adapter, rows, quiet=True, **TRAINING)  # type: ignore[arg-type]
    model.eval()
    if not torch.equal(losses_and_answers(explained, queries), losses_and_answers(adapter, queries)):
        raise ValueError("The training was not repeated: the models on the way are those of another model.")
    explained.tokenizer.model_max_length = POSITIONS
    for i in range(len(training.steps)):
        explained.tokenizer.save_pretrained(folder / str(i))
    return model, explained.tokenizer, training


@contextmanager
def after_each_step(call: Callable[[torch.optim.Optimizer], None]) -> Iterator[None]:
    """Call a function after each step of any optimizer."""
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: call(optimizer))
    try:
        yield
    finally:
        handle.remove()


class Saving:
    """Saves a model and its optimizer's state, evenly over a number of steps."""

    def __init__(self, training: Training, model: PreTrainedModel, total: int):
        self.training, self.model = training, model
        self.stops = np.linspace(0, total, CHECKPOINTS + 1).round().astype(int).tolist()[1:]
        self.rates: list[float] = []
        self.step = 0

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the learning rate, and save at the planned steps."""
        self.step += 1
        self.rates.append(optimizer.param_groups[0]["lr"])
        if self.step in self.stops:
            folder = self.training.folder / str(len(self.training.steps))
            self.model.save_pretrained(folder)
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            self.training.steps.append(len(self.rates))
            self.training.rates.append(float(np.mean(self.rates)))
            self.rates.clear()


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
