import numpy as np
import pytest

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.tracing.time_budget import FIRST, slices


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when a test moves it."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def deal(order, seconds, clock, a_second):
    dealt = []
    for rows in slices(order, seconds):
        clock[0] += len(rows) / a_second
        dealt.append(rows)
    return dealt


def test_slices_grow_and_end_with_the_time(clock):
    order = np.random.default_rng(0).permutation(5000)
    dealt = deal(order, 20.0, clock, a_second=100)  # time for 2,000
    assert [len(rows) for rows in dealt[:3]] == [FIRST, 2 * FIRST, 6 * FIRST]
    assert clock[0] == pytest.approx(20, abs=0.1)
    np.testing.assert_array_equal(np.sort(np.concatenate(dealt)), np.sort(order[: sum(map(len, dealt))]))
    assert all((np.diff(rows) > 0).all() for rows in dealt)


def test_all_candidates_are_scored_if_there_is_time(clock):
    assert sum(map(len, deal(np.arange(300), 1e6, clock, a_second=1))) == 300


def test_a_time_too_short_for_the_first_slice_warns(clock):
    with pytest.warns(UserWarning, match=r"time_budget=0.1 s was over before the first 64 candidates .* \(6.4 s\)"):
        assert len(deal(np.arange(300), 0.1, clock, a_second=10)) == 1
    with pytest.raises(ValueError, match="time_budget=0 must be above 0 seconds"):
        next(slices(np.arange(3), 0))


@pytest.mark.parametrize("ascent", [AscentConfig(), AscentConfig(direction="cg", sample=20, iterations=3)])
def test_with_time_enough_the_scores_are_those_of_a_trace(ascent, model, tokenizer, queries, corpus):
    candidates = corpus["abstracts"].select(range(150))
    tracer = ForwardInf(model, tokenizer, ascent=ascent)
    expected = tracer.trace(queries, candidates, strategy="full").scores  # without a floor
    found = tracer.trace(queries, candidates, time_budget=600).scores
    np.testing.assert_allclose(found, expected, atol=1e-4)  # batches differ in shape


def test_candidates_not_reached_have_no_score(model, tokenizer, queries, corpus):
    candidates = corpus["abstracts"].select(range(150))
    tracer = ForwardInf(model, tokenizer)
    with pytest.warns(UserWarning) as caught:
        found = tracer.trace(queries, candidates, time_budget=1e-6)
    assert [str(one.message)[:16] for one in caught] == ["time_budget=1e-0"]  # and nothing about lost rows
    assert (np.isnan(found.scores).sum(axis=1) == 150 - FIRST).all()
    assert len(found.top(0, 100)) == FIRST
