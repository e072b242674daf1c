"""Small models for recipes without a model: trained once on the data that they are traced on, and cached."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from hf_forward_inf.adapters import CausalLMAdapter, Seq2SeqAdapter
from hf_forward_inf.passes.candidate_pass import batches
from hf_forward_inf.passes.encoding import check_terms
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import device_of
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.storage import default_cache_dir, write_folder
from hf_forward_inf.utils.validation import check_rows

SIZES = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
"""Sizes of the tiny mT5."""
LLAMA_SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
"""Sizes of the tiny Llama."""
SENTINELS = 4
"""`<extra_id_0>` ... `<extra_id_3>`."""


def tiny_mt5(
    rows: Dataset,
    *,
    epochs: int = 25,
    learning_rate: float = 2e-3,
    vocabulary: int = 4096,
    seed: int = 0,
    cache_dir: Path | None = None,
) -> tuple[MT5ForConditionalGeneration, PreTrainedTokenizerFast]:
    """Train an mT5 of about a million parameters, or load it from the cache.

    Only the main process trains; the others wait and load. An interrupted training leaves nothing in the cache.

    Args:
        rows (`datasets.Dataset`): Training rows with `inputs_pretokenized` and `targets_pretokenized`.
        epochs (`int`, defaults to 25): Passes over the rows.
        learning_rate (`float`, defaults to 2e-3): Peak learning rate of AdamW's one-cycle schedule.
        vocabulary (`int`, defaults to 4096): Largest vocabulary of the tokenizer, which is trained too.
        seed (`int`, defaults to 0): Seed of the initial weights and the order of batches.
        cache_dir (`Path`, *optional*): Defaults to [`storage.default_cache_dir`].

    Returns:
        `tuple`: The model in eval mode, on the device of this process, and its tokenizer.
    """
    state = process_state()
    columns = ["inputs_pretokenized", "targets_pretokenized"]
    key = fingerprint([rows[column][:] for column in columns], epochs, learning_rate, vocabulary, seed)
    folder = (cache_dir or default_cache_dir()) / "models" / key

    def write(part: Path) -> None:
        tokenizer = train_tokenizer([text for column in columns for text in rows[column]], vocabulary)
        train_mt5(rows, tokenizer, epochs, learning_rate, seed, device=state.device).save_pretrained(part)
        tokenizer.save_pretrained(part)

    with state.main_process_first():
        if not folder.exists():
            write_folder(folder, write)
    model = MT5ForConditionalGeneration.from_pretrained(folder).to(state.device).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer with mT5's special tokens: `<pad>` 0, `</s>` 1, `<unk>` 2, then the sentinels."""
    special = ["<pad>", "</s>", "<unk>", *(f"<extra_id_{i}>" for i in range(SENTINELS))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=special[3:],
        model_max_length=512,
    )


def train_mt5(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    epochs: int,
    learning_rate: float,
    seed: int,
    *,
    sizes: dict[str, int] = SIZES,
    batch_length: int = 256,
    device: torch.device | None = None,
    quiet: bool = False,
) -> MT5ForConditionalGeneration:
    """Train an mT5 from random weights.

    Args:
        rows (`datasets.Dataset`): Training rows with `inputs_pretokenized` and `targets_pretokenized`.
        tokenizer (`PreTrainedTokenizerFast`): Its tokenizer.
        epochs (`int`): Passes over the rows.
        learning_rate (`float`): Peak learning rate of AdamW's one-cycle schedule.
        seed (`int`): Seed of the initial weights and the order of batches.
        sizes (`dict[str, int]`, *optional*): Arguments of `MT5Config`. Defaults to [`SIZES`].
        batch_length (`int`, defaults to 256): Padded tokens in a batch.
        device (`torch.device`, *optional*): Device of the model. Defaults to the CPU.
        quiet (`bool`, defaults to `False`): Hide the progress bar.

    Raises:
        FloatingPointError: If training diverges.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = MT5Config(
            **cast(Any, sizes),
            vocab_size=len(tokenizer),
            dropout_rate=0.0,
            initializer_factor=0.3,  # at 1.0, embeddings take many more steps to learn
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
        model = MT5ForConditionalGeneration(config)
        model.to(device)  # type: ignore[arg-type]
        fit(Seq2SeqAdapter(model, tokenizer), rows, epochs, learning_rate, batch_length=batch_length, quiet=quiet)
    return model


def train_llama(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    epochs: int,
    learning_rate: float,
    seed: int,
    *,
    sizes: dict[str, int] = LLAMA_SIZES,
    **options: Any,
) -> LlamaForCausalLM:
    """Train a Llama from random weights, on the CPU.

    Arguments are those of [`train_mt5`], with sizes of `LlamaConfig`; options are those of [`fit`].
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = untrained_llama(len(tokenizer), sizes)
        fit(CausalLMAdapter(model, tokenizer), rows, epochs, learning_rate, **options)
    return model


