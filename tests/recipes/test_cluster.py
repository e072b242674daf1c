import json
from pathlib import Path

import numpy as np
import pytest

from hf_forward_inf import AscentConfig, Attribution, ForwardInf
from hf_forward_inf.tracing.shards import ShardedRun, load_scorer
from hf_forward_inf.utils.loading import load_model
from tests.helpers.causal import questions, train_tokens, untrained
from tests.helpers.recipes import recipe

GRADIENT = AscentConfig(direction="gradient", radius=1.0)


def test_a_cluster_run_prints_its_plan_and_merges_its_shards(tmp_path, capsys):
    pytest.importorskip("datatrove")
    cluster, tokenizer = recipe("cluster"), train_tokens()
    untrained("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = questions()
    for i in range(2):
        rows.shard(2, i).to_parquet(tmp_path / f"part-{i}.parquet")
    rows.select([1]).to_parquet(tmp_path / "queries.parquet")
    names = {"model": "model", "candidates": "part-*.parquet", "queries": "queries.parquet", "output": "out"}
    options = {**{option: str(tmp_path / name) for option, name in names.items()}, "top_k": 3}

    cluster.main(cluster.Options(**options, plan=True), GRADIENT)
    assert "2 shards with 5 rows, 2 forward passes over each" in capsys.readouterr().out
    assert not (tmp_path / "out" / "attribution").exists()

    cluster.main(cluster.Options(**options), GRADIENT)
    found = Attribution.load_from_disk(tmp_path / "out" / "attribution")
    expected = ForwardInf(*load_model(str(tmp_path / "model")), ascent=GRADIENT).trace(rows.select([1]), rows, top_k=3)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)
    assert found.top(0, 3)["completion"][:] == expected.top(0, 3)["completion"][:]
    assert json.loads(Path(tmp_path, "out", "metrics.json").read_text())["shards"] == 2


def test_slurm_needs_a_partition_and_a_time():
    pytest.importorskip("datatrove")
    with pytest.raises(ValueError, match="SLURM needs --partition and --time"):
        recipe("cluster").Options(executor="slurm")


def test_options_of_jobs_are_those_that_datatrove_has():
    pytest.importorskip("datatrove")
    cluster = recipe("cluster")
    named = {"slurm": {"partition": "gpu", "time": "12:00:00", "venv": "/home/me/venv/bin/activate"}, "ray": {}}
    for kind, options in named.items():
        asked = cluster.Options(executor=kind, gpus=2, memory=32, workers=3, **options)
        run = ShardedRun(load_scorer, ["a.parquet", "b.parquet"], "/nowhere")
        made = cluster.executor(run, kind, asked.workers, **asked.of_executor)
        assert (made.tasks, made.workers, made.gpus_per_task, made.mem_per_cpu_gb) == (2, 3, 2, 32)
    assert cluster.Options(executor="local", gpus=2).of_executor == {}
