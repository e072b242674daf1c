import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import TensorAdapter
from hf_forward_inf.scores.retraining import Retrained, random_subsets
from hf_forward_inf.tracing.tuning import _best
from tests.helpers import digits
from tests.helpers.line import assert_same_state, points, state

GRADIENT = AscentConfig(direction="gradient")
CANDIDATES = digits.rows(0, 100)
QUERIES = digits.rows(100, 110)


def test_the_highest_value_wins_and_of_equals_the_middle_one():
    assert _best([0.5, 0.9, 0.4]) == 1
    assert _best([0.1, 0.9, 0.9, 0.9, 0.2]) == 2
    assert _best([0.0, -0.5]) is None


def test_training_examples_find_themselves_and_the_trials_are_shown(model, tokenizer, candidates):
    settings = [AscentConfig(direction="gradient", radius=radius) for radius in (0.3, 3.0)]
    tracer = ForwardInf(model, tokenizer).tune(candidates, settings, drawn=6)
    trials = tracer.tuning.trials
    assert [trial["radius"] for trial in trials] == [0.3, 3.0]
    values = [trial["self_mrr"] * trial["distinct"] for trial in trials]
    assert tracer.ascent.radius == trials[int(np.argmax(values))]["radius"]
    assert [trial["chosen"] for trial in trials] == [value == max(values) for value in values]
    assert max(trial["self_mrr"] for trial in trials) > 0.5
    table = str(tracer.tuning)
    assert table.count("\n") == 2
    assert "self-retrieval MRR" in table
    assert "LDS" not in table
    assert "trust" not in table


def test_tuning_draws_the_same_rows_every_time(model, tokenizer, candidates):
    tracer = ForwardInf(model, tokenizer, ascent=GRADIENT)
    trials = [tracer.tune(candidates, [GRADIENT], drawn=5).tuning.trials for _ in range(2)]
    assert trials[0] == trials[1]


@pytest.mark.parametrize(("name", "own"), [("radius", 2.0), ("learning_rate", 0.1), ("trust", 0.02)])
def test_by_default_the_attributors_own_length_is_varied(name, own):
    ascent = AscentConfig(direction="gradient", **{name: own})
    tuned = ForwardInf(adapter=TensorAdapter(digits.perceptron()), ascent=ascent).tune(CANDIDATES, drawn=4)
    tried = [trial[name] for trial in tuned.tuning.trials]
    assert tried == pytest.approx([0.1 * own, 0.3 * own, own, 3 * own, 10 * own])
    assert getattr(tuned.ascent, name) in tried


def test_one_candidate_is_not_enough(line):
    with pytest.raises(ValueError, match="at least 2 candidates"):
        ForwardInf(adapter=line).tune(points(((3, 1), 0)))


def test_no_settings_are_refused(line):
    with pytest.raises(ValueError, match="ascents is empty"):
        ForwardInf(adapter=line).tune(points(((3, 1), 0), ((1, -3), 1)), [])


def test_candidates_without_gradients_retrieve_nothing():
    network = digits.perceptron()
    nn.init.zeros_(network[0].weight)
    rows = CANDIDATES.select([0] * 30).map(lambda _: {"x": [0.0] * 64})
    tracer = ForwardInf(
        adapter=TensorAdapter(network), ascent=AscentConfig(direction="gradient", modules=["0.weight"])
    )
    with pytest.raises(ValueError, match="No setting retrieves anything"):
        tracer.tune(rows, [tracer.ascent], drawn=3)


def test_retraining_that_the_gradient_predicts_chooses_the_gradient():
    queries, subsets = digits.rows(100, 104), random_subsets(100, 30)
    tracer = ForwardInf(adapter=TensorAdapter(digits.perceptron()))
    settings = [AscentConfig(direction=one, radius=r) for one in ("kfac", "gradient") for r in (0.3, 3.0)]
    scores = tracer.with_options(ascent=settings[2]).score(queries, CANDIDATES)
    retrained = Retrained(queries, subsets, -(scores @ subsets.T).T)
    tuned = tracer.tune(CANDIDATES, settings, retrained=retrained)
    assert (tuned.ascent.direction, tuned.ascent.radius) == ("gradient", 0.3)
    assert max(trial["lds"] for trial in tuned.tuning.trials) == pytest.approx(1.0)
    assert "LDS" in str(tuned.tuning)
    against = Retrained(queries, subsets, -retrained.losses)
    with pytest.raises(ValueError, match="No setting predicts the losses"):
        tracer.tune(CANDIDATES, settings[2:3], retrained=against)


