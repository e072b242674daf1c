import copy

import numpy as np
import pytest
import torch
from torch import nn

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import TensorAdapter
from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model, foreign_hooks
from tests.helpers import digits
from tests.helpers.drawing import stable_diffusion


def test_equal_values_have_equal_names_whatever_objects_they_are():
    one = "an equal text"
    assert fingerprint([one, one]) == fingerprint(["an equal text", "".join(["an equal", " text"])])


def test_a_change_in_one_weight_changes_the_models_name(model):
    before = fingerprint_of_model(model)
    assert fingerprint_of_model(copy.deepcopy(model)) == before
    with torch.no_grad():
        model.decoder.final_layer_norm.weight[0] += 1e-6
    assert fingerprint_of_model(model) != before
    assert fingerprint_of_model(copy.deepcopy(model).bfloat16()) != before


def test_a_change_in_one_weight_of_a_denoiser_changes_its_name():
    unet = stable_diffusion().unet
    before = fingerprint_of_model(unet)
    assert fingerprint_of_model(stable_diffusion().unet) == before
    with torch.no_grad():
        unet.conv_out.bias[0] += 1e-6
    assert fingerprint_of_model(unet) != before


def test_what_diffusers_notes_in_a_configuration_in_any_order_changes_no_name():
    one, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    other.load_state_dict(one.state_dict())
    one.config = {"size": 8, "_use_default_values": ["a", "b"]}
    other.config = {"_use_default_values": ["b", "a"], "size": 8}
    assert fingerprint_of_model(one) == fingerprint_of_model(other)
    other.config = {"size": 16}
    assert fingerprint_of_model(one) != fingerprint_of_model(other)


class Scaled(nn.Module):
    """A linear layer whose outputs an attribute divides."""

    def __init__(self, temperature):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.temperature = nn.Linear(64, 10), temperature

    def forward(self, x):
        return self.layer(x) / self.temperature


def rises(model, cache_dir):
    ascent = AscentConfig(direction="gradient", radius=0.3)
    rows = digits.rows(0, 6)
    return ForwardInf(adapter=TensorAdapter(model), ascent=ascent, cache_dir=cache_dir).trace(rows, rows).scores


@pytest.mark.parametrize(
    "attribute", [2.5, np.array([2.5]), torch.tensor(2.5), {"inner": 2.5}, [2.5], lambda x: x / 2.5, {2.5, 3}]
)
def test_a_changed_attribute_changes_the_models_name(attribute):
    model = Scaled(1.0)
    name = fingerprint_of_model(model)
    model.temperature = attribute
    changed = fingerprint_of_model(model)
    assert changed != name
    assert fingerprint_of_model(copy.deepcopy(model).train()) == changed
    model.temperature = 1.0
    assert fingerprint_of_model(model) == name


def network_with(code):
    """Return a network whose class was just read from source, as an edited file is."""
    space = {"nn": nn, "__name__": "edited"}
    exec(f"class Edited(nn.Linear):\n    def forward(self, x):\n        return {code}", space)
    torch.manual_seed(0)
    return nn.Sequential(space["Edited"](2, 2))


def test_an_edited_forward_and_another_activation_change_the_models_name():
    assert fingerprint_of_model(network_with("x @ self.weight")) == fingerprint_of_model(
        network_with("x @ self.weight")
    )
    assert fingerprint_of_model(network_with("x @ self.weight")) != fingerprint_of_model(network_with("x * 2"))
    names = [
        fingerprint_of_model(nn.Sequential(layer))
        for layer in (nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.LayerNorm(2), nn.LayerNorm(2, eps=1e-3))
    ]
    assert len(set(names)) == len(names)


def test_losses_under_another_attribute_or_autocast_are_not_taken_from_the_cache(tmp_path):
    model, shared = Scaled(1.0), tmp_path / "shared"
    rises(model, shared)
    model.temperature = 5.0
    np.testing.assert_array_equal(rises(model, shared), rises(model, tmp_path / "other"))
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(rises(model, shared), rises(model, tmp_path / "half"))
    np.testing.assert_array_equal(rises(model, shared), rises(model, tmp_path / "other"))


def test_losses_under_a_hook_are_not_cached(tmp_path):
    model, shared = Scaled(1.0), tmp_path / "shared"
    before = rises(model, shared)
    handle = model.layer.register_forward_hook(lambda module, args, output: output + torch.arange(10.0))
    assert foreign_hooks(model) == ["layer"]
    with pytest.warns(UserWarning, match="layer has a forward hook of your own: .+ losses are not cached"):
        steered = rises(model, shared)
    assert not np.allclose(steered, before)
    handle.remove()
    np.testing.assert_array_equal(rises(model, shared), before)
    model.layer.forward = lambda x: nn.Linear.forward(model.layer, x) + torch.arange(10.0)
    with pytest.warns(UserWarning, match="losses are not cached"):
        np.testing.assert_allclose(rises(model, shared), steered, atol=1e-5)
