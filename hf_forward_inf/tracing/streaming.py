"""Trace a stream of candidates chunk by chunk, storing only the best: for sets too large for the disk."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetInfo, IterableDataset, concatenate_datasets
from datasets.table import InMemoryTable

from hf_forward_inf.algorithm import Blocks, Scorer
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.data.inputs import as_dataset
from hf_forward_inf.scores.corrections import check_enough, standardised
from hf_forward_inf.scores.metrics import best_first
from hf_forward_inf.tracing.prepared import prepare
from hf_forward_inf.utils.fingerprints import FINGERPRINT, fingerprint, fingerprint_of_model, uncached
from hf_forward_inf.utils.processes import process_state, progress_bars
from hf_forward_inf.utils.progress import progress as shown_progress
from hf_forward_inf.utils.rows import sample_rows
from hf_forward_inf.utils.storage import default_cache_dir, temporary_folder, write_folder
from hf_forward_inf.utils.streams import identity
from hf_forward_inf.utils.validation import lost_candidates, warn_of_lost

STREAM_ROW = "stream_row"
"""Column with a candidate's row number in the stream, from 0."""
ENDING = "-rows"
"""Ends the names of the folders that hold the best candidates after so many rows."""
PROGRESS = "progress.json"
"""File in such a folder: the [`Progress`] that goes with its attribution."""


@dataclass(frozen=True)
class Progress:
    """How far a run has read its stream.

    Args:
        run (`str`): Fingerprint of the model, the queries and the options: another run can't resume from here.
        streamed (`int`, defaults to 0): Rows read and scored.
        unscored (`int`, defaults to 0): Rows among them without a finite loss.
        stream_state (`dict`, defaults to empty): `IterableDataset.state_dict()` after the last of these rows.
    """

    run: str
    streamed: int = 0
    unscored: int = 0
    stream_state: dict[str, Any] = field(default_factory=dict)

    def after(self, scores: np.ndarray, stream: IterableDataset) -> "Progress":
        """Return the progress after one more chunk with these scores, `[queries, rows]`."""
        return replace(
            self,
            streamed=self.streamed + scores.shape[1],
            unscored=self.unscored + len(lost_candidates(scores)),
            stream_state=stream.state_dict(),
        )


