"""Decoder-only language models: Llama, Qwen, GPT-2, Gemma, Mistral and their kin."""

import inspect
from collections.abc import Callable, Iterable, Set
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import Self

from hf_forward_inf.adapters.base import Adapter, Batch, Forward, Rows
from hf_forward_inf.adapters.language import (
    CONTRASTS,
    IGNORED,
    check_language_model,
    input_of,
    longest_input,
    pad,
    pieces,
    preferred_ascent,
    tokenizer_state,
)
from hf_forward_inf.adapters.split_model import Blocks
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import device_of, peft_parameters

SPAN = "span"
"""Column that names a part of the completion."""


class CausalLMAdapter(Adapter):
    """Cross-entropy of the completion's tokens given the prompt, or of all tokens where there is no prompt.

    Rows have the columns that TRL's trainers take, and are tokenized as they do it: `messages`, through the
    tokenizer's chat template; `prompt` and `completion`, as texts or as lists of messages; or `text`. Completions and
    texts end with the end-of-sequence token. Of `messages` that end with the assistant's, that last one is the
    completion.

    A row with a `span` (a part of its completion's text, in a column of that name) has the loss of that span's tokens
    alone: why did it say *Canberra*?

    A query with a `contrast` (or `rejected`: another completion, or another last answer) has the loss of its own minus
    that of the contrast ([`contrast.Contrast`]): why did it say *Sydney*, and not *Canberra*?

    A row beyond `max_length` loses the beginning of its prompt; without a prompt, its end. Tokens are always padded on
    the right, whatever side the tokenizer pads for generation.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): A causal language model. Of a PEFT model the
            trained weights are perturbed, of others all, unless told otherwise.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.
        text_column (`str`, defaults to `"text"`): Column of texts.
        prompt_column (`str`, defaults to `"prompt"`): Column of prompts.
        completion_column (`str`, defaults to `"completion"`): Column of completions.
        messages_column (`str`, defaults to `"messages"`): Column of conversations.
        max_length (`int`, *optional*): Tokens kept of a row. Defaults to the model's limit.

    Raises:
        TypeError: If the model is no causal language model.
    """

    contrast_columns = CONTRASTS

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        text_column: str = "text",
        prompt_column: str = "prompt",
        completion_column: str = "completion",
        messages_column: str = "messages",
        max_length: int | None = None,
    ):
        super().__init__(model)
        self.model: Any = model
        check_language_model(
            model, tokenizer, is_causal_lm(model), "predict the next token of a text", "AutoModelForCausalLM"
        )
        self.tokenizer = tokenizer
        self.formats = ((messages_column,), (prompt_column, completion_column), (text_column,))
        self.columns = self.formats[1]
        self.max_length = max_length or longest_input(model, tokenizer)
        # What closes a text, where the tokenizer doesn't do it by itself.
        closes = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
        self.end = "" if closes else tokenizer.eos_token or ""
        self.blocks = Blocks(model)
        self.shortens = "logits_to_keep" in inspect.signature(_base(model).forward).parameters

    @property
    def cache_key(self) -> str:
        """Columns, length limit, the tokenizer's whole state and its chat template."""
        return fingerprint(self.formats, self.max_length, tokenizer_state(self.tokenizer))

    @property
    def filler(self) -> int:
        """The token that pads; it is masked, so that any will do where the tokenizer has none for it."""
        padding = self.tokenizer.pad_token_id
        return (self.tokenizer.eos_token_id or 0) if padding is None else padding

    def columns_in(self, names: Iterable[str]) -> tuple[str, ...]:
        """Find out how the rows are written: messages, else prompt and completion, else texts.

        Raises:
            ValueError: If they have the columns of none.
        """
        names = list(names)
        for columns in self.formats:
            if set(columns) <= set(names):
                return (*columns, SPAN) if SPAN in names else columns
        wanted = "; ".join(" and ".join(f"`{name}`" for name in columns) for columns in self.formats)
        raise ValueError(f"Rows need columns {wanted}; these have {', '.join(names)}. Rename them, or name yours.")

    def encode(self, rows: Rows) -> Rows:
        """Tokenize rows; tokens from `start` to `stop` count.

        Raises:
            TypeError: If a row holds neither texts nor messages.
            ValueError: If a span does not stand in its row's completion.
        """
        columns = [name for name in self.columns_in(rows) if name != SPAN]
        parts = [self._parts(*values) for values in zip(*(rows[name] for name in columns), strict=True)]
        templated = [part[2] for part in parts]
        whole = self._tokenize([part[1] for part in parts], templated)
        prompts = self._tokenize([part[0] for part in parts], templated)["input_ids"]
        spans = rows.get(SPAN) or [None] * len(parts)
        found: Rows = {"input_ids": [], "start": [], "stop": [], "terms": [], "truncated": []}
        for i, ((prompt, text, _), before, span) in enumerate(zip(parts, prompts, spans, strict=True)):
            ids = whole["input_ids"][i]
            # A token that grew over the end of the prompt belongs to the completion.
            start, stop = max(1, _common(ids, before)) if prompt else 1, len(ids)
            if span:
                start, stop = _tokens_of(span, text, len(prompt), whole.encodings[i].offsets, start)
            dropped = min(max(0, len(ids) - self.max_length), start - 1)
            ids, start = ids[dropped : dropped + self.max_length], start - dropped
            stop = min(stop - dropped, len(ids))
            found["input_ids"].append(ids)
            found["start"].append(start)
            found["stop"].append(stop)
            found["terms"].append(max(0, stop - start) if text[len(prompt) :].strip() else 0)
            found["truncated"].append(len(whole["input_ids"][i]) > self.max_length)
        return found

    def with_outputs(self, rows: Rows, outputs: list[Any]) -> Rows:
        """Return the rows with other completions: of messages another last turn of the assistant's, or another text.

        Raises:
            ValueError: If a row with another completion has a span.
        """
        *_, column = [name for name in self.columns_in(rows) if name != SPAN]
        if any(span and output is not None for span, output in zip(rows.get(SPAN) or [], outputs, strict=False)):
            raise ValueError(f"A query has either a `{SPAN}` or a contrast: take the `{SPAN}` out, or make it None.")
        pairs = zip(rows[column], outputs, strict=True)
        whole = (column,) not in self.formats
        return {**rows, column: [own if other is None else other if whole else _answered(own, other)
                                 for own, other in pairs]}  # fmt: skip

    def _parts(self, *values: Any) -> tuple[str, str, bool]:
        """A row as its prompt's text, its whole text, and whether a chat template wrote them."""
        if len(values) == 2 and isinstance(values[0], list):
            after = values[1] if isinstance(values[1], list) else [{"role": "assistant", "content": values[1] or ""}]
            return self._conversation(values[0], after)
        if len(values) == 1 and isinstance(values[0], list):
            last = 1 if values[0] and values[0][-1].get("role") == "assistant" else 0
            return self._conversation(values[0][: len(values[0]) - last], values[0][len(values[0]) - last :])
        for value in values:
            if value is not None and not isinstance(value, str):
                raise TypeError(f"A row holds {type(value).__name__} where a text (or a list of messages) must stand.")
        prompt, text = "".join(value or "" for value in values[:-1]), values[-1] or ""
        closed = not text.strip() or text.endswith(self.tokenizer.eos_token or "")
        return prompt, prompt + text + ("" if closed else self.end), False

    def _conversation(self, before: list[dict[str, str]], after: list[dict[str, str]]) -> tuple[str, str, bool]:
        if not after:
            return "", self._template(before, False), True
        if not before:
            return "", self._template(after, False), True
        return self._template(before, True), self._template([*before, *after], False), True

    def _template(self, messages: list[dict[str, str]], asks: bool) -> str:
        if not messages:
            return ""
        # Arrow fills keys that only some messages have with None, and templates take None for a value.
        kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
        return str(self.tokenizer.apply_chat_template(kept, tokenize=False, add_generation_prompt=asks))

    def _tokenize(self, texts: list[str], templated: list[bool]) -> Any:
        # A chat template writes the special tokens itself. verbose=False: our own warning counts the rows, once.
        return self.tokenizer(texts, add_special_tokens=not any(templated), verbose=False)

    def lengths(self, features: Rows | Dataset) -> np.ndarray:
        """Tokens of each row, `[rows, 1]`."""
        return np.array([[len(ids)] for ids in features["input_ids"]])

    def collate(self, features: Rows) -> Batch:
        """Pad on the right; labels are -100 where nothing counts."""
        ids, cuts = features["input_ids"], zip(features["start"], features["stop"], strict=True)
        labels = [
            [IGNORED] * start + row[start:stop] + [IGNORED] * (len(row) - stop)
            for row, (start, stop) in zip(ids, cuts, strict=True)
        ]
        return {
            "input_ids": pad(ids, self.filler),
            "attention_mask": pad([[1] * len(row) for row in ids], 0),
            "labels": pad(labels, IGNORED),
        }

    def term_losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Cross-entropy of every token, aligned with `input_ids`: `[rows, tokens]`, 0 where it does not count."""
        logits, labels = self._logits(forward, batch)
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        losses = losses.view_as(labels)
        return F.pad(losses, (batch["labels"].shape[1] - labels.shape[1], 0))

    def _logits(self, forward: Forward, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits from the first position that predicts a token that counts, and the tokens predicted."""
        labels, options = batch["labels"], {}
        first = max(1, int((labels != IGNORED).any(0).int().argmax()))
        if self.shortens:  # the output layer is expensive, and prompts need none of it
            options["logits_to_keep"] = torch.arange(first - 1, labels.shape[1] - 1, device=labels.device)
        read = {key: value for key, value in batch.items() if key not in ("labels", "states")}
        with self.blocks.run_second_half(batch.get("states")):
            logits = forward(**read, use_cache=False, **options).logits
        return logits if self.shortens else logits[:, first - 1 : -1], labels[:, first:]

    def outputs_and_loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Logits of the tokens that count, `[tokens, vocabulary]`, and their cross-entropy."""
        logits, labels = self._logits(forward, batch)
        valid = labels != IGNORED
        return logits[valid].float(), partial(F.cross_entropy, target=labels[valid], reduction="sum")

    def term_texts(self, features: Rows) -> list[list[str]]:
        """The text of every token."""
        return [pieces(self.tokenizer, ids) for ids in features["input_ids"]]

    @torch.no_grad()
    def representation(self, batch: Batch) -> Tensor:
        """Mean of the hidden states from which the tokens that count are predicted, `[rows, hidden]`."""
        states = input_of(self.model.get_output_embeddings(), lambda: self._logits(self.model, batch)).float()
        # Where the output layer read the last hidden states only, so did it of the labels.
        valid = (batch["labels"] != IGNORED)[:, -states.shape[1] :]
        predicting = F.pad(valid[:, 1:], (0, 1)) if states.shape[1] == batch["labels"].shape[1] else valid
        return (states * predicting[..., None]).sum(1) / predicting.sum(1, keepdim=True)

    def with_model(self, model: nn.Module) -> Self:
        """Give the same adapter for another model of the same architecture."""
        other = super().with_model(model)
        other.blocks = Blocks(model)
        return other

    def default_modules(self) -> list[str]:
        """Of a PEFT model what it has trained, else everything."""
        return peft_parameters(self.model) or ["all"]

    def default_ascent(self, direction: str | None = None) -> dict[str, Any]:
        """Corrected by curvature, if the model's size allows it ([`language.preferred_ascent`])."""
        return preferred_ascent(self.model, direction)

    def shared_parameters(self) -> Set[str]:
        """What the first half of the blocks and the embeddings read: perturb none of it, and they are run once."""
        device = device_of(self.model)
        self.blocks.look_before_middle(
            lambda: self.model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
        )
        return self.blocks.before_middle

    def run_shared(self, batch: Batch) -> Batch:
        """Run the first half of the blocks, where there are two halves."""
        if not self.blocks.middle:
            return batch
        read = {key: value for key, value in batch.items() if key != "labels"}
        return {**batch, "states": self.blocks.run_first_half(lambda: self.model(**read, use_cache=False))}

    @torch.no_grad()
    def answer(self, rows: Rows, max_new_tokens: int = 64, batch_size: int = 32) -> list[str]:
        """Let the model complete prompts by greedy decoding.

        Args:
            rows (`dict[str, list]`): With the prompt column, or messages that end with the user's.
            max_new_tokens (`int`, defaults to 64): Tokens of an answer at most; fewer where the model reads no more.
            batch_size (`int`, defaults to 32): Prompts completed together.

        Returns:
            `list[str]`: One completion a row, without special tokens.
        """
        (messages,), (prompt, _), _ = self.formats
        given = rows[messages] if messages in rows else rows[prompt]
        templated = [isinstance(value, list) for value in given]
        texts = [self._template(value, True) if isinstance(value, list) else value for value in given]
        prompts = self._tokenize(texts, templated)["input_ids"]
        if not self.end:  # this tokenizer ends every text: an answer begins before that
            prompts = [ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids for ids in prompts]
        prompts = [ids[1 - self.max_length :] for ids in prompts]
        device = device_of(self.model)
        answers: list[str] = []
        for start in range(0, len(prompts), batch_size):
            chunk = [ids[::-1] for ids in prompts[start : start + batch_size]]  # turned round: padded on the left
            ids, mask = (
                pad(side, value).flip(1).to(device) for side, value in ((chunk, self.filler), (_ones(chunk), 0))
            )
            room = min(max_new_tokens, self.max_length - ids.shape[1])
            made = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=room, do_sample=False, num_beams=1,
                pad_token_id=self.filler,
            )  # fmt: skip
            answers += self.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        return answers


