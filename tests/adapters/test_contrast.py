import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.ascent.parameters import names_for
from hf_forward_inf.ascent.steps import Perturbation
from hf_forward_inf.baselines import TracIn
from hf_forward_inf.curvature.directions import direction_for
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.utils.models import linear_layers
from tests.helpers.causal import questions, train_tokens, untrained

RADIUS = 0.3
PLAIN = AscentConfig(direction="gradient", radius=RADIUS)


@pytest.fixture(scope="module")
def tokens():
    return train_tokens()


@pytest.fixture(params=["llama", "gpt2"])
def network(request, tokens):
    return untrained(request.param, len(tokens))


@pytest.fixture(scope="module")
def rows():
    return questions()


@pytest.fixture(scope="module")
def pairs():
    asked = ["What is the capital of Peru?", "What is the capital of Cuba?"]
    said = [" It is Rome.", " Havana"]
    return Dataset.from_dict({"prompt": asked, "completion": said, "contrast": [" It is Lima, I think.", " Nairobi"]})


def loss_of(network, tokens, prompt, completion):
    before, ids = (torch.tensor([tokens(text)["input_ids"]]) for text in (prompt, prompt + completion + "<end>"))
    logits = network(ids).logits[0, before.shape[1] - 1 : -1]
    return F.cross_entropy(logits, ids[0, before.shape[1] :], reduction="sum")


def scores_after_a_step(network, names, loss, losses):
    """How much the candidates' losses rise after one step of the radius along the gradient of a loss."""
    own = dict(network.named_parameters())
    slopes = torch.autograd.grad(loss(), [own[name] for name in names], materialize_grads=True)
    length = torch.stack([slope.norm() for slope in slopes]).norm()
    with torch.no_grad():
        before = losses()
        theta = {name: own[name].clone() for name in names}
        for name, slope in zip(names, slopes, strict=True):
            own[name] += RADIUS * slope / length
        after = losses()
        for name in names:
            own[name].copy_(theta[name])
    return [a - b for a, b in zip(after, before, strict=True)]


def expected(network, tokens, pair, rows, names=None):
    def loss():
        halves = (loss_of(network, tokens, pair["prompt"], pair[half]) for half in ("completion", "contrast"))
        return next(halves) - next(halves)

    def losses():
        return [loss_of(network, tokens, row["prompt"], row["completion"]).item() for row in rows]

    return scores_after_a_step(network, names or [n for n, _ in network.named_parameters()], loss, losses)


@pytest.mark.parametrize("modules", [["all"], None])
def test_scores_are_those_of_a_step_along_the_difference_of_both_losses(network, tokens, pairs, rows, modules):
    ascent = AscentConfig(direction="gradient", radius=RADIUS, modules=modules)
    tracer = ForwardInf(network, tokens, ascent=ascent)
    names = names_for(tracer.adapter, ascent)
    found = tracer.trace(pairs, rows).scores
    for i, pair in enumerate(pairs):
        np.testing.assert_allclose(found[i], expected(network, tokens, pair, rows, names), rtol=2e-3, atol=2e-4)
    renamed = tracer.trace(pairs.rename_column("contrast", "rejected"), rows)
    np.testing.assert_array_equal(renamed.scores, found)


def test_messages_take_another_last_answer(network, tokens, rows):
    asked = [{"role": "user", "content": "Peru?"}]
    talk = [*asked, {"role": "assistant", "content": "Rome"}]
    other = [{"role": "assistant", "content": "Lima"}]
    tracer = ForwardInf(network, tokens, ascent=PLAIN)
    wholes = Dataset.from_list([{"messages": talk, "contrast": "Lima"}])
    in_turns = Dataset.from_list([{"messages": talk, "contrast": other}])
    in_parts = Dataset.from_list([{"prompt": asked, "completion": talk[1:], "contrast": other}])
    found = [tracer.trace(queries, rows).scores for queries in (wholes, in_turns, in_parts)]
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], found[2], rtol=1e-5)

    def loss():
        start = tokens("<|user|>Peru?<end><|assistant|>")["input_ids"]
        losses = []
        for answer in ("Rome<end>", "Lima<end>"):
            ids = torch.tensor([start + tokens(answer)["input_ids"]])
            logits = network(ids).logits[0, len(start) - 1 : -1]
            losses.append(F.cross_entropy(logits, ids[0, len(start) :], reduction="sum"))
        return losses[0] - losses[1]

    def losses():
        return [loss_of(network, tokens, row["prompt"], row["completion"]).item() for row in rows]

    names = names_for(tracer.adapter, tracer.ascent)
    wanted = scores_after_a_step(network, names, loss, losses)
    np.testing.assert_allclose(found[0][0], wanted, rtol=2e-3, atol=2e-4)


