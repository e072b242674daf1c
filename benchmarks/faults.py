"""Kills, interrupts, full disks and bad inputs, tried at random on real processes: what is lost, which bits differ.

    python benchmarks/faults.py
    python benchmarks/faults.py --kills 10 --bad 40 --seed 1 --figures faults.json

Every run is a process of its own, forked after the imports, on a tiny Llama. What is killed is started again on what
it has left, until it finishes: its scores must be those of an undisturbed run, bit for bit, and nothing may stay
behind. With `--figures`, counts are added to those of earlier runs in that file.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import RLock

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm

from hf_forward_inf import AscentConfig, Attribution, ForwardInf
from hf_forward_inf.cli import main as command
from hf_forward_inf.evaluation.figures import save_figures
from hf_forward_inf.passes import candidate_pass, row_store
from hf_forward_inf.tracing.shards import ShardedRun, load_scorer
from hf_forward_inf.utils.interruptions import interruptible
from hf_forward_inf.utils.loading import load_model
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.text_tables import text_table
from tests.helpers.causal import train_tokens, untrained

TEXTS = [{"text": f"The capital of land {i * 31 % 97} is town {i * 7 % 100}."} for i in range(300)]
QUERIES = Dataset.from_list(TEXTS[:4])
ASCENT = AscentConfig(direction="kfac", radius=1.0, sample=8)
SLOW = 0.01
"""Seconds before each batch, so that most kills hit a pass."""
PATIENCE, GRACE = 3600, 60
"""Seconds after which an undisturbed run, and a process whose neighbour was killed, count as stuck, however busy the
machine is."""
MET = "met"
"""Empty file: the processes of a run have met. Before that, torch itself waits for a missing one, for minutes."""
COLUMNS = ("tried", "finished", "lost", "bits that differ", "left behind")
"""Counts: tried; runs that finished undisturbed; without a result, without an end, or without a message that says
why; bits of the scores that differ from an undisturbed run's; temporary files."""
Task = Callable[[Path], None]
"""Computes `scores.npy` in a folder, going on with what is there."""


def trace(model: str, folder: Path) -> None:
    """Trace, and put the outputs in place."""
    tracer = ForwardInf(*load_model(model), ascent=ASCENT, cache_dir=folder / "cache")
    found = tracer.trace(QUERIES, Dataset.from_list(TEXTS))
    found.save_to_disk(folder / "attribution")
    store(Attribution.load_from_disk(folder / "attribution").scores, folder)


def stream(model: str, folder: Path) -> None:
    """Trace a stream, whose progress is in a folder."""
    tracer = ForwardInf(*load_model(model), ascent=ASCENT, cache_dir=folder / "cache")
    rows = Dataset.from_list(TEXTS).to_iterable_dataset(num_shards=3)
    store(tracer.trace_stream(QUERIES, rows, top_k=9, chunk_size=60, folder=folder / "best").scores, folder)


def shards(model: str, folder: Path) -> None:
    """Start a run over files, trace all that are not finished, and merge."""
    files = [str(folder.parent / f"part-{i}.parquet") for i in range(3)]
    run = ShardedRun(partial(load_scorer, model, ASCENT), files, str(folder / "run"), top_k=9, chunk_size=60)
    run.start(QUERIES)
    for number in run.missing():
        run.trace(number)
    store(run.merge().scores, folder)


TASKS = {
    "trace": (trace, 1),
    "trace, 2 processes": (trace, 2),
    "stream": (stream, 1),
    "stream, 2 processes": (stream, 2),
    "shards": (shards, 1),
}
"""What is killed, and in how many processes."""


def store(scores: np.ndarray, folder: Path) -> None:
    """Write the scores of a finished task at once."""
    if int(os.environ.get("RANK", 0)) == 0:
        np.save(folder / "part.npy", scores)
        os.replace(folder / "part.npy", folder / "scores.npy")


