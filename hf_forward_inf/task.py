"""What a run traces: a model, queries that it answers, candidates, and the truth where it is known."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_forward_inf.datasets import builtin_facts, candidate_pool, load_rows, proponents, sample_rows
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.processes import process_state, say
from hf_forward_inf.tiny_models import tiny_mt5

BUILTIN_CANDIDATES = 1200
"""Candidates traced of the built-in facts, unless the user says how many."""
TRAINED_QUERIES = 4
"""Queries asked of a model that is yet to be trained, for each one wanted: it will not answer them all."""


@dataclass
class TraceOptions:
    """What to trace, and where the results go.

    With none of `model`, `candidates` and `queries`, the built-in facts are traced with a tiny mT5 trained on them.
    """

    output: str = field(default="outputs/ftrace", metadata={"help": "Folder for metrics, attribution and report."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a finished run in the output folder."})
    model: str | None = field(default=None, metadata={"help": "Seq2seq model: hub name or local folder."})
    candidates: str | None = field(
        default=None, metadata={"help": "Training examples: hub name[:config], local folder, parquet, JSON or CSV."}
    )
    queries: str | None = field(default=None, metadata={"help": "Outputs to explain, as --candidates."})
    train: bool = field(default=False, metadata={"help": "Train a tiny mT5 on the candidates instead of --model."})
    epochs: int = field(default=25, metadata={"help": "Epochs of that training."})
    num_candidates: int | None = field(
        default=None,
        metadata={"help": "Candidates: the queries' proponents, filled up with distractors. All if unset."},
    )
    num_queries: int = field(default=60, metadata={"help": "Queries traced at most, drawn at random."})
    unanswered: bool = field(default=False, metadata={"help": "Trace also queries that the model answers otherwise."})
    strict: bool = field(
        default=False, metadata={"help": "Proponents are only those in which the queried object is masked."}
    )
    tune: bool = field(
        default=True,
        metadata={"help": "Choose the radius by self-retrieval, without labels. Off if a step is given."},
    )
    reduction: Literal["sum", "mean"] = field(
        default="sum", metadata={"help": "A candidate's loss: sum or mean over its target tokens."}
    )
    top_k: int = field(default=100, metadata={"help": "Candidates of each query kept in the attribution."})
    baselines: bool = field(
        default=True, metadata={"help": "Also run BM25 and the paper's fixed learning rates, if proponents are known."}
    )
    compare: bool = field(
        default=False,
        metadata={"help": "Run every attributor beside: gradients, curvature, hidden states, fusion and cascade."},
    )

    def __post_init__(self) -> None:
        given = [name for name in ("model", "candidates", "queries") if getattr(self, name)]
        if given and not (self.candidates and self.queries):
            raise ValueError(f"--{given[0]} is given: give --candidates and --queries with it.")
        if given and not self.model and not self.train:
            raise ValueError("Which model? Give --model, or --train for a tiny one trained on the candidates.")
        if self.model and self.train:
            raise ValueError("Give either --model or --train: a model that was trained before, or a new one.")
        for name in ("num_queries", "top_k", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}.")


@dataclass
class Task:
    """What is traced: a model, its queries and candidates, and the truth where it is known."""

    model: Any
    tokenizer: Any
    queries: Dataset
    candidates: Dataset
    proponents: list[list[int]] | None
    figures: dict[str, float]


def load_task(options: TraceOptions, seed: int) -> Task:
    """Load or train the model, and draw queries that it answers and candidates."""
    if options.model:
        task = _task_of_model(options, seed)
    elif options.train:
        task = _task_of_trained_model(options, seed)
    else:
        task = _builtin_task(options, seed)
    figures = {**task.figures, "queries": len(task.queries), "candidates": len(task.candidates)}
    return replace(task, figures=figures)


def _task_of_model(options: TraceOptions, seed: int) -> Task:
    abstracts, queries = load_rows(str(options.candidates), "abstracts"), load_rows(str(options.queries), "queries")
    say(f"Tracing {options.queries} over {options.candidates} with {options.model}.")
    model = AutoModelForSeq2SeqLM.from_pretrained(str(options.model)).to(process_state().device).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(options.model))
    return _drawn(model, tokenizer, queries, abstracts, options.num_candidates, options, seed)


def _builtin_task(options: TraceOptions, seed: int) -> Task:
    say("Tracing the built-in facts with a tiny mT5 trained on them; --model, --candidates, --queries for yours.")
    corpus = builtin_facts()
    model, tokenizer = tiny_mt5(corpus["abstracts"], epochs=options.epochs)
    count = options.num_candidates or BUILTIN_CANDIDATES
    return _drawn(model, tokenizer, corpus["queries"], corpus["abstracts"], count, options, seed)


def _task_of_trained_model(options: TraceOptions, seed: int) -> Task:
    """Draw the candidates first: the model is trained on them, and on them alone."""
    abstracts, queries = load_rows(str(options.candidates), "abstracts"), load_rows(str(options.queries), "queries")
    say(f"Tracing {options.queries} over {options.candidates} with a tiny mT5 trained on the candidates.")
    queries = with_proponents(queries, abstracts, options.strict)
    queries = sample_rows(queries, TRAINED_QUERIES * options.num_queries, seed)
    candidates = draw_candidates(queries, abstracts, options.num_candidates, seed)
    model, tokenizer = tiny_mt5(candidates, epochs=options.epochs)
    return _drawn(model, tokenizer, queries, candidates, None, options, seed)


def _drawn(
    model: Any,
    tokenizer: Any,
    queries: Dataset,
    abstracts: Dataset,
    num_candidates: int | None,
    options: TraceOptions,
    seed: int,
) -> Task:
    """Draw queries that the model answers, candidates for them, and find the proponents."""
    queries = with_proponents(queries, abstracts, options.strict)
    queries, figures = answered(model, tokenizer, queries, options)
    queries = sample_rows(queries, options.num_queries, seed)
    candidates = draw_candidates(queries, abstracts, num_candidates, seed)
    truth = proponents(queries, candidates, options.strict) if has_facts(queries, candidates) else None
    return Task(model, tokenizer, queries, candidates, truth, figures)


def has_facts(queries: Dataset, rows: Dataset) -> bool:
    """Whether columns tell which facts rows state and queries ask for."""
    return "facts" in rows.column_names and "predicate_id" in queries.column_names


def with_proponents(queries: Dataset, abstracts: Dataset, strict: bool) -> Dataset:
    """Leave out queries whose fact no row states; keep all where facts are unknown.

    Raises:
        ValueError: If none is left.
    """
    if not has_facts(queries, abstracts):
        return queries
    known = [i for i, rows in enumerate(proponents(queries, abstracts, strict)) if rows]
    if not known:
        raise ValueError("No candidate states the fact of any query: are these the right candidates?")
    if len(known) < len(queries):
        say(f"{len(queries) - len(known)} of {len(queries)} queries have no proponent: they are left out.")
    return queries.select(known)


def draw_candidates(queries: Dataset, abstracts: Dataset, num_candidates: int | None, seed: int) -> Dataset:
    """All abstracts, or as many as asked for: proponents, and distractors as FTRACE takes them."""
    if num_candidates is None or num_candidates >= len(abstracts):
        return abstracts
    candidates, counts = candidate_pool(queries, abstracts, num_candidates, seed)
    say("Candidates: " + ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in counts.items()))
    return candidates


def answered(model: Any, tokenizer: Any, queries: Dataset, options: TraceOptions) -> tuple[Dataset, dict[str, float]]:
    """Keep the queries that the model answers exactly, and tell their share.

    Queries without a target column get the model's own answer.
    """
    adapter = ForwardInf(model, tokenizer).adapter
    answers = adapter.answer(queries[:])  # type: ignore[attr-defined]
    target = adapter.columns[-1]
    if target not in queries.column_names:
        say("The queries have no targets: the model's own answers are traced.")
        return queries.add_column(target, answers), {}
    right = [i for i, (said, true) in enumerate(zip(answers, queries[target], strict=True)) if said == true.strip()]
    say(f"The model answers {len(right)} of {len(queries)} queries exactly ({len(right) / len(queries):.0%}).")
    figures = {"answered": len(right) / len(queries)}
    if options.unanswered:
        return queries, figures
    if not right:
        raise ValueError(
            "The model answers none of the queries exactly, so there is nothing it knows to trace. "
            "Trace what it was taught anyway with --unanswered."
        )
    return queries.select(right), figures
