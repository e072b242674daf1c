"""Candidates in many files, traced one file at a time by any number of machines, and merged: for clusters."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, IterableDataset, load_from_disk
from pyarrow.parquet import read_metadata

from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.data.rows import stream_rows
from hf_forward_inf.tracing.prepared import load as load_prepared
from hf_forward_inf.tracing.prepared import prepare
from hf_forward_inf.tracing.streaming import (
    STREAM_ROW,
    Progress,
    best_of,
    empty,
    finished,
    first_chunk,
    last_saved,
    trace_stream,
    with_training,
)
from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model
from hf_forward_inf.utils.loading import load_model
from hf_forward_inf.utils.sizes import size_text
from hf_forward_inf.utils.storage import write_bytes, write_folder

TRIED = 256
"""Rows of the first file by which the costs of a run are estimated."""


def load_scorer(model: str, ascent: AscentConfig | None = None) -> Scorer:
    """Load a model by its name, and return its attributor."""
    return Scorer(*load_model(model), ascent=ascent)


@dataclass(frozen=True)
class ShardedCost:
    """What a run over many files will cost.

    Args:
        shards (`int`): Files.
        rows (`int`): Candidates in them: counted in parquet, elsewhere estimated by the size of the files.
        passes (`int`): Forward passes over the candidates: one for each query, one for base losses.
        hours (`float`): Hours of one device like this one, by the time of the first rows.
        models (`int`): Bytes of the perturbed models, which every rank reads.
        results (`int`): Bytes of the best candidates of all files.
    """

    shards: int
    rows: int
    passes: int
    hours: float
    models: int
    results: int

    def __str__(self) -> str:
        return (
            f"{self.shards} shards with {self.rows:,} rows, {self.passes} forward passes over each: "
            f"{self.hours:.2g} hours of a device like this one. "
            f"On disk: {size_text(self.models)} of perturbed models, {size_text(self.results)} of best rows."
        )


@dataclass(frozen=True)
class ShardedRun:
    """A trace over many files, in a folder that all machines share.

    [`start`] perturbs the model for the queries, once; [`trace`] traces one file, on any machine; [`merge`] returns
    what [`trace_stream`] would over all files one after the other. Each can be repeated: what is finished is skipped.

    Args:
        load (`Callable`): Returns the attributor; called on every machine.
        files (`Sequence[str]`): Candidates: parquet, JSON lines, CSV or webdataset files, one a shard.
        folder (`str`): Where the run is.
        top_k (`int`, defaults to 100): Candidates returned for each query.
        chunk_size (`int`, defaults to 2000): Rows traced at once; also after how many a shard's progress is saved.
    """

    load: Callable[[], Scorer]
    files: Sequence[str]
    folder: str
    top_k: int = 100
    chunk_size: int = 2000

    def start(self, queries: Dataset) -> ShardedCost:
        """Perturb the model for all queries, write the models for all ranks, and return the costs of the run.

        Raises:
            ValueError: If the folder holds another run, or there are no files.
        """
        if not self.files:
            raise ValueError("There are no files of candidates.")
        root = Path(self.folder)
        tracer = with_training(self.load(), self._stream(0), self.chunk_size)
        about = {"run": self._key(tracer), "queries": queries._fingerprint, "files": list(map(str, self.files))}
        if (root / "run.json").exists():
            if json.loads((root / "run.json").read_text()) != about:
                raise ValueError(f"{root} holds another run: give another folder, or delete it.")
        else:
            prepare(tracer, queries, root / "models")
            if not (root / "queries").exists():
                write_folder(root / "queries", queries.save_to_disk)
            write_bytes(root / "run.json", json.dumps(about, indent=2).encode())
        return self._cost(tracer, queries)

    def trace(self, number: int) -> int:
        """Trace one file, from where an earlier attempt was saved last, and return its number of rows.

        Raises:
            ValueError: If this machine's model or library is not that of the run, or the file can't be read.
        """
        root = Path(self.folder)
        done = root / "shards" / f"{number:05}" / "finished.json"
        if not done.exists():
            tracer = self.load()
            if json.loads((root / "run.json").read_text())["run"] != self._key(tracer):
                raise ValueError(
                    f"This machine's model, or the version of a package, is not that with which {root} was started."
                )
            stream, rows = self._stream(number), 0
            if next(iter(stream.take(1)), None) is not None:
                found = trace_stream(
                    tracer, load_from_disk(root / "queries"), stream, top_k=self.top_k, chunk_size=self.chunk_size,
                    folder=done.parent, models=load_prepared(root / "models", tracer.adapter),
                )  # fmt: skip
                rows = found.config["streamed"]
            write_bytes(done, json.dumps({"rows": rows}).encode())
        return int(json.loads(done.read_text())["rows"])

    def missing(self) -> list[int]:
        """Return the numbers of the files that are not finished."""
        shards = Path(self.folder) / "shards"
        return [i for i in range(len(self.files)) if not (shards / f"{i:05}" / "finished.json").exists()]

    def merge(self) -> Attribution:
        """Return the best candidates of each query over all files; `stream_row` counts rows through all of them.

        Raises:
            ValueError: If files are not finished.
        """
        if missing := self.missing():
            raise ValueError(f"{len(missing)} of {len(self.files)} shards are not finished, such as {missing[0]}.")
        root = Path(self.folder)
        best, progress = empty(self.load(), load_from_disk(root / "queries"), False), Progress("")
        for number in range(len(self.files)):
            saved = last_saved(root / "shards" / f"{number:05}")
            if saved is None:  # an empty file
                continue
            part, own = saved
            places = [place + progress.streamed for place in part.candidates[STREAM_ROW]]
            rows = part.candidates.remove_columns(STREAM_ROW).add_column(STREAM_ROW, places)
            best = best_of(best, part.scores, rows, self.top_k)
            counts = progress.streamed + own.streamed, progress.unscored + own.unscored
            progress = Progress("", *counts)
        return finished(best, progress, self.top_k)

    def _stream(self, number: int) -> IterableDataset:
        return stream_rows(str(self.files[number]), "abstracts")

    def _key(self, tracer: Scorer) -> str:
        options = (tracer.config, self.top_k, self.chunk_size)
        return fingerprint(fingerprint_of_model(tracer.adapter.model), tracer.adapter.cache_key, *options)

    def _cost(self, tracer: Scorer, queries: Dataset) -> ShardedCost:
        first = first_chunk(self._stream(0), TRIED)
        started = time.perf_counter()
        trace_stream(
            tracer, queries, first.to_iterable_dataset(), top_k=self.top_k, chunk_size=TRIED,
            models=load_prepared(Path(self.folder) / "models", tracer.adapter),
        )  # fmt: skip
        seconds = (time.perf_counter() - started) / len(first)
        rows = _rows_in(self.files, first)
        kept = min(rows, len(self.files) * len(queries) * self.top_k)
        passes = 1 + len(queries) * (1 + (tracer.ascent.mode == "symmetric"))
        stored = sum(file.stat().st_size for file in (Path(self.folder) / "models").iterdir())
        return ShardedCost(
            len(self.files), rows, passes, seconds * rows / 3600, stored, kept * first.data.nbytes // len(first)
        )


def _rows_in(files: Sequence[str], first: Dataset) -> int:
    """Count the rows of parquet files, and estimate those of others by the size of the first rows as JSON."""
    size = len(json.dumps(first.with_format(None)[:], default=str)) / len(first)
    return sum(
        read_metadata(file).num_rows if str(file).endswith(".parquet") else round(Path(file).stat().st_size / size)
        for file in files
    )
