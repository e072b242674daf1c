"""Scores of language models of many architectures against the same computed one unpadded row at a time."""

import inspect
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    CLIPVisionConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.ascent.parameters import names_for
from hf_forward_inf.baselines import TracIn
from hf_forward_inf.curvature.perturber import Perturber
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.utils.fingerprints import fingerprint_of_model
from tests.helpers.line import assert_same_state, state
from tests.helpers.texts import SENTENCES, WORDS, assert_close, plain_scores, randomised, tokenizer

SIZES = {
    "vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 0,
    "hidden_size": 16, "d_model": 16, "n_embd": 16, "dim": 16, "embedding_size": 16, "word_embed_proj_dim": 16,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2, "num_attention_heads": 2, "n_head": 2, "n_heads": 2,
    "num_heads": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_key_value_heads": 1,
    "num_encoder_attention_heads": 2, "num_decoder_attention_heads": 2, "head_dim": 8, "d_kv": 8, "rotary_dim": 8,
    "intermediate_size": 24, "n_inner": 24, "ffn_dim": 24, "d_ff": 24, "hidden_dim": 24, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "feed_forward_size": 24, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
    "max_seq_len": 64, "context_length": 64, "attention_hidden_size": 16, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "shared_expert_intermediate_size": 8, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "state_size": 4,
    "sliding_window": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 16,
}  # fmt: skip
"""Of a tiny model of any kind: what its configuration knows of these."""
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_expand": 2,
    "mamba_chunk_size": 4,
}  # fmt: skip
GEMMA = {
    "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4,
    "vocab_size_per_layer_input": len(WORDS), "hidden_size_per_layer_input": 4,
}  # fmt: skip
CAUSAL = {
    **{
        kind: {}
        for kind in (
            "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2",
            "gemma3_text", "phi", "phi3", "phimoe", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "codegen", "opt",
            "bloom", "mpt", "falcon", "stablelm", "starcoder2", "cohere", "cohere2", "olmo", "olmo2", "olmoe",
            "granite", "granitemoe", "helium", "persimmon", "nemotron", "glm", "glm4", "smollm3", "exaone4", "minimax",
            "mamba", "rwkv", "biogpt", "xglm", "dory", "hrm_text",
        )
    },
    "deepseek_v3": {"num_key_value_heads": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "bert": {"is_decoder": True},
    "roberta": {"is_decoder": True},
    "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 32},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "gemma3n_text": {
        **GEMMA, "num_kv_shared_layers": 2, "laurel_rank": 4, "intermediate_size": [24] * 4,
        "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2,
    },
    "gemma4_text": {**GEMMA, "num_kv_shared_layers": 2, "global_head_dim": 8},
}  # fmt: skip
SEQ2SEQ = (
    "t5", "mt5", "umt5", "longt5", "switch_transformers", "bart", "mbart", "pegasus", "marian", "blenderbot",
    "blenderbot-small", "m2m_100", "nllb-moe", "plbart", "led", "bigbird_pegasus",
)  # fmt: skip
RUN_WHOLE = {"rwkv", "bamba", "dory", "hrm_text", "gemma3n_text", "gemma4_text"}
"""Those whose second half does not follow from the states in the middle."""
DEFAULT = AscentConfig(direction="gradient", radius=0.3)
ALL = AscentConfig(direction="gradient", radius=0.3, modules=["all"])


def untrained(auto, kind, options):
    known = AutoConfig.for_model(kind)
    fields = {*inspect.signature(type(known).__init__).parameters, *vars(known), *known.attribute_map}
    config = AutoConfig.for_model(kind, **{k: v for k, v in SIZES.items() if k in fields} | options)
    torch.manual_seed(0)
    return randomised(auto.from_config(config).float())


def texts():
    return Dataset.from_dict({"text": SENTENCES[:4]})


def loss_of_text(model, row):
    """The loss of a row by itself, without padding, masks or hooks."""
    ids = tokenizer()(SENTENCES[row], return_tensors="pt")["input_ids"]
    return F.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="sum")


def pairs():
    return Dataset.from_dict({"inputs_pretokenized": SENTENCES[:4], "targets_pretokenized": SENTENCES[1:5]})


