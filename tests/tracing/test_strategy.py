from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_forward_inf import AscentConfig, Attribution, ForwardInf
from hf_forward_inf.adapters import Seq2SeqAdapter
from hf_forward_inf.baselines import BM25, Baseline, Random, RepresentationSimilarity
from hf_forward_inf.curvature.perturber import Perturber
from hf_forward_inf.passes.kept_pass import KeptPass
from hf_forward_inf.tracing import strategy
from hf_forward_inf.tracing.screened import floor_under, floored
from tests.helpers.causal import FACTS, questions, train_tokens, untrained
from tests.helpers.line import points

PLAIN = AscentConfig(direction="gradient", radius=0.5)


@pytest.fixture(scope="module")
def rows(corpus):
    return corpus["abstracts"].select(range(150))


class Known(Baseline):
    """A screen that ranks by given scores."""

    name = "known"

    def __init__(self, scores):
        self.scores = scores

    @property
    def config(self):
        return {}

    def score(self, queries, candidates):
        return self.scores


@pytest.mark.parametrize(
    "options",
    [
        {"ascent": PLAIN},
        {"ascent": AscentConfig(), "reduction": "mean"},
        {"ascent": AscentConfig(direction="pcg", sample=10, iterations=2)},
        {"ascent": AscentConfig(direction="gradient", modules=["all"])},
        {"ascent": PLAIN, "storage": 0, "max_batch_length": 100},
        {"ascent": PLAIN, "units": "base_loss", "reduction": "mean"},
    ],
)
@pytest.mark.filterwarnings("ignore:The screen fails")
def test_what_a_screen_keeps_has_the_scores_of_the_full_pass_and_the_rest_the_lowest(
    options, model, tokenizer, queries, rows, tmp_path
):
    tracer = ForwardInf(model, tokenizer, **options, keep=12, audit=8)
    found = tracer.trace(queries, rows, strategy="screen")
    full = ForwardInf(model, tokenizer, **options, strategy="full", cache_dir=tmp_path / "other")
    expected = full.trace(queries, rows).scores
    best = BM25(model, tokenizer).trace(queries, rows).scores  # one half of the screen
    assert found.plan.screen == "bm25+representation" and np.isfinite(best).all()
    assert ((found.stage.sum(axis=1) >= 12) & (found.stage.sum(axis=1) <= 20)).all()
    for scores, stage, true in zip(found.scores, found.stage, expected, strict=True):
        floor = scores[~stage][0]
        assert (scores[~stage] == floor).all()
        kept = stage & (scores > floor)
        np.testing.assert_allclose(scores[kept], true[kept], atol=2e-4 * np.abs(true).max())
        assert kept.sum() >= 11  # all but the one that is the floor
    assert (full.trace(queries, rows).stage, full.trace(queries, rows).plan.strategy) == (None, "full")


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_a_causal_model_goes_on_from_stored_states(layout, tmp_path):
    tokenizer = train_tokens()
    model = untrained(layout, len(tokenizer))
    asked = [f"What is the capital of {place}?{' Say it.' * i}" for i in range(8) for place, _ in FACTS]
    rows = Dataset.from_dict({"prompt": asked, "completion": [f" It is {city}." for _, city in FACTS] * 8})
    tracer = ForwardInf(model, tokenizer, ascent=PLAIN, keep=8, audit=4, cache_dir=tmp_path)
    full = (
        tracer.with_options(keep=None, cache_dir=tmp_path / "other").trace(questions(), rows, strategy="full").scores
    )
    for _ in range(2):  # the second time with stored states alone
        found = tracer.trace(questions(), rows, strategy="screen")
        kept = found.stage & (found.scores > found.scores.min(axis=1, keepdims=True))
        assert (kept.sum(axis=1) >= 7).all()
        np.testing.assert_allclose(found.scores[kept], full[kept], atol=1e-4)
        tracer = tracer.with_options(ascent=replace(PLAIN, radius=0.6))
        full = tracer.with_options(keep=None).trace(questions(), rows, strategy="full").scores
    assert list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize("mode", ["descent", "symmetric"])
@pytest.mark.filterwarnings("ignore:mode=")
def test_modes_are_screened_too(mode, model, tokenizer, queries, rows):
    ascent = AscentConfig(direction="gradient", radius=0.5, mode=mode)
    tracer = ForwardInf(model, tokenizer, ascent=ascent, screen="bm25", keep=5, audit=0, strategy="screen")
    expected = tracer.with_options(strategy="full", screen=None, keep=None).trace(queries, rows).scores
    kept = BM25(model, tokenizer).trace(queries, rows, top_k=5).indices
    found = np.take_along_axis(tracer.trace(queries, rows).scores, kept, axis=1)
    np.testing.assert_allclose(found, np.take_along_axis(expected, kept, axis=1), atol=1e-4)


