"""Language models that see: Llava, Qwen2-VL and their kin."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import numpy as np
from datasets import Dataset
from torch import Tensor, nn

from hf_forward_inf.adapters.base import Batch, Forward, Rows
from hf_forward_inf.adapters.causal_lm import CausalLMAdapter
from hf_forward_inf.adapters.columns import IGNORED, PICTURES, UnreadableRow
from hf_forward_inf.adapters.language import LanguageAdapter, counted, with_template
from hf_forward_inf.adapters.pictures import PIXELS, collated, expanded, pictures_of, processed, stored
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.images import undecoded
from hf_forward_inf.utils.models import peft_parameters

STATE = "rope_deltas"
"""What some models (Qwen2-VL) note of their last input."""


class VisionLanguageAdapter(CausalLMAdapter):
    """Cross-entropy of the tokens that a vision-language model was taught to say, as in [`CausalLMAdapter`].

    Rows have the columns of [`CausalLMAdapter`], and pictures as TRL takes them: in the columns `images` or `image`,
    or in the contents of messages, `{"type": "image", "image": ...}`; in plain texts the processor's image token says
    where they are. A picture becomes the tokens that the processor makes of it, which never count in the loss. Rows
    without pictures are rows of text.

    The language model is perturbed unless other modules are named.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): A causal language model with a vision tower.
        processor (`transformers.ProcessorMixin`): Its processor, with a tokenizer and an image processor.
        **options: Of [`CausalLMAdapter`].

    Raises:
        TypeError: If the model is no causal language model, or the processor knows no image token.
    """

    default_strategy: Literal["full", "screen"] = "full"
    blank: ClassVar[dict[str, Any]] = {**LanguageAdapter.blank, "pictures": b""}

    def __init__(self, model: nn.Module, processor: Any, **options: Any):
        super().__init__(model, with_template(processor), **options)
        self.processor = processor
        self.rows.sees = True
        if getattr(processor, "image_token", None) is None:
            raise TypeError(f"{type(processor).__name__} has no image_token, so pictures have no place in its texts.")
        self.image_token: str = processor.image_token
        self.image_token_id: Any = self.tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def cache_key(self) -> str:
        """That of texts, and how pictures are processed."""
        pictures = (type(self.processor).__name__, self.processor.image_processor.to_json_string(), self.image_token)
        return fingerprint(super().cache_key, *pictures)

    def prepare(self, rows: Dataset) -> Dataset:
        """Leave decoding to `encode`, which names the rows whose pictures can't be read."""
        rows = super().prepare(rows)
        for column in PICTURES:
            if column in rows.column_names:
                rows = undecoded(rows, column)
        return rows

    def _features(self, row: dict[str, Any]) -> dict[str, Any]:
        _, prompt, completion, messages = self.rows.names
        found, row = pictures_of(row, (prompt, completion, messages))
        ids, labels = self._tokens(row)
        pictures = [processed(self.processor, self.image_token, picture) for picture in found]
        ids, labels, by_token = expanded(ids, labels, self.image_token_id, pictures, IGNORED)
        if not pictures:
            return {**self._cut(ids, labels), "pictures": b""}
        if self.max_length is not None and len(ids) > self.max_length:
            raise UnreadableRow(
                f"it has {len(ids)} tokens with its pictures and the model reads {self.max_length}, and a row with "
                "pictures is never cut: make them smaller, or raise max_length"
            )
        features = {"input_ids": ids, "labels": labels, "terms": counted(labels), "truncated": ""}
        return {**features, "pictures": stored(pictures, by_token)}

    def asked(self, row: dict[str, Any]) -> list[int] | None:
        """Return the tokens of what a text asks, `None` where a row has its answer.

        Raises:
            UnreadableRow: If a row with pictures has no answer.
        """
        _, prompt, completion, messages = self.rows.names
        found, text = pictures_of(row, (prompt, completion, messages))
        ids = super().asked(text)
        if ids is not None and found:
            raise UnreadableRow("it has pictures and no answer: generate it before, and give it as a completion")
        return ids

    def collate(self, features: Rows) -> Batch:
        """Pad tokens on the right, and put the pictures of all rows one after the other."""
        batch = super().collate(features)
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        inputs = collated(features["pictures"], batch["input_ids"].shape[1])
        return batch | {name: v.to(dtype) if v.is_floating_point() else v for name, v in inputs.items()}

    def shared_lengths(self, lengths: np.ndarray) -> np.ndarray | None:
        """Return `None`: how many positions a row with pictures has is for the model to know."""
        return None

    def _logits(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        with self._as_before():
            return super()._logits(forward, batch)

    def run_shared(self, batch: Batch) -> Batch:
        """Run the vision tower and the first half of the language model, where that has two."""
        with self._as_before():
            shared = super().run_shared(batch)
        return {name: v for name, v in shared.items() if name not in PIXELS} if "states" in shared else shared

    def first_row(self, batch: Batch) -> Batch:
        """Return the whole batch: which pictures are the first row's is not known any more."""
        return batch

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        """Restore whatever a run leaves in the model."""
        noted = [(module, getattr(module, STATE)) for module in self.model.modules() if hasattr(module, STATE)]
        try:
            yield
        finally:
            for module, value in noted:
                setattr(module, STATE, value)

    def default_modules(self) -> list[str]:
        """Of a PEFT model what it has trained, else the language model with its output layer."""
        if trained := peft_parameters(self.model):
            return trained
        names = {id(module): name for name, module in self.model.named_modules()}
        found = [names.get(id(part)) for part in (self.model.get_decoder(), self.model.get_output_embeddings())]
        return [name for name in found if name] or ["all"]


def sees_pictures(processor: Any) -> bool:
    """Whether a processor reads texts and pictures."""
    return all(getattr(processor, part, None) is not None for part in ("tokenizer", "image_processor"))
