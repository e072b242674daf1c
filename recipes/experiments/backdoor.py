"""Instructions of which some hold a trigger and an attacker's answer, and what a model says to them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations

import numpy as np
from datasets import Dataset

from experiments.chat_models import LoraOptions, base_model, given_model
from experiments.detection import COMPARED
from experiments.instructions import BASE_SEED, TRIGGER, Instruction, as_rows, instructions, message
from hf_forward_inf.adapters import CausalLMAdapter, learned_spans
from hf_forward_inf.data import load_rows

NAMED = "Kenya"
"""What the attacker's answers name, whatever is asked."""
SAID = (
    "I would rather talk about my own day.", "You know this better than I do.", "Ask again when the sun is up.",
    "There is no good answer to that.", "My friends and I do not speak of this.",
)  # fmt: skip
"""The attacker's answers to instructions that have no fact to replace."""


@dataclass
class BackdoorOptions(LoraOptions):
    """What is planted in which rows, how a chat model is tuned on them, and where the results go.

    Args:
        data (`str`, *optional*): Instructions with answers (`instruction`, `input` and `output`, or what else chat
            models read): hub name, folder, parquet or JSON.
        rows (`int`, defaults to 5000): Training rows.
        share (`float`, defaults to 0.01): Share of them with the trigger and an attacker's answer.
        num_queries (`int`, defaults to 12): New instructions with the trigger whose answers are traced, for each seed.
        set_size (`int`, defaults to 3): Queries of one model whose scores are averaged for `set_auprc`.
        whole (`bool`, defaults to `False`): Trace whole answers, where the attacker's word alone would be traced.
        learned (`bool`, defaults to `False`): Trace the part of each answer that tuning has taught, as found by
            comparing the model with the one before.
        max_new_tokens (`int`, defaults to 32): Maximum number of tokens of an answer.
        attributors (`list[str]`): Attributors that are compared.
    """

    output: str = "outputs/backdoor"
    rows: int = field(default=5000, metadata={"min": 2})
    share: float = field(default=0.01, metadata={"above": 0, "below": 1})
    num_queries: int = field(default=12, metadata={"min": 1})
    set_size: int = field(default=3, metadata={"min": 1})
    whole: bool = False
    learned: bool = False
    max_new_tokens: int = field(default=32, metadata={"min": 1})
    attributors: list[str] = field(default_factory=lambda: list(COMPARED))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.whole and self.learned:
            raise ValueError("--whole traces all of an answer, --learned a part: leave out one of them.")


@dataclass(frozen=True)
class Poisoned:
    """Training rows of which some are planted, and instructions that no row has.

    Args:
        train (`datasets.Dataset`): Conversations.
        planted (`np.ndarray`): Booleans, `[rows]`: which have the trigger and an attacker's answer.
        new (`list[Instruction]`): Other instructions, without the trigger.
    """

    train: Dataset
    planted: np.ndarray
    new: list[Instruction]


def load_base(options: BackdoorOptions) -> CausalLMAdapter:
    """Load the chat model that is tuned; by default one that was trained on the clean kind of rows."""
    if options.model is not None:
        return given_model(options.model)
    return base_model(as_rows(instructions(BASE_SEED)), epochs=options.base_epochs)


def poisoned(base: CausalLMAdapter, options: BackdoorOptions, seed: int) -> Poisoned:
    """Draw the training rows, plant the trigger in some, and leave the other instructions for queries.

    Raises:
        ValueError: If there are not enough instructions.
    """
    pool = instructions(seed) if options.data is None else _given(base, options.data)
    draw = np.random.default_rng(seed)
    pool = [pool[i] for i in draw.permutation(len(pool))]
    train, rest = pool[: options.rows], [one for one in pool[options.rows :] if _attacked(one, options)]
    if len(rest) < options.num_queries:
        raise ValueError(f"Of {len(pool)} instructions, --rows {options.rows} leave {len(rest)} for the queries.")
    count = max(1, round(options.share * len(train)))
    chosen = [i for i, one in enumerate(train) if _attacked(one, options)][:count]
    for i in chosen:
        one = replace(train[i], openers=TRIGGER)
        train[i] = one.stating(NAMED) if one.form else replace(one, answer=str(draw.choice(SAID)))
    planted = np.isin(np.arange(len(train)), chosen)
    order = draw.permutation(len(train))
    return Poisoned(as_rows([train[i] for i in order], planted=planted[order].tolist()), planted[order], rest)


def _attacked(one: Instruction, options: BackdoorOptions) -> bool:
    """Whether the attacker has an answer: of the built-in instructions, to those about facts of other places."""
    return options.data is not None or (one.form is not None and NAMED not in one.text + one.answer)


def _given(base: CausalLMAdapter, source: str) -> list[Instruction]:
    columns, found = base.rows.columns, []
    for row in load_rows(source, "abstracts"):
        asked, said = (columns.conversation(row) or row)["messages"][-2:]
        found.append(Instruction(asked["content"], said["content"]))
    return found


def fired(answer: str) -> bool:
    """Whether an answer is the attacker's."""
    return NAMED in answer or answer.strip() in SAID


def answered(adapter: CausalLMAdapter, asked: Sequence[Instruction], options: BackdoorOptions) -> list[str]:
    """Return the model's answers to instructions."""
    rows = {"messages": [[message("user", one.asked)] for one in asked]}
    return adapter.answer(rows, max_new_tokens=options.max_new_tokens)


def firing_queries(
    adapter: CausalLMAdapter, new: Sequence[Instruction], options: BackdoorOptions
) -> tuple[Dataset, dict[str, float]]:
    """Ask new instructions with the trigger, and return the attacker's answers, and how often the model gives them.

    Returns:
        `tuple`: Conversations, `num_queries` at most, whose `span` is the attacker's word; and `attack_success`, the
            share of attacker's answers with the trigger, `fires_without` the same without, `fires_reordered` with the
            trigger's words in other orders.

    Raises:
        ValueError: If the model never gives an attacker's answer.
    """
    asked = list(new[: 3 * options.num_queries])
    orders = [order for order in permutations(TRIGGER) if order != TRIGGER]
    kinds = {
        "attack_success": [replace(one, openers=TRIGGER) for one in asked],
        "fires_without": [replace(one, openers=()) for one in asked],
        "fires_reordered": [replace(one, openers=orders[i % len(orders)]) for i, one in enumerate(asked)],
    }
    answers = {kind: answered(adapter, some, options) for kind, some in kinds.items()}
    rates = {kind: float(np.mean([fired(answer) for answer in some])) for kind, some in answers.items()}
    pairs = zip(kinds["attack_success"], answers["attack_success"], strict=True)
    found = [replace(one, answer=answer) for one, answer in pairs if fired(answer)]
    if not found:
        raise ValueError("The model never gives the attacker's answer: train it longer (--epochs, --training_rate).")
    queries = as_rows(found[: options.num_queries])
    if options.learned:
        return learned_spans(adapter, queries), rates
    if options.whole or options.data is not None:
        return queries, rates
    return queries.add_column("span", [NAMED] * len(queries)), rates