def untrained_llama(vocabulary: int, sizes: Mapping[str, Any] = LLAMA_SIZES) -> Any:
    """Return a Llama with random weights, drawn from torch's generator, for a tokenizer of [`train_tokenizer`].

    Args:
        vocabulary (`int`): Number of tokens.
        sizes (`dict`, *optional*): Arguments of `LlamaConfig`. Defaults to [`LLAMA_SIZES`].
    """
    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **special, **sizes))


def fit(
    adapter: Seq2SeqAdapter | CausalLMAdapter,
    rows: Dataset,
    epochs: int,
    learning_rate: float,
    *,
    batch_length: int = 256,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    until: int | None = None,
    quiet: bool = False,
) -> None:
    """Train an adapter's model in place, with a one-cycle schedule.

    Args:
        adapter (`Adapter`): Encodes the rows; its model computes the loss.
        rows (`datasets.Dataset`): Training examples.
        epochs (`int`): Passes over the rows.
        learning_rate (`float`): Peak of the schedule.
        batch_length (`int`, defaults to 256): Padded tokens in a batch.
        optimizer (`str`, defaults to `"adamw"`): `"adamw"`, or `"sgd"` with momentum.
        until (`int`, *optional*): Stop after this epoch, in the middle of the schedule: a checkpoint. Defaults to the
            last.
        quiet (`bool`, defaults to `False`): Show no progress.

    Raises:
        FloatingPointError: If training diverges.
    """
    model, device = adapter.model, device_of(adapter.model)
    features = _sorted_features(adapter, rows)
    cuts = [
        adapter.collate({name: values[rows] for name, values in features.items()})
        for rows in batches(adapter.lengths(features), batch_length)
    ]
    steps: torch.optim.Optimizer
    if optimizer == "sgd":
        steps = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    else:
        steps = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(steps, learning_rate, total_steps=epochs * len(cuts), pct_start=0.1)
    model.train()
    title = f"training a tiny {type(model).__name__} on {len(rows)} sentences"
    epochs = epochs if until is None else until
    total = 0.0
    bar = tqdm(total=epochs, desc=title, unit="epoch", disable=quiet)
    for _ in range(epochs):
        total = 0.0
        for i in torch.randperm(len(cuts)).tolist():
            loss = model(**{name: tensor.to(device) for name, tensor in cuts[i].items()}).loss
            steps.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            steps.step()
            schedule.step()
            total += loss.item()
        bar.set_postfix(loss=f"{total / len(cuts):.3f}")
        bar.update()
    bar.close()
    if not math.isfinite(total):
        raise FloatingPointError("Training diverged: the loss is not finite. Lower the learning rate.")


def _sorted_features(adapter: Seq2SeqAdapter | CausalLMAdapter, rows: Dataset) -> dict[str, Any]:
    """Return encoded rows sorted by length, so that batches need little padding.

    [`candidate_pass.encode`] would wait for all processes, but only the main one trains.
    """
    columns = adapter.columns_in(rows.column_names)
    check_rows(rows, columns, "candidates")
    features = adapter.encode(rows[:])
    check_terms(np.array(features["terms"]), columns[-1], "candidates")
    order = np.lexsort(adapter.lengths(features).T)
    return {name: [values[i] for i in order] for name, values in features.items()}