def test_seq2seq_models_are_asked_why_this_rather_than_that(model, tokenizer, queries, candidates):
    few = candidates.select(range(6))
    pair = queries.select([0]).add_column("contrast", ["<extra_id_0> Peru"])
    tracer = ForwardInf(model, tokenizer, ascent=PLAIN)

    def loss_of(inputs, target):
        ids, labels = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (inputs, target))
        logits = model(input_ids=ids, labels=labels).logits[0]
        return F.cross_entropy(logits, labels[0], reduction="sum")

    def loss():
        inputs, said = (pair[0][column] for column in tracer.adapter.columns)
        return loss_of(inputs, said) - loss_of(inputs, pair[0]["contrast"])

    def losses():
        return [loss_of(*(row[column] for column in tracer.adapter.columns)).item() for row in few]

    wanted = scores_after_a_step(model, names_for(tracer.adapter, tracer.ascent), loss, losses)
    np.testing.assert_allclose(tracer.trace(pair, few).scores[0], wanted, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("direction", ["kfac", "ekfac", "cg"])
def test_corrected_directions_correct_the_gradient_of_the_difference(network, tokens, pairs, rows, direction):
    adapter = CausalLMAdapter(network, tokens)
    config = AscentConfig(direction=direction, radius=RADIUS).completed(adapter.default_ascent)
    names = names_for(adapter, config)
    fitted = direction_for(config, adapter, rows, names)
    (theta, _) = Perturbation(adapter, encode(adapter, pairs, "queries")[:], names, config, fitted).thetas
    own = dict(network.named_parameters())
    pair = pairs[0]
    difference = loss_of(network, tokens, pair["prompt"], pair["completion"])
    difference = difference - loss_of(network, tokens, pair["prompt"], pair["contrast"])
    slopes = torch.autograd.grad(difference, [own[name] for name in names], materialize_grads=True)
    step = fitted.correction()(list(slopes))
    moved = torch.cat([(theta[name] - own[name]).detach().flatten() for name in names])
    wanted = torch.cat([part.flatten() for part in step])
    assert moved.norm().item() == pytest.approx(RADIUS, rel=1e-3)
    assert F.cosine_similarity(moved, wanted, dim=0).item() > 0.999


def test_steps_of_low_rank_give_the_scores_of_changed_weights(network, tokens, pairs, rows, monkeypatch):
    monkeypatch.setattr("hf_forward_inf.ascent.parameters.SMALL", 0)
    weights = [name for name in linear_layers(network) if ".1." in name]
    ascent = AscentConfig(direction="gradient", step="low_rank", modules=weights, radius=RADIUS)
    through = ForwardInf(network, tokens, ascent=ascent)
    found = through.trace(pairs, rows).scores
    for i, pair in enumerate(pairs):
        np.testing.assert_allclose(found[i], expected(network, tokens, pair, rows, weights), rtol=5e-3, atol=5e-4)


def test_a_query_without_a_contrast_has_its_ordinary_scores(network, tokens, pairs, rows):
    tracer = ForwardInf(network, tokens, ascent=PLAIN)
    mixed = pairs.remove_columns("contrast").add_column("contrast", [None, pairs[1]["contrast"]])
    found = tracer.trace(mixed, rows).scores
    np.testing.assert_allclose(found[0], tracer.trace(pairs.remove_columns("contrast"), rows).scores[0], rtol=1e-4)
    np.testing.assert_allclose(found[1], tracer.trace(pairs, rows).scores[1], rtol=1e-4)


def test_a_column_of_contrasts_changes_no_candidate(network, tokens, pairs, rows):
    tracer = ForwardInf(network, tokens, ascent=PLAIN)
    others = rows.add_column("contrast", [" It is London."] * len(rows))
    np.testing.assert_array_equal(tracer.trace(pairs, others).scores, tracer.trace(pairs, rows).scores)


def test_a_model_that_is_indifferent_still_moves(tokens, pairs, rows):
    network = untrained("llama", len(tokens))
    torch.nn.init.zeros_(network.lm_head.weight)  # all tokens are equally likely: the difference of equal lengths is 0
    pair = {"prompt": "What is the capital of Peru?", "completion": " ab", "contrast": " cd"}
    queries = Dataset.from_list([pair])
    ascent = AscentConfig(direction="gradient", radius=RADIUS, modules=["all"])
    found = ForwardInf(network, tokens, ascent=ascent).trace(queries, rows).scores
    wanted = expected(network, tokens, pair, rows)
    assert max(map(abs, wanted)) > 1e-3
    np.testing.assert_allclose(found[0], wanted, rtol=2e-3, atol=2e-4)


def test_first_order_scores_are_the_differences_of_both_halves(network, tokens, pairs, rows):
    tracin = TracIn(network, tokens, similarity="dot")
    halves = [Dataset.from_dict({"prompt": pairs["prompt"][:], "completion": pairs[half][:]})
              for half in ("completion", "contrast")]  # fmt: skip
    said, other = (tracin.trace(half, rows).scores for half in halves)
    np.testing.assert_allclose(tracin.trace(pairs, rows).scores, said - other, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("contrast", "reason"),
    [
        ([" It is Lima.", " "], "row 1: its `contrast` is empty"),
        ([" It is Rome.", " Nairobi"], "row 0: its `contrast` is the output itself"),
    ],
)
def test_a_contrast_that_says_nothing_is_refused_by_row(network, tokens, pairs, rows, contrast, reason):
    queries = pairs.remove_columns("contrast").add_column("contrast", contrast)
    with pytest.raises(ValueError, match=reason):
        ForwardInf(network, tokens, ascent=PLAIN).trace(queries, rows)


def test_a_span_and_a_contrast_exclude_each_other(network, tokens, pairs, rows):
    spans = pairs.add_column("span", ["Rome", "Havana"])
    with pytest.raises(ValueError, match="either a `span` or a contrast"):
        ForwardInf(network, tokens, ascent=PLAIN).trace(spans, rows)
