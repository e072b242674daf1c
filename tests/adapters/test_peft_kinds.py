"""Models with adapters of PEFT's kinds: losses and scores against PEFT's own loss, one unpadded row at a time."""

import peft
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.ascent.parameters import names_for
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.utils.fingerprints import fingerprint_of_model
from hf_forward_inf.utils.models import peft_parameters
from tests.helpers.line import assert_same_state, state
from tests.helpers.texts import SENTENCES, WORDS, assert_close, plain_scores, randomised, tokenizer

KIND = {"task_type": "CAUSAL_LM"}
LINEAR = {**KIND, "target_modules": ["q_proj", "o_proj"]}
READ = sorted(set(tokenizer()(SENTENCES[0])["input_ids"]))
KINDS = {
    "prompt tuning": peft.PromptTuningConfig(**KIND, num_virtual_tokens=3),
    "p-tuning": peft.PromptEncoderConfig(**KIND, num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix tuning": peft.PrefixTuningConfig(**KIND, num_virtual_tokens=3),
    "ia3": peft.IA3Config(**KIND, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": peft.VeraConfig(**LINEAR, r=2),
    "lora": peft.LoraConfig(**LINEAR, r=2, bias="lora_only", modules_to_save=["lm_head"]),
    "dora": peft.LoraConfig(**LINEAR, r=2, use_dora=True),
    "lora and tokens": peft.LoraConfig(**LINEAR, r=2, trainable_token_indices=READ),
    "tokens": peft.TrainableTokensConfig(**KIND, token_indices=READ),
    "norms": peft.LNTuningConfig(**KIND),
    "adaption prompt": peft.AdaptionPromptConfig(**KIND, adapter_layers=2, adapter_len=3),
}
LEARNED = ("prompt tuning", "p-tuning", "prefix tuning")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


def tuned(kind):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = peft.get_peft_model(randomised(LlamaForCausalLM(config)), KINDS[kind])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn_like(p)
    return model.eval()


def rows():
    return Dataset.from_dict({"text": SENTENCES[:4]})


def loss_of(model, row):
    ids = tokenizer()(SENTENCES[row], return_tensors="pt")["input_ids"]
    labels = torch.cat([torch.full((1, 1), -100), ids[:, 1:]], dim=1)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss * (ids.shape[1] - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_scores_are_those_of_pefts_own_loss(kind, tmp_path):
    model = tuned(kind)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(peft_parameters(model)) == trained
    before = state(model)
    with torch.no_grad():
        expected = [loss_of(model, row).item() for row in range(4)]
    assert_close(LossPass(CausalLMAdapter(model, tokenizer()), rows(), cache_dir=tmp_path).base(), expected)
    for modules in (None, ["all"], [next(iter(sorted(trained)))]):
        ascent = AscentConfig(direction="gradient", radius=0.3, modules=modules)
        tracer = ForwardInf(model, tokenizer(), falls=1, ascent=ascent, cache_dir=tmp_path)
        found = tracer.trace(rows().select([0]), rows()).scores[0]
        assert_same_state(before, state(model))
        names = names_for(tracer.adapter, tracer.ascent)
        if modules is None:
            assert set(names) <= trained and (kind not in LEARNED or set(names) == trained)
        assert_close(found, plain_scores(model, lambda row: loss_of(model, row), 0, range(4), 0.3, names))


def test_an_adapters_scale_and_its_being_off_are_part_of_a_models_name():
    model = tuned("lora")
    names = [fingerprint_of_model(model)]
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.scaling["default"] *= 2
    names.append(fingerprint_of_model(model))
    with model.disable_adapter():
        names.append(fingerprint_of_model(model))
    assert len(set(names)) == 3
    layer.scaling["default"] /= 2
    assert fingerprint_of_model(model) == names[0]
