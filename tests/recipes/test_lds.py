import json
import re

import numpy as np
import pytest
import torch
from experiments.counterfactual import Counterfactual, CounterfactualOptions, answered_by
from experiments.lds import LdsOptions, retrain_subsets
from experiments.retrainable import digits
from experiments.retrainable_facts import facts, losses_and_answers
from experiments.retrainable_sentences import sentences

from hf_forward_inf import Attribution, ForwardInf
from hf_forward_inf.cli import run_command
from hf_forward_inf.scores.retraining import without_best
from tests.helpers.recipes import recipe

SMALL = ["--num_candidates", "60", "--num_queries", "4", "--subsets", "4", "--seeds", "2", "--dampings", "0.1"]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr("experiments.retrainable.STEPS", 20)


def run(command, folder, *options):
    words = ["--output", str(folder), *SMALL, "--directions", "gradient", "kfac", *options]
    kind = {"lds": LdsOptions, "counterfactual": CounterfactualOptions}[command]
    return run_command(recipe(command).main, kind, arguments=words, bars=False)


def test_lds_judges_every_attributor_beside_chance(tmp_path, capsys):
    assert run("lds", tmp_path, "--without", "influence_functions_lissa", "--top_k", "5") == 0
    found = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("", "tuned/", "kfac_symmetric/", "kfac_first_order/", "kfac_seeds/", "tracin/", "random/"):
        assert found[f"{name}lds_low"] <= found[f"{name}lds"] <= found[f"{name}lds_high"]
    assert found["tuned/direction"] in ("gradient", "kfac")
    assert found["kfac/damping"] == 0.1
    assert "influence_functions_lissa/lds" not in found
    assert "kfac_seeds" in capsys.readouterr().out
    found_by_default = Attribution.load_from_disk(tmp_path / "attribution")
    assert found_by_default.indices.shape == (4, 5)
    page = (tmp_path / "report.html").read_text()
    assert page.count('<use href="#p') >= 4 * 6  # four queries, five candidates each
    assert "<svg" in page and "kfac_seeds" in page
    assert run("lds", tmp_path) == 1
    assert "already holds a run" in capsys.readouterr().err


def test_a_counterfactual_run_tells_rises_and_answers_that_are_gone(tmp_path):
    assert (
        run("counterfactual", tmp_path, "--share", "0.1", "--explained", "3", "--without", "influence_functions_lissa")
        == 0
    )
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert (found["removed"], found["queries"]) == (6, 3)
    assert found["random/rise_over_random"] == 0
    assert {"rise", "rise_median", "tuned/rise", "tracin/answer_gone"} <= set(found)
    assert found["tracin/rise_behind"] == pytest.approx(found["rise"] - found["tracin/rise"], abs=1e-6)
    assert found["tracin/rise_behind_low"] <= found["tracin/rise_behind"] <= found["tracin/rise_behind_high"]
    page = (tmp_path / "report.html").read_text()
    assert len(re.findall("<h2>.*, really ", page)) == found["wrong_answers"]
    assert (tmp_path / "attribution").is_dir()


def test_a_run_that_was_interrupted_trains_nothing_twice(tmp_path, monkeypatch):
    options = ("--share", "0.1", "--without", "influence_functions_lissa")
    assert run("counterfactual", tmp_path, *options) == 0
    monkeypatch.setattr("hf_forward_inf.scores.batched_training.BatchedTraining.__call__", None)  # not called again
    first = json.loads((tmp_path / "metrics.json").read_text())
    assert run("counterfactual", tmp_path, *options, "--overwrite") == 0
    second = json.loads((tmp_path / "metrics.json").read_text())
    assert {key: value for key, value in first.items() if "rise" in key or "gone" in key} == {
        key: value for key, value in second.items() if "rise" in key or "gone" in key
    }


def test_other_queries_are_not_taken_for_those_that_were_kept():
    task = digits(candidates=60, queries=4)
    subsets = np.ones((1, 60), dtype=bool)
    mine, others = (task.retrained(rows, subsets, 1) for rows in (task.queries, task.others))
    assert mine.shape == others.shape == (1, 1, 4, 2)
    assert not np.array_equal(mine, others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "deep"}, "--network must be one of perceptron, conv"),
        ({"subsets": 1}, "--subsets must be at least 2"),
        ({"directions": ["up"]}, "--directions must be one of gradient, kfac"),
        ({"without": ["forward_inf"]}, "--without forward_inf leaves nothing to compare with"),
    ],
)
def test_impossible_options_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        LdsOptions(**options)


