"""Rows a second of traces, streams and cluster steps against a plain forward loop, and the memory of long streams.

    python benchmarks/streams.py
    python benchmarks/streams.py --queries 4 --processes 2
    python benchmarks/streams.py --memory 1000 10000 100000 1000000

Everything is measured in processes of their own, forked after the imports, in processor time, on a small Llama and
rows of about 25 tokens that are read, tokenised, batched and forwarded under the model itself and once for each query.
The plain loop does nothing else. Each is repeated, in turns with the loop, and the fastest counts.
"""

import argparse
import json
import os
import resource
import shutil
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import torch
from datasets import Dataset, IterableDataset
from torch.nn.functional import cross_entropy

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters.language import pad
from hf_forward_inf.evaluation.figures import save_figures
from hf_forward_inf.tracing.shards import ShardedRun, load_scorer
from hf_forward_inf.utils.loading import load_model
from hf_forward_inf.utils.text_tables import text_table
from tests.helpers.causal import train_tokens, untrained

CHUNK, LENGTH = 2000, 4096
"""Rows that are read at once, and padded tokens of a batch, as in a stream by default."""
ASCENT = AscentConfig(direction="gradient", radius=1.0)
Job = Callable[[Path], object]
"""Does the work, with files of its own in a folder."""


def sentences(count: int, short: bool = False) -> Iterator[dict[str, str]]:
    """Yield rows."""
    for i in range(count):
        yield {"text": f"land {i}" if short else f"What is the capital of land {i}? It is town {i * 7 % 1000}."}


def plain(root: Path, count: int, queries: int, folder: Path) -> None:
    """Read, tokenise, sort and batch rows, and run the model: what nobody can do without."""
    model, tokenizer = load_model(str(root / "model"))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    with torch.no_grad():
        for part in IterableDataset.from_generator(partial(sentences, count)).iter(batch_size=CHUNK):
            ids = sorted((tokenizer(text)["input_ids"] for text in part["text"]), key=len, reverse=True)
            batches = []
            while ids:
                size = max(1, LENGTH // len(ids[0]))
                batches.append(ids[:size])
                ids = ids[size:]
            for batch in batches[rank::world]:
                forward(model, batch, 1 + queries)


def forward(model: torch.nn.Module, ids: list[list[int]], times: int) -> None:
    """Compute the losses of a batch, several times."""
    read, mask = pad(ids, 0), pad([[1] * len(row) for row in ids], 0)
    labels = read.masked_fill(mask == 0, -100)[:, 1:]
    for _ in range(times):
        logits = model(input_ids=read, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")


def traced(root: Path, count: int, queries: int, folder: Path) -> None:
    """Trace rows that are in memory, with an empty cache."""
    tracer = ForwardInf(*load_model(str(root / "model")), ascent=ASCENT, strategy="full", cache_dir=folder)
    tracer.trace(asked(queries), Dataset.from_generator(partial(sentences, count), cache_dir=str(folder)))


def streamed(root: Path, count: int, queries: int, folder: Path, short: bool = False) -> None:
    """Trace a stream."""
    tracer = ForwardInf(*load_model(str(root / "model")), ascent=ASCENT, cache_dir=folder)
    rows = IterableDataset.from_generator(partial(sentences, count, short))
    tracer.trace_stream(asked(queries), rows, top_k=10, chunk_size=CHUNK)


def stepped(root: Path, count: int, queries: int, folder: Path) -> None:
    """Trace one file as a worker of a cluster does, whose models are prepared; of two workers each has one."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    sharded(root, count // world, queries, world).trace(int(os.environ.get("RANK", 0)))


def sharded(root: Path, rows: int, queries: int, files: int) -> ShardedRun:
    """Return a run over files of so many rows."""
    names = [str(root / f"{rows}-{i}.parquet") for i in range(files)]
    load = partial(load_scorer, str(root / "model"), ASCENT)
    return ShardedRun(load, names, str(root / f"run-{rows}-{queries}"), top_k=10, chunk_size=CHUNK)


def asked(count: int) -> Dataset:
    """Return the queries."""
    return Dataset.from_list(list(sentences(count)))


JOBS = {"plain loop": plain, "trace": traced, "trace_stream": streamed, "cluster step": stepped}


def in_processes(job: Job, folder: Path, count: int) -> tuple[float, float]:
    """Run a job in so many processes; return their processor time in all, and the largest memory, MiB."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    children = []
    for rank in range(count):
        child = os.fork()
        if child:
            children.append(child)
            continue
        if count > 1:
            os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
        begun = time.process_time()
        job(folder)
        used = time.process_time() - begun
        (folder / f"{rank}.json").write_text(json.dumps([used, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
        os._exit(0)
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    measured = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
    return sum(used for used, _ in measured), max(peak for _, peak in measured) / 1024


def speeds(root: Path, rows: int, queries: int, processes: int, repeats: int) -> dict[str, float]:
    """Return the rows a second of processor time of each job, in all processes."""
    for i in range(processes):
        Dataset.from_list(list(sentences(rows // processes))).to_parquet(root / f"{rows // processes}-{i}.parquet")
    run = sharded(root, rows // processes, queries, processes)
    child = os.fork()
    if not child:
        run.start(asked(queries))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    seconds: dict[str, float] = {}
    for _ in range(repeats):
        for name, job in JOBS.items():
            shutil.rmtree(Path(run.folder) / "shards", ignore_errors=True)
            folder = Path(tempfile.mkdtemp(dir=root))
            used, _ = in_processes(partial(job, root, rows, queries), folder, processes)
            seconds[name] = min(used, seconds.get(name, used))
            shutil.rmtree(folder)
    return {name: rows / used for name, used in seconds.items()}


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="*", help="numbers of rows of streams whose memory is measured")
    parser.add_argument("--figures", type=Path, help="JSON file for the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="streams-"))
    os.environ.update(HF_FORWARD_INF_CACHE=str(root / "cache"), ACCELERATE_USE_CPU="true")
    tokenizer = train_tokens()
    untrained("llama", len(tokenizer)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")

    table: dict[str, dict[str, float]] = {}
    for count in options.memory or []:
        folder = Path(tempfile.mkdtemp(dir=root))
        used, peak = in_processes(partial(streamed, root, count, 1, short=True), folder, 1)
        table[f"{count:,} rows"] = {"peak memory, MiB": round(peak), "rows a second": round(count / used)}
        print(count, table[f"{count:,} rows"], flush=True)
    for processes in options.processes if options.memory is None else []:
        for queries in options.queries:
            found = speeds(root, options.rows, queries, processes, options.repeats)
            title = f"{queries} quer{'y' if queries == 1 else 'ies'}, {processes} process{'es' * (processes > 1)}"
            table[title] = {name: round(rows) for name, rows in found.items()}
            table[title] |= {f"{name} / plain": found[name] / found["plain loop"] for name in list(JOBS)[1:]}
            print(title, table[title], flush=True)
    columns = list(next(iter(table.values())))
    print(text_table([["", *columns], *([name, *(f"{row[c]:.3g}" for c in columns)] for name, row in table.items())]))
    if options.figures is not None:
        note = f"Rows a second of processor time, {options.rows:,} rows, fastest of {options.repeats}."
        save_figures(
            options.figures, table, note=note if options.memory is None else "One query, rows of a few tokens."
        )
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
