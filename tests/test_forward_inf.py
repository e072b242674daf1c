import copy
import warnings

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from transformers import BertConfig, BertModel, pipeline

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import Seq2SeqAdapter, TensorAdapter
from hf_forward_inf.algorithm import _warn_of_mode
from tests.helpers import digits
from tests.helpers.line import assert_same_state, points, state


def by_hand(model, tokenizer, query, candidates, radius):
    """The paper's Algorithm 1 the plain way: one row at a time, in place on a copy, transformers' own loss."""

    def batch(row):
        inputs = tokenizer(row["inputs_pretokenized"], return_tensors="pt")
        return {**inputs, "labels": tokenizer(row["targets_pretokenized"], return_tensors="pt")["input_ids"]}

    def losses():
        with torch.no_grad():
            return np.array([model(**b).loss.item() * b["labels"].shape[1] for b in map(batch, candidates)])

    model = copy.deepcopy(model).eval()
    base = losses()
    model(**batch(query)).loss.backward()
    moved = [p for name, p in model.named_parameters() if name.startswith(("decoder.", "lm_head"))]
    norm = torch.cat([p.grad.flatten() for p in moved]).norm()
    with torch.no_grad():
        for p in moved:
            p += radius * p.grad / norm
    return losses() - base


@pytest.fixture
def tracer(model, tokenizer):
    return ForwardInf(model, tokenizer)


def test_scores_are_those_of_the_algorithm_written_out_by_hand(tracer, tokenizer, queries, candidates):
    tracer = tracer.with_options(ascent=AscentConfig(direction="gradient"))
    found = tracer.trace(queries, candidates)
    for i, query in enumerate(queries):
        expected = by_hand(tracer.adapter.model, tokenizer, query, candidates, radius=1.0)
        np.testing.assert_allclose(found.scores[i], expected, atol=2e-4)
    assert found.scores.dtype == np.float32
    assert found.scores.shape == (3, 40)


def test_rises_are_shares_of_the_candidates_losses_on_request():
    network, rows = digits.perceptron(), digits.rows(90, 100)
    data = rows.with_format("torch")[:]
    losses = torch.nn.functional.cross_entropy(network(data["x"]), data["label"], reduction="none").detach().numpy()
    tracer = ForwardInf(adapter=TensorAdapter(network), ascent=AscentConfig(direction="gradient", radius=0.1))
    shares = tracer.with_options(units="base_loss")
    plain, found = (one.trace(rows.select(range(3)), rows) for one in (tracer, shares))
    np.testing.assert_allclose(found.scores, plain.scores / losses, rtol=1e-5)
    assert (plain.config["units"], found.config["units"]) == ("loss", "base_loss")
    np.testing.assert_allclose(found.standardised().scores, found.scores - found.scores.mean(axis=0), atol=1e-5)
    with pytest.raises(ValueError, match="units='loss'"):
        shares.rerank(found)
    with pytest.raises(ValueError, match="leave it out with measure='shift'"):
        shares.with_options(measure="shift")
    with pytest.raises(ValueError, match="leave it out with falls=0"):
        shares.with_options(falls=0)
    with pytest.raises(ValueError, match="falls=0 is for rises of the loss"):
        tracer.with_options(falls=0, measure="shift")
    with pytest.raises(ValueError, match="losses that were to rise"):
        tracer.with_options(falls=0, ascent=AscentConfig(mode="descent"))
    sure = ForwardInf(adapter=TensorAdapter(network, objective="margin"), units="base_loss", ascent=tracer.ascent)
    with pytest.raises(ValueError, match=r"divides by losses, and that of candidate \d+ is negative"):
        sure.trace(rows.select(range(3)), rows)


def test_shares_are_the_same_by_term_and_by_row(model, tokenizer, queries, candidates):
    options = {"ascent": AscentConfig(direction="gradient"), "units": "base_loss"}
    one, other = (ForwardInf(model, tokenizer, reduction=reduction, **options) for reduction in ("sum", "mean"))
    expected = one.trace(queries, candidates).scores
    np.testing.assert_allclose(other.trace(queries, candidates).scores, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["descent", "symmetric"])
