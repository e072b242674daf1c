"""Masked language models: BERT, RoBERTa, ModernBERT and their kin, which fill in what is masked."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from datasets.fingerprint import Hasher
from torch import nn

from hf_forward_inf.adapters.base import Rows
from hf_forward_inf.adapters.language import IGNORED, pieces
from hf_forward_inf.adapters.text_inputs import is_of_kind, unreadable
from hf_forward_inf.adapters.token_labels import TokenLabelsAdapter
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import evaluating, to_device


class MaskedLMAdapter(TokenLabelsAdapter):
    """Cross-entropy of masked tokens.

    A row has a `text`. Where it has `labels` besides, its text holds masks, and they say what belongs there: a token
    (or a text that is one token), a list with one for each mask, or a label for every token of the row, -100 where
    none counts. A row without labels has tokens masked at random: the same ones whenever the text is the same, so that
    it has one loss. All of them become the mask token; none is replaced by another word, as training does with some.

    Masks drawn at random may miss the word that matters. For candidates whose fact is known, give `labels`, or raise
    `mlm_probability`.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): Loaded with `AutoModelForMaskedLM`.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer, with a mask token.
        text_column (`str`, defaults to `"text"`): Column of texts.
        label_column (`str`, defaults to `"labels"`): Column of what is masked.
        mlm_probability (`float`, defaults to 0.15): Share of a text's tokens that is masked, at least one.
        max_length (`int`, *optional*): Tokens kept of a row. Defaults to the model's limit.
        seed (`int`, defaults to 0): Draws the masks.

    Raises:
        TypeError: If the model does not fill in masks, or the tokenizer has none.
        ValueError: If `mlm_probability` is no share.

    Example:
        >>> tracer = ForwardInf(AutoModelForMaskedLM.from_pretrained(name), tokenizer)
        >>> tracer.trace(Dataset.from_dict({"text": ["Lima is in [MASK]."], "labels": ["Peru"]}), candidates)
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        text_column: str = "text",
        label_column: str = "labels",
        mlm_probability: float = 0.15,
        max_length: int | None = None,
        seed: int = 0,
    ):
        if not is_masked_lm(model):
            raise TypeError(f"{type(model).__name__} has no head that fills in masks.")
        if not 0 < mlm_probability <= 1:
            raise ValueError(f"mlm_probability={mlm_probability} must be above 0, and at most 1.")
        super().__init__(model, tokenizer, max_length)
        if tokenizer.mask_token_id is None:
            raise TypeError(f"{type(tokenizer).__name__} has no mask token.")
        self.columns, self.label_columns = (text_column, label_column), (label_column,)
        self.mlm_probability, self.seed = mlm_probability, seed

    @property
    def cache_key(self) -> str:
        """Columns, how masks are drawn, and how texts are tokenized."""
        return fingerprint(self.columns, self.mlm_probability, self.seed, self.inputs.cache_key)

    def columns_in(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the column of texts, and that of labels where there is one."""
        return self.columns if self.columns[1] in set(names) else self.columns[:1]

    def encode(self, rows: Rows) -> Rows:
        """Tokenize texts and mask them; `unreadable` says which rows can't be read."""
        texts, column = rows[self.columns[0]], self.columns[0]
        why = unreadable(texts, column)
        found, _ = self.inputs.encode(["" if reason else text for text, reason in zip(texts, why, strict=True)])
        given, labels = rows.get(self.columns[1]) or [None] * len(texts), []
        for i, label in enumerate(given):
            ids = found["input_ids"][i]
            if label is None and self.inputs.tokenizer.mask_token_id in ids:
                why[i] = why[i] or f"it holds masks, and no `{self.columns[1]}` say what belongs there"
            try:
                masked, own = self._masked(ids) if label is None else (ids, self._filled(ids, label))
            except ValueError as error:
                why[i], masked, own = why[i] or str(error), ids, [IGNORED] * len(ids)
            found["input_ids"][i] = masked
            labels.append(own)
        terms = [sum(label != IGNORED for label in row) for row in labels]
        return {**found, "labels": labels, "terms": terms, "unreadable": why}

    def _masked(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return a text's tokens with some masked, and what was there."""
        tokenizer = self.inputs.tokenizer
        special = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        plain = np.flatnonzero(np.array(special) == 0)
        draws = np.random.default_rng(int(Hasher.hash_bytes([f"{self.seed} {ids}".encode()])[:15], 16))
        count = min(len(plain), max(1, round(self.mlm_probability * len(plain))))
        chosen = set(draws.choice(plain, count, replace=False).tolist()) if count else set()
        masked = [tokenizer.mask_token_id if i in chosen else token for i, token in enumerate(ids)]
        return masked, [token if i in chosen else IGNORED for i, token in enumerate(ids)]

    def _filled(self, ids: list[int], label: Any) -> list[int]:
        """Return the label of each token; raise a `ValueError` that says why there is none."""
        several = label if isinstance(label, list) else [label]
        if several and all(isinstance(one, int) and not isinstance(one, bool) for one in several):
            if len(several) != len(ids):
                raise ValueError(f"it has {len(ids)} tokens and {len(several)} labels")
            return list(several)
        places = [i for i, token in enumerate(ids) if token == self.inputs.tokenizer.mask_token_id]
        if len(places) != len(several):
            raise ValueError(f"it has {len(places)} masks and {len(several)} labels for them")
        tokens = dict(zip(places, map(self._token, several), strict=True))
        return [tokens.get(i, IGNORED) for i in range(len(ids))]

    def _token(self, text: Any) -> int:
        tokenizer = self.inputs.tokenizer
        vocabulary = tokenizer.get_vocab() if isinstance(text, str) else {}
        ids = [vocabulary[text]] if text in vocabulary else []
        if isinstance(text, str) and not ids:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(f"{text!r} is not one token")
        return ids[0]

    def term_texts(self, features: Rows) -> list[list[str]]:
        """Return the text of every token, masked ones as they were."""
        rows = zip(features["input_ids"], features["labels"], strict=True)
        whole = [[i if label == IGNORED else label for i, label in zip(*row, strict=True)] for row in rows]
        return [pieces(self.inputs.tokenizer, ids) for ids in whole]

    def is_open(self, row: Mapping[str, Any], column: str) -> bool:
        """Whether a row holds masks, and nothing says what belongs there."""
        text = row.get(self.columns[0])
        return super().is_open(row, column) and isinstance(text, str) and self.inputs.tokenizer.mask_token in text

    @torch.no_grad()
    def answer(self, rows: Rows) -> list[list[str]]:
        """Fill in the masks of texts.

        Args:
            rows (`dict[str, list]`): With the column of texts, which hold masks.

        Returns:
            `list[list[str]]`: The most probable token for each mask of a row.
        """
        tokenizer, answers = self.inputs.tokenizer, []
        with evaluating(self.model):
            for text in rows[self.columns[0]]:
                features, _ = self.inputs.encode([text])
                batch = to_device(self.inputs.collate(features), self.model)
                best = self.inputs.run(self.model, batch)[0].argmax(-1)
                answers.append(tokenizer.convert_ids_to_tokens(best[batch["input_ids"][0] == tokenizer.mask_token_id]))
        return answers


def is_masked_lm(model: Any) -> bool:
    """Whether this is a transformers model that fills in masks."""
    return is_of_kind(model, "ForMaskedLM")
