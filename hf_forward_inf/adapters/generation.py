"""Answers that a language model gives: the tokens that it generates, and their text for people."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_forward_inf.utils.models import device_of, evaluating
from hf_forward_inf.utils.progress import progress


@torch.no_grad()
def generate(
    model: Any,
    inputs: Sequence[list[int]],
    *,
    room: Sequence[int],
    padding: int,
    batch_size: int,
    decoder: bool,
    **options: Any,
) -> list[list[int]]:
    """Generate answers, by greedy decoding unless options say otherwise.

    Args:
        model (`transformers.PreTrainedModel`): The model.
        inputs (`list[list[int]]`): Tokens of prompts, or what an encoder reads.
        room (`list[int]`): Tokens of each answer at most.
        padding (`int`): The token that pads.
        batch_size (`int`): Inputs answered together.
        decoder (`bool`): Whether a decoder of its own answers, and the answer does not follow the input.
        **options: Of the model's `generate`.

    Returns:
        `list[list[int]]`: The generated tokens; the end token is the last of them where the model generated one.
    """
    answers: list[list[int]] = [[] for _ in inputs]
    with progress("answering", len(inputs), "queries") as advance:
        for chunk, size in _chunks(room, batch_size):
            ids, mask = (
                part.to(device_of(model)) for part in _padded([inputs[row] for row in chunk], padding, not decoder)
            )
            with evaluating(model):
                made = model.generate(**{"do_sample": False, "num_beams": 1, **options},
                    input_ids=ids, attention_mask=mask, max_new_tokens=size,
                    pad_token_id=padding,
                )  # fmt: skip
            for row, tokens in zip(chunk, made[:, 1 if decoder else ids.shape[1] :].tolist(), strict=True):
                answers[row] = _until_end(tokens, end_tokens(model))
            advance(len(chunk))
    return answers


def _chunks(room: Sequence[int], batch_size: int) -> Iterator[tuple[list[int], int]]:
    """Yield rows that are answered together, and the limit that they have in common."""
    for size in sorted(set(room)):
        rows = [row for row, own in enumerate(room) if own == size]
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size], size


def end_tokens(model: Any) -> set[int]:
    """Return the tokens at which a model stops."""
    ends = getattr(model, "generation_config", model.config).eos_token_id
    return set(ends) if isinstance(ends, list | tuple) else set() if ends is None else {ends}


def answer_text(tokenizer: PreTrainedTokenizerBase, before: list[int], answer: list[int]) -> str:
    """Return an answer as text, without special tokens.

    As it reads behind its prompt: alone, many tokenizers drop the space with which it begins.
    """
    prompt, whole = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (before, [*before, *answer]))
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    stop = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def _padded(rows: list[list[int]], padding: int, left: bool) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    fills = [width - len(row) for row in rows]
    ids = [[padding] * fill + row if left else row + [padding] * fill for row, fill in zip(rows, fills, strict=True)]
    ones = [[0] * fill + [1] * (width - fill) if left else [1] * (width - fill) + [0] * fill for fill in fills]
    return torch.tensor(ids), torch.tensor(ones)
