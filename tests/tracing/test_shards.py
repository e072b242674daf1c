import json
import os
import signal
from functools import partial
from pathlib import Path

import dill
import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.tracing.shards import ShardedRun, load_scorer
from tests.helpers.causal import train_tokens, untrained
from tests.helpers.runs import start, wait_for

TEXTS = [{"text": f"The capital of land {i * 31 % 97} is town {i * 7 % 100}."} for i in range(70)]
QUERIES = Dataset.from_list(TEXTS[:3])
ASCENT = AscentConfig(direction="kfac", radius=1.0, sample=8)


@pytest.fixture
def run(tmp_path):
    """A model and three files of candidates, of which one is empty."""
    tokenizer = train_tokens()
    untrained("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = Dataset.from_list(TEXTS)
    files = [str(tmp_path / name) for name in ("a.parquet", "b.jsonl", "c.parquet", "d.parquet")]
    rows.select(range(30)).to_parquet(files[0])
    rows.select(range(30, 45)).to_json(files[1])
    rows.select([]).to_parquet(files[2])
    rows.select(range(45, 70)).to_parquet(files[3])
    load = partial(load_scorer, str(tmp_path / "model"), ASCENT)
    return ShardedRun(load, files, str(tmp_path / "run"), top_k=5, chunk_size=20)


def as_one_stream(run):
    """What a single process finds in all files, one after the other."""
    rows = concatenate_datasets([Dataset.from_list(TEXTS[a:b]) for a, b in ((0, 30), (30, 45), (45, 70))])
    tracer = run.load()
    tracer = ForwardInf(adapter=tracer.adapter, ascent=ASCENT, training=Dataset.from_list(TEXTS[:20]))
    return tracer.trace_stream(QUERIES, rows.to_iterable_dataset(), top_k=5, chunk_size=20)


def assert_same(found, expected):
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)
    np.testing.assert_array_equal(found.rows[found.indices], expected.rows[expected.indices])
    assert [found.top(i, 5)["text"][:] for i in range(3)] == [expected.top(i, 5)["text"][:] for i in range(3)]
    assert found.config["streamed"] == expected.config["streamed"] == 70


def test_the_best_of_all_files_are_those_of_one_stream(run):
    cost = run.start(QUERIES)
    # Rows of parquet are counted, those of JSON estimated by its size.
    assert cost.shards == 4 and 65 <= cost.rows <= 75 and cost.passes == 4
    assert "4 shards with" in str(cost) and cost.hours > 0 and cost.models > 0
    with pytest.raises(ValueError, match="4 of 4 shards are not finished"):
        run.merge()
    assert [run.trace(number) for number in (2, 0, 3)] == [0, 30, 25]
    assert run.missing() == [1]
    run.trace(1)
    assert_same(run.merge(), as_one_stream(run))
    assert run.start(QUERIES).models == cost.models  # started again, nothing is written
    with pytest.raises(ValueError, match="holds another run"):
        run.start(QUERIES.select([0]))


def test_a_machine_with_another_model_is_refused(run, tmp_path):
    run.start(QUERIES)
    untrained("qwen3", len(train_tokens())).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="This machine's model, or the version of a package, is not that"):
        run.trace(0)


LAUNCH = """
import sys
from functools import partial
from hf_forward_inf import AscentConfig
from hf_forward_inf.tracing.cluster import executor
from hf_forward_inf.tracing.shards import ShardedRun, load_scorer

if __name__ == "__main__":
    model, folder, *files = sys.argv[1:]
    ascent = AscentConfig(direction="kfac", radius=1.0, sample=8)
    run = ShardedRun(partial(load_scorer, model, ascent), files, folder, top_k=5, chunk_size=20)
    executor(run, workers=2).run()
"""


def test_two_workers_of_datatrove_are_killed_and_go_on(run, tmp_path):
    pytest.importorskip("datatrove")
    run.start(QUERIES)
    (tmp_path / "launch.py").write_text(LAUNCH)
    words = [tmp_path / "launch.py", tmp_path / "model", run.folder, *run.files]
    process = start(*words, cache=tmp_path / "cache")
    shards = Path(run.folder) / "shards"
    assert wait_for(lambda: list(shards.glob("*/*-rows")) or process.poll() is not None, 120), process.poll()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    begun = {path: path.stat().st_mtime_ns for path in shards.glob("*/finished.json")}

    process = start(*words, cache=tmp_path / "cache")
    _, said = process.communicate()
    assert process.returncode == 0, said[-2000:]
    assert {path: path.stat().st_mtime_ns for path in begun} == begun  # not traced again
    assert not list(Path(run.folder).rglob(".writing-*"))
    marks = Path(run.folder) / "logs" / "local" / "completions"
    assert len(list(marks.iterdir())) == 4
    assert_same(run.merge(), as_one_stream(run))
    assert json.loads((Path(run.folder) / "run.json").read_text())["files"] == run.files


def test_slurm_is_given_a_job_for_each_file_which_traces_it(run, tmp_path, monkeypatch):
    pytest.importorskip("datatrove")
    from hf_forward_inf.tracing.cluster import executor

    run.start(QUERIES)
    (tmp_path / "bin").mkdir()
    for program, answer in {"sbatch": "Submitted batch job 17", "scontrol": "node-1"}.items():
        (tmp_path / "bin" / program).write_text(f"#!/bin/sh\necho {answer}\n")
        (tmp_path / "bin" / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    options = {"partition": "gpu", "time": "01:00:00", "gpus_per_task": 1, "mem_per_cpu_gb": 16}
    executor(run, "slurm", workers=2, **options).run()
    logs = Path(run.folder) / "logs" / "slurm"
    lines = (logs / "launch_script.slurm").read_text().splitlines()
    for asked in ("partition=gpu", "time=01:00:00", "gpus=1", "mem-per-cpu=16G", "array=0-3%2"):
        assert f"#SBATCH --{asked}" in lines
    assert lines[-1].split()[-2:] == ["launch_pickled_pipeline", str(logs / "executor.pik")]

    before = signal.getsignal(signal.SIGUSR1)
    try:
        monkeypatch.setenv("SLURM_NODELIST", "node-1")
        for job in (1, 3):  # as `launch_pickled_pipeline` does in a job of SLURM's
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(job))
            dill.loads((logs / "executor.pik").read_bytes()).run()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert run.missing() == [0, 2]


def test_ray_is_given_a_task_for_each_file(run):
    pytest.importorskip("datatrove")
    from hf_forward_inf.tracing.cluster import executor

    made = executor(run, "ray", workers=3, gpus_per_task=1, mem_per_cpu_gb=16)
    assert (made.tasks, made.workers, made.gpus_per_task, made.mem_per_cpu_gb) == (4, 3, 1, 16)
    assert made.pipeline[0].sharded is run
