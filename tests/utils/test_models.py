import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import MT5ForConditionalGeneration

from hf_forward_inf import ForwardInf
from hf_forward_inf.utils.loading import load_model
from hf_forward_inf.utils.models import evaluating


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_an_adapters_folder_is_loaded_with_its_base(model, tokenizer, queries, candidates, tmp_path, own_tokenizer):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    torch.manual_seed(0)
    config = LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "v"], init_lora_weights=False)
    tuned = get_peft_model(MT5ForConditionalGeneration.from_pretrained(base), config).eval()
    tuned.save_pretrained(folder)
    if own_tokenizer:
        tokenizer.save_pretrained(folder)
    loaded, tokens = load_model(str(folder))
    assert isinstance(loaded, PeftModel) and not loaded.training
    assert tokens.get_vocab() == tokenizer.get_vocab()
    one, other = (ForwardInf(m, tokenizer).trace(queries, candidates).scores for m in (tuned, loaded))
    torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(other))


def test_buffers_that_a_forward_writes_to_are_as_they_were():
    class Counting(nn.BatchNorm1d):
        def forward(self, x):
            self.num_batches_tracked += 1
            self.running_mean = self.running_mean + 1
            return F.batch_norm(x, self.running_mean, self.running_var, training=True)

    model = Counting(2)
    before, objects = copy.deepcopy(model.state_dict()), dict(model.named_buffers())
    with evaluating(model):
        model(torch.randn(4, 2))
        assert not torch.equal(model.running_mean, before["running_mean"])
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert all(model.get_buffer(name) is buffer for name, buffer in objects.items())
