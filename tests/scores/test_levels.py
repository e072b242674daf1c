from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset

from hf_forward_inf import Attribution
from hf_forward_inf.scores.levels import background

NATS = {"units": "loss", "reduction": "sum", "measure": "rise"}


def traced(scores, **options):
    rows = Dataset.from_dict({"text": [f"row {i}" for i in range(len(scores))]})
    options = {"config": NATS, **options}
    return Attribution(np.array([scores], np.float32), Dataset.from_dict({"text": ["q"]}), rows, **options)


@pytest.fixture
def noise():
    return np.random.default_rng(0).normal(scale=0.01, size=400)


def test_the_spread_is_that_of_the_inner_98_percent(noise):
    noise[:8] = 100.0
    found = background(noise)
    inner = np.sort(np.abs(noise - np.median(noise)))[:392]
    assert found.spread == pytest.approx(np.sqrt(np.mean(inner**2)))
    assert found.median == pytest.approx(np.median(noise)) and found.count == 400


def test_a_candidate_far_above_all_others_is_strong_and_a_nearer_one_has_some_effect(noise):
    noise[3], noise[5], noise[9] = 11.5, 7.5, 6.5
    found = traced(noise)
    assert found.levels(0, 4) == ["strong", "some", "none", "none"]
    assert found.verdict(0) == "2 of 400 training rows stand out, 1 of them strongly."
    assert found.top(0, 2)["level"][:] == ["strong", "some"]
    assert found.to_dataset(2)["level"][:] == ["strong", "some"]


def test_noise_has_no_level_however_wide_it_is(noise):
    for scale in (0.01, 1.0, 1e4):
        found = traced(noise * scale)
        assert set(found.levels(0)) == {"none"}
        assert found.verdict(0) == "Nothing in this data stands out: none of 400 training rows."


def test_a_row_just_below_the_limit_is_not_called_nothing(noise):
    noise[3] = 5.6
    found = traced(noise)
    assert found.levels(0, 1) == ["none"]
    assert found.verdict(0) == (
        "No training row stands out beyond doubt: the best of 400 rises by 5.6 nats, and 7 would count."
    )


def test_a_row_that_rises_much_does_not_stand_out_where_all_others_rise(noise):
    noise[3] = 0.4  # 40 nats, and 43 spreads
    assert traced(noise * 100).levels(0, 1) == ["none"]
    noise[3] = 0.6
    assert traced(noise * 100).levels(0, 1) == ["strong"]


def test_of_other_scores_it_is_only_said_how_far_the_best_is(noise):
    noise[3] = 17.0
    for other in (
        {"method": "tracin"},
        {"config": {**NATS, "units": "base_loss"}},
        {"config": {**NATS, "reduction": "mean"}},
    ):
        found = traced(noise, **other)
        assert found.levels(0) is None and "level" not in found.top(0).column_names
        assert found.verdict(0).startswith("The best of 400 training rows is 1,8")
    labelled = Dataset.from_dict({"text": ["q"], "label": [1]})
    assert replace(traced(noise), queries=labelled).levels(0) is None


def test_levels_are_the_same_where_only_the_best_are_kept(noise):
    noise[3], noise[5] = 13.0, 9.0
    found = traced(noise)
    assert found.keep(3).levels(0) == found.levels(0, 3) and found.keep(1).verdict(0) == found.verdict(0)


def test_scores_that_were_not_computed_are_no_part_of_the_null(noise):
    noise[3] = 17.0
    computed = np.zeros((1, 400), bool)
    computed[0, :150] = True
    scores = np.where(computed[0], noise, 0.0)
    found = traced(scores, stage=computed)
    assert found.background(0).count == 150
    assert found.background(0).spread == pytest.approx(traced(scores[:150]).background(0).spread)
    assert found.levels(0, 2) == ["strong", "none"] == found.keep(2).levels(0)


def test_few_scores_or_only_the_best_have_no_level(noise):
    few = traced(noise[:50])
    assert few.levels(0) is None and "Only 50 training rows have a score" in few.verdict(0)
    best = Attribution(
        np.ones((1, 2), np.float32), few.queries, few.candidates, indices=np.array([[1, 2]]), config=NATS
    )
    assert best.levels(0) is None and "can't be said" in best.verdict(0)
    assert "No scores" in traced(np.full(200, np.nan)).verdict(0)


def test_one_other_score_among_equal_ones_is_not_infinitely_far():
    scores = np.zeros(300)
    scores[7] = 20.0
    assert traced(scores).background(0).distance(20.0) == pytest.approx(np.sqrt(300))
