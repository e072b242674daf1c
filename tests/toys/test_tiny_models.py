import pytest
import torch

from hf_forward_inf.toys.tiny_models import tiny_mt5


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