def test_some_queries_are_explained_at_least():
    with pytest.raises(ValueError, match="--explained must be at least 1, not 0"):
        CounterfactualOptions(explained=0)


def test_a_share_that_takes_nothing_away_is_told():
    with pytest.raises(ValueError, match=r"--share 0.001 of 800 candidates removes none"):
        CounterfactualOptions(share=0.001)


def test_what_is_taken_away_is_compared_with_the_same_seeds_trained_on_everything():
    task = digits(candidates=60, queries=4)
    queries, wrong = answered_by(task.adapter(0), task.queries)
    truth = Counterfactual(task, queries, seeds=2)
    nothing = truth.without(np.ones((4, 60), dtype=bool))
    np.testing.assert_array_equal(nothing.rises, 0)
    np.testing.assert_array_equal(nothing.gone[~np.isnan(nothing.gone)], 0)
    agree = np.array(queries["label"]) == np.array(task.queries["label"])
    np.testing.assert_array_equal(wrong, ~agree)
    kept = without_best(ForwardInf(adapter=task.adapter(0)).trace(queries, task.candidates).dense(), 6)
    assert (kept.sum(axis=1) == 54).all()
    expected = []
    for i, row in enumerate(kept):
        x, label = ([queries[name][i]] for name in ("x", "label"))
        models = [[task.train(queries).model(seed, rows) for seed in range(2)] for rows in (row, np.ones(60, bool))]
        adapter = task.adapter(0)
        batch = adapter.collate(adapter.encode({"x": x, "label": label}))
        without, whole = (np.mean([adapter.loss(model, batch).item() for model in some]) for some in models)
        expected.append(without - whole)
    np.testing.assert_allclose(truth.without(kept).rises, expected, atol=1e-4)


@pytest.mark.parametrize(("name", "make"), [("facts", facts), ("sentences", sentences)])
def test_a_language_model_is_trained_again_without_half_of_its_sentences(name, make, monkeypatch):
    training = {"epochs": 1, "learning_rate": 1e-3}
    monkeypatch.setattr(f"experiments.retrainable_{name}.TRAINING", training)
    task = make(candidates=40, queries=3)
    measured, others = retrain_subsets(task, LdsOptions(task=name, subsets=3, seeds=1))
    assert measured.losses.shape == others.losses.shape == (3, 3)
    kept = task.candidates.select(np.flatnonzero(measured.subsets[1]))
    again = task.adapter(0, kept)
    batch = again.collate(again.encode(measured.queries[:]))
    np.testing.assert_allclose(measured.losses[1], again.loss(again.model, batch).detach().numpy(), rtol=1e-5)


def test_other_sentences_are_another_task():
    few, same, more = (facts(candidates=40, queries=queries) for queries in (3, 3, 4))
    assert few.key == same.key != more.key  # the queries' proponents are among the candidates


def test_a_language_models_answer_goes_away_without_the_rows_that_taught_it(monkeypatch, tmp_path):
    training = {"epochs": 12, "learning_rate": 8e-3, "batch_length": 512}
    monkeypatch.setattr("experiments.retrainable_facts.TRAINING", training)
    task = facts(candidates=40, queries=3)
    adapter = task.adapter(0)
    queries, _ = answered_by(adapter, task.queries)
    found = losses_and_answers(adapter, queries)
    for i, (loss, given) in enumerate(found.tolist()):
        batch = adapter.collate(adapter.encode(queries[i : i + 1]))
        assert given == 1  # it was asked for its own answers
        assert loss == pytest.approx(adapter.loss(adapter.model, batch).item(), rel=1e-4)
    others = queries.map(lambda row: {"targets_pretokenized": row["targets_pretokenized"] + " not"})
    torch.testing.assert_close(losses_and_answers(adapter, others)[:, 1], torch.zeros(3))
    truth = Counterfactual(task, queries, seeds=1)
    assert truth.whole[0, :, 1].tolist() == [1, 1, 1]
    taught = np.ones((3, 40), dtype=bool)
    taught[:, :30] = False
    assert truth.without(taught).rises.mean() > 0
