import pytest
import torch

from hf_forward_inf.utils.storage import StoredTensors, cached_tensors


def test_stored_tensors_are_read_one_by_one(tmp_path):
    expected = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2])}
    cached_tensors(tmp_path / "some.safetensors", lambda: expected)
    stored = StoredTensors(tmp_path / "some.safetensors", torch.device("cpu"))
    assert set(stored) == set(expected) and len(stored) == 2
    for name, value in expected.items():
        assert name in stored
        torch.testing.assert_close(stored[name], value)
    assert "c" not in stored and stored.get("c") is None
    with pytest.raises(KeyError):
        stored["c"]