def test_only_what_was_drawn_and_lies_above_the_floor_keeps_its_score(line):
    query, candidates = points(((3, 1), 0)), points(*(((i, 1), 0.5 * i) for i in range(40)))
    full = ForwardInf(adapter=line).trace(query, candidates).scores
    worst = Known(-full)  # keeps the lowest
    tracer = ForwardInf(adapter=line, screen=worst, keep=3, audit=30, strategy="screen")
    with pytest.warns(
        UserWarning, match=r"The screen fails: known finds 0\.\d+ .* Give another screen, a larger keep"
    ):
        found = tracer.trace(query, candidates)
    lowest = np.argsort(full[0])[:3]
    assert found.stage.sum() == 33
    assert found.scores[0][~found.stage[0]].tolist() == [full[0][lowest].min()] * 7
    np.testing.assert_allclose(found.scores[found.stage], full[found.stage], rtol=1e-6)


@pytest.mark.parametrize(
    ("kept", "audited", "floor"),
    [
        (np.arange(40.0), np.array([np.nan, *np.linspace(0, 10, 11)]), 9.0),  # the second of eleven
        (np.arange(40.0), np.arange(100.0, 110.0), 15.0),  # the 25th best of the kept
        (np.arange(40.0), np.arange(-20.0, -10.0), 0.0),  # the lowest of the kept
        (np.arange(40.0), np.array([]), 0.0),
        (np.arange(5.0), np.arange(100.0, 110.0), 0.0),
    ],
)
def test_the_floor_is_what_one_in_ten_of_the_audited_reaches(kept, audited, floor):
    assert floor_under(kept, audited) == floor


def test_kept_candidates_below_the_floor_have_it(line):
    query, candidates = points(((3, 1), 0)), points(*(((i, 1), 0.5 * i) for i in range(100)))
    full = ForwardInf(adapter=line).trace(query, candidates).scores[0]
    order = np.argsort(-full)
    kept = np.concatenate([order[:30], order[-30:]])  # the best, and the worst
    screen = Known(np.isin(np.arange(100), kept)[None].astype(float))
    tracer = ForwardInf(adapter=line, screen=screen, keep=60, audit=39, strategy="screen")
    found = tracer.trace(query, candidates)
    others = np.delete(full, kept)
    reached = [np.quantile(np.delete(others, i), 0.9) for i in range(40)]  # one of them was not drawn
    floor = found.scores.min()
    assert np.isclose(np.clip(reached, full[order[-1]], full[order[24]]), floor, rtol=1e-6).any()
    kept_own = np.isin(np.arange(100), kept) & ~(full < floor)
    np.testing.assert_allclose(found.scores[0][kept_own], full[kept_own], rtol=1e-6)
    assert found.stage[0][kept].tolist() == kept_own[kept].tolist()
    assert 25 <= kept_own.sum() < 60


def test_a_second_trace_computes_nothing_and_a_wider_one_only_what_is_new(line):
    query, candidates = points(((3, 1), 0)), points(*(((i, 1), 0.5 * i) for i in range(40)))
    order = Known(np.arange(40.0)[None])
    tracer = ForwardInf(adapter=line, screen=order, keep=10, audit=0, strategy="screen", max_batch_length=5)
    first = tracer.trace(query, candidates)
    passes = line.passes
    assert passes == 40 / 5 + 1 + 10 / 5  # base losses, ascent, kept
    np.testing.assert_array_equal(tracer.trace(query, candidates).scores, first.scores)
    assert line.passes == passes
    tracer.with_options(keep=20).trace(query, candidates)
    assert line.passes == passes + 1 + 10 / 5


