import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import Seq2SeqAdapter
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.utils.fingerprints import uncached
from hf_forward_inf.utils.models import evaluating
from tests.helpers.line import points


@pytest.fixture
def encoder_calls(model):
    """Counts the rows that the encoder reads."""
    rows = []
    model.encoder.register_forward_hook(lambda module, args, output: rows.append(output[0].shape[0]))
    return rows


def tried(adapter):
    """As if it were known how the model may be run: what finds out runs the encoder, too."""
    adapter.shares = adapter.batches_rows = adapter.batches = True


def test_base_losses_are_transformers_own(model, tokenizer, candidates):
    losses = LossPass(Seq2SeqAdapter(model, tokenizer), candidates).base()
    for row, loss in zip(candidates, losses, strict=True):
        inputs = tokenizer(row["inputs_pretokenized"], return_tensors="pt")
        labels = tokenizer(row["targets_pretokenized"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert loss == pytest.approx(model(**inputs, labels=labels).loss.item() * labels.shape[1], rel=1e-5)


def test_a_second_query_costs_one_pass_and_the_same_query_none(line):
    rows = points(((1, 0), 0), ((0, 1), 0))
    tracer = ForwardInf(adapter=line)
    tracer.trace(points(((3, 1), 0)), rows)
    assert line.passes == 3  # the query's ascent, base losses, perturbed losses
    tracer.trace(points(((1, 2), 0)), rows)
    assert line.passes == 5
    tracer.trace(points(((1, 2), 0)), rows)
    assert line.passes == 5


def test_the_encoder_runs_once_for_all_queries_of_a_block(model, tokenizer, queries, candidates, encoder_calls):
    tracer = ForwardInf(model, tokenizer, ascent=AscentConfig(direction="cg", sample=10))
    tried(tracer.adapter)
    tracer.trace(queries, candidates)
    # Ascents, the sample, one block of queries, whose batches give base losses too where nothing is cached.
    assert sum(encoder_calls) == len(queries) + 10 + len(candidates)


def test_base_losses_of_the_first_block_are_those_of_a_pass_of_their_own(model, tokenizer, queries, candidates):
    alone, together = (LossPass(Seq2SeqAdapter(model, tokenizer), candidates) for _ in range(2))
    tracer = ForwardInf(model, tokenizer, ascent=AscentConfig(direction="gradient"))
    ((_, models),) = tracer.models_of(queries, candidates)()
    with evaluating(model):
        alone.base()
        with uncached():
            np.testing.assert_array_equal(together(models), alone(models))
            np.testing.assert_array_equal(together._base, alone.base())


def test_the_encoder_runs_for_every_query_that_perturbs_it(model, tokenizer, queries, candidates, encoder_calls):
    tracer = ForwardInf(model, tokenizer, ascent=AscentConfig(direction="gradient", modules=["all"]))
    tried(tracer.adapter)
    tracer.trace(queries, candidates)
    assert sum(encoder_calls) == len(queries) + (1 + len(queries)) * len(candidates)


@torch.no_grad()
def token_losses(model, theta, ids, labels):
    logits = functional_call(model, theta, (), {"input_ids": ids, "labels": labels}).logits
    return cross_entropy(logits[0], labels[0], reduction="none")


@pytest.mark.parametrize(("strategy", "falls"), [("full", 0.5), ("screen", 0.5), ("full", 0)])
def test_tokens_whose_losses_fall_count_less(strategy, falls, model, tokenizer, queries, candidates):
    ascent = AscentConfig(direction="gradient", modules=["all"], step="full")
    options = {"keep": 5, "audit": 0} if strategy == "screen" else {}
    tracer = ForwardInf(model, tokenizer, falls=falls, ascent=ascent, strategy=strategy, **options)
    scores = tracer.trace(queries.select([0]), candidates).dense()[0]
    (theta,) = tracer.perturber(candidates).perturbation(tracer.adapter.encode(queries[:1])).thetas
    fallen = 0
    for j in np.argsort(-scores)[:4].tolist():
        asked, said = (candidates[j][name] for name in ("inputs_pretokenized", "targets_pretokenized"))
        ids, labels = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (asked, said))
        before, after = (token_losses(model, own, ids, labels) for own in ({}, theta))
        rises = after - before
        fallen += int((rises < 0).sum())
        expected = sum(rise if rise > 0 else falls * rise for rise in rises.tolist())
        assert scores[j] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert fallen  # or plain rises would be the same