def trace_stream(
    tracer: Scorer,
    queries: Dataset,
    stream: IterableDataset,
    *,
    top_k: int = 100,
    chunk_size: int = 2000,
    standardise: bool = False,
    folder: str | Path | None = None,
    models: Blocks | None = None,
) -> Attribution:
    """Score every row of a stream for every query, and return the best candidates of each query.

    The model is perturbed once for all queries. The stream is read a chunk at a time, of which only the rows that are
    among the best of some query remain: a chunk costs the forward passes over its rows, and is not cached. All rows of
    a chunk get the finite step, whatever the tracer's strategy: the floors of screened chunks could not be compared.

    A direction that is corrected by curvature, and a trust region, take their sample from the first chunk, unless the
    tracer has `training`.

    Args:
        tracer (`ForwardInf`): With any adapter.
        queries (`datasets.Dataset`): Outputs to explain, as in [`ForwardInf.trace`].
        stream (`datasets.IterableDataset`): Candidates, for example from `load_dataset(..., streaming=True)`.
        top_k (`int`, defaults to 100): Candidates returned for each query.
        chunk_size (`int`, defaults to 2000): Rows read and traced at once.
        standardise (`bool`, defaults to `False`): Standardise each candidate's scores over the queries
            ([`corrections.standardised`]); this needs no other candidate.
        folder (`str` or `Path`, *optional*): Where the best candidates and the position in the stream are saved after
            each chunk; the same call then resumes after the last saved chunk. (A shuffled stream loses what is in its
            buffer.)
        models (`Callable`, *optional*): The queries' perturbed models, where they were prepared
            ([`prepared.prepare`]).

    Returns:
        `Attribution`: Scores `[queries, top_k]`. Its candidates are the best rows in stream order, with a column
        `stream_row` for their row number in the stream, by which `top` and the others name them. Its `config` counts
        the rows read (`streamed`) and those without a finite loss (`unscored`), which a warning names too.

    Raises:
        TypeError: If `stream` is not a stream.
        ValueError: If it is empty, a chunk of it can't be read or traced (the message names the rows), or the
            folder holds the progress of another run.
    """
    known_deviation = 1.0 if tracer.units == "base_loss" else None
    _check(stream, top_k=top_k, chunk_size=chunk_size)
    queries = as_dataset(queries, "queries")
    if tracer.adapter.answers_queries:
        queries = tracer.adapter.with_answers(queries)
    if standardise:
        check_enough(len(queries), 3 if known_deviation is None else 2)
    stream = stream.with_format("arrow")  # a copy, with a position of its own
    tracer = with_training(tracer, stream, chunk_size)
    run = fingerprint(
        fingerprint_of_model(tracer.adapter.model), tracer.adapter.cache_key, queries._fingerprint, tracer.config,
        top_k, chunk_size, standardise, None if folder is None else identity(stream),
    )  # fmt: skip
    saved = None if folder is None else _resumed(Path(folder), run, stream)
    best, progress = saved or (empty(tracer, queries, standardise), Progress(run))
    main = process_state().is_main_process
    cache = tracer.cache_dir or default_cache_dir()
    with shown_progress("tracing", None, "rows", progress.streamed) as advance, _scratch(cache) as scratch:
        for rows in _chunks(stream, chunk_size, progress.streamed):
            models = models or prepare(tracer, queries, scratch / "models", in_memory=True)
            scores = _scored(tracer, queries, models, rows, progress.streamed, scratch / "chunk")
            scores = standardised(scores, known_deviation) if standardise else scores
            places = range(progress.streamed, progress.streamed + len(rows))
            best = best_of(best, scores, rows.add_column(STREAM_ROW, list(places)), top_k)
            progress = progress.after(scores, stream)
            advance(len(rows))
            if folder is not None and main:
                _save(best, progress, Path(folder))
    if progress.streamed == 0:
        raise ValueError("There are no candidates: the stream is empty.")
    return finished(best, progress, top_k)


def finished(best: Attribution, progress: Progress, top_k: int) -> Attribution:
    """Return the attribution of the best candidates at the end of a stream."""
    counts = {"streamed": progress.streamed, "unscored": progress.unscored}
    return replace(
        best.keep(top_k), config={**best.config, **counts}, backgrounds=None, traced=progress.streamed,
        rows=np.array(best.candidates[STREAM_ROW][:], dtype=np.int64),
    )  # fmt: skip


def with_training(tracer: Scorer, stream: IterableDataset, chunk_size: int) -> Scorer:
    """Return an attributor with training data, from the first chunk of a stream, where its step needs any."""
    if tracer.training is not None or (tracer.ascent.sample is None and tracer.ascent.trust is None):
        return tracer
    chunk = first_chunk(stream, chunk_size)
    return tracer.with_options(training=sample_rows(chunk, tracer.ascent.sample or len(chunk), tracer.ascent.seed))


def _check(stream: Any, **sizes: int) -> None:
    """Refuse what can't be traced as a stream, before anything is read."""
    if not isinstance(stream, IterableDataset):
        raise TypeError(f"A stream is a datasets.IterableDataset, not {type(stream).__name__}: give that to trace().")
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")


def empty(tracer: Scorer, queries: Dataset, standardise: bool) -> Attribution:
    """Return the attribution before the first chunk, with no candidates."""
    scores = np.empty((len(queries), 0), dtype=np.float32)
    own = {FINGERPRINT: fingerprint_of_model(tracer.adapter.model), "standardised": standardise}
    config = {**tracer.config, **own}
    return Attribution(scores, queries, Dataset.from_dict({}), method=tracer.name, config=config)


def first_chunk(stream: IterableDataset, size: int) -> Dataset:
    """Return the first rows of a stream, undecoded, without advancing the stream.

    Raises:
        ValueError: If the stream is empty.
    """
    for chunk in _chunks(stream.with_format("arrow"), size):
        return chunk
    raise ValueError("There are no candidates: the stream is empty.")


