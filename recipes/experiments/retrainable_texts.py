"""A causal language model that is pretrained on texts of some topics, and fine-tuned on others again and again."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from experiments.finetuning import FineTuning
from experiments.retrainable import Retrainable
from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.data import builtin_facts, load_rows
from hf_forward_inf.toys.tiny_models import train_tokenizer, untrained_llama
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.processes import process_state, say
from hf_forward_inf.utils.rows import fill_in
from hf_forward_inf.utils.storage import default_cache_dir, write_folder

SIZES: dict[str, Any] = {
    "hidden_size": 160, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 5,
    "num_key_value_heads": 5, "max_position_embeddings": 128,
}  # fmt: skip
"""A Llama of 2.1 million parameters with the largest vocabulary."""
VOCABULARY = 3000
"""Maximum number of tokens in the vocabulary."""
PRETRAINING: dict[str, Any] = {"epochs": 8, "learning_rate": 3e-3, "batch_length": 2048, "autocast": True}
TUNING: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-3, "batch_length": 1024}
TUNED = 2 / 3
"""Share of the texts that are for fine-tuning and queries; the others' topics are for pretraining."""
LONGEST = 16
"""Words of the longest sentence that is a candidate or a query by itself."""
ATTENTION = "eager"
"""Fused attention can't be stacked, and on a CPU it takes ten times as long over short rows in bfloat16."""
BLOCK = 128
"""Tokens of a block."""
FACTS = ("inputs_pretokenized", "targets_pretokenized", "facts")
"""Columns of sentences that state facts, as in FTRACE."""


@dataclass(frozen=True)
class Texts:
    """Texts in the order of a random draw of their topics; those of a topic follow one another as in their source.

    Args:
        tuned (`list[str]`): For fine-tuning and queries.
        rest (`list[str]`): Texts about other topics.
    """

    tuned: list[str]
    rest: list[str]


def read_texts(source: str | None, seed: int = 0) -> Texts:
    """Read sentences that state facts, whose topic is the first fact's subject, or texts, each its own topic.

    Args:
        source (`str`, *optional*): As of [`load_rows`]. Defaults to the built-in facts.
        seed (`int`, defaults to 0): Draws the order of the topics.
    """
    rows = builtin_facts()["abstracts"] if source is None else load_rows(source, "abstracts")
    if set(FACTS) <= set(rows.column_names):
        columns = [rows[name][:] for name in FACTS]
        topics = {
            fill_in(text, target): facts[0].split(",", 2)[-1] for text, target, facts in zip(*columns, strict=True)
        }
    else:
        topics = {text: text for text in rows["text"] if text.strip()}
    names = list(dict.fromkeys(topics.values()))
    place = dict(zip(names, np.random.default_rng(seed).permutation(len(names)).tolist(), strict=True))
    texts = sorted(topics, key=lambda text: place[topics[text]])
    cut = round(TUNED * len(texts))
    while 0 < cut < len(texts) and topics[texts[cut]] == topics[texts[cut - 1]]:
        cut += 1  # a topic is on one side only
    return Texts(texts[:cut], texts[cut:])


def texts(
    candidates: int = 5000,
    queries: int = 50,
    *,
    source: str | None = None,
    model: str | None = None,
    blocks: bool = False,
    epochs: int = TUNING["epochs"],
    autocast: bool = False,
) -> Retrainable:
    """Return the task of fine-tuning a language model on texts; queries are texts about the candidates' topics.

    Args:
        candidates (`int`, defaults to 5000): Short sentences, or blocks of 128 tokens.
        queries (`int`, defaults to 50): Queries, and as many others.
        source (`str`, *optional*): Texts, as of [`read_texts`].
        model (`str`, *optional*): A causal language model and its tokenizer, a folder or hub name. Defaults to a small
            Llama that is pretrained on other topics of the same source.
        blocks (`bool`, defaults to `False`): Cut the texts into blocks, several to a block.
        epochs (`int`, defaults to 2): Passes of the fine-tuning over the candidates.
        autocast (`bool`, defaults to `False`): Train again in bfloat16, whose noise is as large as the effect of a
            single block. The model that is explained is always trained in float32.

    Raises:
        ValueError: If there are too few texts.
    """
    found = read_texts(source)
    base, key = _pretrained(found) if model is None else _loaded(model)
    rows, asked = (_blocks if blocks else _sentences)(found.tuned, base.tokenizer, candidates, 2 * queries)
    tuning = TUNING | {"epochs": epochs}
    key = fingerprint(key, rows[rows.column_names[0]][:], asked["text"][:], tuning)

    def train(asked: Dataset) -> FineTuning:
        return FineTuning(base, rows, asked, autocast=autocast, **tuning)

    def adapter(seed: int) -> CausalLMAdapter:
        made = partial(replace(train(asked), autocast=False).model, seed)
        return base.with_model(_cached_model(fingerprint(key, seed), made, base.tokenizer))

    mine, others = asked.select(range(queries)), asked.select(range(queries, 2 * queries))
    together = train(mine).together
    return Retrainable(fingerprint(key, autocast), rows, mine, others, adapter, train, ("text", "text"), together)


