import numpy as np
import pytest
from experiments.fact_tracing import FtraceOptions

from hf_forward_inf import AscentConfig
from tests.helpers.recipes import recipe

main = recipe("ftrace").main
GRADIENT = AscentConfig(direction="gradient")
"""For tests of what holds along any direction: no curvature is fitted."""
pytestmark = pytest.mark.usefixtures("measured_once")


@pytest.fixture
def options(model, tokenizer, corpus, tmp_path):
    """An untrained model's folder and parquet files, as options."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    corpus["abstracts"].select(range(600)).to_parquet(tmp_path / "candidates.parquet")
    corpus["queries"].to_parquet(tmp_path / "queries.parquet")
    names = {"model": "model", "candidates": "candidates.parquet", "queries": "queries.parquet"}
    given = {name: str(tmp_path / file) for name, file in names.items()}
    return {**given, "output": str(tmp_path / "out"), "num_queries": 4, "unanswered": True, "num_candidates": 120}


def test_kinds_of_queries_are_reported_apart(options, corpus, tmp_path, monkeypatch):
    # An untrained model answers nothing: let it be told that it answered every other query.
    right = [target if i % 2 else "" for i, target in enumerate(corpus["queries"]["targets_pretokenized"])]
    texts = dict(zip(corpus["queries"]["inputs_pretokenized"], right, strict=True))
    monkeypatch.setattr(
        "hf_forward_inf.adapters.Seq2SeqAdapter.answer",
        lambda self, rows: [texts[text] for text in rows["inputs_pretokenized"]],
    )
    metrics = main(FtraceOptions(**options, paraphrased=True), GRADIENT)
    assert metrics["queries"] == 16  # 4 answered, 4 not, and all of them in other words
    mean = np.mean([metrics["answered/mrr"], metrics["unanswered/mrr"]])
    assert metrics["mrr"] == pytest.approx(mean)  # the main group is both, paraphrases not among them
    for method in ("", "bm25/", "fixed_learning_rate/"):
        assert 0 <= metrics[f"{method}paraphrased/mrr"] <= 1


def test_repeats_give_means_and_their_standard_errors(options, tmp_path):
    runs = []
    for name, seed, repeats in (("one", 0, 1), ("two", 1, 1), ("both", 0, 2)):
        given = FtraceOptions(
            **{**options, "output": str(tmp_path / name)}, repeats=repeats, baselines=False, seed=seed
        )
        runs.append(main(given, GRADIENT))
    values = [run["mrr"] for run in runs]
    assert values[0] != values[1]
    assert values[2] == pytest.approx(np.mean(values[:2]))
    assert runs[2]["mrr_se"] == pytest.approx(np.std(values[:2], ddof=1) / 2**0.5)


def test_queries_can_be_ranked_among_candidates_of_their_own(options):
    options = {**options, "num_candidates": None, "own_candidates": True}
    metrics = main(FtraceOptions(**options, baselines=False), GRADIENT)
    assert metrics["mrr_random"] < metrics["random/mrr"]  # all candidates against a query's own


def test_the_run_can_train_a_model_of_its_own(options, capsys):
    options = {key: value for key, value in options.items() if key != "model"}
    main(FtraceOptions(**options, train=True, epochs=1, baselines=False), GRADIENT)
    assert "a tiny mT5 trained on the candidates" in capsys.readouterr().out


def test_a_model_that_answers_nothing_is_refused(options):
    with pytest.raises(ValueError, match="answers none of the queries exactly"):
        main(FtraceOptions(**{**options, "unanswered": False}), GRADIENT)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "m"}, "give --candidates and --queries with it"),
        ({"candidates": "c", "queries": "q"}, "either --model, trained before, or --train"),
        (
            {"model": "m", "candidates": "c", "queries": "q", "train": True},
            "either --model, trained before, or --train",
        ),
        ({"num_queries": 0}, "--num_queries must be at least 1"),
        ({"num_candidates": 9, "own_candidates": True}, "either --own_candidates"),
    ],
)
def test_impossible_options_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        FtraceOptions(**given)
