import json
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import TensorAdapter
from hf_forward_inf.loss_pass import LossPass
from tests import digits
from tests.causal import questions, train_tokens, untrained
from tests.line import assert_same_state, state

pytest.importorskip("peft")

RELOAD = """
import json, sys
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from hf_forward_inf.adapters import adapter_for
from hf_forward_inf.loss_pass import LossPass

base, folder, rows, kind = sys.argv[1:]
auto = AutoModelForCausalLM if kind == "causal" else AutoModelForSeq2SeqLM
model = PeftModel.from_pretrained(auto.from_pretrained(base), folder).eval()
adapter = adapter_for(model, AutoTokenizer.from_pretrained(base))
print(json.dumps(LossPass(adapter, Dataset.from_list(json.loads(rows))).base().tolist()))
"""


@pytest.fixture(scope="module")
def rows():
    return questions()


def saved(network, tokens, folder):
    """As it comes from a hub: with a name that the adapter's configuration can hold."""
    network.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return type(network).from_pretrained(folder).eval()


def losses_in_a_fresh_process(base, folder, rows, kind):
    command = [sys.executable, "-c", RELOAD, str(base), str(folder), json.dumps(rows.to_list()), kind]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return np.array(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_a_saved_perturbation_gives_the_same_losses_in_a_fresh_process(layout, rows, tmp_path):
    tokens = train_tokens()
    network = saved(untrained(layout, len(tokens)), tokens, tmp_path / "base")
    before = state(network)
    tracer = ForwardInf(network, tokens, ascent=AscentConfig(lora_rank=64))
    scores = tracer.trace(rows.select([0]), rows).scores[0]
    assert tracer.save_perturbation(rows[0], tmp_path / "moved") < 1e-6
    assert_same_state(before, state(network))
    expected = LossPass(tracer.adapter, rows).base() + scores
    given = losses_in_a_fresh_process(tmp_path / "base", tmp_path / "moved", rows, "causal")
    np.testing.assert_allclose(given, expected, atol=1e-4)
    card = (tmp_path / "moved" / "README.md").read_text()
    assert "capital of France" in card
    assert json.dumps(str(tmp_path / "base")) in card


def test_so_does_that_of_a_seq2seq_model(model, tokenizer, queries, candidates, tmp_path):
    network = saved(model, tokenizer, tmp_path / "base")
    tracer = ForwardInf(network, tokenizer, ascent=AscentConfig(lora_rank=64))
    scores = tracer.trace(queries.select([0]), candidates).scores[0]
    tracer.save_perturbation(queries[0], tmp_path / "moved")
    rows = candidates.select_columns(["inputs_pretokenized", "targets_pretokenized"])
    given = losses_in_a_fresh_process(tmp_path / "base", tmp_path / "moved", rows, "seq2seq")
    np.testing.assert_allclose(given, LossPass(tracer.adapter, candidates).base() + scores, atol=1e-4)


def test_what_a_rank_cannot_hold_is_told(rows, tmp_path):
    tokens = train_tokens()
    network = untrained("llama", len(tokens))
    tracer = ForwardInf(network, tokens, ascent=AscentConfig(lora_rank=64))
    assert 0 < tracer.save_perturbation(rows[0], tmp_path / "thin", rank=1) < 1
    assert json.loads((tmp_path / "thin" / "adapter_config.json").read_text())["r"] == 1


def test_what_lora_cannot_hold_is_refused_by_name(rows, tmp_path):
    tokens = train_tokens()
    network = untrained("llama", len(tokens))
    tracer = ForwardInf(network, tokens, ascent=AscentConfig(modules=["model.norm"]))
    with pytest.raises(ValueError, match=r"can't hold the change of model\.norm\.weight.*lora_rank=64"):
        tracer.save_perturbation(rows[0], tmp_path / "moved")
    with pytest.raises(ValueError, match="direction='cg' needs the training data"):
        cg = AscentConfig(direction="cg", modules=["model.layers.1.mlp"])
        tracer.with_options(ascent=cg).save_perturbation(rows[0], tmp_path / "moved")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        tracer.save_perturbation(rows[0], tmp_path / "full")


def test_only_language_models_have_one(tmp_path):
    network = digits.perceptron()
    row = Dataset.from_dict({"x": [[0.0] * 64], "label": [1]})[0]
    with pytest.raises(TypeError, match="not those of TensorAdapter"):
        ForwardInf(adapter=TensorAdapter(network)).save_perturbation(row, tmp_path / "moved")
