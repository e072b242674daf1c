from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import language as text
from hf_forward_inf.adapters.language import tokenizer_state
from hf_forward_inf.toys.tiny_models import train_tokenizer


def test_a_tokenizers_state_is_the_same_after_its_use():
    used, fresh = (train_tokenizer(["a red square", "a green square"], 300) for _ in range(2))
    used(["a red square"], padding="max_length", truncation=True, max_length=6)
    assert tokenizer_state(used) == tokenizer_state(fresh)
    assert tokenizer_state(used) != tokenizer_state(train_tokenizer(["a blue circle"], 300))


def test_a_model_too_large_for_copies_is_stepped_along_the_gradient(model, tokenizer, monkeypatch):
    assert ForwardInf(model, tokenizer).ascent == AscentConfig(direction="kfac", radius=2.0, sample=128).completed()
    monkeypatch.setattr(text, "LARGE", 1000)
    assert ForwardInf(model, tokenizer).ascent == AscentConfig(direction="gradient").completed()
