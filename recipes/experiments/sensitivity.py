"""Models as users have them: other seeds, checkpoints, precisions, adapters, optimizers, rows; and their tracers."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import nn

from experiments.retrainable import Retrainable
from experiments.retrainable_sentences import SIZES, TRAINING, as_text
from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines import Difference, Ensemble
from hf_forward_inf.data import builtin_facts
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.toys.tiny_models import fit, train_llama
from hf_forward_inf.utils.rows import sample_rows

REFERENCE = "the last checkpoint of one seed"
CHECKPOINTS = (9, 12)
"""Epochs, of 15, whose checkpoints are traced besides the last."""
SGD = {"optimizer": "sgd", "learning_rate": 0.2, "epochs": 22}
"""SGD needs more epochs for a loss like AdamW's."""
REPEATED = 0.2
"""Share of the rows that the data has three times."""


@dataclass(frozen=True)
class Variant:
    """What is traced in place of the reference.

    Args:
        attributor (`Attributor`): Traces the model.
        candidates (`datasets.Dataset`): The task's, and perhaps others after them.
        unwanted (`np.ndarray`, *optional*): bool `[candidates]`: rows that should not be among the best: the model has
            never seen them, or they repeat others.
    """

    attributor: Attributor
    candidates: Dataset
    unwanted: np.ndarray | None = None


class Sensitivity:
    """Small Llamas of the same sentences, trained in several ways with one seed.

    Args:
        task (`Retrainable`): The sentences.
        seed (`int`): Of the reference's training; others take those that follow.
    """

    def __init__(self, task: Retrainable, seed: int):
        self.task, self.seed = task, seed
        self.tokenizer: Any = getattr(task.adapter(seed), "tokenizer")  # noqa: B009

    def variants(self) -> Iterator[tuple[str, Variant]]:
        """Train one model after another; yield what is traced, by what is different, the reference first."""
        model = self.trained()
        tracer = self.tracer(model)
        yield REFERENCE, self.variant(tracer)
        other, third = (self.tracer(self.trained(seed=self.seed + 100 * i)) for i in (1, 2))
        yield "another seed", self.variant(other)
        yield "the mean of 3 seeds", self.variant(Ensemble([tracer, other, third]))
        earlier = [self.tracer(self.trained(until=epoch)) for epoch in CHECKPOINTS]
        yield f"the checkpoint after {CHECKPOINTS[-1]} of {TRAINING['epochs']} epochs", self.variant(earlier[-1])
        yield "the mean of 3 checkpoints", self.variant(Ensemble([*earlier, tracer]))
        yield "bfloat16", self.variant(self.tracer(copy.deepcopy(model).to(torch.bfloat16)))
        yield "trained by SGD", self.variant(self.tracer(self.trained(**SGD)))
        yield "a LoRA added, nothing else perturbed", self.variant(self.tracer(self.with_lora(model)))
        yield from self.tuned()
        yield "half of the rows never seen", self.half_seen()
        yield "a fifth of the rows three times", self.repeated()

    def tuned(self) -> Iterator[tuple[str, Variant]]:
        """Yield fine-tuned models: a base has learned other sentences first."""
        base = self.trained(rows=self.other_sentences())
        tuned, lora = copy.deepcopy(base), self.with_lora(base)
        for model in (tuned, lora):
            fit(CausalLMAdapter(model, self.tokenizer), self.task.candidates, **TRAINING, quiet=True)
        yield "a base fine-tuned by LoRA", self.variant(self.tracer(lora))
        yield "a base fine-tuned", self.variant(self.tracer(tuned))
        less = Difference(self.tracer(tuned), self.tracer(base))
        yield "a base fine-tuned, the base's scores subtracted", self.variant(less)

    def half_seen(self) -> Variant:
        """Return the model of a random half of the rows, traced over all of them."""
        rows = len(self.task.candidates)
        seen = np.random.default_rng(self.seed).permutation(rows) < rows // 2
        model = self.trained(rows=self.task.candidates.select(np.flatnonzero(seen)))
        return self.variant(self.tracer(model), unwanted=~seen)

    def repeated(self) -> Variant:
        """Return the model of data with repeated rows, traced over all of it."""
        rows = len(self.task.candidates)
        chosen = np.random.default_rng(self.seed).permutation(rows)[: round(REPEATED * rows)]
        copies = self.task.candidates.select(np.tile(chosen, 2))
        everything = concatenate_datasets([self.task.candidates, copies])
        return Variant(self.tracer(self.trained(rows=everything)), everything, np.arange(len(everything)) >= rows)

    def trained(self, rows: Dataset | None = None, seed: int | None = None, **changes: Any) -> nn.Module:
        """Train on the candidates, or other rows, with changes of the training."""
        options = {**TRAINING, **changes, "sizes": SIZES, "quiet": True, "seed": self.seed if seed is None else seed}
        return train_llama(self.task.candidates if rows is None else rows, self.tokenizer, **options)

    def with_lora(self, model: nn.Module) -> nn.Module:
        """Return a copy of a model with an untrained LoRA, which is then all that is trained and perturbed."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(self.seed)
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear")
        return get_peft_model(copy.deepcopy(model), lora)  # type: ignore[arg-type]

    def other_sentences(self) -> Dataset:
        """Return as many other sentences of the built-in facts."""
        taken = set(self.task.candidates["text"][:])
        rows = as_text(builtin_facts()["abstracts"])
        others = rows.select([i for i, text in enumerate(rows["text"][:]) if text not in taken])
        return sample_rows(others, len(self.task.candidates), self.seed)

    def tracer(self, model: nn.Module) -> ForwardInf:
        """Return Forward-INF with defaults that scores all candidates, without a floor."""
        return ForwardInf(model.eval(), self.tokenizer, strategy="full")

    def variant(self, attributor: Attributor, unwanted: np.ndarray | None = None) -> Variant:
        """Return an attributor on the task's candidates."""
        return Variant(attributor, self.task.candidates, unwanted)
