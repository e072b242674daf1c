import copy

import torch

from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model
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