def _sentences(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, candidates: int, queries: int
) -> tuple[Dataset, Dataset]:
    """Draw candidates and queries from the short texts."""
    short = [text for text in texts if len(text.split()) <= LONGEST]
    if len(short) < candidates + queries:
        raise ValueError(
            f"{candidates} candidates and {queries} queries don't fit into {len(short)} sentences of up to {LONGEST} "
            "words: ask for fewer candidates, or give more data."
        )
    drawn = np.random.default_rng(0).permutation(len(short))[: candidates + queries]
    asked, rows = drawn[:queries], np.sort(drawn[queries:])
    return _as_rows([short[i] for i in rows]), _as_rows([short[i] for i in asked])


def _blocks(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, candidates: int, queries: int
) -> tuple[Dataset, Dataset]:
    """Draw queries from the texts, and cut the others into blocks of tokens."""
    ids = tokenizer(texts)["input_ids"]
    lengths = np.cumsum([len(one) for one in ids])
    enough = int(np.searchsorted(lengths, candidates * BLOCK * (1 + 2 * queries / len(texts)))) + queries
    drawn = np.random.default_rng(0).permutation(min(enough, len(texts)))[:queries]
    asked = set(drawn.tolist())
    stream = [token for i, one in enumerate(ids) if i not in asked for token in one]
    if len(stream) < candidates * BLOCK:
        raise ValueError(f"{candidates} blocks of {BLOCK} tokens don't fit into {len(stream)} tokens.")
    cut = [stream[start : start + BLOCK] for start in range(0, candidates * BLOCK, BLOCK)]
    read = tokenizer.batch_decode(cut, skip_special_tokens=True)
    return Dataset.from_dict({"input_ids": cut, "text": read}), _as_rows([texts[i] for i in drawn])


def _as_rows(texts: list[str]) -> Dataset:
    return Dataset.from_dict({"text": texts})


def _pretrained(found: Texts) -> tuple[CausalLMAdapter, str]:
    """Return a small Llama that was trained on the texts about other topics, and its key."""
    key = fingerprint("pretrained", found.tuned, found.rest, SIZES, VOCABULARY, PRETRAINING)

    def made() -> nn.Module:
        say(f"A small Llama is pretrained on {len(found.rest)} texts.")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = untrained_llama(len(tokenizer), {"attn_implementation": ATTENTION, **SIZES})
        rows = _as_rows(found.rest)
        return FineTuning(CausalLMAdapter(model, tokenizer), rows, rows, **PRETRAINING).model(0)

    tokenizer = train_tokenizer(found.tuned + found.rest, VOCABULARY)
    return CausalLMAdapter(_cached_model(key, made, tokenizer), tokenizer), key


def _loaded(model: str) -> tuple[CausalLMAdapter, str]:
    """Return a model from a folder or the hub, and its key."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=ATTENTION)
    network = network.to(process_state().device).eval()
    weights = [float(weight.detach().double().abs().sum()) for weight in network.parameters()]
    return CausalLMAdapter(network, AutoTokenizer.from_pretrained(model)), fingerprint(model, weights)


def _cached_model(key: str, make: Callable[[], Any], tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the model that `make` trains, from the cache if it was trained before, where its tokenizer is, too."""
    folder = default_cache_dir() / "models" / key

    def write(part: Path) -> None:
        make().save_pretrained(part)
        tokenizer.save_pretrained(part)

    with process_state().main_process_first():
        if not folder.exists():
            write_folder(folder, write)
    network = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=ATTENTION)
    return network.to(process_state().device).eval()
