import pytest
from datasets import is_caching_enabled

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.baselines import BM25
from hf_forward_inf.evaluation.cost import Pace, measure, pace


def test_costs_are_measured_and_caching_is_left_as_it_was(model, tokenizer, corpus, queries):
    rows = corpus["abstracts"].select(range(300))
    figures = measure(ForwardInf(model, tokenizer, ascent=AscentConfig(modules=["all"])), queries, rows)
    assert 0 < figures["forward_passes_per_query"] < 100
    assert figures.get("peak_memory_ratio", 1) > 0
    assert is_caching_enabled()


def test_a_pace_tells_what_is_inspected_by_when():
    pace = Pace(setup=2.0, seconds=6.0)
    assert [pace.inspected(t) for t in (1.0, 2.0, 3.0, 6.0, 9.0)] == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert Pace(setup=0.0, seconds=0.0).inspected(0.0) == 1.0
    assert Pace(setup=6.0, seconds=6.0).inspected(3.0) == 0.0


def test_the_setup_is_where_the_line_through_two_sizes_begins(queries, candidates, monkeypatch):
    clock = iter([0.0, 10.0, 20.0, 23.0, 30.0, 40.0])  # all take 10 seconds, an eighth 3: 2 before the first candidate
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    found, measured, _ = pace(BM25().trace, queries, candidates)
    assert found.scores.shape == (len(queries), len(candidates))
    assert (measured.setup, measured.seconds) == (pytest.approx(2.0), 10.0)
    assert pace(BM25().trace, queries, candidates, setup=4.0)[1] == Pace(4.0, 10.0)
