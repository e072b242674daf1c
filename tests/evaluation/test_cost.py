import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from datasets import is_caching_enabled

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import TensorAdapter
from hf_forward_inf.baselines import BM25, Random
from hf_forward_inf.evaluation import cost
from hf_forward_inf.evaluation.cost import Pace, measure, pace, plain_pass
from tests.helpers import digits

CANDIDATES, QUERIES = digits.rows(0, 100), digits.rows(100, 103)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One repetition, and no collection of garbage before each."""
    monkeypatch.setattr(cost, "REPEATS", 1)
    monkeypatch.setattr(cost, "gc", SimpleNamespace(collect=lambda: None))


@pytest.fixture
def network(monkeypatch):
    """A network whose rows are the clock: time is the number of rows that it has forwarded, alone or perturbed."""
    network, clock = digits.perceptron(), SimpleNamespace(rows=0)

    def count(module, args):
        clock.rows += len(args[0])

    network[0].register_forward_pre_hook(count)
    monkeypatch.setattr(cost, "clock", lambda: clock.rows)
    return network


def tracer_of(network, **options):
    return ForwardInf(adapter=TensorAdapter(network), ascent=AscentConfig(direction="gradient", **options))


@pytest.mark.parametrize(("mode", "passes"), [("ascent", 1), ("symmetric", 2)])
def test_a_query_costs_a_pass_over_itself_and_one_over_the_candidates_for_each_side(network, mode, passes):
    figures = measure(tracer_of(network, mode=mode), QUERIES, CANDIDATES)
    assert figures["forward_passes_per_query"] == pytest.approx(passes + 1 / 100)
    assert "forward_passes_to_fit" not in figures
    assert is_caching_enabled()


def test_a_fit_is_counted_once_and_not_for_each_query(network):
    tracer = ForwardInf(adapter=TensorAdapter(network), ascent=AscentConfig(direction="kfac", sample=50))
    figures = measure(tracer, QUERIES, CANDIDATES)
    assert 50 / 100 <= figures["forward_passes_to_fit"] <= 3 * 50 / 100
    assert figures["forward_passes_per_query"] == pytest.approx(1 + 1 / 100)


def test_a_further_query_of_a_screened_trace_costs_itself_and_what_is_kept(network, monkeypatch):
    monkeypatch.setattr(cost, "plain_pass", lambda tracer, candidates: (100.0, 0.0))
    tracer = tracer_of(network)
    screened = tracer.with_options(screen=Random(), keep=20, audit=10)
    monkeypatch.setattr("hf_forward_inf.passes.candidate_pass.foreign_hooks", lambda model: [])  # the clock
    figures = cost.measure_screened(screened, QUERIES, CANDIDATES)
    assert figures["screened_forward_passes_per_query"] == pytest.approx((1 + 20 + 10) / 100, abs=0.03)
    assert cost.measure_screened(tracer, QUERIES, CANDIDATES) == {}
    assert cost.measure_screened(screened, QUERIES.select([0]), CANDIDATES) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's work is not in the processor's time")
def test_seconds_are_the_processors_and_not_those_of_waiting():
    assert cost.timed(lambda: time.sleep(0.2))[0] < 0.1


def test_each_of_several_plain_passes_runs_the_model(network, monkeypatch):
    monkeypatch.setattr(cost, "REPEATS", 3)
    assert plain_pass(tracer_of(network), CANDIDATES)[0] == 100


def test_nothing_is_read_from_the_cache(network):
    tracer = tracer_of(network)
    tracer.trace(QUERIES, CANDIDATES)
    assert plain_pass(tracer, CANDIDATES)[0] == 100


@pytest.mark.parametrize(("peaks", "ratio"), [([100.0, 150.0], 1.5), ([0.0, 0.0], None)])
def test_peak_memory_is_that_of_the_queries_passes_over_that_of_plain_ones(monkeypatch, peaks, ratio):
    monkeypatch.setattr(cost, "_peak", partial(next, iter(peaks * cost.REPEATS)))
    assert measure(tracer_of(digits.perceptron()), QUERIES, CANDIDATES).get("peak_memory_ratio") == ratio


def test_a_pace_gives_the_share_of_candidates_that_are_scored_by_a_time():
    pace = Pace(setup=2.0, seconds=6.0)
    assert [pace.inspected(t) for t in (1.0, 2.0, 3.0, 6.0, 9.0)] == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert Pace(setup=0.0, seconds=0.0).inspected(0.0) == 1.0
    assert Pace(setup=6.0, seconds=6.0).inspected(3.0) == 0.0


def test_the_setup_is_where_the_line_through_two_sizes_begins(queries, candidates, monkeypatch):
    clock = iter([0.0, 10.0, 20.0, 23.0, 30.0, 40.0])  # all take 10 seconds, an eighth 3: 2 before the first candidate
    monkeypatch.setattr(cost, "clock", lambda: next(clock))
    found, measured, _ = pace(BM25().trace, queries, candidates)
    assert found.scores.shape == (len(queries), len(candidates))
    assert (measured.setup, measured.seconds) == (pytest.approx(2.0), 10.0)
