"""What once gave stale results: another key, or rows that are compared, so that nothing stored before is used."""

import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from hf_forward_inf.adapters import CausalLMAdapter, TensorAdapter
from hf_forward_inf.baselines import TrackStar
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.utils import fingerprints
from hf_forward_inf.utils.fingerprints import fingerprint_of_model
from tests.helpers import digits
from tests.helpers.causal import train_tokens, untrained
from tests.helpers.line import points


def network(*, activations=(nn.ReLU, nn.Tanh), **options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=options.get("stride", 1), padding=options.get("padding", 0)), activations[0](),
        nn.BatchNorm2d(2, eps=options.get("eps", 1e-5)), activations[1](), nn.Flatten(),
    )  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"stride": 2},
        {"padding": 1},
        {"eps": 1e-3},
        {"activations": (nn.Tanh, nn.ReLU)},
        {"activations": (nn.GELU, nn.Tanh)},
    ],
)
def test_layers_that_compute_something_else_with_the_same_weights_have_another_key(changed):
    assert fingerprint_of_model(network()) == fingerprint_of_model(network())
    assert fingerprint_of_model(network(**changed)) != fingerprint_of_model(network())


def test_another_implementation_of_attention_has_another_key():
    model = untrained("llama", 100)
    before = fingerprint_of_model(model)
    model.set_attn_implementation("eager")
    assert fingerprint_of_model(model) != before


@pytest.mark.parametrize("package", ["hf_forward_inf", "torch", "transformers"])
def test_another_version_of_what_computes_has_another_key(package, monkeypatch):
    before = fingerprint_of_model(digits.perceptron())
    own = fingerprints._version
    monkeypatch.setattr(fingerprints, "_version", lambda name: "99" if name == package else own(name))
    assert fingerprint_of_model(digits.perceptron()) != before


def test_another_end_token_has_another_key():
    tokenizer = train_tokens()
    model = untrained("llama", len(tokenizer))
    before = CausalLMAdapter(model, tokenizer).cache_key
    tokenizer.eos_token = "<|user|>"
    assert CausalLMAdapter(model, tokenizer).cache_key != before


def test_a_transform_that_was_edited_in_an_imported_module_has_another_key(tmp_path, monkeypatch):
    file = tmp_path / "own_transforms.py"
    monkeypatch.syspath_prepend(tmp_path)

    def key(code):
        file.write_text(f"def scaled(image):\n    return {code}\n")
        sys.modules.pop("own_transforms", None)
        from own_transforms import scaled

        return TensorAdapter(digits.perceptron(), transform=scaled).cache_key

    assert key("image / 2") != key("image / 300")


def test_other_rows_under_the_fingerprint_of_a_dataset_are_noticed(line):
    rows, others = (points(*(((i, 1), y * i) for i in range(20))) for y in (0.5, 2.0))
    before = LossPass(line, rows).base()
    others._fingerprint = rows._fingerprint
    again = type(line)(line.model)
    with pytest.warns(UserWarning, match="all rows are encoded again"):
        after = LossPass(again, others).base()
    expected = [(line.model(torch.tensor(row["x"])).item() - row["y"]) ** 2 for row in others]
    np.testing.assert_allclose(after, expected, rtol=1e-5)
    assert not np.allclose(after, before)


def test_longer_rows_under_the_fingerprint_of_a_dataset_are_noticed():
    tokenizer = train_tokens()
    rows, others = (Dataset.from_list([{"text": f"{word} {i}."} for i in range(6)]) for word in ("Land", "A far land"))
    others._fingerprint = rows._fingerprint
    model = untrained("llama", len(tokenizer))
    LossPass(CausalLMAdapter(model, tokenizer), rows).base()
    with pytest.warns(UserWarning, match="all rows are encoded again"):
        found = LossPass(CausalLMAdapter(model, tokenizer), others)
    tokens = [len(tokenizer(row["text"])["input_ids"]) + 1 for row in others]  # and the end
    assert list(found.lengths[:, 0]) == sorted(tokens, reverse=True)


def test_an_optimizers_other_values_of_the_same_sums_give_other_scores(tmp_path):
    tokenizer = train_tokens()
    model = untrained("llama", len(tokenizer))
    rows = Dataset.from_list([{"text": f"The capital of land {i} is town {i * 7 % 10}."} for i in range(8)])
    optimizer = torch.optim.AdamW(dict(model.named_parameters()).items(), lr=0.0)
    model(input_ids=torch.arange(9)[None]).logits.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    found = []
    for turned in (False, True):
        state = optimizer.state_dict()
        for one in state["state"].values():
            one["exp_avg_sq"] = one["exp_avg_sq"].flip(0) if turned else one["exp_avg_sq"]
        torch.save(state, tmp_path / "optimizer.pt")
        found.append(TrackStar(model, tokenizer, second_moments=tmp_path).trace(rows.select([1]), rows).scores)
    assert not np.allclose(*found)
