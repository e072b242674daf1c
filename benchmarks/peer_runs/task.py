"""A task as plain files, and what every library needs to read it: nothing here imports `hf_forward_inf`."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = list[dict[str, Any]]

IGNORED = -100
BATCH_TOKENS = 4096
"""Padded tokens of a batch in the plain pass, as in `hf_forward_inf`."""


@dataclass(frozen=True)
class Task:
    """A model, candidates and queries in a folder, which [`peer_tasks.write_task`] writes.

    Args:
        folder (`Path`): Has `model/`, `task.json`, `candidates.json` and `queries.json`; rows have `input_ids` and
            `labels`, which for a causal model are as long as the inputs and -100 where there is no loss, and `row`,
            the columns that this library reads.
        asked (`slice`, *optional*): The queries to score. Defaults to all.
    """

    folder: Path
    asked: slice = field(default_factory=lambda: slice(None))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What `task.json` says: `kind`, and where there are some, `proponents`, `checkpoints` and other facts."""
        return json.loads((self.folder / "task.json").read_text())

    @property
    def kind(self) -> str:
        """`"seq2seq"` or `"causal"`."""
        return self.facts["kind"]

    @cached_property
    def candidates(self) -> Rows:
        """The candidates."""
        return json.loads((self.folder / "candidates.json").read_text())

    @cached_property
    def queries(self) -> Rows:
        """The queries to score."""
        return json.loads((self.folder / "queries.json").read_text())[self.asked]

    @cached_property
    def model(self) -> Any:
        """The trained model, with eager attention, the only kind that every peer can differentiate."""
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

        loader = {"seq2seq": AutoModelForSeq2SeqLM, "causal": AutoModelForCausalLM}[self.kind]
        return loader.from_pretrained(self.folder / "model", attn_implementation="eager").eval()

    def collate(self, rows: Rows, like: Rows | None = None) -> dict[str, Tensor]:
        """Return a batch, padded to the longest row (or that of `like`); `labels` are at their logits' positions."""
        like = like or rows
        wide = max(len(row["input_ids"]) for row in like)
        inputs = _pad([row["input_ids"] for row in rows], wide, 0)
        batch = {
            "input_ids": inputs,
            "attention_mask": _pad([[1] * len(row["input_ids"]) for row in rows], wide, 0),
        }
        if self.kind == "seq2seq":
            deep = max(len(row["labels"]) for row in like)
            # mT5's decoder starts with its padding token, 0, and reads its targets shifted by one.
            batch["decoder_input_ids"] = _pad([[0, *row["labels"][:-1]] for row in rows], deep, 0)
            batch["labels"] = _pad([row["labels"] for row in rows], deep, IGNORED)
        else:
            batch["labels"] = _pad([row["labels"][1:] for row in rows], wide, IGNORED)
        return batch


def _pad(rows: list[list[int]], width: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def logits_of(model: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of every position."""
    read = {name: values for name, values in batch.items() if name != "labels"}
    return model(**read, use_cache=False).logits


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each row, summed over its target tokens."""
    flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view_as(labels).sum(1)


def plain_batches(task: Task) -> list[dict[str, Tensor]]:
    """Return the candidates in batches for inference, sorted by length, so that little is padded."""
    batches: list[Rows] = [[]]
    for row in sorted(task.candidates, key=lambda row: len(row["input_ids"]) + len(row["labels"])):
        if (len(batches[-1]) + 1) * (len(row["input_ids"]) + len(row["labels"])) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return [task.collate(batch) for batch in batches if batch]


@torch.no_grad()
def plain_pass(task: Task, batches: list[dict[str, Tensor]]) -> Tensor:
    """Run one forward pass over the candidates, and return their losses."""
    return torch.cat([losses(logits_of(task.model, batch), batch["labels"]) for batch in batches])
