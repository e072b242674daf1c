"""How well facts are traced: with a tiny model that is trained here, and with the mT5 whose figures are known."""

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.data import load_rows, proponents
from hf_forward_inf.evaluation.candidate_sets import candidate_pool
from hf_forward_inf.toys.tiny_models import train_mt5, train_tokenizer

SIZES = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_heads": 4, "num_layers": 1, "num_decoder_layers": 1}
COLUMNS = ("inputs_pretokenized", "targets_pretokenized")


def evaluate(tracer, queries, candidates, **ascent):
    tracer = tracer.with_options(ascent=AscentConfig(**ascent)) if ascent else tracer
    return tracer.trace(queries, candidates).evaluate(proponents(queries, candidates))


@pytest.fixture(scope="module")
def tiny(corpus):
    """A model of 94,000 parameters that has learned 200 sentences; queries ask for their facts in other words."""
    queries = corpus["queries"].select(range(0, 100, 6))
    candidates, _ = candidate_pool(queries, corpus["abstracts"], 200)
    texts = [text for rows in (candidates, queries) for column in COLUMNS for text in rows[column]]
    tokenizer = train_tokenizer(texts, 800)
    model = train_mt5(candidates, tokenizer, 25, 8e-3, 0, sizes=SIZES, batch_length=512, quiet=True)
    return ForwardInf(model.eval(), tokenizer), queries, candidates


def test_facts_are_found_eight_times_better_than_by_chance(tiny):
    figures = evaluate(*tiny)
    assert figures["mrr"] > 0.6 > 8 * figures["mrr_random"]
    assert figures["recall@10"] > 0.5


def test_curvature_and_the_right_length_find_more_than_a_long_step_at_a_fixed_rate(tiny):
    default, gradient, fixed = (
        evaluate(*tiny, **ascent)["mrr"]
        for ascent in ({}, {"direction": "gradient"}, {"learning_rate": 1.0, "modules": ["all"]})
    )
    assert default > gradient > 2 * fixed


@pytest.fixture(scope="module")
def yardstick(shared):
    """The mT5 of 2.1M parameters in the shared folder; radius 1 on its decoder gives MRR .979 and recall@10 .53."""
    folder = shared / "mt5_facts"
    queries = load_rows(str(folder / "queries.parquet"), "queries")
    queries = queries.filter(lambda row: row["answered"], load_from_cache_file=False).select(range(12))
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "model").eval()
    candidates = load_rows(str(folder / "candidates.parquet"), "abstracts")
    return ForwardInf(model, AutoTokenizer.from_pretrained(folder / "model")), queries, candidates


def test_a_model_that_knows_its_facts_by_heart_is_traced_to_them(yardstick):
    figures = evaluate(*yardstick)
    assert figures["mrr"] > 0.9
    assert figures["recall@10"] > 0.45


def test_the_papers_fixed_rate_finds_far_less(yardstick):
    assert evaluate(*yardstick, learning_rate=0.1, modules=["all"])["mrr"] < 0.8