def fork(run: Callable[[], object], **environment: str) -> int:
    """Start a function in a process of its own, and return the process."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment)
    null = os.open(os.environ.get("FAULTS_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(null, 1), os.dup2(null, 2)
    tqdm.set_lock(RLock())  # not one that a killed sibling may hold forever
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with interruptible():
            run()
        os._exit(0)
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:
        print(type(error).__name__, error, flush=True)
        os._exit(1)


def processes(task: Task, folder: Path, count: int) -> list[int]:
    """Start a task in one process, or in several that share the work."""
    if count == 1:
        return [fork(lambda: task(folder))]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    shared["LOCAL_WORLD_SIZE"] = str(count)
    (folder / MET).unlink(missing_ok=True)

    def meet() -> None:
        process_state()
        (folder / MET).touch()
        task(folder)

    return [fork(meet, **shared, RANK=str(i), LOCAL_RANK=str(i)) for i in range(count)]


def wait(children: list[int], seconds: float) -> list[int]:
    """Wait for processes for some time, and return those that have not ended."""
    until = time.monotonic() + seconds
    left = list(children)
    while left and time.monotonic() < until:
        left = [child for child in left if os.waitpid(child, os.WNOHANG) == (0, 0)]
        time.sleep(0.002)
    return left


def end(children: list[int], number: int) -> None:
    """Send a signal to processes, and after a while SIGKILL."""
    for child in children:
        os.kill(child, number)
    for child in wait(children, 10):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def tried(task: Task, folder: Path, expected: np.ndarray, count: int, numbers: Sequence[int], kills: int) -> list[int]:
    """Kill a task again and again at random times, until so many kills hit it; return a row of the table."""
    lost = bits = runs = hits = 0
    log = folder.with_suffix(".log")
    os.environ["FAULTS_LOG"] = str(log)
    longest = 0.0
    folder.mkdir()
    while hits < kills:
        started = time.monotonic()
        children = processes(task, folder, count)
        left = wait(children, random.uniform(0, max(longest, 1.0)) if runs % 4 else PATIENCE)
        if left:
            victim = random.choice(left)
            end([victim], random.choice(numbers))
            stuck = wait([child for child in left if child != victim], GRACE)  # the others notice
            end(stuck, signal.SIGKILL)
            if stuck and (folder / MET).exists():
                lost += 1
                print(f"{len(stuck)} processes did not notice that another was killed", flush=True)
            hits += 1
        else:
            longest = max(longest, time.monotonic() - started)
        runs += 1
        if (folder / "scores.npy").exists():
            bits += int((np.load(folder / "scores.npy").view(np.uint32) != expected.view(np.uint32)).sum())
            shutil.rmtree(folder)
            folder.mkdir()
        elif not left:
            lost += 1
            print(f"ended by itself without a result: {log.read_text()[-300:]}", flush=True)
    end(wait(processes(task, folder, count), PATIENCE), signal.SIGKILL)
    lost += not (folder / "scores.npy").exists()
    left_behind = len([*folder.rglob(".writing-*"), *folder.rglob(".complete")])
    del os.environ["FAULTS_LOG"]
    return [hits, runs - hits, lost, bits, left_behind]


def full_disk(task: Task, root: Path, expected: np.ndarray, sizes: list[int]) -> list[int]:
    """Let no file grow beyond a size, for several sizes; then run without a limit on what is left."""
    bits = unnamed = left_behind = failed = 0
    for size in sizes:
        folder, log = root / f"disk-{size}", root / f"disk-{size}.log"
        folder.mkdir()

        def limited(folder: Path = folder, size: int = size) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            task(folder)

        end(wait([fork(limited, FAULTS_LOG=str(log))], PATIENCE), signal.SIGKILL)
        if not (folder / "scores.npy").exists():
            failed += 1
            unnamed += "There is no room for" not in log.read_text()
        left_behind += len(list(folder.rglob(".writing-*")))
        end(wait([fork(lambda folder=folder: task(folder))], PATIENCE), signal.SIGKILL)  # type: ignore[misc]
        bits += int((np.load(folder / "scores.npy").view(np.uint32) != expected.view(np.uint32)).sum())
    return [len(sizes), len(sizes) - failed, unnamed, bits, left_behind]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Damage a file: cut it off, change or remove bytes, repeat a part."""
    at = draw.randrange(1, len(data))
    kind = draw.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes(draw.randrange(256) for _ in range(3)) + data[at + 3 :]
    if kind == 2:
        return data[:at] + data[at + draw.randrange(1, 40) :]
    if kind == 3:
        return data + data[at:]
    return draw.choice([b"", b"\n", b"{}", b"[]", b"null\n", b"\xff\xfe", b'{"text": 3}\n', b'{"text": ["a"]}\n'])


