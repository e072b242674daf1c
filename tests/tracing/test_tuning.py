import numpy as np
import pytest

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import TensorAdapter
from hf_forward_inf.scores.retraining import Retrained, random_halves
from hf_forward_inf.tracing.tuning import _choose
from tests.helpers import digits
from tests.helpers.line import points


def trial(radius, mrr, steps=1, hubs=False, distinct=1.0):
    setting = {"direction": "gradient", "damping": None, "radius": radius, "steps": steps, "hubs": hubs}
    return {**setting, "self_mrr": mrr, "distinct": distinct, "chosen": False}


def chosen(trials):
    return trials[_choose(trials)]


def test_the_best_retrieval_wins():
    assert chosen([trial(0.1, 0.5), trial(1, 0.9), trial(10, 0.4)])["radius"] == 1


def test_finding_itself_among_hubs_is_worth_less():
    assert chosen([trial(0.3, 1.0, distinct=0.5), trial(1, 0.95, distinct=0.8), trial(3, 0.5)])["radius"] == 1


def test_of_equals_the_uncorrected_the_fewer_steps_and_the_middle_radius_win():
    equal = [trial(r, 1.0, steps, hubs) for r in (0.1, 1, 10) for steps in (1, 3) for hubs in (True, False)]
    assert chosen(equal) == trial(1, 1.0)


def test_nothing_retrieved_is_an_error():
    with pytest.raises(ValueError, match="No setting retrieves anything"):
        chosen([trial(1, 0.0)])


def test_training_examples_find_themselves_and_the_trials_are_shown(model, tokenizer, candidates):
    tracer = ForwardInf(model, tokenizer).tune(candidates, radii=(0.3, 3.0), queries=6)
    assert tracer.ascent.radius in (0.3, 3.0)
    assert len(tracer.tuning.trials) == 4
    assert sum(trial["chosen"] for trial in tracer.tuning.trials) == 1
    assert str(tracer.tuning).count("\n") == 4
    chosen = next(trial for trial in tracer.tuning.trials if trial["chosen"])
    value = max(trial["self_mrr"] * trial["distinct"] for trial in tracer.tuning.trials)
    assert chosen["self_mrr"] * chosen["distinct"] == value
    assert chosen["self_mrr"] > 0.5


def test_the_hub_correction_is_on_only_if_it_was_chosen(model, tokenizer, queries, candidates):
    tracer = ForwardInf(model, tokenizer).tune(candidates, radii=(1.0,), queries=6)
    assert (tracer.references is not None) == next(t["hubs"] for t in tracer.tuning.trials if t["chosen"])


def test_tuning_draws_the_same_rows_every_time(model, tokenizer, candidates):
    trials = [ForwardInf(model, tokenizer).tune(candidates, radii=(1.0,), queries=5).tuning.trials for _ in range(2)]
    assert trials[0] == trials[1]


def test_tune_is_one_argument_of_trace(line):
    rows = points(((3, 1), 0), ((1, -3), 1), ((0, 2), 2), ((2, 2), -1))
    found = ForwardInf(adapter=line).trace(rows.select([0]), rows, tune=True)
    assert found.config["radius"] in (0.1, 0.3, 1.0, 3.0, 10.0)
    assert np.isfinite(found.scores).all()


def test_one_candidate_is_not_enough(line):
    with pytest.raises(ValueError, match="at least 2 candidates"):
        ForwardInf(adapter=line).tune(points(((3, 1), 0)))


def test_no_values_to_try_are_refused(line):
    with pytest.raises(ValueError, match="radii, steps, directions and dampings need at least one value each"):
        ForwardInf(adapter=line).tune(points(((3, 1), 0), ((1, -3), 1)), radii=())


def test_directions_and_dampings_are_tried_where_they_are_named(model, tokenizer, candidates):
    ascent = AscentConfig(direction="gradient", modules=["decoder"])
    tracer = ForwardInf(model, tokenizer, ascent=ascent)
    options = {"directions": ["gradient", "kfac"], "dampings": (0.1, 1.0), "radii": (1.0,), "queries": 4}
    trials = tracer.tune(candidates, **options).tuning.trials
    settings = [(trial["direction"], trial["damping"]) for trial in trials if not trial["hubs"]]
    assert settings == [("gradient", None), ("kfac", 0.1), ("kfac", 1.0)]


def test_retraining_that_the_gradient_predicts_chooses_the_gradient():
    adapter = TensorAdapter(digits.perceptron())
    candidates, queries, subsets = digits.rows(0, 100), digits.rows(100, 104), random_halves(100, 30)
    tracer = ForwardInf(adapter=adapter)
    scores = tracer.with_options(ascent=AscentConfig(direction="gradient", radius=0.3)).score(queries, candidates)
    retrained = Retrained(queries, subsets, -(scores @ subsets.T).T)
    options = {"directions": ["adam", "gradient"], "radii": (0.3, 3.0), "retrained": retrained}
    tuned = tracer.tune(candidates, **options)
    assert (tuned.ascent.direction, tuned.ascent.radius, tuned.references) == ("gradient", 0.3, None)
    assert max(trial["lds"] for trial in tuned.tuning.trials) == pytest.approx(1.0)
    assert "LDS" in str(tuned.tuning)
    against = Retrained(queries, subsets, -retrained.losses)
    with pytest.raises(ValueError, match="No setting predicts the losses"):
        tracer.tune(candidates, radii=(0.3,), retrained=against)