def test_a_mode_that_is_worse_for_language_models_warns_once(model, tokenizer, line, mode):
    _warn_of_mode.cache_clear()
    with pytest.warns(UserWarning, match=f"mode='{mode}' .*loses .1.*, against mode='ascent'") as caught:
        tracer = ForwardInf(model, tokenizer, ascent=AscentConfig(mode=mode))
        tracer.with_options(reduction="mean")
    assert sum("mode=" in str(one.message) for one in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ForwardInf(adapter=line, ascent=AscentConfig(mode=mode))


def test_on_two_parameters_scores_are_those_on_paper(line):
    # w = (1, -2); the query's gradient (6, 2) normalised to radius sqrt(40) / 2 moves w to (4, -1).
    tracer = ForwardInf(adapter=line, ascent=AscentConfig(radius=40**0.5 / 2))
    found = tracer.trace(points(((3, 1), 0)), points(((1, 0), 0), ((0, 1), 0), ((3, 1), 0)))
    np.testing.assert_allclose(found.scores, [[16 - 1, 1 - 4, 11**2 - 1]], rtol=1e-5)


def test_a_proponent_scores_high_under_ascent_and_under_descent(line):
    for mode in ("ascent", "descent"):
        tracer = ForwardInf(adapter=line, ascent=AscentConfig(radius=0.1, mode=mode))
        scores = tracer.trace(points(((3, 1), 0)), points(((3, 1), 0), ((1, -3), 7.5))).scores[0]
        assert scores[0] > 0.1
        assert abs(scores[1]) < 1e-5  # its input is orthogonal to the step


def test_the_mean_reduction_divides_by_the_number_of_target_tokens(tracer, tokenizer, queries, candidates):
    total = tracer.trace(queries, candidates).scores
    mean = tracer.with_options(reduction="mean").trace(queries, candidates).scores
    tokens = [len(tokenizer(text)["input_ids"]) for text in candidates["targets_pretokenized"]]
    np.testing.assert_allclose(mean, total / np.array(tokens), rtol=1e-6)


def test_language_models_have_no_shift_and_say_so(tracer, queries, candidates):
    with pytest.raises(NotImplementedError, match="for classifiers"):
        tracer.with_options(measure="shift").trace(queries, candidates)


def test_top_k_keeps_the_best(tracer, queries, candidates):
    everything, best = tracer.trace(queries, candidates), tracer.trace(queries, candidates, top_k=5)
    assert best.scores.shape == (3, 5)
    np.testing.assert_array_equal(best.indices, [everything.ranking(i)[:5] for i in range(3)])


def test_top_k_above_the_number_of_candidates_keeps_all(tracer, queries, candidates):
    assert tracer.trace(queries, candidates, top_k=1000).scores.shape == (3, 40)


def test_dropout_is_off_and_training_mode_comes_back(model, tokenizer, queries, candidates, tmp_path):
    expected = ForwardInf(model, tokenizer).trace(queries, candidates).scores
    model.train()
    model.decoder.block[0].eval()
    model.encoder.block[0].requires_grad_(False)
    before = state(model)
    scores = ForwardInf(model, tokenizer, cache_dir=tmp_path / "other").trace(queries, candidates).scores
    np.testing.assert_array_equal(scores, expected)
    assert_same_state(before, state(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [0, 3, 12])
def test_the_model_is_restored_bit_for_bit_when_interrupted(
    model, tokenizer, queries, candidates, monkeypatch, error, calls
):
    model.train()
    before = state(model)
    losses, count = Seq2SeqAdapter.term_losses, iter(range(10**6))

    def interrupted(self, forward, batch):
        if next(count) == calls:
            raise error("in the middle")
        return losses(self, forward, batch)

    monkeypatch.setattr(Seq2SeqAdapter, "term_losses", interrupted)
    with pytest.raises(error):
        ForwardInf(model, tokenizer, max_batch_length=200).trace(queries, candidates)
    assert_same_state(before, state(model))


def test_a_query_that_moves_nothing_has_no_scores_and_is_named(line):
    with pytest.warns(UserWarning, match=r"Queries row 1: the gradient is zero or not finite"):
        found = ForwardInf(adapter=line).trace(points(((3, 1), 0), ((0, 0), 1)), points(((1, 0), 0), ((0, 1), 0)))
    assert np.isnan(found.scores[1]).all()
    assert np.isfinite(found.scores[0]).all()
    assert len(found.top(1)) == 0


def test_a_candidate_without_a_finite_loss_is_named_and_ranked_last(line):
    with pytest.warns(UserWarning, match="Candidates row 0: the loss is NaN or infinite"):
        found = ForwardInf(adapter=line).trace(points(((3, 1), 0)), points(((1e30, 0), 0), ((0, 1), 0), ((3, 1), 0)))
    assert np.isnan(found.scores[0, 0])
    assert found.ranking(0).tolist() == [2, 1, 0]


def test_no_rows_are_refused(tracer, queries, candidates):
    with pytest.raises(ValueError, match="There are no candidates"):
        tracer.trace(queries, candidates.select([]))
    with pytest.raises(ValueError, match="There are no queries"):
        tracer.trace(queries.select([]), candidates)


def test_a_missing_column_is_named(tracer, queries, candidates):
    with pytest.raises(ValueError, match=r"Rows need columns `inputs_pretokenized` and .*; these have id, text"):
        tracer.trace(queries, candidates.rename_column("inputs_pretokenized", "text"))


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_an_empty_target_is_named_by_its_row(tracer, queries, candidates, empty):
    rows = candidates.to_list()
    rows[7]["targets_pretokenized"] = empty
    with pytest.raises(ValueError, match="Nothing to predict in candidates row 7: `targets_pretokenized` is empty"):
        tracer.trace(queries, type(candidates).from_list(rows))


def test_texts_that_are_no_texts_are_refused(tracer, queries, candidates):
    numbers = candidates.remove_columns("targets_pretokenized").add_column("targets_pretokenized", list(range(40)))
    with pytest.raises(ValueError, match="row 0: `targets_pretokenized` holds int where a text must be"):
        tracer.trace(queries, numbers)


def test_one_warning_counts_the_rows_that_are_truncated(model, tokenizer, queries, candidates):
    rows = candidates.to_list()
    for row in (3, 5):
        rows[row]["inputs_pretokenized"] = "a long story " * 200
    tracer = ForwardInf(adapter=Seq2SeqAdapter(model, tokenizer, max_length=64))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = tracer.trace(queries, type(candidates).from_list(rows)).scores
    messages = [str(w.message) for w in caught if "truncated" in str(w.message)]
    expected = "Candidates longer than the model's maximum length are truncated: of 40 rows, 2 lose their ends."
    assert messages == [expected]
    assert np.isfinite(scores).all()


def test_a_model_without_labels_is_refused():
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=10)
    with pytest.raises(TypeError, match="No adapter knows BertModel"):
        ForwardInf(BertModel(config))


def test_a_seq2seq_model_without_its_tokenizer_is_refused(model):
    with pytest.raises(TypeError, match="needs its tokenizer"):
        ForwardInf(model)


def test_a_model_that_is_not_loaded_is_refused(model, tokenizer, queries, candidates):
    with pytest.raises((ValueError, NotImplementedError), match="meta"):
        ForwardInf(model.to("meta"), tokenizer).trace(queries, candidates)


def test_bfloat16_ranks_nearly_as_float32(model, tokenizer, queries, candidates):
    full = ForwardInf(model, tokenizer).trace(queries, candidates)
    before = state(model.bfloat16())
    half = ForwardInf(model, tokenizer).trace(queries, candidates)
    assert half.scores.dtype == np.float32
    assert np.corrcoef(full.scores.ravel(), half.scores.ravel())[0, 1] > 0.99
    assert_same_state(before, state(model))


def test_from_pipe_takes_the_pipelines_model(model, tokenizer, queries, candidates):
    pipe = pipeline("data-attribution", model=model, tokenizer=tokenizer, candidates=candidates, device=-1)
    tracer = ForwardInf.from_pipe(pipe, reduction="mean")
    assert tracer.adapter.model is model
    assert tracer.trace(queries, candidates).config["reduction"] == "mean"


def test_unknown_options_are_refused(tracer):
    with pytest.raises(TypeError, match="no option 'score'"):
        tracer.with_options(score=None)
    with pytest.raises(TypeError, match="no option 'radius'; it has adapter, ascent"):
        tracer.with_options(radius=1.0)
    with pytest.raises(TypeError, match="needs a model"):
        ForwardInf()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("reduction", "median", r"reduction='median' must be one of \('sum', 'mean'\)"),
        ("units", "nats", "units='nats' must be one of"),
        ("measure", "sideways", "measure='sideways' must be one of"),
        ("falls", 1.5, "falls=1.5 must be between 0 and 1"),
        ("max_batch_length", -1, "max_batch_length=-1 must be a whole number of at least 1"),
        ("max_batch_length", 2.5, "max_batch_length=2.5 must be a whole number"),
    ],
)
def test_other_options_are_checked_as_the_constructors(tracer, option, value, message):
    with pytest.raises(ValueError, match=message):
        ForwardInf(adapter=tracer.adapter, **{option: value})
    with pytest.raises(ValueError, match=message):
        tracer.with_options(**{option: value})


def test_other_options_leave_the_rest_as_it_was(tracer, tmp_path):
    ascent = AscentConfig(direction="gradient", radius=0.5)
    first = tracer.with_options(ascent=ascent, reduction="mean", cache_dir=tmp_path, max_batch_length=7)
    other = first.with_options(reduction="sum")
    assert other.config == first.config | {"reduction": "sum"}
    assert (other.cache_dir, other.max_batch_length, other.adapter) == (tmp_path, 7, tracer.adapter)
    assert first.reduction == "mean" and other.with_options(ascent=None).ascent == tracer.ascent


def test_nothing_is_written_beside_the_users_data(tracer, queries, candidates, tmp_path):
    folders = [tmp_path / name for name in ("queries", "candidates")]
    rows = []
    for folder, data in zip(folders, (queries, candidates), strict=True):
        data.save_to_disk(folder)
        rows.append(load_from_disk(folder))
    before = [sorted(folder.rglob("*")) for folder in folders]
    found = tracer.explain(tracer.trace(*rows, top_k=5), k=2)
    assert [len(found.top(i, 3)) for i in range(len(found))] == [3] * len(queries)
    found.to_html(tmp_path / "why.html")
    assert [sorted(folder.rglob("*")) for folder in folders] == before
