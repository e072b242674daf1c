import pytest

from hf_forward_inf import AscentConfig
from hf_forward_inf.ascent.config import OF_DIRECTION

SMALL = {"direction": "cg", "damping": 0.01, "sample": 32, "radius": 1e-2, "relative": True}


def relative_adapter(direction=None):
    """The defaults of an adapter that steps along conjugate gradients, by a share of the weights' norm."""
    if direction in (None, "cg"):
        return SMALL
    return {"radius": 1e-2, "relative": True}


def absolute_adapter(direction=None):
    """The defaults of an adapter that steps along K-FAC's direction."""
    return {"direction": direction or "kfac"} | ({"radius": 2.0, "sample": 128} if direction in (None, "kfac") else {})


@pytest.mark.parametrize("adapter", [relative_adapter, absolute_adapter])
def test_naming_a_default_changes_nothing(adapter):
    default = AscentConfig().completed(adapter)
    for name in ("direction", "damping", "sample", "iterations", "steps", "mode", "tolerance", "seed"):
        assert AscentConfig(**{name: getattr(default, name)}).completed(adapter) == default
    assert AscentConfig(radius=default.radius, relative=default.relative).completed(adapter) == default
    assert default.completed(adapter) == default


@pytest.mark.parametrize("direction", OF_DIRECTION)
def test_each_direction_is_complete_without_an_adapter(direction):
    ascent = AscentConfig(direction=direction).completed()
    assert (ascent.radius, ascent.relative) == (1.0, False)
    for name, value in {"damping": None, "sample": None, "iterations": None, **OF_DIRECTION[direction]}.items():
        assert getattr(ascent, name) == value


def test_false_is_not_unset():
    ascent = AscentConfig(relative=False).completed(relative_adapter)
    assert (ascent.relative, ascent.radius) == (False, 1.0)
    assert AscentConfig(relative=True).completed(absolute_adapter).radius == 1e-3


def test_a_radius_alone_is_absolute():
    ascent = AscentConfig(radius=0.5).completed(relative_adapter)
    assert (ascent.direction, ascent.damping, ascent.radius, ascent.relative) == ("cg", 0.01, 0.5, False)


def test_another_direction_keeps_the_adapters_length():
    ascent = AscentConfig(direction="gradient").completed(relative_adapter)
    assert (ascent.radius, ascent.relative, ascent.damping) == (1e-2, True, None)
    turned = AscentConfig().completed(relative_adapter).along("ekfac").completed(relative_adapter)
    assert (turned.radius, turned.relative, turned.damping, turned.sample) == (1e-2, True, 0.1, 1024)


def test_a_learning_rate_goes_along_the_gradient():
    ascent = AscentConfig(learning_rate=0.1).completed(relative_adapter)
    assert ascent.direction == "gradient" and ascent.relative is False
    assert ascent.radius is None


def test_steps_are_of_low_rank_where_the_direction_allows_it():
    def step(**options):
        return AscentConfig(**options).completed().step

    assert step(direction="gradient") == step(learning_rate=0.1) == "low_rank"
    assert step(direction="cg") == step(direction="ekfac") == "full"
    assert step(learning_rate=0.1, optimizer="adam") == step(direction="gradient", step="full") == "full"


def test_an_option_that_the_preferred_direction_lacks_is_refused():
    with pytest.raises(ValueError, match=r"damping=0\.5 is for a correction, and direction='gradient' has none"):
        AscentConfig(damping=0.5).completed(lambda direction: {"direction": "gradient"})


def test_text_is_no_number():
    with pytest.raises(ValueError, match="radius must be a number, not '2'"):
        AscentConfig(radius="2")
