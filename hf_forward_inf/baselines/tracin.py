"""TracIn (Pruthi et al., 2020): products of gradients, summed over training checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from torch import nn

from hf_forward_inf.baselines.checkpoints import Checkpoint, find_checkpoints, load_checkpoint
from hf_forward_inf.baselines.gradients import GradientBaseline, cosines


class TracIn(GradientBaseline):
    """Scores a candidate by the product of its gradient with the query's, at one or several checkpoints.

    With `similarity="dot"`: sum over checkpoints of learning rate x dot product. With `"cosine"`: mean over
    checkpoints of the cosine, as in FTRACE. Products are exact, and take one forward pass and one backward pass over
    activations for all queries of a block; no candidate's gradient is stored.

    Args:
        model (`torch.nn.Module`, *optional*): The trained model. Its weights are the only checkpoint if `checkpoints`
            are not given.
        processor (*optional*): Its tokenizer or image processor.
        checkpoints (`str`, `Path` or a list, *optional*): A Trainer's output folder, or checkpoint folders.
        learning_rates (`list[float]`, *optional*): One per checkpoint. Defaults to those logged in
            `trainer_state.json`.
        similarity (`str`, defaults to `"dot"`): `"dot"` or `"cosine"`.
        **options: `adapter`, `modules` (`["decoder.block.1"]`: the paper's one-layer form), `cache_dir`,
            `max_batch_length` of [`baselines.gradients.GradientBaseline`].

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If `similarity` or a learning rate is unknown, or a checkpoint has another architecture.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        processor: Any = None,
        *,
        checkpoints: str | Path | Sequence[str | Path] | None = None,
        learning_rates: Sequence[float] | None = None,
        similarity: Literal["dot", "cosine"] = "dot",
        **options: Any,
    ):
        super().__init__(model, processor, **options)
        if similarity not in ("dot", "cosine"):
            raise ValueError(f"similarity={similarity!r} must be 'dot' or 'cosine'.")
        self.similarity = similarity
        self.name = "tracin" if similarity == "dot" else "tracin_cosine"
        needed = similarity == "dot"
        self.checkpoints: list[Checkpoint] | None = (
            None if checkpoints is None else find_checkpoints(checkpoints, learning_rates, needed)
        )

    @property
    def config(self) -> dict[str, Any]:
        """Similarity, modules and checkpoints."""
        folders = None if self.checkpoints is None else [str(one.folder) for one in self.checkpoints]
        return {"similarity": self.similarity, "modules": self.modules, "checkpoints": folders}

    def score(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        """Return the sum, or mean, over checkpoints, `[queries, candidates]`."""
        if self.checkpoints is None:
            return self._at(queries, candidates)
        total = np.zeros((len(queries), len(candidates)), dtype=np.float32)
        for one in self.checkpoints:
            there = self.with_model(load_checkpoint(self.adapter.model, one.folder))
            weight = one.learning_rate if self.similarity == "dot" else 1 / len(self.checkpoints)
            total += weight * there._at(queries, candidates)
        return total

    def self_influence(self, rows: Dataset) -> np.ndarray:
        """Return each training example's squared gradient norm, summed over checkpoints as scores are: `[rows]`.

        Raises:
            ValueError: If the similarity is a cosine, which is 1 for all.
        """
        if self.similarity == "cosine":
            raise ValueError("The cosine of an example with itself is 1: use TracIn(similarity='dot').")
        if self.checkpoints is None:
            return self._self_at(rows)
        total = np.zeros(len(rows), dtype=np.float32)
        for one in self.checkpoints:
            there = self.with_model(load_checkpoint(self.adapter.model, one.folder))
            total += one.learning_rate * there._self_at(rows)
        return total

    def _self_at(self, rows: Dataset) -> np.ndarray:
        _, _, norms = self.products(rows.select([0]), rows, "gradients")
        return norms**2

    def _at(self, queries: Dataset, candidates: Dataset) -> np.ndarray:
        norms = self.similarity == "cosine"
        products, own, theirs = self.products(queries, candidates, "gradients", norms=norms)
        if not norms:
            return products
        return cosines(products, own, theirs)
