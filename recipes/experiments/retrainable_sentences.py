"""A small causal language model of sentences, trained again without some of them."""

from typing import Any

from datasets import Dataset

from experiments.retrainable import Retrainable
from experiments.retrainable_facts import retrainable
from hf_forward_inf.adapters import Adapter, CausalLMAdapter
from hf_forward_inf.data import builtin_facts
from hf_forward_inf.evaluation.candidate_sets import candidate_pool
from hf_forward_inf.toys.tiny_models import train_llama, train_tokenizer
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.rows import fill_in, sample_rows

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
"""A Llama of 185,000 parameters, embeddings included."""
TRAINING: dict[str, Any] = {"epochs": 15, "learning_rate": 4e-3, "batch_length": 512}
"""It then knows what its sentences are like, and not by heart."""
VOCABULARY = 800
"""Maximum number of tokens in the vocabulary."""


def sentences(candidates: int = 600, queries: int = 40) -> Retrainable:
    """Sentences of the built-in facts, and a tiny Llama; queries state facts in words that no candidate uses for them.

    Args:
        candidates (`int`, defaults to 600): Training sentences: those that state the queries' facts, and distractors.
        queries (`int`, defaults to 40): Queries, and as many others.

    Raises:
        ImportError: If the extra `facts` is not installed.
    """
    corpus = builtin_facts()
    asked = sample_rows(corpus["queries"], 2 * queries, seed=0)
    pool, _ = candidate_pool(asked, corpus["abstracts"], candidates, 0)
    data, asked = as_text(pool), as_text(asked)
    tokenizer = train_tokenizer(data["text"][:], VOCABULARY)

    def adapter(seed: int, rows: Dataset = data) -> Adapter:
        model = train_llama(rows, tokenizer, seed=seed, sizes=SIZES, quiet=True, **TRAINING)
        return CausalLMAdapter(model.eval(), tokenizer)

    key = fingerprint("sentences, losses and answers", data["text"][:], SIZES, TRAINING, VOCABULARY)
    return retrainable(key, data, asked, adapter, ("text", "text"))


def as_text(rows: Dataset) -> Dataset:
    """Return rows of the built-in facts as whole sentences, in the column `text`."""
    texts = [fill_in(*row) for row in zip(rows["inputs_pretokenized"], rows["targets_pretokenized"], strict=True)]
    return rows.remove_columns(["inputs_pretokenized", "targets_pretokenized"]).add_column("text", texts)
