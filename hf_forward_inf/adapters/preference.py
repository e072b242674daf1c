"""Preference data: pairs of a chosen and a rejected answer, as direct preference optimisation (DPO) trains on them."""

from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import Self

from hf_forward_inf.adapters.base import Adapter, Batch, Forward, Rows, divergence_of_logits
from hf_forward_inf.adapters.causal_lm import CausalLMAdapter
from hf_forward_inf.adapters.columns import IGNORED, PICTURES, TEMPLATE
from hf_forward_inf.adapters.language import counted
from hf_forward_inf.adapters.pairs import half, halves, interleaved, named
from hf_forward_inf.adapters.vision_language import VisionLanguageAdapter, sees_pictures
from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model
from hf_forward_inf.utils.models import evaluating, peft_parameters, to_device

PROMPT, CHOSEN, REJECTED = COLUMNS = ("prompt", "chosen", "rejected")
"""Columns of pairs, as TRL names them; without prompts they are what both answers begin with."""
MARGIN = "reference"
"""Feature: log p(chosen) - log p(rejected) under the reference model."""
REFERENCE_TOKENS = 4096
"""Padded tokens that the reference model reads at once."""


class PreferenceAdapter(Adapter):
    """The loss of direct preference optimisation: -log sigmoid(beta x (margin - reference margin)).

    A margin is log p(chosen | prompt) - log p(rejected | prompt), summed over tokens. Candidates are pairs (columns
    `prompt`, `chosen` and `rejected`: texts, or lists of messages; without `prompt` it is what both answers begin
    with), tokenized as TRL's `DPOTrainer` does. Queries are either

    - pairs: what made the model prefer this to that? Their loss is the same; or
    - what the model said, in the columns of [`CausalLMAdapter`] (`prompt` and `completion`, `messages`, ...): which
      pairs made it say this? Their loss is that adapter's; with a `contrast`, the difference of two.

    The reference model is never perturbed: its margins are computed when pairs are encoded, and cached with them.

    All directions of ascent work: as in logistic regression, the model's output is the scaled margin, and the
    curvature of the loss that of a Bernoulli variable.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`): A causal language model that was trained on pairs.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer; of a vision-language model its processor.
        reference_model (`transformers.PreTrainedModel`, *optional*): What the training started from. Defaults to the
            base of a PEFT model, its adapter disabled (or to its adapter `ref`, which TRL adds where a trained adapter
            is trained on).
        beta (`float`, defaults to 0.1): As in the training.
        max_length (`int`, *optional*): As in [`CausalLMAdapter`].

    Raises:
        TypeError: If the model is no causal language model, or has no reference.
        ValueError: If `beta` is not above 0, or the reference is the model itself.
    """

    columns = COLUMNS
    answers_queries = True
    max_draws = 16  # each has a pair's exact curvature

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        reference_model: nn.Module | None = None,
        beta: float = 0.1,
        max_length: int | None = None,
    ):
        super().__init__(model)
        reader = VisionLanguageAdapter if sees_pictures(tokenizer) else CausalLMAdapter
        self.language = reader(model, tokenizer, max_length=max_length)
        if reference_model is None and not peft_parameters(model):
            raise TypeError(
                f"{type(model).__name__} is no PEFT model, so its reference is not known: give reference_model=, the "
                "model that preference training started from."
            )
        if reference_model is model:
            raise ValueError("reference_model is the model itself: give the model that the training started from.")
        if not beta > 0:
            raise ValueError(f"beta={beta} must be above 0.")
        self.reference_model, self.beta = reference_model, beta
        self._named: tuple[Any, str] | None = None

    @property
    def cache_key(self) -> str:
        """That of the texts, beta, and the reference model's weights."""
        reference = self.reference_model or self.model
        versions = [(id(p), p._version) for p in reference.parameters()]
        if self._named is None or self._named[0] != versions:  # hashing takes time: only after changes
            self._named = versions, fingerprint_of_model(reference)
        return fingerprint("preference", self.language.cache_key, self.beta, self._named[1])

    @property
    def config(self) -> dict[str, Any]:
        """Beta, and how texts are read."""
        return {"beta": self.beta, **self.language.config}

    def columns_in(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the columns of pairs, with the prompt where there is one.

        Raises:
            ValueError: If one is missing.
        """
        names = list(names)
        if not {CHOSEN, REJECTED} <= set(names):
            raise ValueError(
                f"Pairs need columns `{CHOSEN}` and `{REJECTED}` (and `{PROMPT}`); these have {', '.join(names)}. "
                "Queries may be outputs too, such as `prompt` and `completion`."
            )
        return tuple(name for name in (*TEMPLATE, *PICTURES, *COLUMNS) if name in names)

    def prepare(self, rows: Dataset) -> Dataset:
        """Return rows as Python values."""
        return self.language.prepare(rows)

    def for_queries(self, columns: Iterable[str]) -> Adapter:
        """Return this adapter for pairs, and that of texts for outputs."""
        return self if CHOSEN in columns else self.language

    def for_encoded(self, features: Iterable[str]) -> Adapter:
        """Return what [`for_queries`] returned for them."""
        return self if MARGIN in features else self.language

    def encode(self, rows: Rows) -> Rows:
        """Tokenize both halves of every pair, and compute the reference model's margins."""
        prompts = rows.get(PROMPT) or [None] * len(rows[CHOSEN])
        split = zip(*map(split_prompt, prompts, rows[CHOSEN], rows[REJECTED]), strict=True)
        prompts, *answers = map(list, split)
        shared = {PROMPT: prompts, **{name: rows[name] for name in (*TEMPLATE, *PICTURES) if name in rows}}
        chosen, rejected = (self.language.encode({**shared, "completion": answer}) for answer in answers)
        begin_together(chosen, rejected)
        reasons = list(map(_reason, *(both[name] for both in (chosen, rejected) for name in ("unreadable", "terms"))))
        features = {**named(_tokens(chosen), f"{CHOSEN}/"), **named(_tokens(rejected), f"{REJECTED}/")}
        return {
            **features,
            MARGIN: self._reference_margins(features, [not reason for reason in reasons]),
            "terms": [int(not reason) for reason in reasons],
            "truncated": [a or b for a, b in zip(chosen["truncated"], rejected["truncated"], strict=True)],
            "unreadable": reasons,
        }

    def _reference_margins(self, features: Rows, readable: list[bool]) -> list[float]:
        """Compute the margins under the reference model, 0 for rows that can't be read."""
        model: Any = self.reference_model or self.model
        margins = np.zeros(len(readable))
        lengths = self.lengths(features)[:, 0]
        order = [i for i in np.argsort(-lengths, kind="stable") if readable[i]]
        language = self.language.with_model(model)
        without = nullcontext() if self.reference_model else without_adapter(model)
        with evaluating(model), without, torch.no_grad():
            while order:
                count = max(1, REFERENCE_TOKENS // lengths[order[0]])
                rows, order = order[:count], order[count:]
                part = {name: [values[i] for i in rows] for name, values in features.items()}
                batch = to_device(language.collate(_interleaved(part)), model)
                chosen, rejected = halves(language.loss(model, batch))
                margins[rows] = (rejected - chosen).double().cpu().numpy()
        return margins.tolist()

    def lengths(self, features: Rows | Dataset) -> np.ndarray:
        """Tokens of both halves, padded to the longer: `[rows, 1]`."""
        ids = (features[f"{name}/input_ids"][:] for name in (CHOSEN, REJECTED))
        return np.array([[2 * max(len(chosen), len(rejected))] for chosen, rejected in zip(*ids, strict=True)])

    def collate(self, features: Rows) -> Batch:
        """Pad both halves of the pairs together, each rejected answer right behind the chosen one."""
        # The margins first, so that whoever counts rows finds that of pairs.
        margins = torch.tensor(features[MARGIN], dtype=torch.float32)
        return {MARGIN: margins, **self.language.collate(_interleaved(features))}

    def margins(self, forward: Forward, batch: Batch) -> Tensor:
        """Return how much further apart the answers are than under the reference model, times beta: `[rows]`."""
        chosen, rejected = halves(self.language.loss(forward, _texts(batch)))
        return self.beta * (rejected - chosen - batch[MARGIN])

    def term_losses(self, forward: Forward, batch: Batch) -> Tensor:
        """Return the loss of every pair, `[rows, 1]`: it is no sum over tokens."""
        return F.softplus(-self.margins(forward, batch))[:, None]

    def outputs_and_loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the scaled margins, `[rows, 1]`, and their loss."""
        return self.margins(forward, batch)[:, None], lambda margins: F.softplus(-margins).sum()

    def sampled_output_gradients(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return gradients by the margins with mean 0 and the loss's curvature for their square: signs are drawn."""
        chances = outputs.float().sigmoid()
        signs = torch.randint(0, 2, outputs.shape, generator=generator).to(outputs.device) * 2 - 1
        return signs * (chances * (1 - chances)).sqrt()

    def divergence(self, before: Tensor, after: Tensor) -> Tensor:
        """Return how far each preference has moved: KL of Bernoulli variables, in nats, `[rows]`."""
        return divergence_of_logits(*(F.pad(margins, (1, 0)) for margins in (before, after)))

    def term_texts(self, features: Rows) -> list[list[str]]:
        """Raise a `NotImplementedError`: the loss of a pair is no sum over tokens."""
        raise NotImplementedError("The loss of a preference pair is no sum over tokens, so none of them has a share.")

    def representation(self, batch: Batch) -> Tensor:
        """Return the mean hidden state of the chosen answer less that of the rejected one, `[rows, hidden]`."""
        chosen, rejected = halves(self.language.representation(_texts(batch)))
        return chosen - rejected

    def rows_for(self, inputs: Any, candidates: Dataset | None = None) -> Rows:
        """Return what a user asks as rows ([`LanguageAdapter.rows_for`])."""
        return self.language.rows_for(inputs, candidates)

    def with_answers(self, queries: Dataset, **options: Any) -> Dataset:
        """Answer queries without an answer ([`LanguageAdapter.with_answers`]); pairs have two."""
        return queries if CHOSEN in queries.column_names else self.language.with_answers(queries, **options)

    def with_model(self, model: nn.Module) -> Self:
        """Return the same adapter for another model of the same architecture, with the same reference."""
        other = super().with_model(model)
        other.language, other._named = self.language.with_model(model), None
        return other

    def default_modules(self) -> list[str]:
        """Return those of language models."""
        return self.language.default_modules()

    def default_ascent(self, direction: str | None = None) -> dict[str, Any]:
        """Return one step along the gradient.

        Three tiny Llamas were taught by 652 pairs to prefer 42 wrong answers each, and asked in other words about the
        34 to 38 that they then preferred. A step of length 1 along the gradient finds the pairs behind a pair with an
        MRR of .96, behind an output with .84; K-FAC, with the options of language models, with .95 and .79, and it
        must be fitted.
        """
        if direction is None:
            return {"direction": "gradient", "radius": 1.0}
        return self.language.default_ascent(direction)

    def shared_parameters(self) -> Set[str]:
        """Return those of the language model."""
        return self.language.shared_parameters()

    def with_shared(self, batch: Batch, names: Set[str]) -> Batch:
        """Run it for both halves."""
        return {MARGIN: batch[MARGIN], **self.language.with_shared(_texts(batch), names)}


def split_prompt(prompt: Any, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Return a pair with its prompt taken off where both answers begin with it, as TRL's `extract_prompt` does.

    So it is without a prompt, and where the answers are conversations and the prompt is a text.
    """
    conversations = isinstance(chosen, list)
    if chosen is None or rejected is None or (prompt is not None and conversations == isinstance(prompt, list)):
        return prompt, chosen, rejected
    same = (place for place, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    end = next(same, min(len(chosen), len(rejected)))
    if not conversations and chosen[:end].endswith(" "):  # a space belongs to the answer
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def begin_together(chosen: Rows, rejected: Rows) -> None:
    """Make both answers of a pair begin at the same token, the earlier: one may have merged with the prompt."""
    for i, both in enumerate(zip(chosen["labels"], rejected["labels"], strict=True)):
        if not all(map(counted, both)) or chosen["truncated"][i] or rejected["truncated"][i]:
            continue
        start = min(next(place for place, label in enumerate(labels) if label != IGNORED) for labels in both)
        for encoded in (chosen, rejected):
            encoded["labels"][i] = [IGNORED] * start + encoded["input_ids"][i][start:]


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Disable the adapter of a PEFT model, or take its adapter `ref` where it has one; all is as before afterwards."""
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    active = model.active_adapter
    try:
        if "ref" in model.peft_config:
            model.set_adapter("ref")
            yield
        else:
            with model.disable_adapter():
                yield
    finally:
        if "ref" in model.peft_config:
            model.set_adapter(active)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])


def _reason(chosen: str, chosen_terms: int, rejected: str, rejected_terms: int) -> str:
    """Return why a pair can't be read, nothing where it can."""
    empty = [name for name, terms in ((CHOSEN, chosen_terms), (REJECTED, rejected_terms)) if not terms]
    return chosen or rejected or (f"its `{empty[0]}` is empty" if empty else "")


def _tokens(encoded: Rows) -> Rows:
    return {name: values for name, values in encoded.items() if name not in ("terms", "truncated", "unreadable")}


def _interleaved(features: Rows) -> Rows:
    return interleaved(half(features, f"{CHOSEN}/"), half(features, f"{REJECTED}/"))


def _texts(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != MARGIN}
