import pytest
import torch

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import Seq2SeqAdapter
from hf_forward_inf.passes.loss_pass import LossPass
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
    # Ascents, the sample, base losses, one block of queries.
    assert sum(encoder_calls) == len(queries) + 10 + 2 * len(candidates)


def test_the_encoder_runs_for_every_query_that_perturbs_it(model, tokenizer, queries, candidates, encoder_calls):
    tracer = ForwardInf(model, tokenizer, ascent=AscentConfig(direction="gradient", modules=["all"]))
    tried(tracer.adapter)
    tracer.trace(queries, candidates)
    assert sum(encoder_calls) == len(queries) + (1 + len(queries)) * len(candidates)
