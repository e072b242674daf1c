import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.utils.models import linear_layers
from tests.helpers.causal import questions, train_tokens, untrained
from tests.helpers.line import assert_same_state, state


def linear(network, **options):
    """Steps of the linear layers alone, without the output layer."""
    names = [name for name in linear_layers(network) if "block.1" in name or "layers.1" in name or ".h.1" in name]
    return AscentConfig(**{"direction": "gradient", "modules": names, **options})


FRESH = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

losses = []
for folder in sys.argv[1:]:
    kind = AutoModelForSeq2SeqLM if "mt5" in folder else AutoModelForCausalLM
    model = PeftModel.from_pretrained(kind.from_pretrained(folder), f"{folder}-moved").eval()
    rows = json.load(open(f"{folder}.json"))
    with torch.no_grad():
        losses.append([model(**{k: torch.tensor([v]) for k, v in row.items()}).loss.item() for row in rows])
print(json.dumps(losses))
"""


@pytest.fixture(scope="module")
def tokens():
    return train_tokens()


@pytest.fixture(scope="module")
def rows():
    return questions()


def losses_of(tracer, rows, query):
    """Mean losses of rows under the perturbed model, by way of scores."""
    loss = LossPass(tracer.adapter, rows)
    return (loss.base() + tracer.trace(query, rows).scores[0]) / loss.terms


def test_a_fresh_process_loads_it_by_peft_and_has_the_same_losses(
    model, tokenizer, tokens, rows, queries, candidates, tmp_path
):
    expected, folders = [], []
    for name in ("llama", "gpt2", "qwen2, tied", "mt5"):
        network, processor = (model, tokenizer) if name == "mt5" else (untrained(name, len(tokens)), tokens)
        asked, among = (
            (queries.select([0]), candidates.select(range(5))) if name == "mt5" else (rows.select([0]), rows)
        )
        tracer = ForwardInf(network, processor, ascent=AscentConfig(direction="gradient", steps=2, modules=["all"]))
        folder = tmp_path / name
        network.save_pretrained(folder)
        before = state(network)
        assert tracer.save_perturbation(asked[0], tmp_path / f"{name}-moved") < 1e-9
        assert_same_state(before, state(network))
        expected.append(losses_of(tracer, among, asked))
        encoded = tracer.adapter.encode(among[:])
        batches = [tracer.adapter.collate({k: [v[i]] for k, v in encoded.items()}) for i in range(len(among))]
        (tmp_path / f"{name}.json").write_text(json.dumps([{k: v[0].tolist() for k, v in b.items()} for b in batches]))
        folders.append(str(folder))
    done = subprocess.run([sys.executable, "-c", FRESH, *folders], capture_output=True, text=True, check=True)
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), np.stack(expected), atol=1e-4)


def test_a_change_beyond_the_rank_is_truncated_and_the_share_lost_returned(tokens, rows, tmp_path):
    network = untrained("llama", len(tokens))
    names = [name for name in linear_layers(network) if "proj" in name]
    tracer = ForwardInf(
        network, tokens, training=rows, ascent=AscentConfig(modules=names, direction="cg", iterations=3)
    )
    assert tracer.save_perturbation(rows[0], tmp_path / "whole", rank=99) < 1e-9
    lost = tracer.save_perturbation(rows[0], tmp_path / "cut", rank=1)
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    layers = {name.rpartition(".lora_")[0] for name in whole}
    changes = [[f[f"{name}.lora_B.weight"] @ f[f"{name}.lora_A.weight"] for f in (whole, cut)] for name in layers]
    missed = sum((a - b).square().sum() for a, b in changes) / sum(a.square().sum() for a, _ in changes)
    assert lost == pytest.approx(missed.item(), rel=1e-3)
    assert json.loads((tmp_path / "cut" / "adapter_config.json").read_text())["r"] == 1


def test_of_a_peft_model_its_own_adapter_is_saved_perturbed(tokens, rows, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = get_peft_model(untrained("llama", len(tokens)), config).eval()
    tracer = ForwardInf(tuned, tokens, falls=1, training=rows)
    expected = losses_of(tracer, rows, rows.select([1]))
    before = state(tuned)
    tracer.save_perturbation(rows[1], tmp_path / "moved")
    assert_same_state(before, state(tuned))
    again = PeftModel.from_pretrained(untrained("llama", len(tokens)), str(tmp_path / "moved")).eval()
    loss = LossPass(tracer.adapter.with_model(again), rows)
    np.testing.assert_allclose(loss.base() / loss.terms, expected, atol=1e-4)
    with pytest.raises(ValueError, match="has LoRA weights of its own"):
        tracer.with_options(ascent=AscentConfig(modules=["*base_layer.weight"])).save_perturbation(
            rows[1], tmp_path / "other"
        )


def test_its_card_says_what_it_is(tokens, rows, tmp_path):
    network = untrained("llama", len(tokens))
    tracer = ForwardInf(network, tokens, ascent=linear(network))
    tracer.save_perturbation({"text": "# A\n```\nMarkdown", "other": 1}, tmp_path / "moved")
    card = (tmp_path / "moved" / "README.md").read_text()
    assert "library_name: peft" in card
    assert '    {"text": "# A\\n```\\nMarkdown"}' in card
    assert '"radius": 1.0' in card
    with pytest.raises(FileExistsError, match="is not empty"):
        tracer.save_perturbation(rows[0], tmp_path / "moved")


@pytest.mark.parametrize(
    ("ascent", "message"),
    [
        (AscentConfig(modules=["*proj.weight"], direction="cg"), "direction='cg' needs the training data"),
    ],
)
def test_what_lora_cannot_represent_is_refused_before_computing(ascent, message, tokens, rows, tmp_path):
    tracer = ForwardInf(untrained("llama", len(tokens)), tokens, ascent=ascent)
    with pytest.raises(ValueError, match=message):
        tracer.save_perturbation(rows[0], tmp_path / "moved")
    assert not (tmp_path / "moved").exists()


def test_other_models_perturbations_are_not_saved(line, tmp_path):
    with pytest.raises(
        TypeError, match="Only perturbations of language models can be saved, not those of LineAdapter"
    ):
        ForwardInf(adapter=line).save_perturbation({"x": [1.0, 1.0], "y": 3.0}, tmp_path / "moved")


def test_a_query_that_moves_nothing_is_refused(tokens, tmp_path, rows):
    network = untrained("llama", len(tokens))
    with torch.no_grad():
        network.lm_head.weight.zero_()  # all tokens equally likely, whatever the layers before give
    tracer = ForwardInf(network, tokens, ascent=linear(network))
    with pytest.raises(ValueError, match="no perturbation to save"):
        tracer.save_perturbation(rows[0], tmp_path / "moved")