def descend(model, rows, epochs):
    """Plain gradient descent on the mean loss: a step an epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    data = rows.with_format("torch")[:]
    for _ in range(epochs):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data["x"]), data["label"]).backward()
        optimizer.step()


def test_halves_are_trained_on_and_settings_judged_by_their_losses(capsys):
    network = digits.perceptron()
    before = state(network)
    tracer = ForwardInf(adapter=TensorAdapter(network))
    settings = [AscentConfig(direction="gradient", radius=radius) for radius in (0.1, 30.0)]
    tuned = tracer.tune(CANDIDATES, settings, halves=4, train=descend, epochs=3, queries=QUERIES)
    assert_same_state(before, state(network))
    assert "4 halves of 50 candidates x 3 epochs, about 18 forward passes" in capsys.readouterr().out

    subsets, data = random_subsets(100, 4), QUERIES.with_format("torch")[:]
    losses = []
    for subset in subsets:
        own = digits.perceptron()
        descend(own, CANDIDATES.select(np.flatnonzero(subset)), 3)
        losses.append(nn.functional.cross_entropy(own(data["x"]), data["label"], reduction="none").detach().numpy())
    for ascent, trial in zip(settings, tuned.tuning.trials, strict=True):
        sums = tracer.with_options(ascent=ascent).score(QUERIES, CANDIDATES) @ subsets.T
        by_query = [spearmanr(sums[i], [-one[i] for one in losses]).statistic for i in range(len(QUERIES))]
        assert trial["lds"] == pytest.approx(np.mean(by_query))
    assert tuned.ascent.radius == settings[int(np.argmax([t["lds"] for t in tuned.tuning.trials]))].radius


def test_an_interrupted_choice_trains_on_no_half_twice(tmp_path):
    def train(model, rows, epochs):
        done = len(list(tmp_path.glob("half-*")))
        if done == 2 and not (tmp_path / "go on").exists():
            raise KeyboardInterrupt
        descend(model, rows, epochs)
        (tmp_path / f"half-{done}").touch()

    tracer = ForwardInf(adapter=TensorAdapter(digits.perceptron()))
    options = {"halves": 3, "train": train, "queries": QUERIES, "epochs": 1}
    with pytest.raises(KeyboardInterrupt):
        tracer.tune(CANDIDATES, ascents=[GRADIENT], **options)
    (tmp_path / "go on").touch()
    found = [tracer.tune(CANDIDATES, ascents=[GRADIENT], **options).tuning.trials for _ in range(2)]
    assert found[0] == found[1]
    assert len(list(tmp_path.glob("half-*"))) == 3


def test_a_function_may_return_a_model_of_its_own():
    def fresh(model, rows, epochs):
        other = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 10))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.fill_(len(rows[:]["label"]) * 1e-3 + rows[0]["label"] * 1e-2)
        return other

    tracer = ForwardInf(adapter=TensorAdapter(digits.perceptron()))
    with pytest.raises(ValueError, match="No setting predicts"):  # the same logits for all classes, whatever the half
        tracer.tune(CANDIDATES, [GRADIENT], halves=3, train=fresh, queries=QUERIES)


def test_what_halves_need_is_asked_for():
    tracer = ForwardInf(adapter=TensorAdapter(digits.perceptron()))
    with pytest.raises(ValueError, match=r"halves needs train=\.\.\., a function"):
        tracer.tune(CANDIDATES, halves=8)
    with pytest.raises(ValueError, match="train and queries are for retraining"):
        tracer.tune(CANDIDATES, train=descend)
    with pytest.raises(ValueError, match="halves=1 must be at least 2"):
        tracer.tune(CANDIDATES, halves=1, train=descend, queries=QUERIES)
    with pytest.raises(ValueError, match=r"Query \d has no finite loss after training on half 0: does train diverge"):
        tracer.tune(CANDIDATES, halves=2, train=diverge, queries=QUERIES)


def diverge(model, rows, epochs):
    with torch.no_grad():
        model[2].bias.fill_(torch.nan)
