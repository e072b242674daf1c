"""Spans that fine-tuning has taught, against the losses of both models."""

import copy
from itertools import combinations

import pytest
import torch

from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.adapters.spans import greatest_run, learned_spans
from tests.helpers import causal

QUERIES = causal.questions()


@pytest.fixture(scope="module")
def models():
    """A model, and the same with a LoRA that has changed it at random."""
    peft = pytest.importorskip("peft")
    tokens = causal.train_tokens()
    base = causal.untrained("llama", len(tokens))
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    return base, CausalLMAdapter(peft.get_peft_model(copy.deepcopy(base), config).eval(), tokens)


def token_losses(model, tokens, asked, said):
    """The answer's tokens as texts, and their losses, from the model's logits."""
    before, ids = (tokens(text, add_special_tokens=False)["input_ids"] for text in (asked, asked + said))
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    answer = range(len(before), len(ids))
    return [tokens.decode([ids[i]]) for i in answer], [-chances[i - 1, ids[i]].item() for i in answer]


@pytest.mark.parametrize("least", [0.01, 0.05])
def test_the_span_is_the_run_of_tokens_whose_losses_have_fallen_most(least, models):
    base, adapter = models
    found = learned_spans(adapter, QUERIES, least=least)
    for row in found:
        pair = row["prompt"], row["completion"]
        texts, before = token_losses(base, adapter.tokenizer, *pair)
        _, after = token_losses(adapter.model, adapter.tokenizer, *pair)
        gains = [a - b - least for a, b in zip(before, after, strict=True)]
        sums = {(i, j): sum(gains[i:j]) for i, j in combinations(range(len(gains) + 1), 2)}
        i, j = max(sums, key=lambda run: sums[run])
        assert row["span"] == ("".join(texts[i:j]) if sums[i, j] > 0 else None)
    assert any(found["span"]) and found.remove_columns("span").to_list() == QUERIES.to_list()
    given = learned_spans(adapter.with_model(adapter.model), QUERIES, base_model=adapter.model)
    assert given["span"] == [None] * len(QUERIES)  # nothing has changed against itself


def test_what_has_a_span_or_no_base_is_refused(models):
    base, adapter = models
    with pytest.raises(ValueError, match="have a `span` already"):
        learned_spans(adapter, QUERIES.add_column("span", ["It"] * len(QUERIES)))
    with pytest.raises(ValueError, match="give it as base_model="):
        learned_spans(CausalLMAdapter(base, adapter.tokenizer), QUERIES)


@pytest.mark.parametrize(
    ("values", "run"), [([-1, 2, -1, 3, -5, 4], (1, 4)), ([-1, -2], None), ([1, -3, 2], (2, 3)), ([], None)]
)
def test_the_greatest_run_is_the_one_with_the_greatest_sum(values, run):
    assert greatest_run(values) == run