def bad_inputs(model: str, root: Path, count: int, seed: int) -> list[int]:
    """Run the command on damaged files: it succeeds, or says in one line what is wrong."""
    draw, said = random.Random(seed), {"finished": 0, "refused": 0, "other": 0}
    good = "".join(json.dumps(row) + "\n" for row in TEXTS[:30]).encode()
    Dataset.from_list(TEXTS[:30]).to_parquet(root / "good.parquet")
    sources = {"rows.jsonl": good, "rows.parquet": (root / "good.parquet").read_bytes()}
    (root / "queries.jsonl").write_bytes(good[:200].rpartition(b"\n")[0])
    for case in range(count):
        name = draw.choice(list(sources))
        folder, log = root / f"bad-{case}", root / f"bad-{case}.log"
        folder.mkdir()
        (folder / name).write_bytes(mutated(sources[name], draw))
        words = [
            "trace",
            "--model",
            model,
            "--candidates",
            str(folder / name),
            "--no_baselines",
            "--direction",
            "gradient",
        ]
        words += ["--queries", str(root / "queries.jsonl"), "--output", str(folder / "out")]
        child = fork(lambda words=words: os._exit(command(words)), FAULTS_LOG=str(log))  # type: ignore[misc]
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lines = log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        kind = "finished" if status == 0 else "refused" if status == 1 and len(errors) == 1 else "other"
        said[kind] += 1
        if kind == "other":
            print(f"bad input {case} ({name}): status {status}: {' | '.join(lines[-3:])[-300:]}", flush=True)
    return [count, said["finished"], said["other"], 0, len(list(root.glob("bad-*/**/.writing-*")))]


def main() -> None:
    """Try everything, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="of each kind")
    parser.add_argument("--bad", type=int, default=150, help="damaged files")
    parser.add_argument("--only", nargs="+", default=[*TASKS, "damaged files"], help="what to try")
    parser.add_argument("--sizes", type=int, default=20, help="sizes of a full disk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figures", type=Path, help="JSON to which counts are added")
    options = parser.parse_args()
    random.seed(options.seed)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["HF_FORWARD_INF_CACHE"] = str(root / "cache")
    os.environ["HF_FORWARD_INF_TIMEOUT"] = "20"  # a busy machine leaves a process without time for seconds
    row_store.SECONDS = 0.05
    batches, values = candidate_pass.batches, candidate_pass.CandidatePass.values
    candidate_pass.batches = lambda lengths, max_batch_length: batches(lengths, min(max_batch_length, 400))
    candidate_pass.CandidatePass.values = lambda *own: time.sleep(SLOW) or values(*own)  # type: ignore

    tokenizer, model = train_tokens(), str(root / "model")
    untrained("llama", len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    for i in range(3):
        Dataset.from_list(TEXTS).shard(3, i, contiguous=True).to_parquet(root / f"part-{i}.parquet")

    started = time.monotonic()
    rows: dict[str, dict[str, int]] = {}

    def add(name: str, counts: list[int]) -> None:
        """Add counts to those of the table, and to the file's."""
        rows[name] = dict(zip(COLUMNS, counts, strict=True))
        print(name, counts, f"{time.monotonic() - started:.0f} s", flush=True)
        if options.figures is not None:
            add_to(options.figures, name, rows[name])

    if "damaged files" in options.only:
        add("damaged files", bad_inputs(model, root, options.bad, options.seed))
    for name, (function, count) in TASKS.items():
        if name not in options.only:
            continue
        task = partial(function, model)
        (root / f"{name} alone").mkdir()
        end(wait(processes(task, root / f"{name} alone", 1), PATIENCE), signal.SIGKILL)
        expected = np.load(root / f"{name} alone" / "scores.npy")
        for how, numbers in {"SIGKILL": [signal.SIGKILL], "SIGINT, SIGTERM": [signal.SIGINT, signal.SIGTERM]}.items():
            if count == 2 and how != "SIGKILL":
                continue
            kills = options.kills if how == "SIGKILL" else options.kills // 2
            add(f"{name}: {how}", tried(task, root / f"{name} {how}", expected, count, numbers, kills))
        if name == "trace" and options.sizes:
            sizes = [2**k + odd for k in range(11, 21) for odd in (0, 2 ** (k - 1))][: options.sizes]
            add(f"{name}: full disk", full_disk(task, root, expected, sizes))
    print(text_table([["", *COLUMNS], *([name, *map(str, counts.values())] for name, counts in rows.items())]))
    shutil.rmtree(root)


def add_to(file: Path, name: str, counts: dict[str, int]) -> None:
    """Add counts to those of earlier runs in a file of figures."""
    figures = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    before = figures["rows"].get(name, dict.fromkeys(counts, 0))
    figures["rows"][name] = {column: before[column] + number for column, number in counts.items()}
    save_figures(file, figures["rows"])


if __name__ == "__main__":
    main()
