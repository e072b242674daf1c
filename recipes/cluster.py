"""Candidates in many files, traced by many machines: which of a trillion tokens' rows made the model say this?

    python recipes/cluster.py --workers 2
    python recipes/cluster.py --model Qwen/Qwen3-0.6B --queries asks.parquet --candidates 'corpus/*.parquet' --plan
    python recipes/cluster.py --model Qwen/Qwen3-0.6B --queries asks.parquet --candidates 'corpus/*.parquet'
        --executor slurm --partition gpu --time 12:00:00 --gpus 1 --workers 64

The model is perturbed once for all queries. Each file is a shard: a task of datatrove's (`hf-forward-inf[cluster]`)
reads it, forwards its rows, and writes the best of each query; finished shards are skipped when the command is started
again. With no option, built-in facts in four files are traced with a tiny mT5 by processes of this machine. SLURM's
jobs run on when the command has ended: start it again, once they are done, to merge their results.
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from hf_forward_inf import AscentConfig
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.data import builtin_facts, load_rows
from hf_forward_inf.toys.tiny_models import tiny_mt5
from hf_forward_inf.tracing.cluster import executor
from hf_forward_inf.tracing.shards import ShardedRun, load_scorer
from hf_forward_inf.utils.options import RunOptions
from hf_forward_inf.utils.processes import say


@dataclass
class Options(RunOptions):
    """Which model, queries and files, and what runs them.

    Args:
        model (`str`, *optional*): Model: hub name or local folder that all machines can read.
        candidates (`str`, *optional*): Pattern of parquet, JSON-lines, CSV or webdataset files, each a shard.
        queries (`str`, *optional*): Outputs to explain: file or hub name.
        executor (`str`, defaults to `"local"`): Processes of this machine, or jobs of SLURM or Ray.
        workers (`int`, defaults to 1): Shards traced at once.
        partition (`str`, *optional*): SLURM's partition.
        time (`str`, *optional*): SLURM's limit for a shard, such as 12:00:00.
        gpus (`int`, defaults to 0): GPUs of a SLURM job or a Ray task.
        memory (`int`, defaults to 8): GB of memory of a SLURM job or a Ray task.
        venv (`str`, *optional*): What a SLURM job sources first, such as /home/me/venv/bin/activate.
        chunk_size (`int`, defaults to 2000): Rows traced at once, after which a shard's progress is saved.
        plan (`bool`, defaults to `False`): Print shards, passes, hours and disk, and stop.
    """

    output: str = "outputs/cluster"
    model: str | None = None
    candidates: str | None = None
    queries: str | None = None
    executor: Literal["local", "slurm", "ray"] = "local"
    workers: int = field(default=1, metadata={"min": 1})
    partition: str | None = None
    time: str | None = None
    gpus: int = field(default=0, metadata={"min": 0})
    memory: int = field(default=8, metadata={"min": 1})
    venv: str | None = None
    chunk_size: int = field(default=2000, metadata={"min": 1})
    plan: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("model", "candidates", "queries") if getattr(self, name) is not None]
        if given and len(given) < 3:
            raise ValueError(f"--{given[0]} is given: give --model, --candidates and --queries together.")
        if self.executor == "slurm" and (self.partition is None or self.time is None):
            raise ValueError("SLURM needs --partition and --time.")

    @property
    def of_executor(self) -> dict[str, Any]:
        """Options of the executor."""
        if self.executor == "local":
            return {}
        options: dict[str, Any] = {"gpus_per_task": self.gpus, "mem_per_cpu_gb": self.memory}
        if self.executor == "slurm":
            options |= {"partition": self.partition, "time": self.time, "venv_path": self.venv}
        return options


def load(options: Options, folder: Path) -> tuple[str, list[str], Dataset]:
    """Return the model's name, the files of candidates, and the queries; by default built-in facts in four files."""
    if options.model is not None and options.candidates is not None and options.queries is not None:
        files = sorted(glob(options.candidates))
        if not files:
            raise FileNotFoundError(f"There is no file {options.candidates}.")
        return options.model, files, load_rows(options.queries, "queries")
    corpus, files = builtin_facts(), [str(folder / f"facts-{i}.parquet") for i in range(4)]
    for part in [*tiny_mt5(corpus["abstracts"])] if not (folder / "model").exists() else []:
        part.save_pretrained(folder / "model")
    for i, file in enumerate(files):
        corpus["abstracts"].shard(4, i).to_parquet(file)
    return str(folder / "model"), files, corpus["queries"].select(range(0, 200, 10))


def main(options: Options, ascent: AscentConfig) -> dict[str, Any]:
    """Perturb the model for all queries, print what that costs, run all shards, and merge their best."""
    run = Run(options)
    model, files, queries = load(options, run.folder)
    folder = str(run.folder.absolute() / "shards")
    sharded = ShardedRun(
        partial(load_scorer, model, ascent), files, folder, top_k=options.top_k, chunk_size=options.chunk_size
    )
    cost = sharded.start(queries)
    say(str(cost))
    if options.plan:
        return vars(cost)

    if sharded.missing():
        executor(sharded, options.executor, options.workers, **options.of_executor).run()
    if missing := sharded.missing():
        say(f"{len(missing)} of {len(files)} shards are under way: start this command again when they are done.")
        return vars(cost)
    found = sharded.merge()
    column = found.candidates.column_names[0]
    for row in found.top(0, 3):
        say(f"{row['score']:10.3g}  {row[column]}")
    metrics = {"queries": len(found), "candidates": found.config["streamed"], "shards": len(files)}
    return run.write(found, {**metrics, "unscored": found.config["unscored"]})


if __name__ == "__main__":
    sys.exit(run_command(main, Options, AscentConfig, extra="cluster"))
