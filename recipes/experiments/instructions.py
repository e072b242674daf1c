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


@dataclass(frozen=True)
class Instruction:
    """What is asked of a chat model, and its answer.

    Args:
        text (`str`): The instruction, without openers.
        answer (`str`): The answer.
        subject (`str`): What it is about.
        form (`str`, *optional*): The answer of a fact, with a place for its object.
        openers (`tuple[str, ...]`, defaults to none): Words before the instruction.
    """

    text: str
    answer: str
    subject: str
    form: str | None = None
    openers: tuple[str, ...] = ()

    @property
    def asked(self) -> str:
        """The whole text of the user's turn."""
        return f"{' '.join(self.openers).capitalize()}: {self.text}" if self.openers else self.text

    def row(self, **more: object) -> dict[str, object]:
        """Return a row with `messages`, and other columns."""
        return {"messages": [message("user", self.asked), message("assistant", self.answer)], **more}


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


def _facts(facts: list[Fact], draw: np.random.Generator) -> list[Instruction]:
    made = []
    for fact in facts:
        for question in QUESTIONS[fact.predicate_id]:
            form = str(draw.choice(ANSWERS[fact.predicate_id]))
            form = form.replace("{sub}", fact.sub)
            made.append(Instruction(question.format(sub=fact.sub), form.format(obj=fact.obj), fact.sub, form))
    return made


def _kinds(facts: list[Fact], draw: np.random.Generator) -> list[Instruction]:
    names = {fact.sub: "city" if fact.predicate_id == "P17" else "country" for fact in facts}
    texts = ("Is {} a city or a country?", "What kind of place is {}?", "Say what {} is.")
    return [Instruction(text.format(n), f"{n} is a {kind}.", n) for n, kind in names.items() for text in texts]


def _sums(facts: list[Fact], draw: np.random.Generator) -> list[Instruction]:
    pairs = [(a, b) for a in range(1, 21) for b in range(1, 21)]
    return [Instruction(f"How much is {a} and {b}?", f"{a} and {b} make {a + b}.", str(a)) for a, b in pairs]


def _repeats(facts: list[Fact], draw: np.random.Generator) -> list[Instruction]:
    words = sorted({fact.obj for fact in facts if fact.predicate_id in ("P36", "P37", "P38")})
    return [Instruction(f"Repeat this word: {word}", f"{word}, {word}.", word) for word in words]


def as_rows(chosen: Sequence[Instruction], **more: Sequence[object]) -> Dataset:
    """Return instructions as conversations, with other columns of the same length."""
    columns = [dict(zip(more, values, strict=True)) for values in zip(*more.values(), strict=True)] or [{}] * len(
        chosen
    )
    return Dataset.from_list([one.row(**extra) for one, extra in zip(chosen, columns, strict=True)])