def test_an_interrupted_run_resumes_with_the_query_where_it_stopped(line, monkeypatch, tmp_path):
    queries = points(((3, 1), 0), ((1, 2), 0), ((2, 2), 1))
    candidates = points(*(((i, 1), 0.5 * i) for i in range(40)))
    monkeypatch.setattr(Perturber, "block_size", 1)
    order = Known(np.tile(np.arange(40.0), (3, 1)))
    tracer = ForwardInf(adapter=line, screen=order, keep=10, audit=0, strategy="screen")
    run = KeptPass.run

    def killed(self, theta, key, rows):
        if line.passes > 4:
            raise KeyboardInterrupt
        return run(self, theta, key, rows)

    monkeypatch.setattr(KeptPass, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        tracer.trace(queries, candidates)
    monkeypatch.setattr(KeptPass, "run", run)
    passes = line.passes
    resumed = tracer.trace(queries, candidates)
    assert line.passes <= passes + 4  # two ascents, two kept passes
    again = tracer.with_options(cache_dir=tmp_path / "other").trace(queries, candidates)
    np.testing.assert_array_equal(resumed.scores, again.scores)


def test_states_are_computed_once_for_all_queries(model, tokenizer, queries, rows, monkeypatch):
    adapter = Seq2SeqAdapter(model, tokenizer)
    encoded = []
    run = Seq2SeqAdapter.run_shared
    monkeypatch.setattr(
        Seq2SeqAdapter, "run_shared", lambda self, batch: encoded.append(len(batch["labels"])) or run(self, batch)
    )
    tracer = ForwardInf(adapter=adapter, ascent=PLAIN, screen="bm25", keep=20, audit=0, strategy="screen")
    tracer.trace(queries, rows)
    assert len(rows) <= sum(encoded) <= len(rows) + len(queries) + 3  # ascents, and first rows that were tried
    encoded.clear()
    tracer.with_options(ascent=AscentConfig(direction="gradient", radius=1.0)).trace(queries, rows)
    assert sum(encoded) <= len(queries) + 1


def test_a_screen_of_the_users_reads_its_own_model_and_other_candidates_next(model, tokenizer, queries, rows):
    adapter = Seq2SeqAdapter(model, tokenizer)
    screen = RepresentationSimilarity(adapter=adapter)
    tracer = ForwardInf(adapter=adapter, ascent=PLAIN, screen=screen, keep=10, audit=0, strategy="screen")
    found = tracer.trace(queries, rows)
    others = rows.select(range(100, 150))
    expected = RepresentationSimilarity(model, tokenizer).trace(queries, others).scores
    np.testing.assert_allclose(screen.trace(queries, others).scores, expected, atol=1e-5)
    kept = RepresentationSimilarity(model, tokenizer).trace(queries, rows, top_k=10).indices
    for stage, best in zip(found.stage, kept, strict=True):
        assert set(np.flatnonzero(stage)) == set(best)


def test_a_full_pass_goes_on_from_stored_states_too(model, tokenizer, queries, rows, tmp_path, monkeypatch):
    tracer = ForwardInf(model, tokenizer, ascent=PLAIN, strategy="full")
    tracer.trace(queries.select([0]), rows)
    encoded, run = [], Seq2SeqAdapter.run_shared
    monkeypatch.setattr(
        Seq2SeqAdapter, "run_shared", lambda self, batch: encoded.append(len(batch["labels"])) or run(self, batch)
    )
    found = tracer.trace(queries, rows)
    assert sum(encoded) <= len(queries) + 3  # ascents, and first rows that were tried
    apart = tracer.with_options(storage=0, cache_dir=tmp_path / "other").trace(queries, rows)
    np.testing.assert_allclose(found.scores, apart.scores, atol=1e-5 * np.abs(apart.scores).max())
    weights = dict(model.named_parameters())
    with torch.no_grad():
        weights["shared.weight"] += 0.1  # other states
    changed = tracer.trace(queries, rows)
    apart = tracer.with_options(storage=0, cache_dir=tmp_path / "third").trace(queries, rows)
    np.testing.assert_allclose(changed.scores, apart.scores, atol=1e-5 * np.abs(apart.scores).max())


def test_auto_screens_language_models_where_that_saves_something(model, tokenizer, queries, corpus, line):
    tracer = ForwardInf(model, tokenizer, ascent=PLAIN)
    plan = tracer.plan(queries, corpus["abstracts"])
    assert (plan.strategy, plan.screen, plan.audit) == ("screen", "bm25+representation", 30)
    assert plan.keep == np.ceil(0.05 * len(corpus["abstracts"]))
    assert "base losses and hidden states: 1 pass" in str(plan)
    assert tracer.plan(queries, corpus["abstracts"].select(range(200))).reason == "a screen would save little"
    assert tracer.with_options(screen="bm25").plan(queries, corpus["abstracts"].select(range(200))).screen == "bm25"
    assert tracer.with_options(keep=999).plan(queries, corpus["abstracts"]).strategy == "full"
    many = points(*(((i, 1), 0.5 * i) for i in range(400)))
    assert ForwardInf(adapter=line).plan(many, many).reason == "the best for this kind of model"


def test_a_plan_names_what_is_cached_and_is_kept_with_the_result(model, tokenizer, queries, rows, tmp_path):
    tracer = ForwardInf(model, tokenizer, ascent=PLAIN, keep=10, audit=5)
    before = tracer.plan(queries, rows)
    found = tracer.trace(queries, rows, strategy="screen", top_k=4)
    after = tracer.with_options(strategy="screen").plan(queries, rows)
    assert before.strategy == "screen" and not before.parts[0].cached and after.parts[0].cached
    assert after.passes < before.passes and "cached" in str(after)
    found.save_to_disk(tmp_path / "found")
    again = Attribution.load_from_disk(tmp_path / "found")
    assert again.plan == found.plan and again.plan.audits[0].drawn == 15
    np.testing.assert_array_equal(again.stage, found.stage)


def test_auto_takes_the_full_pass_where_the_audit_finds_that_a_screen_fails(model, tokenizer, queries, corpus):
    rows = corpus["abstracts"].select(range(300))
    tracer = ForwardInf(model, tokenizer, ascent=PLAIN, screen=Random(seed=1), keep=20, audit=60)
    with pytest.warns(UserWarning, match="The screen fails: random finds 0.*Another way is taken instead"):
        found = tracer.trace(corpus["queries"].select(range(10)), rows)
    assert found.plan.strategy == "full" and found.plan.reason == "random failed"
    assert found.plan.audits[0].recall < 0.4
    expected = tracer.with_options(screen=None, strategy="full").trace(corpus["queries"].select(range(10)), rows)
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.stage, expected.stage)


