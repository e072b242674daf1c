import numpy as np
import pytest
from datasets import Dataset

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.adapters import language as text
from hf_forward_inf.adapters.language import tokenizer_state
from hf_forward_inf.toys.tiny_models import train_tokenizer
from tests.helpers.causal import questions, train_tokens, untrained


def test_a_tokenizers_state_is_the_same_after_its_use():
    used, fresh = (train_tokenizer(["a red square", "a green square"], 300) for _ in range(2))
    used(["a red square"], padding="max_length", truncation=True, max_length=6)
    assert tokenizer_state(used) == tokenizer_state(fresh)
    assert tokenizer_state(used) != tokenizer_state(train_tokenizer(["a blue circle"], 300))


def test_models_of_any_size_are_stepped_along_the_corrected_gradient(model, tokenizer, monkeypatch):
    expected = AscentConfig(direction="kfac", radius=1.5, damping=0.01, sample=128).completed()
    assert ForwardInf(model, tokenizer).ascent == expected
    monkeypatch.setattr(text, "LARGE", 1000)
    assert ForwardInf(model, tokenizer).ascent == expected
    assert not text.can_be_copied(model)


def test_a_tokenizer_of_another_family_is_doubted(tokenizer, recwarn):
    own = untrained("llama", len(tokenizer))
    CausalLMAdapter(own, tokenizer)
    CausalLMAdapter(untrained("llama", len(tokenizer) + 20), tokenizer)  # padded embeddings are common
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM's own tokenizer\? It has 600 tokens and the model 1,200"):
        CausalLMAdapter(untrained("llama", 2 * len(tokenizer)), tokenizer)
    own.config.eos_token_id, own.config.pad_token_id = 17, 18
    with pytest.warns(UserWarning, match="its special tokens have other ids"):
        CausalLMAdapter(own, tokenizer)


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"not LlamaForCausalLM's own tokenizer\. It has 600 tokens and"):
        CausalLMAdapter(untrained("llama", len(tokenizer) - 1), tokenizer)


def test_a_token_that_was_added_for_padding_needs_no_embedding():
    plain, padded = train_tokens(), train_tokens()
    plain.pad_token = None
    padded.add_special_tokens({"pad_token": "[PADS]"})
    model = untrained("llama", len(plain))
    assert padded.pad_token_id == len(plain)
    rows = questions()
    found, expected = (ForwardInf(model, one).trace(rows, rows).scores for one in (padded, plain))
    np.testing.assert_array_equal(found, expected)


def test_a_row_with_an_added_token_that_has_no_embedding_is_refused():
    tokenizer = train_tokens()
    model = untrained("llama", len(tokenizer))
    tokenizer.add_tokens(["Atlantis"])
    rows = Dataset.from_dict({"text": ["It is Rome.", "It is Atlantis."]})
    with pytest.raises(ValueError, match=r"row 1: token 'Atlantis' has the id .* embeddings"):
        ForwardInf(model, tokenizer).trace(rows.select([0]), rows)
