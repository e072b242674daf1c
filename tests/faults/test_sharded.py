"""Models that accelerate has prepared for several processes: sharded by FSDP2, replicated, in mixed precision."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.utils.models import uncompiled
from tests.helpers.causal import train_tokens, untrained
from tests.helpers.runs import start

ROWS = Dataset.from_list([{"text": f"The capital of land {i} is town {i * 7 % 100}."} for i in range(25)])
LAYERS = ["model.layers.*.mlp.*_proj", "model.layers.*.self_attn.*_proj"]
ASCENT = AscentConfig(direction="gradient", step="low_rank", radius=1.0, modules=LAYERS)
KFAC = AscentConfig(direction="kfac", radius=1.0, sample=12, modules=LAYERS)
CODE = """
import sys
import numpy as np
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.utils.processes import process_state
from tests.faults.test_sharded import ASCENT, KFAC, ROWS
from tests.helpers.causal import train_tokens, untrained

folder = sys.argv[1]
tokenizer, state = train_tokens(), process_state()

def scores(model, name, ascent=ASCENT):
    tracer = ForwardInf(model, tokenizer, ascent=ascent, max_batch_length=300)
    found = tracer.trace(ROWS.select([1, 5]), ROWS).scores
    again = tracer.trace(ROWS.select([1, 5]), ROWS).scores
    assert (found == again).all()
    if state.is_main_process:
        np.save(f"{folder}/{name}.npy", found)

model, mesh = untrained("llama", len(tokenizer)), init_device_mesh("cpu", (2,))
for layer in model.model.layers:  # as accelerate does with fsdp_version=2
    fully_shard(layer, mesh=mesh)
scores(fully_shard(model, mesh=mesh), "sharded")
scores(model, "kfac", KFAC)
tracer = ForwardInf(model, tokenizer, ascent=KFAC, training=ROWS, strategy="screen", keep=5, audit=0)
found = tracer.trace_stream(ROWS.select([1, 5]), ROWS.to_iterable_dataset(), top_k=25, chunk_size=9)
if state.is_main_process:
    np.save(f"{folder}/stream.npy", found.dense())
for other in (tracer, ForwardInf(model, tokenizer, ascent=AscentConfig(direction="ekfac"))):
    try:
        other.trace(ROWS.select([1]), ROWS)
    except ValueError as error:
        assert "sharded" in str(error)
    else:
        raise AssertionError("what processes would not do together")
scores(Accelerator(cpu=True, mixed_precision="bf16").prepare(untrained("llama", len(tokenizer))), "mixed")
"""


def test_two_processes_with_shards_of_a_model_give_the_scores_of_one(tmp_path):
    (tmp_path / "sharded.py").write_text(CODE)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = start(*launch, tmp_path / "sharded.py", tmp_path, cache=tmp_path / "cache")
    _, said = process.communicate()
    assert process.returncode == 0, said[-2000:]
    tokenizer = train_tokens()
    tracer = ForwardInf(untrained("llama", len(tokenizer)), tokenizer, ascent=ASCENT, max_batch_length=300)
    for name, ascent in {"sharded": ASCENT, "kfac": KFAC, "stream": KFAC}.items():
        expected = tracer.with_options(ascent=ascent).trace(ROWS.select([1, 5]), ROWS).scores
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), expected, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = tracer.trace(ROWS.select([1, 5]), ROWS).scores
    np.testing.assert_allclose(np.load(tmp_path / "mixed.npy"), half, atol=0.02 * np.abs(half).max())


def test_what_deepspeed_and_the_first_fsdp_make_of_a_model_is_refused():
    engine = type("DeepSpeedEngine", (nn.Linear,), {})(2, 2)
    partitioned = nn.Linear(2, 2)
    partitioned.weight.ds_id = 0
    for model in (engine, partitioned):
        with pytest.raises(TypeError, match="DeepSpeed's engine and its partitioned parameters can't be traced"):
            uncompiled(model)
    with pytest.raises(TypeError, match="FSDP1 flattens parameters"):
        uncompiled(type("FullyShardedDataParallel", (nn.Linear,), {})(2, 2))