def test_auto_tries_the_parts_of_the_default_screen_before_the_full_pass(model, tokenizer, corpus, monkeypatch):
    queries, rows = corpus["queries"].select(range(10)), corpus["abstracts"].select(range(300))
    tracer = ForwardInf(model, tokenizer, ascent=PLAIN, keep=20, audit=30)
    good = tracer.with_options(keep=None).trace(queries, rows, strategy="full").scores
    monkeypatch.setattr(BM25, "score", lambda self, asked, candidates: -good)  # the worst, which spoils both
    with pytest.warns(UserWarning, match="The screen fails"):
        found = tracer.with_options(keep=20).trace(queries, rows)
    tried = [audit.screen for audit in found.plan.audits]
    assert tried == ["bm25+representation", "bm25", "representation"][: len(tried)] and len(tried) > 1
    monkeypatch.setattr(RepresentationSimilarity, "score", lambda self, asked, candidates: good)
    monkeypatch.setattr(strategy, "failed", lambda audit: audit.screen != "representation")
    with pytest.warns(UserWarning, match="The screen fails"):
        found = tracer.trace(queries, rows)
    assert found.plan.screen == "representation" and len(found.plan.audits) == 3
    best = np.argsort(-good, axis=1)[:, :20]
    np.testing.assert_array_equal(np.take_along_axis(found.stage, best, axis=1), True)


def test_a_full_pass_can_set_all_but_the_best_to_a_floor(model, tokenizer, queries, rows, corpus):
    full = ForwardInf(model, tokenizer, ascent=PLAIN, strategy="full").trace(queries, rows).scores
    found = ForwardInf(model, tokenizer, ascent=PLAIN, strategy="full", keep=7).trace(queries, rows)
    for scores, stage, true in zip(found.scores, found.stage, full, strict=True):
        best = np.argsort(-true)[:7]
        assert set(np.flatnonzero(stage)) == set(best)
        np.testing.assert_array_equal(scores[best], true[best])
        assert (scores[~stage] == true[best].min()).all()
    for rows, own in ((corpus["abstracts"].select(range(100)), 50), (corpus["abstracts"].select(range(40)), 40)):
        found = ForwardInf(model, tokenizer, ascent=PLAIN).trace(queries, rows)  # the default of language models
        assert found.plan.strategy == "full" and found.plan.keep == (50 if len(rows) > 50 else None)
        assert found.stage is None if len(rows) == 40 else (found.stage.sum(axis=1) == own).all()
    scores, stage = floored(np.array([[np.nan, 2, 1, 0], [np.nan, np.nan, np.nan, 1]], dtype=np.float32), 2)
    np.testing.assert_array_equal(scores, [[np.nan, 2, 1, 1], [np.nan, np.nan, np.nan, 1]])


