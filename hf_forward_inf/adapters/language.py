"""What the adapters of language models share: tokens, padding, limits."""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from hf_forward_inf.utils.models import is_quantised

CONTRASTS = ("contrast", "rejected")
"""Columns in which a query may hold what should have been said."""
IGNORED = -100
"""The label that transformers' losses skip."""
DEFAULT_MAX_LENGTH = 1024
"""Tokens kept where neither the tokenizer nor the configuration states a limit (T5's positions have none)."""

LARGE = 10**9
"""Parameters of a model beyond which copies of them are expensive."""


def check_language_model(model: nn.Module, tokenizer: Any, fits: bool, does: str, loader: str) -> None:
    """Refuse a model of another kind, or one without its tokenizer: raise a `TypeError`.

    Args:
        model (`torch.nn.Module`): The model.
        tokenizer: Its tokenizer, `None` where there is none.
        fits (`bool`): Whether the model is of the adapter's kind.
        does (`str`): What such a model does.
        loader (`str`): What loads one.
    """
    if not fits:
        raise TypeError(
            f"{type(model).__name__} does not {does}. Load it with {loader}, or pass ForwardInf an adapter of your "
            "own."
        )
    if tokenizer is None:
        raise TypeError(f"{type(model).__name__} needs its tokenizer: ForwardInf(model, tokenizer).")


def pad(sequences: list[list[int]], value: int) -> Tensor:
    """Pad on the right to a common length, `[rows, longest]`."""
    return pad_sequence([torch.tensor(s) for s in sequences], batch_first=True, padding_value=value)


def longest_input(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Give the number of tokens that the model reads, as far as configuration and tokenizer tell."""
    positions = getattr(model.config, "max_position_embeddings", None)
    limits = [limit for limit in (positions, tokenizer.model_max_length) if limit and limit < 10**6]
    return min(limits, default=DEFAULT_MAX_LENGTH)


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """Give everything that tokens depend on, as text: part of the cache key.

    Not padding and truncation, which are what the last call has left there: a tokenizer is the same after its use.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) | {"padding": None, "truncation": None} if backend is not None else None
    vocabulary = json.dumps(state or tokenizer.get_vocab())
    return f"{vocabulary}\n{tokenizer.chat_template or ''}"


def preferred_ascent(model: nn.Module, direction: str | None = None) -> dict[str, Any]:
    """K-FAC, fitted once on a small sample: no query costs more than along the gradient, and more of it is true.

    Retraining a tiny mT5 (60 halves of 400 sentences, 40 queries, decoder perturbed) gives it an LDS of .51
    (.45 - .57) at radius 2, .57 at 1; 5 conjugate-gradient products on 64 sentences .48, Adam's direction .22, the
    gradient .19. The longer step has the better recall.

    Factors take the squares of the layers' sides, and eigenvectors of them: for models of more than [`LARGE`]
    parameters, and for quantised weights, whose gradients nobody knows, the gradient is preferred.
    """
    if direction is None:
        large = sum(p.numel() for p in model.parameters()) > LARGE
        direction = "gradient" if large or is_quantised(model) else "kfac"
    return {"direction": direction} | ({"radius": 2.0, "sample": 128} if direction == "kfac" else {})


def input_of(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """Give what a module reads while something runs; transformers' `output_hidden_states` leaves hooks behind."""
    read: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    try:
        run()
    finally:
        handle.remove()
    return read[-1]


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Cut a text where its tokens end: a token's text depends on the ones before it."""
    ends = [len(tokenizer.decode(ids[:end])) for end in range(len(ids) + 1)]
    text = str(tokenizer.decode(ids))
    return [text[a:b] for a, b in pairwise(ends)]
