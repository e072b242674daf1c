import pytest
import torch
from datasets import Dataset

from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.toys.tiny_models import LLAMA_SIZES, tiny_mt5, train_llama


def test_it_learns_and_is_trained_once(candidates, cache, monkeypatch):
    model, tokenizer = tiny_mt5(candidates, epochs=2)
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>", "<extra_id_0>"]) == [0, 1, 2, 3]
    text = candidates["targets_pretokenized"][0]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == f"{text}</s>"
    monkeypatch.setattr("hf_forward_inf.toys.tiny_models.train_mt5", None)
    again, _ = tiny_mt5(candidates, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not again.training


def test_an_interrupted_training_leaves_nothing(candidates, cache, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_forward_inf.toys.tiny_models.train_mt5", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_mt5(candidates)
    assert list((cache / "models").iterdir()) == []


def test_training_leaves_the_callers_random_numbers_alone(candidates):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    tiny_mt5(candidates, epochs=1)
    assert torch.equal(torch.rand(1), expected)


@pytest.fixture
def few(corpus):
    """Eight sentences as whole texts, which make one batch."""
    return Dataset.from_dict({"text": corpus["abstracts"]["targets_pretokenized"][:8]})


def test_sgd_takes_a_clipped_step_of_the_schedules_length(few, tokenizer):
    sizes = {**LLAMA_SIZES, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    options = {"sizes": sizes, "seed": 0, "epochs": 40, "learning_rate": 0.5, "batch_length": 4096, "quiet": True}
    before = train_llama(few, tokenizer, until=0, **options)
    after = train_llama(few, tokenizer, until=1, optimizer="sgd", **options)
    adapter = CausalLMAdapter(before.eval(), tokenizer)
    features = adapter.encode(few[:])
    loss = adapter.loss(before, adapter.collate(features)).sum() / sum(features["terms"])
    gradient = torch.autograd.grad(loss, list(before.parameters()))
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    rate = 0.5 / 25  # where a one-cycle schedule begins
    for old, g, new in zip(before.parameters(), gradient, after.parameters(), strict=True):
        torch.testing.assert_close(new, old - rate * g / max(1, norm), rtol=1e-4, atol=1e-6)
