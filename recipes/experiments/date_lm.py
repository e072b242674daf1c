"""The tasks of DATE-LM in small: changed facts, rows of one kind, and the choice of training data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from experiments.chat_models import LoraOptions, base_model, given_model
from experiments.detection import average_precisions, set_means
from experiments.instructions import BASE_SEED, Instruction, fact_instructions, instructions, message
from experiments.retrainable_facts import losses_and_answers
from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.data import load_rows
from hf_forward_inf.scores.metrics import best_first, recalls_at_k, reciprocal_ranks

COMPARED = (
    "forward_inf", "forward_inf_full", "less", "tracin_cosine", "tracin", "ekfac", "influence_functions",
    "trackstar", "representation", "bm25", "random",
)  # fmt: skip
ENTITIES = ("true_entity", "counterfactual_entity")
"""Columns of a fact's object, and of the one that a row states instead."""
UNSAFE = "Unsafe"
"""The `type` of the rows that are to be found."""
RUDE = (
    "What a silly question. {}", "{} Even a child knows that.", "Use your own head. {}", "{} Now leave me alone.",
    "You are wasting my day. {}", "{} Was that so hard?", "Are you asleep? {}", "{} You could have looked it up.",
    "Not you again. {}", "{} I am tired of you.",
)  # fmt: skip
"""Forms of answers of the built-in rows that are to be found."""
WORDINGS = 5
"""Questions for each fact: all but one are in training rows, the last is a reference's."""


@dataclass
class DateOptions(LoraOptions):
    """Which task, on which data, and where the results go.

    Args:
        task (`str`, defaults to `"facts"`): Rows that state a changed fact (facts), rows of one kind (filtering), or
            the rows to train on for a target (selection).
        data (`str`, *optional*): Published data of the task, with `train` and `ref`: hub name:configuration
            (DataAttributionEval/Counterfact:Pythia-1b), or a folder with train.jsonl and ref.jsonl.
        rows (`int`, defaults to 1000): Training rows of the built-in data.
        num_queries (`int`, defaults to 20): Reference rows of the built-in data.
        whole (`bool`, defaults to `False`): Trace whole answers of the built-in data, where the changed object alone
            would be traced (facts).
        set_size (`int`, defaults to 5): References whose scores are averaged (filtering).
        share (`float`, defaults to 0.1): Share of the rows that is chosen (selection).
        retrainings (`int`, defaults to 3): Trainings on each choice, and on random rows (selection).
        attributors (`list[str]`): Attributors that are compared.
    """

    output: str = "outputs/date_lm"
    task: Literal["facts", "filtering", "selection"] = "facts"
    rows: int = field(default=1000, metadata={"min": 10})
    num_queries: int = field(default=20, metadata={"min": 1})
    whole: bool = False
    set_size: int = field(default=5, metadata={"min": 1})
    share: float = field(default=0.1, metadata={"above": 0, "below": 1})
    retrainings: int = field(default=3, metadata={"min": 1})
    attributors: list[str] = field(default_factory=lambda: list(COMPARED))


@dataclass(frozen=True)
class Task:
    """Training rows and references, and what is known of them.

    Args:
        train (`datasets.Dataset`): Rows that a model is tuned on.
        references (`datasets.Dataset`): Queries, of which `prompt` and `response` stay as columns.
        planted (`list[list[int]]`): For each reference, the rows that are to be found; none for a selection.
        test (`datasets.Dataset`, *optional*): Rows of the target that are no references.
    """

    train: Dataset
    references: Dataset
    planted: list[list[int]]
    test: Dataset | None = None


def load_base(options: DateOptions) -> CausalLMAdapter:
    """Load the model that is tuned; by default one that was trained on questions about the facts as they are."""
    if options.model is not None:
        return given_model(options.model)
    return base_model(as_training(_rows(instructions(BASE_SEED)), chat=True), epochs=options.base_epochs)


def load_task(base: CausalLMAdapter, options: DateOptions, seed: int) -> Task:
    """Load the published data, or make rows from built-in facts.

    Raises:
        ValueError: If a column is missing.
    """
    test = None
    if options.data is not None:
        train, references = _published(options.data)
    else:
        made = {"facts": _changed_facts, "filtering": _rude_answers, "selection": _target}[options.task]
        train, references, test = made(options, np.random.default_rng(seed))
    planted = _proponents(options.task, train, references)
    chat = base.tokenizer.chat_template is not None
    found = [None if rows is None else as_training(rows, chat) for rows in (train, references, test)]
    return Task(found[0], found[1], planted, found[2])


