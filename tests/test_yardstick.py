"""The known figures of a trained mT5 (design: radius 1 on the decoder gives MRR .979, recall@10 .53)."""

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.data import load_rows, proponents


@pytest.fixture(scope="module")
def yardstick(shared):
    folder = shared / "mt5_facts"
    queries = load_rows(str(folder / "queries.parquet"), "queries")
    queries = queries.filter(lambda row: row["answered"], load_from_cache_file=False).select(range(12))
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "model").eval()
    candidates = load_rows(str(folder / "candidates.parquet"), "abstracts")
    return ForwardInf(model, AutoTokenizer.from_pretrained(folder / "model")), queries, candidates


def test_the_first_queries_find_their_sentences(yardstick):
    tracer, queries, candidates = yardstick
    figures = tracer.trace(queries, candidates).evaluate(proponents(queries, candidates))
    assert figures["mrr"] > 0.9
    assert figures["recall@10"] > 0.45


def test_the_papers_fixed_rate_finds_far_less(yardstick):
    tracer, queries, candidates = yardstick
    fixed = tracer.with_options(ascent=AscentConfig(learning_rate=0.1, modules=["all"]))
    assert fixed.trace(queries, candidates).evaluate(proponents(queries, candidates))["mrr"] < 0.8