def _chunks(stream: IterableDataset, size: int, start: int = 0) -> Iterator[Dataset]:
    """Yield the chunks of a stream, undecoded, so that one corrupt row does not end the run.

    Raises:
        ValueError: If the stream itself can't be read on, for example at a truncated shard.
    """
    tables = stream.iter(batch_size=size)
    while True:
        try:
            table = next(tables, None)
        except Exception as error:
            raise ValueError(
                f"The stream can't be read beyond row {start - 1}, to the end of a chunk of {size} rows: {error} "
                f"({type(error).__name__}). Repair or leave out the file that holds these rows."
            ) from error
        if table is None:
            return
        table = table.combine_chunks()  # of a generator each row is a piece
        yield Dataset(InMemoryTable(table), info=DatasetInfo(features=stream.features))
        start += len(table)


def _scored(tracer: Scorer, queries: Dataset, models: Blocks, rows: Dataset, start: int, scratch: Path) -> np.ndarray:
    """Compute a chunk's scores, `[queries, rows]`; nothing of it is cached, but what several processes share."""
    state = process_state()
    with progress_bars(False), uncached() if state.num_processes == 1 else nullcontext():
        try:
            loss = tracer.candidate_pass(rows, scratch, start)
            loss.cached = False  # several processes share the encoded rows alone
            scores = tracer.in_units(tracer.score(queries, rows, scratch, start, loss, models), loss, start)
        except ValueError as error:
            raise ValueError(f"Rows {start} to {start + len(rows) - 1} of the stream: {error}") from error
    if state.num_processes > 1:
        state.wait_for_everyone()
        if state.is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)
    warn_of_lost(scores, np.arange(start, start + len(rows)))
    return scores


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Create a temporary folder that all processes share, and delete it afterwards."""
    state = process_state()
    with temporary_folder(folder) if state.is_main_process else nullcontext(folder) as own:
        yield own if state.num_processes == 1 else Path(broadcast_object_list([str(own)])[0])
        state.wait_for_everyone()


def best_of(best: Attribution, scores: np.ndarray, rows: Dataset, top_k: int) -> Attribution:
    """Add rows, with their place in [`STREAM_ROW`], and drop what is not among the best of any query."""
    rows = concatenate_datasets([best.candidates, rows]) if len(best.candidates) else rows
    scores = np.concatenate([best.scores, scores], axis=1)
    ranked = [(row, best_first(row)[:top_k]) for row in scores]
    remaining = np.unique(np.concatenate([first[~np.isnan(row[first])] for row, first in ranked]))
    if len(remaining) == len(best.candidates) and (remaining < len(remaining)).all():  # nothing better among them
        return best
    with progress_bars(False):
        candidates = rows.select(remaining).flatten_indices(keep_in_memory=True)
    return replace(best, scores=scores[:, remaining], candidates=candidates)


def _save(best: Attribution, progress: Progress, folder: Path) -> None:
    """Write the best candidates so far and the progress into a folder of their own, then delete older ones."""
    older = _saved(folder)

    def write(part: Path) -> None:
        best.save_to_disk(part)
        (part / PROGRESS).write_text(json.dumps(asdict(progress), indent=2))

    write_folder(folder / f"{progress.streamed}{ENDING}", write)
    for other in older:
        shutil.rmtree(other, ignore_errors=True)


def _saved(folder: Path) -> list[Path]:
    """List the folders that [`_save`] wrote, the latest last."""
    return sorted(folder.glob(f"*{ENDING}"), key=lambda path: int(path.name.removesuffix(ENDING)))


def last_saved(folder: Path) -> tuple[Attribution, Progress] | None:
    """Load what [`trace_stream`] has saved last in a folder; `None` if nothing was saved."""
    saved = _saved(folder)
    if not saved:
        return None
    return Attribution.load_from_disk(saved[-1]), Progress(**json.loads((saved[-1] / PROGRESS).read_text()))


def _resumed(folder: Path, run: str, stream: IterableDataset) -> tuple[Attribution, Progress] | None:
    """Load what was saved last and set the stream to its position; `None` if nothing was saved."""
    saved = last_saved(folder)
    if saved is None:
        return None
    if saved[1].run != run:
        raise ValueError(
            f"{folder} holds the progress of another run, with another model, other queries, another stream or other "
            "options. Give another folder, or delete it."
        )
    stream.load_state_dict(saved[1].stream_state)
    return saved
