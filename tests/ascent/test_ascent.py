import math

import pytest
import torch

from hf_forward_inf import AscentConfig
from hf_forward_inf.adapters import Seq2SeqAdapter
from hf_forward_inf.ascent.parameters import perturbed_names
from hf_forward_inf.ascent.steps import Perturbation, ascend
from hf_forward_inf.utils.models import evaluating

# At w = (1, -2) the query x = (3, 1), y = 0 has residual 1, loss 1 and gradient 2 * 1 * x = (6, 2), norm sqrt(40).
QUERY = {"x": [[3.0, 1.0]], "y": [0.0], "terms": [1]}

GRADIENT = AscentConfig(direction="gradient").completed()


def moved(line, **options):
    return (ascend(line, QUERY, ["w"], AscentConfig(**options).completed())["w"] - line.model.w).tolist()


def test_a_step_goes_along_the_gradient_for_the_length_of_the_radius(line):
    assert moved(line, radius=0.5) == pytest.approx([0.5 * 6 / math.sqrt(40), 0.5 * 2 / math.sqrt(40)])


def test_descent_goes_the_other_way(line):
    assert moved(line, radius=0.5, mode="descent") == pytest.approx([-value for value in moved(line, radius=0.5)])


def test_a_fixed_learning_rate_moves_by_rate_times_gradient(line):
    assert moved(line, learning_rate=0.1) == pytest.approx([0.6, 0.2])


def test_two_fixed_steps_take_the_gradient_anew(line):
    # After the first, w = (1.6, -1.8), residual 3, gradient (18, 6).
    assert moved(line, learning_rate=0.1, steps=2) == pytest.approx([0.6 + 1.8, 0.2 + 0.6])


def test_adams_first_step_has_the_length_of_the_learning_rate_in_every_parameter(line):
    assert moved(line, learning_rate=0.1, optimizer="adam") == pytest.approx([0.1, 0.1], rel=1e-5)


def test_steps_share_the_radius(line):
    # All gradients here lie along x, so the path is straight and its length the distance.
    assert math.hypot(*moved(line, radius=0.9, steps=3)) == pytest.approx(0.9, rel=1e-5)


def test_a_relative_radius_is_a_share_of_the_norm_of_what_is_perturbed(line):
    assert math.hypot(*moved(line, radius=0.1, relative=True)) == pytest.approx(0.1 * math.hypot(1, 2), rel=1e-5)
    with pytest.raises(ValueError, match="relative=True is for a radius: leave it out"):
        AscentConfig(relative=True, learning_rate=1.0)


def test_a_zero_gradient_moves_nothing(line):
    assert ascend(line, {"x": [[0.0, 0.0]], "y": [1.0], "terms": [1]}, ["w"], GRADIENT) is None


def test_an_infinite_gradient_moves_nothing(line):
    assert ascend(line, {"x": [[1e30, 0.0]], "y": [0.0], "terms": [1]}, ["w"], GRADIENT) is None


def test_only_named_modules_move(model, tokenizer, queries):
    adapter = Seq2SeqAdapter(model, tokenizer)
    names = perturbed_names(adapter, ["decoder.block.*.layer.1"])
    assert names
    assert all(".layer.1.EncDecAttention" in name or ".layer.1.layer_norm" in name for name in names)
    row = adapter.encode(queries[:1])
    theta = ascend(adapter, row, names, AscentConfig(radius=2.0, direction="gradient", step="full").completed())
    own = dict(model.named_parameters())
    norm = torch.stack([(theta[name] - own[name]).norm() for name in names]).norm()
    assert theta.keys() == set(names)
    assert norm.item() == pytest.approx(2.0, rel=1e-5)


def test_the_decoder_is_the_default_without_what_the_encoder_shares(model, tokenizer):
    names = perturbed_names(Seq2SeqAdapter(model, tokenizer), None)
    assert all(name.startswith("decoder.") for name in names)
    assert not any("embed" in name or name == "shared.weight" for name in names)


def test_all_names_every_parameter(model, tokenizer):
    names = perturbed_names(Seq2SeqAdapter(model, tokenizer), ["all"])
    assert names == [name for name, _ in model.named_parameters()]


def test_an_unknown_module_is_named_with_the_ones_there_are(model, tokenizer):
    with pytest.raises(ValueError, match=r"'nowhere'.*decoder, encoder"):
        perturbed_names(Seq2SeqAdapter(model, tokenizer), ["nowhere"])


def test_a_tied_parameter_is_told_by_its_owners_name(model, tokenizer):
    with pytest.raises(ValueError, match=r"tied to shared\.weight"):
        perturbed_names(Seq2SeqAdapter(model, tokenizer), ["encoder.embed_tokens"])


def test_a_perturbation_is_known_by_query_modules_and_settings(line):
    def name(query=QUERY, names=("w",), **options):
        return Perturbation(line, query, list(names), AscentConfig(**options).completed()).fingerprint

    assert name() == name()
    others = [name(radius=2.0), name(names=["v"]), name({**QUERY, "y": [1.0]}), name(steps=2)]
    assert len({name(), *others}) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 1.0, "learning_rate": 0.1}, "either a radius or a learning_rate"),
        ({"optimizer": "adam"}, "needs a learning_rate"),
        ({"radius": 0.0}, "must be above 0"),
        ({"steps": 0}, "must be above 0"),
        ({"learning_rate": float("nan")}, "must be above 0"),
        ({"mode": "sideways"}, "must be one of"),
        ({"optimizer": "lion", "learning_rate": 0.1}, "must be one of"),
        ({"direction": "newton"}, "must be one of"),
        ({"damping": 0.1, "direction": "gradient"}, "direction='gradient' has none. Give direction='cg'"),
        ({"sample": 10, "direction": "gradient"}, "direction='gradient' has none"),
        ({"direction": "cg", "learning_rate": 0.1}, "direction='cg' needs a radius"),
        ({"direction": "cg", "iterations": 0}, "iterations must be above 0, not 0"),
        ({"direction": "kfac", "damping": -1.0}, "damping must be above 0, not -1.0"),
        ({"direction": "kfac", "sample": 0}, "sample must be above 0, not 0"),
        ({"memory": 0.0}, "memory must be above 0, not 0.0"),
        (
            {"memory": 0.1, "direction": "gradient"},
            "memory=0.1 is for a correction, and direction='gradient' has none",
        ),
        ({"step": "low_rank", "direction": "cg"}, "step='low_rank' can't follow direction='cg'"),
        ({"step": "low_rank", "optimizer": "adam", "learning_rate": 0.1}, "can't follow .* optimizer='adam'"),
        ({"step": "high_rank"}, "step must be one of low_rank, full"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AscentConfig(**options)


def test_evaluating_gives_every_module_its_own_mode_back(model):
    model.train()
    model.encoder.eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert [module.training for module in model.modules()] == before


def test_a_step_that_rounding_swallows_is_refused(line):
    with pytest.raises(ValueError, match=r"length 1e-30 is lost in the rounding of the weights \(torch\.float32\)"):
        moved(line, radius=1e-30)
