"""Models as users have them: other seeds, checkpoints, precisions, adapters, optimizers, rows; and their tracers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import nn

from experiments.retrainable import Retrainable
from experiments.retrainable_sentences import SIZES, TRAINING, VOCABULARY, as_text
from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines import Difference, Ensemble
from hf_forward_inf.data import builtin_facts
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.toys.tiny_models import fit, train_llama, train_tokenizer
from hf_forward_inf.utils.rows import sample_rows

REFERENCE = "the last checkpoint of one seed"
CHECKPOINTS = (9, 12)
"""Epochs, of 15, whose checkpoints are traced besides the last."""
SGD: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.2, "epochs": 22}
"""SGD needs more epochs for a loss like AdamW's."""
REPEATED = 0.2
"""Share of the rows that the data has three times."""


@dataclass(frozen=True)
class Variant:
    """What is traced in place of the reference.

    Args:
        make (`Callable`): Trains the model, and returns what traces it.
        candidates (`datasets.Dataset`): The task's, and perhaps others after them.
        unwanted (`np.ndarray`, *optional*): bool `[candidates]`: rows that should not be among the best: the model has
            never seen them, or they repeat others.
    """

    make: Callable[[], Attributor]
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
        self.tokenizer = train_tokenizer(task.candidates["text"][:], VOCABULARY)

    def variants(self) -> dict[str, Variant]:
        """Return what is traced, by what is different; the reference first."""
        own = partial(Variant, candidates=self.task.candidates)
        epochs, last = TRAINING["epochs"], CHECKPOINTS[-1]
        return {
            REFERENCE: own(lambda: self.tracer(self.model)),
            "another seed": own(lambda: self.other_seeds[0]),
            "the mean of 3 seeds": own(lambda: Ensemble([self.tracer(self.model), *self.other_seeds])),
            f"the checkpoint after {last} of {epochs} epochs": own(lambda: self.checkpoints[-1]),
            "the mean of 3 checkpoints": own(lambda: Ensemble([*self.checkpoints, self.tracer(self.model)])),
            "bfloat16": own(lambda: self.tracer(copy.deepcopy(self.model).to(torch.bfloat16))),
            "trained by SGD": own(lambda: self.tracer(self.trained(**SGD))),
            "a LoRA added, nothing else perturbed": own(lambda: self.tracer(self.with_lora(self.model))),
            "a base that has seen none of the rows": own(lambda: self.tracer(self.base)),
            "a base fine-tuned by LoRA": own(lambda: self.tracer(self.tuned(self.with_lora(self.base)))),
            "a base fine-tuned": own(lambda: self.tracer(self.tuned(self.base))),
            "a base fine-tuned, the base's scores subtracted": own(
                lambda: Difference(self.tracer(self.tuned(self.base)), self.tracer(self.base))
            ),
            "half of the rows never seen": self.half_seen(),
            "a fifth of the rows three times": self.repeated(),
        }

    @cached_property
    def model(self) -> nn.Module:
        """The reference's model."""
        return self.trained()

    @cached_property
    def base(self) -> nn.Module:
        """A model that has learned other sentences."""
        return self.trained(rows=self.other_sentences())

    @cached_property
    def other_seeds(self) -> list[ForwardInf]:
        """Tracers of two more models, of other seeds."""
        return [self.tracer(self.trained(seed=self.seed + 100 * i)) for i in (1, 2)]

    @cached_property
    def checkpoints(self) -> list[ForwardInf]:
        """Tracers of earlier checkpoints."""
        return [self.tracer(self.trained(until=epoch)) for epoch in CHECKPOINTS]

    def tuned(self, model: nn.Module) -> nn.Module:
        """Fine-tune a copy of a model on the candidates."""
        model = copy.deepcopy(model)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            fit(CausalLMAdapter(model, self.tokenizer), self.task.candidates, **TRAINING, quiet=True)
        return model

    def half_seen(self) -> Variant:
        """Return the model of a random half of the rows, traced over all of them."""
        rows = len(self.task.candidates)
        seen = np.random.default_rng(self.seed).permutation(rows) < rows // 2
        half = self.task.candidates.select(np.flatnonzero(seen))
        return Variant(lambda: self.tracer(self.trained(rows=half)), self.task.candidates, ~seen)

    def repeated(self) -> Variant:
        """Return the model of data with repeated rows, traced over all of it."""
        rows = len(self.task.candidates)
        chosen = np.random.default_rng(self.seed).permutation(rows)[: round(REPEATED * rows)]
        everything = concatenate_datasets([self.task.candidates, self.task.candidates.select(np.tile(chosen, 2))])
        copies = np.arange(len(everything)) >= rows
        return Variant(lambda: self.tracer(self.trained(rows=everything)), everything, copies)

    def trained(self, rows: Dataset | None = None, seed: int | None = None, **changes: Any) -> nn.Module:
        """Train on the candidates, or other rows, with changes of the training."""
        options = {**TRAINING, **changes, "sizes": SIZES, "quiet": True, "seed": self.seed if seed is None else seed}
        return train_llama(self.task.candidates if rows is None else rows, self.tokenizer, **options)

    def with_lora(self, model: nn.Module) -> nn.Module:
        """Return a copy of a model with an untrained LoRA, which is then all that is trained and perturbed."""
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=16, target_modules="all-linear")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return get_peft_model(copy.deepcopy(model), lora)

    def other_sentences(self) -> Dataset:
        """Return as many other sentences of the built-in facts."""
        taken = set(self.task.candidates["text"][:])
        rows = as_text(builtin_facts()["abstracts"])
        others = rows.select([i for i, text in enumerate(rows["text"][:]) if text not in taken])
        return sample_rows(others, len(self.task.candidates), self.seed)

    def tracer(self, model: nn.Module) -> ForwardInf:
        """Return Forward-INF with defaults that scores all candidates, without a floor."""
        return ForwardInf(model.eval(), self.tokenizer, strategy="full")
