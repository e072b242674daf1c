"""One adapter for each kind of model."""

from collections.abc import Callable
from typing import Any

from torch import nn

from hf_forward_inf.adapters.base import Adapter
from hf_forward_inf.adapters.causal_lm import CausalLMAdapter, is_causal_lm
from hf_forward_inf.adapters.diffusion import DiffusionAdapter, is_diffusion
from hf_forward_inf.adapters.image_classification import ImageClassificationAdapter, is_image_classifier
from hf_forward_inf.adapters.masked_lm import MaskedLMAdapter, is_masked_lm
from hf_forward_inf.adapters.preference import PreferenceAdapter
from hf_forward_inf.adapters.reward import RewardAdapter, is_reward_model
from hf_forward_inf.adapters.seq2seq import Seq2SeqAdapter, is_seq2seq
from hf_forward_inf.adapters.sequence_classification import SequenceClassificationAdapter, is_sequence_classifier
from hf_forward_inf.adapters.spans import learned_spans
from hf_forward_inf.adapters.tensors import TensorAdapter
from hf_forward_inf.adapters.token_classification import TokenClassificationAdapter, is_token_classifier
from hf_forward_inf.adapters.vision_language import VisionLanguageAdapter, sees_pictures
from hf_forward_inf.utils.models import uncompiled

__all__ = [
    "Adapter",
    "CausalLMAdapter",
    "DiffusionAdapter",
    "ImageClassificationAdapter",
    "MaskedLMAdapter",
    "PreferenceAdapter",
    "RewardAdapter",
    "Seq2SeqAdapter",
    "SequenceClassificationAdapter",
    "TensorAdapter",
    "TokenClassificationAdapter",
    "VisionLanguageAdapter",
    "adapter_for",
    "choose_adapter",
    "is_diffusion",
    "learned_spans",
]


KINDS: tuple[tuple[Callable[[Any], bool], Callable[..., Adapter]], ...] = (
    (is_reward_model, RewardAdapter),
    (is_sequence_classifier, SequenceClassificationAdapter),
    (is_token_classifier, TokenClassificationAdapter),
    (is_masked_lm, MaskedLMAdapter),
    (is_seq2seq, Seq2SeqAdapter),
    (is_causal_lm, CausalLMAdapter),
    (is_image_classifier, ImageClassificationAdapter),
)
"""Which models have which adapter: the first that fits."""


def choose_adapter(model: nn.Module | None, processor: Any, adapter: Adapter | None, attributor: str) -> Adapter:
    """Return the given adapter, or the one for the given model: what every attributor does with its arguments.

    Args:
        model (`torch.nn.Module`, *optional*): The trained model.
        processor (*optional*): Its tokenizer, image processor, or processor of both.
        adapter (`Adapter`, *optional*): Takes precedence over model and processor.
        attributor (`str`): Its class name, for the message.

    Raises:
        TypeError: If there is neither an adapter nor a model, or no adapter for this kind of model.
    """
    if adapter is not None:
        return adapter
    if model is None:
        raise TypeError(f"{attributor} needs a model, or an adapter that holds one.")
    return adapter_for(model, processor)


def adapter_for(model: nn.Module, processor: Any = None) -> Adapter:
    """Find the adapter for a model.

    Args:
        model (`torch.nn.Module`): The trained model.
        processor (*optional*): Its tokenizer, image processor, or processor of both.

    Raises:
        TypeError: If no adapter knows this kind of model.
    """
    model = uncompiled(model)
    if is_causal_lm(model) and sees_pictures(processor):
        return VisionLanguageAdapter(model, processor)
    for fits, kind in KINDS:
        if fits(model):
            return kind(model, processor)
    raise TypeError(
        f"No adapter knows {type(model).__name__}: it has no loss over labels that the library can read. "
        "Load a language model with AutoModelForSeq2SeqLM, AutoModelForCausalLM or AutoModelForMaskedLM, a classifier "
        "with AutoModelForSequenceClassification, AutoModelForTokenClassification or AutoModelForImageClassification. "
        "For a module from images to logits use ForwardInf(adapter=ImageClassificationAdapter(model, transform=...)), "
        "for one from arrays TensorAdapter, or write an adapter (hf_forward_inf.adapters.Adapter)."
    )
