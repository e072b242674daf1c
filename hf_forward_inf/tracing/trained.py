"""What a trainer holds: its model, what prepares its rows, and the rows themselves."""

from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from hf_forward_inf.adapters import Adapter, adapter_for
from hf_forward_inf.adapters.columns import INPUT_IDS
from hf_forward_inf.adapters.language import LanguageAdapter
from hf_forward_inf.utils.rows import as_stored
from hf_forward_inf.utils.validation import listed


def adapter_of(trainer: Any) -> Adapter:
    """Return the adapter for a trainer's model.

    Args:
        trainer (`transformers.Trainer`): Or one of TRL's that trains on answers or texts (`SFTTrainer`).

    Raises:
        TypeError: If the trainer has no tokenizer or processor, or no adapter knows its model.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    processor = getattr(trainer, "processing_class", None) or getattr(trainer.data_collator, "tokenizer", None)
    if processor is None:
        raise TypeError(
            f"The {type(trainer).__name__} has no tokenizer or processor: give it processing_class=..., or use "
            "ForwardInf(model, tokenizer)."
        )
    return adapter_for(model, processor)


def rows_of(trainer: Any, adapter: Adapter, part: str = "train") -> Dataset:
    """Return the rows that a trainer trains on, or evaluates by, as the adapter reads them.

    Rows that were tokenized already are taken as they are by language models; those of other models of texts become
    texts again, where these give the same tokens.

    Args:
        trainer (`transformers.Trainer`): As in [`adapter_of`].
        adapter (`Adapter`): Reads the rows.
        part (`str`, defaults to `"train"`): `"train"` or `"eval"`.

    Raises:
        TypeError: If they are a stream, or no `datasets.Dataset`.
        ValueError: If several rows are packed into one, or tokens can't become texts again.
    """
    rows = getattr(trainer, f"{part}_dataset")
    if isinstance(rows, IterableDataset):
        raise TypeError(
            "The trainer's rows are a stream: use ForwardInf(model, tokenizer).trace_stream(queries, stream)."
        )
    if not isinstance(rows, Dataset):
        raise TypeError(f"The trainer's {part}_dataset must be a datasets.Dataset, not {type(rows).__name__}.")
    if getattr(trainer.args, "packing", False) or "seq_lengths" in rows.column_names:
        raise ValueError(
            "Several of the trainer's rows are packed into one: give the rows as they were before, "
            "ForwardInf(trainer.model, trainer.processing_class).trace(queries, rows)."
        )
    rows = as_stored(rows, "candidates")
    inputs = getattr(adapter, "inputs", None)
    if isinstance(adapter, LanguageAdapter) or inputs is None or INPUT_IDS not in rows.column_names:
        return rows
    if adapter.columns[0] in rows.column_names:
        return rows.remove_columns(INPUT_IDS)
    return _as_texts(rows, adapter.columns[0], inputs)


def _as_texts(rows: Dataset, column: str, inputs: Any) -> Dataset:
    """Return rows of tokens as rows of texts, and refuse those that would be read as other tokens."""
    tokens = rows[INPUT_IDS][:]
    texts = [inputs.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
    again, _ = inputs.encode(texts)
    filler = inputs.tokenizer.pad_token_id
    other = [i for i, (a, b) in enumerate(zip(tokens, again["input_ids"], strict=True)) if _unpadded(a, filler) != b]
    if other:
        raise ValueError(
            f"The tokens of {listed(np.array(other))} are not those of a single text: leave the texts in the "
            "trainer's dataset (map without remove_columns)."
        )
    return rows.remove_columns(INPUT_IDS).add_column(column, texts)


def _unpadded(ids: list[int], filler: int | None) -> list[int]:
    kept = list(ids)
    while kept and kept[-1] == filler:
        kept.pop()
    return kept