def test_within_a_time_budget_the_best_are_scored_first(model, tokenizer, queries, rows):
    tracer = ForwardInf(model, tokenizer, ascent=PLAIN, screen="bm25", strategy="screen")
    first = BM25(model, tokenizer).trace(queries, rows, top_k=64).indices
    found = tracer.trace(queries, rows, time_budget=1e-6)
    for stage, best in zip(found.stage, first, strict=True):
        assert set(np.flatnonzero(stage)) == set(best)
    expected = tracer.with_options(strategy="full", screen=None).trace(queries, rows).scores
    np.testing.assert_allclose(tracer.trace(queries, rows, time_budget=600).scores, expected, atol=1e-4)


def test_levels_tokens_and_reranking_read_only_scores_of_their_own(model, tokenizer, queries, corpus):
    rows = corpus["abstracts"].select(range(300))
    tracer = ForwardInf(model, tokenizer, ascent=PLAIN, keep=12, audit=50, screen="bm25")
    found = tracer.trace(queries, rows, strategy="screen")
    full = tracer.trace(queries, rows, strategy="full")
    for i in range(len(queries)):
        estimate, true = found.background(i), full.background(i)
        assert estimate.count == pytest.approx(300, abs=20)
        assert abs(estimate.median - true.median) < true.spread
        assert found.levels(i, 3) is not None
    explained = tracer.explain(found, k=40).details
    for row in explained:
        assert found.stage[row["query"], row["candidate"]]
        score = found.scores[row["query"], row["candidate"]]
        assert sum(row["term_scores"]) == pytest.approx(score, abs=1e-3)
    assert 3 * 12 <= len(explained) <= found.stage.sum()
    again = tracer.rerank(found, k=40)
    own = tracer.self_influence(rows)
    for i, scores in enumerate(again.scores):
        known = ~np.isnan(scores)
        assert found.stage[i][again.indices[i][known]].all()
        expected = found.scores[i][again.indices[i][known]] / own[again.indices[i][known]]
        np.testing.assert_allclose(scores[known], expected, rtol=1e-3)


def test_a_query_that_cannot_move_the_model_has_no_scores_and_a_lost_candidate_none(line):
    queries, candidates = points(((3, 1), 0), ((0, 0), 0)), points(*(((i, 1), 0.5 * i) for i in range(40)))
    candidates = candidates.map(
        lambda row, i: {**row, "x": [float("inf"), 1.0]} if i == 39 else row, with_indices=True
    )
    order = Known(np.tile(np.arange(40.0)[::-1], (2, 1)))
    tracer = ForwardInf(adapter=line, screen=order, keep=10, audit=0, strategy="screen")
    with pytest.warns(UserWarning) as said:
        found = tracer.trace(queries, candidates)
    assert {"Queries row 1", "Candidates ro"} <= {str(one.message)[:13] for one in said}
    assert np.isnan(found.scores[1]).all() and np.isnan(found.scores[0, 39])
    assert np.isfinite(found.scores[0, :39]).all()


def test_the_plan_of_long_work_is_printed_to_stderr(model, tokenizer, queries, rows, monkeypatch, capsys):
    monkeypatch.setattr(strategy, "LONG", 1)
    tracer = ForwardInf(model, tokenizer, ascent=PLAIN)
    tracer.trace(queries, rows)
    assert capsys.readouterr().err == ""  # progress bars are off
    monkeypatch.setattr(strategy, "are_progress_bars_disabled", lambda: False)
    tracer.trace(queries, rows)
    assert "3 queries: the finite step on all 150 candidates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"strategy": "some"}, ValueError, "strategy='some' must be one of"),
        ({"keep": 0}, ValueError, "keep=0 must be a whole number of at least 1"),
        ({"audit": -1}, ValueError, "audit=-1 must be a whole number of at least 0"),
        ({"storage": -1}, ValueError, "storage=-1 must be at least 0"),
        ({"screen": 3}, TypeError, "screen=3 must be the name of an attributor"),
        ({"screen": "bm25", "strategy": "full"}, ValueError, "leave out screen, or strategy"),
    ],
)
def test_options_out_of_range_are_refused(options, error, message, line):
    with pytest.raises(error, match=message):
        ForwardInf(adapter=line, **options)


def test_screens_that_do_not_fit_are_refused(line, model, tokenizer, queries, rows):
    many = points(*(((i, 1), 0.5 * i) for i in range(400)))
    with pytest.raises(TypeError, match="screen='bm25' does not fit: BM25 compares words"):
        ForwardInf(adapter=line, screen="bm25").trace(many, many)
    with pytest.raises(ValueError, match="neither texts nor representations"):
        ForwardInf(adapter=line, strategy="screen").trace(many, many)
    with pytest.raises(ValueError, match="screen='bm26' is no attributor"):
        ForwardInf(model, tokenizer, screen="bm26", keep=5, audit=5).trace(queries, rows)