def loss_of_pair(model, row):
    read = tokenizer()
    ids, labels = (read(SENTENCES[i], return_tensors="pt")["input_ids"] for i in (row, row + 1))
    return F.cross_entropy(model(input_ids=ids, labels=labels).logits[0], labels[0], reduction="sum")


def assert_scores_are_those_of_rows_alone(model, rows, loss_of, cache_dir, whole):
    """With every parameter perturbed, with those of the default, and along the default's direction."""
    loss_of(model, 0)  # RWKV notes that it has been run
    before, key = state(model), fingerprint_of_model(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for ascent in (ALL, DEFAULT):
            tracer = ForwardInf(model, tokenizer(), ascent=ascent, cache_dir=cache_dir)
            found = tracer.trace(rows.select([0]), rows).scores[0]
            assert_same_state(before, state(model))
            names = names_for(tracer.adapter, tracer.ascent)
            assert_close(found, plain_scores(model, lambda row: loss_of(model, row), 0, range(4), 0.3, names))
            assert_same_state(before, state(model))
        assert any("can't be run in two parts" in str(one.message) for one in caught) == whole
        default = ForwardInf(model, tokenizer(), cache_dir=cache_dir)
        found = default.trace(rows.select([0]), rows).scores[0]
        assert_close(found, risen(model, loss_of, moved(default, rows, cache_dir)))
    assert fingerprint_of_model(model) == key


def moved(tracer, rows, cache_dir):
    """The parameters of the default step, which is taken from the library."""
    query = encode(tracer.adapter, rows.select([0]), "queries", cache_dir)
    (theta,) = Perturber(tracer.adapter, tracer.ascent, rows, cache_dir).perturbation(query[:]).thetas
    return theta


@torch.no_grad()
def risen(model, loss_of, theta):
    own = {name: model.get_parameter(name).clone() for name in theta}
    before = torch.stack([loss_of(model, row) for row in range(4)])
    for values in (theta, own):
        after = torch.stack([loss_of(model, row) for row in range(4)])
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
    return after - before


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_scores_are_those_of_rows_by_themselves(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_forward_inf.curvature.kronecker.TARGETS", 24)  # quicker, and as good for this
    model = untrained(AutoModelForCausalLM, kind, CAUSAL[kind])
    assert_scores_are_those_of_rows_alone(model, texts(), loss_of_text, tmp_path, kind in RUN_WHOLE)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_seq2seq_scores_are_those_of_rows_by_themselves(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_forward_inf.curvature.kronecker.TARGETS", 24)
    options = {"decoder_start_token_id": 0, "attention_type": "original_full"}  # what BigBird sets for short texts
    model = untrained(AutoModelForSeq2SeqLM, kind, options)
    assert_scores_are_those_of_rows_alone(model, pairs(), loss_of_pair, tmp_path, False)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bert", {}),
        ("roberta", {}),
        ("xlnet", {"d_inner": 24}),
        ("xlm", {"emb_dim": 16, "n_words": len(WORDS), "pad_index": 0}),
    ],
)
def test_a_model_that_sees_the_tokens_it_is_to_predict_is_refused(kind, options):
    model = untrained(AutoModelForCausalLM, kind, options)
    with pytest.raises(TypeError, match="sees the tokens that it is to predict"):
        ForwardInf(model, tokenizer()).trace(texts(), texts())


class Counting(LlamaForCausalLM):
    """Predictions that depend on how long the batch is."""

    def forward(self, input_ids, **options):
        output = super().forward(input_ids, **options)
        output.logits = output.logits + input_ids.shape[1] * torch.linspace(0, 0.1, len(WORDS))
        return output


def test_rows_that_change_with_their_batch_are_run_one_by_one(tmp_path):
    torch.manual_seed(0)
    model = randomised(Counting(untrained(AutoModelForCausalLM, "llama", {}).config))
    tracer = ForwardInf(model, tokenizer(), ascent=ALL, cache_dir=tmp_path)
    with pytest.warns(UserWarning, match="The loss that Counting gives a row in a batch differs by up to"):
        found = tracer.trace(texts().select([0]), texts()).scores[0]
    assert_close(found, plain_scores(model, lambda row: loss_of_text(model, row), 0, range(4), 0.3))


def test_a_vision_tower_with_as_many_blocks_is_not_taken_for_the_language_model(tmp_path):
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = untrained(AutoModelForCausalLM, "llama", {"num_hidden_layers": 4}).config
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=1)
    torch.manual_seed(0)
    model = randomised(LlavaForConditionalGeneration(config))
    adapter = CausalLMAdapter(model, tokenizer())
    tracer = ForwardInf(adapter=adapter, ascent=DEFAULT, cache_dir=tmp_path)
    found = tracer.trace(texts().select([0]), texts()).scores[0]
    names = names_for(adapter, tracer.ascent)
    assert adapter.shares and not any("vision" in name for name in names)
    assert_close(found, plain_scores(model, lambda row: loss_of_text(model, row), 0, range(4), 0.3, names))