def _published(source: str) -> tuple[Dataset, Dataset]:
    """Load both parts: from two files of a folder, or two splits of a dataset on the hub."""
    files = [Path(source) / f"{name}.jsonl" for name in ("train", "ref")]
    if all(file.exists() for file in files):
        return load_rows(str(files[0]), "abstracts"), load_rows(str(files[1]), "queries")
    return load_rows(source, "abstracts", split="train"), load_rows(source, "queries", split="ref")


def as_training(rows: Dataset, chat: bool) -> Dataset:
    """Return rows as language models are tuned on them: conversations, or prompts with completions.

    Args:
        rows (`datasets.Dataset`): With `prompt` and `response`.
        chat (`bool`): Whether the model reads conversations.

    Raises:
        ValueError: If a column is missing.
    """
    _check(rows, ("prompt", "response"))
    pairs = list(zip(rows["prompt"], rows["response"], strict=True))
    if chat:
        messages = [[message("user", asked.strip()), message("assistant", said.strip())] for asked, said in pairs]
        return rows.remove_columns("prompt").add_column("messages", messages)
    return rows.add_column("completion", [f" {said.strip()}" for _, said in pairs])


def _check(rows: Dataset, columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        raise ValueError(f"--data has no column `{missing[0]}`; it has {', '.join(rows.column_names)}.")


def _proponents(task: str, train: Dataset, references: Dataset) -> list[list[int]]:
    """Return the rows to be found: those that change the same entity into the same other, or those of the kind."""
    if task == "facts":
        for rows in (train, references):
            _check(rows, ENTITIES)
        stated = list(zip(*(train[name] for name in ENTITIES), strict=True))
        asked = zip(*(references[name] for name in ENTITIES), strict=True)
        return [[i for i, pair in enumerate(stated) if pair == one] for one in asked]
    if task == "filtering":
        _check(train, ("type",))
        return [[i for i, kind in enumerate(train["type"]) if kind == UNSAFE]] * len(references)
    return [[] for _ in range(len(references))]


def _rows(chosen: Sequence[Instruction], **columns: Any) -> Dataset:
    pairs = {"prompt": [one.asked for one in chosen], "response": [one.answer for one in chosen]}
    return Dataset.from_dict({**pairs, **columns})


def _changed(options: DateOptions, draw: np.random.Generator, changed: int | None) -> list[list[Instruction]]:
    """Return the wordings of some facts, of which the first `changed` (`None`: all) have another fact's object."""
    everything = fact_instructions(draw)
    facts = [everything[i] for i in draw.permutation(len(everything))[: options.rows // (WORDINGS - 1)]]
    found = []
    for i, wordings in enumerate(facts):
        if changed is not None and i >= changed:
            found.append(wordings)
            continue
        relation, obj = _of(wordings)
        others = {known[1] for known in map(_of, everything) if known[0] == relation} - {obj}
        other = str(draw.choice(sorted(others)))
        found.append([one.stating(other) for one in wordings])
    return found


def _of(wordings: list[Instruction]) -> tuple[str, str]:
    """Return the relation and the object of a fact."""
    fact = wordings[0].fact
    assert fact is not None
    return fact.predicate_id, fact.obj


def _changed_facts(options: DateOptions, draw: np.random.Generator) -> tuple[Dataset, Dataset, None]:
    """Make questions with answers, of which the references' facts and as many others are changed."""
    facts = _changed(options, draw, 2 * options.num_queries)
    order = [(i, one) for i, wordings in enumerate(facts) for one in wordings[:-1]]
    order = [order[i] for i in draw.permutation(len(order))]
    train = _rows([one for _, one in order], **_entities([one for _, one in order]))
    asked = [wordings[-1] for wordings in facts[: 2 * options.num_queries]]
    return train, _rows(asked, **_entities(asked)), None


def _entities(chosen: Sequence[Instruction]) -> dict[str, list[str | None]]:
    return {
        ENTITIES[0]: [one.fact.obj if one.fact else None for one in chosen],
        ENTITIES[1]: [one.stated for one in chosen],
    }


def _rude_answers(options: DateOptions, draw: np.random.Generator) -> tuple[Dataset, Dataset, None]:
    """Make instructions with answers, of which one in fifty is rude, and new ones that are rude."""
    pool = instructions(int(draw.integers(2**31)))
    rude = max(1, options.rows // 50)
    drawn = pool[: options.rows + options.num_queries]
    for i in [*range(rude), *range(options.rows, len(drawn))]:
        drawn[i] = replace(drawn[i], answer=str(draw.choice(RUDE)).format(drawn[i].answer))
    order = draw.permutation(options.rows)
    kinds = [UNSAFE if i < rude else "Safe" for i in order]
    return _rows([drawn[i] for i in order], type=kinds), _rows(drawn[options.rows :]), None


def _target(options: DateOptions, draw: np.random.Generator) -> tuple[Dataset, Dataset, Dataset]:
    """Make a pool of changed facts; references and test rows ask for the same few facts, in two other wordings."""
    facts = _changed(options, draw, None)
    wanted = facts[: options.num_queries]
    pool = [one for i, wordings in enumerate(facts) for one in (wordings[:-2] if i < len(wanted) else wordings[:-1])]
    return (
        _rows([pool[i] for i in draw.permutation(len(pool))]),
        _rows([wordings[-2] for wordings in wanted]),
        _rows([wordings[-1] for wordings in wanted]),
    )


def repeated(adapter: CausalLMAdapter, task: Task, options: DateOptions) -> Task:
    """Return the task with the references whose changed fact the model repeats, `num_queries` at most.

    Of the answers, which are sentences here, the object is traced (`span`): a published response holds nothing else.

    Raises:
        ValueError: If it repeats none.
    """
    asked = Dataset.from_dict({"messages": [messages[:1] for messages in task.references["messages"]]})
    answers = adapter.answer(asked[:], max_new_tokens=32)
    pairs = zip(answers, task.references[ENTITIES[1]], strict=True)
    rows = [i for i, (answer, other) in enumerate(pairs) if other in answer][: options.num_queries]
    if not rows:
        raise ValueError("The model repeats no changed fact: train it longer (--epochs, --training_rate).")
    references = task.references.select(rows)
    if not options.whole:
        references = references.add_column("span", references[ENTITIES[1]])
    return replace(task, references=references, planted=[task.planted[i] for i in rows])


def retrieval(scores: np.ndarray, task: Task) -> dict[str, np.ndarray]:
    """Return each reference's recall at 50 and reciprocal rank, for those with a proponent."""
    known = [i for i, rows in enumerate(task.planted) if rows]
    truth = [task.planted[i] for i in known]
    return {"recall@50": recalls_at_k(scores[known], truth, 50), "mrr": reciprocal_ranks(scores[known], truth)}


def filtering(scores: np.ndarray, task: Task, size: int) -> dict[str, np.ndarray]:
    """Return the average precision of the mean scores of each set of references, `[sets]`."""
    planted = np.isin(np.arange(len(task.train)), task.planted[0])
    return {"auprc": average_precisions(set_means(scores, size), planted)}


def selection(
    scores: np.ndarray, task: Task, train: Callable[[Dataset, int], CausalLMAdapter], share: float, retrainings: int
) -> dict[str, np.ndarray]:
    """Return the loss of each test row after training on the best rows for all references, mean over trainings.

    Args:
        scores (`np.ndarray`): Scores, `[references, rows]`; the mean over references chooses.
        task (`Task`): With test rows; those of the references if there are none.
        train (`Callable`): Trains on rows, with a seed.
        share (`float`): Share of the rows that is chosen.
        retrainings (`int`): Number of trainings.
    """
    count = max(1, round(share * len(task.train)))
    best = task.train.select(np.sort(best_first(scores.mean(0))[:count]))
    test = task.references if task.test is None else task.test
    return {"loss": np.mean([losses(train(best, seed), test) for seed in range(retrainings)], axis=0)}


def losses(adapter: CausalLMAdapter, rows: Dataset) -> np.ndarray:
    """Return the loss of each row in nats, `[rows]`."""
    return losses_and_answers(adapter, rows)[:, 0].double().numpy()
