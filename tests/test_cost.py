from datasets import is_caching_enabled

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.cost import measure


def test_costs_are_measured_and_caching_is_left_as_it_was(model, tokenizer, corpus, queries):
    rows = corpus["abstracts"].select(range(300))
    figures = measure(ForwardInf(model, tokenizer, ascent=AscentConfig(modules=["all"])), queries, rows)
    assert 0 < figures["forward_passes_per_query"] < 100
    assert figures.get("peak_memory_ratio", 1) > 0
    assert is_caching_enabled()