@pytest.mark.parametrize("way", ["torch.compile(model)", "model.compile()", "compiled layers"])
@pytest.mark.parametrize(
    "options",
    [{"step": "full"}, {}, {"direction": "kfac", "sample": 4}, {"direction": "kfac", "sample": 4, "step": "low_rank"}],
)
def test_a_compiled_model_has_the_scores_of_the_model(way, options, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_forward_inf.ascent.parameters.SMALL", 0)
    model = untrained(AutoModelForCausalLM, "llama", {})
    ascent = AscentConfig(**{"direction": "gradient", **options}, radius=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = ForwardInf(model, tokenizer(), ascent=ascent, cache_dir=tmp_path / "plain")
        scores = expected.trace(texts().select([0]), texts()).scores
        torch._dynamo.reset()
        compiled = model
        if way == "torch.compile(model)":
            compiled = torch.compile(model, backend="eager")
        else:
            for module in [model] if way == "model.compile()" else model.model.layers:
                module.compile(backend="eager")
        loss_of_text(compiled, 0)  # compiled by now: hooks that come later would not run
        tracer = ForwardInf(compiled, tokenizer(), ascent=ascent, cache_dir=tmp_path / "compiled")
        np.testing.assert_array_equal(tracer.trace(texts().select([0]), texts()).scores, scores)


def test_a_trace_in_inference_mode_has_the_same_scores(tmp_path):
    model = untrained(AutoModelForCausalLM, "llama", {})
    tracer = ForwardInf(model, tokenizer(), ascent=ALL, cache_dir=tmp_path)
    with torch.inference_mode():
        found = tracer.trace(texts().select([0]), texts()).scores[0]
        made = untrained(AutoModelForCausalLM, "llama", {})
    assert_close(found, plain_scores(model, lambda row: loss_of_text(model, row), 0, range(4), 0.3))
    with pytest.raises(ValueError, match="was made in inference mode, and autograd can't use it"):
        ForwardInf(made, tokenizer()).trace(texts(), texts())


def test_of_an_offloaded_model_what_is_in_memory_is_perturbed(tmp_path):
    untrained(AutoModelForCausalLM, "llama", {}).save_pretrained(tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    ).eval()
    found, expected = (
        ForwardInf(one, tokenizer(), ascent=DEFAULT, cache_dir=tmp_path / name).trace(texts(), texts()).scores
        for name, one in {"offloaded": model, "whole": whole}.items()
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"layers\.0\..+ is not in memory .+ load the model without offloading"):
        ForwardInf(model, tokenizer(), ascent=ALL).trace(texts(), texts())


def test_a_gradient_baseline_names_the_experts_that_it_leaves_out(tmp_path):
    model = untrained(AutoModelForCausalLM, "mixtral", {})
    experts = {name for name, _ in model.named_parameters() if ".experts." in name or ".gate." in name}
    share = sum(model.get_parameter(name).numel() for name in experts) / sum(p.numel() for p in model.parameters())
    with pytest.warns(UserWarning, match=f"tracin leaves out {share:.1%} of the weights, .+layers.0.mlp.experts"):
        found = TracIn(model, tokenizer(), cache_dir=tmp_path).trace(texts().select([0]), texts()).scores[0]
    known = [p for name, p in model.named_parameters() if name not in experts]
    gradients = [torch.autograd.grad(loss_of_text(model, row), known) for row in range(4)]
    products = [sum((a * b).sum().item() for a, b in zip(gradients[0], row, strict=True)) for row in gradients]
    assert_close(found, products, tolerance=2e-3)
