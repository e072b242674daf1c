"""What adapters share whose models predict something for tokens of a text: their losses, and their hidden states."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from hf_forward_inf.adapters.base import Batch, Forward, Rows
from hf_forward_inf.adapters.language import IGNORED, inputs_of, pad, preferred_ascent
from hf_forward_inf.adapters.text_inputs import AnswersTexts, TextInputs


class TokenLabelsAdapter(AnswersTexts):
    """Cross-entropy of the labels of a text's tokens, those of -100 left out.

    Subclasses encode rows: `input_ids` and `labels`, one a token.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): Predicts something for each token.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.
        max_length (`int`, *optional*): Tokens kept of a row. Defaults to the model's limit.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_length: int | None = None):
        super().__init__(model)
        self.inputs = TextInputs(self.model, tokenizer, max_length)

    def lengths(self, features: Rows | Dataset) -> np.ndarray:
        """Return the number of tokens of each row, `[rows, 1]`."""
        return self.inputs.lengths(features["input_ids"][:])

    def collate(self, features: Rows) -> Batch:
        """Pad on the right, labels with -100."""
        return {**self.inputs.collate(features), "labels": pad(features["labels"], IGNORED)}

    def term_losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Compute the cross-entropy of every token's label, `[rows, tokens]`, 0 where there is none."""
        logits, labels = self.inputs.run(forward, batch).float(), batch["labels"]
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return losses.view_as(labels)

    def outputs_and_loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Compute the logits of tokens that have labels, `[tokens, classes]`, and return with them their loss."""
        valid = batch["labels"] != IGNORED
        loss = partial(F.cross_entropy, target=batch["labels"][valid], reduction="sum")
        return self.inputs.run(forward, batch)[valid].float(), loss

    @torch.no_grad()
    def representation(self, batch: Batch) -> Tensor:
        """Return the mean over tokens that have labels of what the last linear layer reads, `[rows, hidden]`."""
        last = [module for module in self.model.modules() if isinstance(module, nn.Linear)][-1]
        with inputs_of(last) as read:
            self.inputs.run(self.model, batch)
        states = read[-1].float()
        valid = (batch["labels"] != IGNORED)[..., None]
        return (states * valid).sum(1) / valid.sum(1)

    def default_ascent(self, direction: str | None = None) -> dict[str, Any]:
        """K-FAC ([`language.preferred_ascent`])."""
        return preferred_ascent(direction)
