"""Candidates that are too many to keep: a stream, traced chunk by chunk, of which only the best stay."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list
from datasets import Dataset, DatasetInfo, IterableDataset, concatenate_datasets
from datasets.table import InMemoryTable
from datasets.utils import tqdm

from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.scores.corrections import check_enough, standardised
from hf_forward_inf.scores.metrics import best_first
from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model
from hf_forward_inf.utils.processes import process_state, progress_bars
from hf_forward_inf.utils.rows import sample_rows
from hf_forward_inf.utils.storage import default_cache_dir, write_folder
from hf_forward_inf.utils.validation import lost_candidates, warn_of_lost

PLACE = "stream_row"
"""Column that tells a kept candidate's place in the stream, from 0."""
ENDING = "-rows"
"""Ends the names of folders that hold what was best after so many rows."""


def trace_stream(
    tracer: Scorer,
    queries: Dataset,
    stream: IterableDataset,
    *,
    top_k: int = 100,
    chunk_size: int = 2000,
    standardise: bool = False,
    folder: str | Path | None = None,
) -> Attribution:
    """Score every row of a stream for every query, and keep the best.

    The stream is read a chunk at a time. What a chunk is encoded to, and its losses, are on disk only as long as it is
    traced; of its rows those stay that are among the best of some query. Each chunk costs what [`ForwardInf.trace`]
    does, the queries' ascent included: beside a chunk of some thousand rows that is little.

    A direction that is corrected by curvature takes its sample from the first chunk, unless the tracer has `training`.

    Args:
        tracer (`ForwardInf`): Any adapter's.
        queries (`datasets.Dataset`): Outputs to explain.
        stream (`datasets.IterableDataset`): Candidates, of `load_dataset(..., streaming=True)` for example.
        top_k (`int`, defaults to 100): Candidates kept of each query.
        chunk_size (`int`, defaults to 2000): Rows that are read and traced at once.
        standardise (`bool`, defaults to `False`): Measure each candidate's scores by how it fares with all queries
            ([`corrections.standardised`]); that needs no other candidate.
        folder (`str` or `Path`, *optional*): After each chunk the best so far and the place in the stream are written
            there; the same call then goes on after the last chunk. (A shuffled stream loses what is in its buffer.)

    Returns:
        `Attribution`: Scores `[queries, top_k]`; its candidates are the kept rows, in the order of the stream, with a
        column `stream_row`, their place in it. Rows without a finite loss are counted in a warning, and in `config`
        (`unscored`, of `streamed` rows).

    Raises:
        TypeError: If `stream` is no stream.
        ValueError: If it is empty, a chunk of it can't be read or traced (the message says which), the tracer corrects
            hubs by references, or the folder holds what another run has found.
    """
    if not isinstance(stream, IterableDataset):
        raise TypeError(f"A stream is a datasets.IterableDataset, not {type(stream).__name__}: give that to trace().")
    for name, value in {"top_k": top_k, "chunk_size": chunk_size}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if tracer.references is not None:
        raise ValueError(
            "Hubs are corrected by the mean of all candidates, which no chunk knows: leave references out."
        )
    known = 1.0 if tracer.units == "sensitivity" else None
    if standardise:
        check_enough(len(queries), 3 if known is None else 2)
    stream = stream.with_format("arrow")  # a copy, whose place is its own
    if tracer.training is None and tracer.ascent.sample is not None:
        training = sample_rows(first_chunk(stream, chunk_size), tracer.ascent.sample, tracer.ascent.seed)
        tracer = tracer.with_options(training=training)
    run = fingerprint(
        fingerprint_of_model(tracer.adapter.model), tracer.adapter.cache_key, queries._fingerprint, tracer.config,
        top_k, chunk_size, standardise,
    )  # fmt: skip
    best = None if folder is None else _resumed(Path(folder), run, stream)
    if best is None:
        config = {**tracer.config, "standardised": standardise}
        best = Attribution(
            np.empty((len(queries), 0), dtype=np.float32), queries, Dataset.from_dict({}), method=tracer.name,
            config={**config, "run": run, "streamed": 0, "unscored": 0},
        )  # fmt: skip
    main = process_state().is_main_process
    with tqdm(desc="candidates traced", unit=" rows", initial=best.config["streamed"], disable=not main) as bar:
        for rows in _chunks(stream, chunk_size, best.config["streamed"]):
            scores = _scored(tracer, queries, rows, best.config["streamed"])
            best = _merged(best, standardised(scores, known) if standardise else scores, rows, top_k)
            bar.update(len(rows))
            if folder is not None and main:
                _save(best, Path(folder), stream)
    if best.config["streamed"] == 0:
        raise ValueError("There are no candidates: the stream is empty.")
    return best.keep(top_k)


