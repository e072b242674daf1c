import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import MT5ForConditionalGeneration

from hf_forward_inf import ForwardInf
from hf_forward_inf.utils.models import load_language_model


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
    loaded, tokens = load_language_model(str(folder))
    assert isinstance(loaded, PeftModel) and not loaded.training
    assert tokens.get_vocab() == tokenizer.get_vocab()
    one, other = (ForwardInf(m, tokenizer).trace(queries, candidates).scores for m in (tuned, loaded))
    torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(other))
