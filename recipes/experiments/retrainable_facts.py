"""A small language model that learns facts in seconds, and can be trained again without some sentences."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from experiments.retrainable import Retrainable
from hf_forward_inf.adapters import Adapter, Seq2SeqAdapter
from hf_forward_inf.adapters.columns import IGNORED
from hf_forward_inf.data import builtin_facts
from hf_forward_inf.evaluation.candidate_sets import candidate_pool
from hf_forward_inf.scores.retraining import Train
from hf_forward_inf.toys.tiny_models import train_mt5, train_tokenizer
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import to_device
from hf_forward_inf.utils.rows import sample_rows

SIZES = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_heads": 4, "num_layers": 1, "num_decoder_layers": 1}
"""An mT5 of 94,000 parameters."""
TRAINING = {"epochs": 25, "learning_rate": 8e-3, "batch_length": 512}
"""With these it has learned its sentences (about 1 nat a token) but not memorised them."""
VOCABULARY = 800
"""Largest number of tokens."""


def facts(candidates: int = 400, queries: int = 40) -> Retrainable:
    """Return the task of the built-in facts and a tiny mT5; no candidate states a fact in its query's words.

    Args:
        candidates (`int`, defaults to 400): Training sentences: the queries' proponents and similar ones.
        queries (`int`, defaults to 40): Number of queries, and of other queries.

    Raises:
        ImportError: If the extra `facts` is not installed.
    """
    corpus = builtin_facts()
    asked = sample_rows(corpus["queries"], 2 * queries, seed=0)
    data, _ = candidate_pool(asked, corpus["abstracts"], candidates, 0)
    texts = [text for column in ("inputs_pretokenized", "targets_pretokenized") for text in data[column]]
    tokenizer = train_tokenizer(texts, VOCABULARY)

    def adapter(seed: int, rows: Dataset = data) -> Adapter:
        model = train_mt5(rows, tokenizer, seed=seed, sizes=SIZES, quiet=True, **TRAINING)  # type: ignore[arg-type]
        return Seq2SeqAdapter(model.eval(), tokenizer)

    key = fingerprint("facts, losses and answers", data["id"][:], SIZES, TRAINING, VOCABULARY)
    return retrainable(key, data, asked, adapter, ("inputs_pretokenized", "targets_pretokenized"))


def retrainable(
    key: str,
    data: Dataset,
    asked: Dataset,
    adapter: Callable[..., Adapter],
    columns: tuple[str, str],
) -> Retrainable:
    """Return the task of a language model: the first half of `asked` are its queries, the second half the others."""
    half = len(asked) // 2

    def train(asked: Dataset) -> Train:
        return partial(trained_outcomes, adapter, data, asked)

    queries, others = asked.select(range(half)), asked.select(range(half, 2 * half))
    return Retrainable(key, data, queries, others, adapter, train, columns, together=5)


def trained_outcomes(
    adapter: Callable[[int, Dataset], Adapter], data: Dataset, asked: Dataset, subsets: np.ndarray, seeds: np.ndarray
) -> np.ndarray:
    """Train one model after another; return the queries' losses and answers, float32 `[models, queries, 2]`."""
    pairs = zip(subsets, seeds.tolist(), strict=True)
    models = (adapter(seed, data.select(np.flatnonzero(subset))) for subset, seed in pairs)
    return np.stack([losses_and_answers(one, asked).numpy() for one in models])


@torch.no_grad()
def losses_and_answers(adapter: Adapter, asked: Dataset) -> Tensor:
    """Return each row's loss, and whether its target is the model's answer (1 or 0), `[rows, 2]`.

    Greedy decoding returns a target if and only if each of its tokens is the most likely one after its prefix.
    """
    features = adapter.encode(asked[:])
    batch = to_device(adapter.collate(features), adapter.model)
    losses = adapter.loss(adapter.model, batch)
    logits, _ = adapter.outputs_and_loss(adapter.model, batch)
    targets = torch.tensor([token for labels in features["labels"] for token in labels if token != IGNORED])
    right = (logits.argmax(dim=1).cpu() == targets).split(features["terms"])
    return torch.stack([losses.cpu(), torch.tensor([float(tokens.all()) for tokens in right])], dim=1)
