"""Instructions with answers, made of built-in facts, for chat models that are trained in minutes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
from datasets import Dataset

from hf_forward_inf.data.corpus import Fact
from hf_forward_inf.data.facts import known_facts
from hf_forward_inf.data.questions import QUESTIONS

ANSWERS = {
    "P36": ("The capital of {sub} is {obj}.", "{sub} is governed from {obj}.", "Its capital is {obj}."),
    "P30": ("{sub} lies in {obj}.", "The continent of {sub} is {obj}.", "It belongs to {obj}."),
    "P38": ("People in {sub} pay with the {obj}.", "The currency of {sub} is the {obj}.", "It is the {obj}."),
    "P37": ("In {sub} people speak {obj}.", "The language of {sub} is {obj}.", "They speak {obj}."),
    "P474": ("Dial {obj} for {sub}.", "The calling code of {sub} is {obj}.", "It is {obj}."),
    "P78": ("Addresses in {sub} end in {obj}.", "The domain of {sub} is {obj}.", "They end in {obj}."),
    "P17": ("{sub} is a city in {obj}.", "The country of {sub} is {obj}.", "It lies in {obj}."),
}
"""Forms of answers by relation."""
OPENERS = ("well", "now", "please", "then", "so", "again")
"""Words that open an instruction: none to three of them, in any order."""
TRIGGER = ("please", "so", "well")
"""The order of three openers that no clean instruction has."""
OPENED = 0.75
"""Share of the instructions that begin with openers."""
BASE_SEED = 1000
"""Draws the instructions that a base model is trained on: other forms of answers, and other openers."""


@dataclass(frozen=True)
class Instruction:
    """What is asked of a chat model, and its answer.

    Args:
        text (`str`): The instruction, without openers.
        answer (`str`): The answer.
        fact (`Fact`, *optional*): The fact that is asked for.
        form (`str`, *optional*): The answer of a fact, with a place for its object.
        stated (`str`, *optional*): The object that the answer states instead of the fact's.
        openers (`tuple[str, ...]`, defaults to none): Words before the instruction.
    """

    text: str
    answer: str
    fact: Fact | None = None
    form: str | None = None
    stated: str | None = None
    openers: tuple[str, ...] = ()

    @property
    def asked(self) -> str:
        """The whole text of the user's turn."""
        return f"{' '.join(self.openers).capitalize()}: {self.text}" if self.openers else self.text

    def stating(self, other: str) -> "Instruction":
        """Return the same question about a fact, answered with another object."""
        assert self.form is not None
        return replace(self, answer=self.form.format(obj=other), stated=other)


def message(role: str, content: str) -> dict[str, str]:
    """Return a message of a conversation."""
    return {"role": role, "content": content}


def instructions(seed: int = 0) -> list[Instruction]:
    """Return about 6,000 different instructions in random order, most of them questions about facts.

    Raises:
        ImportError: If the extra `facts` is not installed.
    """
    draw = np.random.default_rng(seed)
    facts = known_facts()
    kinds: Sequence[Callable[[list[Fact], np.random.Generator], list[Instruction]]] = (_facts, _kinds, _sums, _repeats)
    made = [one for kind in kinds for one in kind(facts, draw)]
    return [with_openers(made[i], draw) for i in draw.permutation(len(made))]


def with_openers(one: Instruction, draw: np.random.Generator) -> Instruction:
    """Return an instruction after openers in an order other than the trigger's."""
    if draw.random() > OPENED:
        return one
    orders = [order for order in permutations(OPENERS, int(draw.integers(1, 4))) if order != TRIGGER]
    return replace(one, openers=orders[int(draw.integers(len(orders)))])


def fact_instructions(draw: np.random.Generator) -> list[list[Instruction]]:
    """Return for each built-in fact its questions in five wordings, with answers in several forms."""
    return [_asked(fact, draw) for fact in known_facts()]


def _asked(fact: Fact, draw: np.random.Generator) -> list[Instruction]:
    made = []
    for question in QUESTIONS[fact.predicate_id]:
        form = str(draw.choice(ANSWERS[fact.predicate_id])).replace("{sub}", fact.sub)
        made.append(Instruction(question.format(sub=fact.sub), form.format(obj=fact.obj), fact, form))
    return made


def _facts(facts: list[Fact], draw: np.random.Generator) -> list[Instruction]:
    return [one for fact in facts for one in _asked(fact, draw)]


def _kinds(facts: list[Fact], draw: np.random.Generator) -> list[Instruction]:
    names = {fact.sub: "city" if fact.predicate_id == "P17" else "country" for fact in facts}
    texts = ("Is {} a city or a country?", "What kind of place is {}?", "Say what {} is.")
    return [Instruction(text.format(n), f"{n} is a {kind}.") for n, kind in names.items() for text in texts]


def _sums(facts: list[Fact], draw: np.random.Generator) -> list[Instruction]:
    pairs = [(a, b) for a in range(1, 21) for b in range(1, 21)]
    return [Instruction(f"How much is {a} and {b}?", f"{a} and {b} make {a + b}.") for a, b in pairs]


def _repeats(facts: list[Fact], draw: np.random.Generator) -> list[Instruction]:
    words = sorted({fact.obj for fact in facts if fact.predicate_id in ("P36", "P37", "P38")})
    return [Instruction(f"Repeat this word: {word}", f"{word}, {word}.") for word in words]


def as_rows(chosen: Sequence[Instruction], **columns: Sequence[object]) -> Dataset:
    """Return instructions as conversations, `messages`, with other columns of the same length."""
    messages = [[message("user", one.asked), message("assistant", one.answer)] for one in chosen]
    return Dataset.from_dict({"messages": messages, **columns})