def is_causal_lm(model: Any) -> bool:
    """Whether a model predicts the next token of a text."""
    base = _base(model)
    config = getattr(base, "config", None)
    generates = getattr(base, "can_generate", lambda: False)()
    return bool(generates) and config is not None and not getattr(config, "is_encoder_decoder", False)


def _base(model: Any) -> Any:
    """The model that a PEFT model wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _tokens_of(span: str, text: str, begin: int, offsets: list[tuple[int, int]], start: int) -> tuple[int, int]:
    """Find the tokens that a part of a completion is made of: the first, and the one behind the last."""
    at = text.find(span, begin)
    if at < 0:
        raise ValueError(f"The span {span!r} does not stand in the completion {text[begin:]!r}.")
    inside = [i for i, (a, b) in enumerate(offsets) if i >= start and a < at + len(span) and b > at]
    return inside[0], inside[-1] + 1


def _answered(before: Any, output: Any) -> Any:
    """Return messages with another last answer; of a text, the other text."""
    if not isinstance(before, list):
        return output
    turns = [{"role": "assistant", "content": output}] if isinstance(output, str) else output
    asked = before[:-1] if before and before[-1].get("role") == "assistant" else before
    return [*asked, *turns]


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two rows begin with together."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _ones(rows: list[list[int]]) -> list[list[int]]:
    return [[1] * len(row) for row in rows]