def first_chunk(stream: IterableDataset, size: int) -> Dataset:
    """Read the first rows of a stream, undecoded, and leave it where it is.

    Raises:
        ValueError: If there are none.
    """
    for chunk in _chunks(stream.with_format("arrow"), size):
        return chunk
    raise ValueError("There are no candidates: the stream is empty.")


def _chunks(stream: IterableDataset, size: int, start: int = 0) -> Iterator[Dataset]:
    """Read a stream, undecoded: one corrupt row must not end the run.

    Raises:
        ValueError: If the stream itself breaks off, by a shard that is cut off for example.
    """
    tables = stream.iter(batch_size=size)
    while True:
        try:
            table = next(tables, None)
        except Exception as error:
            raise ValueError(
                f"The stream can't be read beyond row {start - 1}, to the end of a chunk of {size} rows: {error} "
                f"({type(error).__name__}). Mend or leave out the file that holds them."
            ) from error
        if table is None:
            return
        yield Dataset(InMemoryTable(table), info=DatasetInfo(features=stream.features))
        start += len(table)


def _scored(tracer: Scorer, queries: Dataset, rows: Dataset, start: int) -> np.ndarray:
    """Score a chunk, `[queries, rows]`; what is computed of it is on disk only until then."""
    with progress_bars(False), _scratch(tracer.cache_dir or default_cache_dir()) as scratch:
        try:
            scores = tracer.in_units(tracer.score(queries, rows, scratch, start), rows, scratch, start)
        except ValueError as error:
            raise ValueError(f"Rows {start} to {start + len(rows) - 1} of the stream: {error}") from error
    warn_of_lost(scores, np.arange(start, start + len(rows)))
    return scores


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """Make a folder that all processes share, and delete it afterwards."""
    state = process_state()
    made = [""]
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        made = [tempfile.mkdtemp(prefix="chunk-", dir=folder)]
    scratch = Path(made[0] if state.num_processes == 1 else broadcast_object_list(made)[0])
    try:
        yield scratch
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            shutil.rmtree(scratch, ignore_errors=True)


def _merged(best: Attribution, scores: np.ndarray, rows: Dataset, top_k: int) -> Attribution:
    """Take in a chunk and its scores, and let go of all that is not among the best of any query."""
    config = best.config
    places = np.arange(config["streamed"], config["streamed"] + len(rows))
    config = {
        **config,
        "streamed": config["streamed"] + len(rows),
        "unscored": config["unscored"] + len(lost_candidates(scores)),
    }
    rows = rows.add_column(PLACE, places.tolist())
    rows = concatenate_datasets([best.candidates, rows]) if len(best.candidates) else rows
    scores = np.concatenate([best.scores, scores], axis=1)
    ranked = [(row, best_first(row)[:top_k]) for row in scores]
    stay = np.unique(np.concatenate([first[~np.isnan(row[first])] for row, first in ranked]))
    with progress_bars(False):
        kept = rows.select(stay).flatten_indices(keep_in_memory=True)
    return replace(best, scores=scores[:, stay], candidates=kept, config=config)


def _save(best: Attribution, folder: Path, stream: IterableDataset) -> None:
    """Write the best so far beside what was written before, and then let go of that."""
    before = _saved(folder)
    best = replace(best, config={**best.config, "place": stream.state_dict()})
    write_folder(folder / f"{best.config['streamed']}{ENDING}", best.save_to_disk)
    for other in before:
        shutil.rmtree(other, ignore_errors=True)


def _saved(folder: Path) -> list[Path]:
    """List what was saved, the latest last."""
    return sorted(folder.glob(f"*{ENDING}"), key=lambda path: int(path.name.removesuffix(ENDING)))


def _resumed(folder: Path, run: str, stream: IterableDataset) -> Attribution | None:
    """Read what was saved, and put the stream in its place."""
    saved = _saved(folder)
    if not saved:
        return None
    best = Attribution.load_from_disk(saved[-1])
    if best.config["run"] != run:
        raise ValueError(
            f"{folder} holds what another run has found: another model, other queries or other options. "
            "Give another folder, or delete it."
        )
    stream.load_state_dict(best.config.pop("place"))
    return best
