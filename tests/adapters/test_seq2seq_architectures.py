"""Encoder-decoder models of many architectures: scores are those of an independent computation, row by row."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    MBart50Tokenizer,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import Seq2SeqAdapter, adapter_for
from hf_forward_inf.ascent.parameters import names_for

BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 0}
ARCHITECTURES = {
    "t5": T5, "mt5": T5, "umt5": T5, "longt5": T5,
    "switch_transformers": {**T5, "num_sparse_encoder_layers": 0, "num_sparse_decoder_layers": 0},
    "bart": BART, "mbart": BART, "marian": BART, "pegasus": BART, "blenderbot": BART, "blenderbot-small": BART,
    "m2m_100": BART, "mvp": BART, "plbart": BART,
    "nllb-moe": {**BART, "num_experts": 2, "encoder_sparse_step": 0, "decoder_sparse_step": 0},
    "fsmt": {**BART, "langs": ["en", "de"]},
    "pegasus_x": {**BART, "num_global_tokens": 2, "block_size": 8},
    "led": {**BART, "attention_window": 8, "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64},
}  # fmt: skip


def untrained(kind, vocabulary):
    torch.manual_seed(0)
    names = ("src_vocab_size", "tgt_vocab_size") if kind == "fsmt" else ("vocab_size",)
    config = AutoConfig.for_model(kind, **dict.fromkeys(names, vocabulary), **IDS, **ARCHITECTURES[kind])
    config.decoder_start_token_id = 0
    return livened(AutoModelForSeq2SeqLM.from_config(config))


def livened(model):
    """Weights of a size at which every input counts."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def plain_scores(model, losses, names, radius):
    """One normalised step along the gradient of the first row's loss, in plain torch."""
    parameters = [model.get_parameter(name) for name in names]
    gradients = torch.autograd.grad(losses(0), parameters, allow_unused=True, materialize_grads=True)
    step = radius / torch.stack([g.norm() for g in gradients]).norm()
    with torch.no_grad():
        before = torch.stack([losses(i) for i in range(3)])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter += step * gradient
        return (torch.stack([losses(i) for i in range(3)]) - before).numpy()


def assert_scores_agree(model, tokenizer, rows, labels, shifted=None):
    """Under default settings and with all parameters, against rows that are read one by one."""
    for modules in (None, ["all"]):
        tracer = ForwardInf(model, tokenizer, ascent=AscentConfig(direction="gradient", radius=0.3, modules=modules))
        found = tracer.trace(rows.select([0]), rows).scores[0]
        plain = copy.deepcopy(model).requires_grad_(True)  # positions that are computed are frozen

        def losses(i, plain=plain):
            ids, target = (
                torch.tensor([one]) for one in (tokenizer(rows[i]["inputs_pretokenized"])["input_ids"], labels[i])
            )
            read = {"labels": target} if shifted is None else {"decoder_input_ids": torch.tensor([shifted(labels[i])])}
            return F.cross_entropy(
                plain(input_ids=ids, use_cache=False, **read).logits[0].float(), target[0], reduction="sum"
            )

        expected = plain_scores(plain, losses, names_for(tracer.adapter, tracer.ascent), 0.3)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.fixture(scope="module")
def rows(corpus):
    return corpus["abstracts"].select([0, 7, 30]).select_columns(["inputs_pretokenized", "targets_pretokenized"])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scores_agree(kind, tokenizer, rows):
    labels = [tokenizer(text_target=text)["input_ids"] for text in rows["targets_pretokenized"]]
    # Given labels alone, FSMT reads its inputs for the targets.
    shifted = (lambda ids: [ids[-1], *ids[:-1]]) if kind == "fsmt" else None
    assert_scores_agree(untrained(kind, len(tokenizer)), tokenizer, rows, labels, shifted)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scores_of_two_joined_berts_agree(tokenizer, rows):
    size = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 24, "max_position_embeddings": 64}  # fmt: skip
    decoder = BertConfig(**size, is_decoder=True, add_cross_attention=True)
    torch.manual_seed(0)
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**size), decoder))
    model.config.decoder_start_token_id, model.config.pad_token_id = 2, 0
    labels = [tokenizer(text_target=text)["input_ids"] for text in rows["targets_pretokenized"]]
    assert adapter_for(model, tokenizer).max_target_length == 64
    assert_scores_agree(livened(model), tokenizer, rows, labels)


def test_targets_are_tokenized_in_the_target_language():
    words = ["▁The", "▁capital", "▁of", "▁Peru", "▁is", "▁Lima", "▁Cuba", "▁Havana"]
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -1.0) for word in ["▁", *words])]
    tokens = MBart50Tokenizer(vocab=pieces, src_lang="en_XX", tgt_lang="fr_XX")
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = AutoConfig.for_model("mbart", vocab_size=len(tokens), **BART, **ids, forced_bos_token_id=None)
    torch.manual_seed(0)
    model = livened(AutoModelForSeq2SeqLM.from_config(config))
    rows = Dataset.from_dict({
        "inputs_pretokenized": ["The capital of Peru", "The capital of Cuba is", "Havana"],
        "targets_pretokenized": ["Lima is", "Havana", "The capital of Cuba"],
    })  # fmt: skip
    french = tokens.convert_tokens_to_ids("fr_XX")
    labels = [
        [french, *tokens(text, add_special_tokens=False)["input_ids"], 2] for text in rows["targets_pretokenized"]
    ]
    assert Seq2SeqAdapter(model, tokens).encode(rows[:])["labels"] == labels
    assert_scores_agree(model, tokens, rows, labels)
    answered = Seq2SeqAdapter(model, tokens).with_answers(
        rows.remove_columns("targets_pretokenized"), max_new_tokens=3
    )
    assert [ids[0] for ids in answered["output_ids"]] == [french] * 3
    assert not any("fr_XX" in text for text in answered["targets_pretokenized"])


def test_models_that_cannot_be_read_are_refused(tokenizer, rows):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    decoder = BertConfig(vocab_size=len(tokenizer), **size, is_decoder=True, add_cross_attention=True)
    looks = VisionEncoderDecoderModel(
        VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**size, image_size=8, patch_size=4), decoder)
    )
    with pytest.raises(TypeError, match="VisionEncoderDecoderModel reads pixel_values, not texts"):
        adapter_for(looks, tokenizer)
    prophet = AutoConfig.for_model(
        "prophetnet", vocab_size=len(tokenizer), hidden_size=16, encoder_ffn_dim=24, decoder_ffn_dim=24,
        num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=2, num_decoder_attention_heads=2,
        **IDS,
    )  # fmt: skip
    torch.manual_seed(0)
    with pytest.raises(TypeError, match="losses would depend on the other rows of a batch"):
        ForwardInf(livened(AutoModelForSeq2SeqLM.from_config(prophet)), tokenizer).trace(rows, rows)


def test_other_columns_are_read_as_input_and_target(model, tokenizer):
    adapter = Seq2SeqAdapter(model, tokenizer)
    expected = adapter.encode({"inputs_pretokenized": ["Of Peru?"], "targets_pretokenized": ["Lima"]})
    with pytest.warns(UserWarning, match="`question` is read as the model's input, `answer` as its target"):
        assert adapter.encode({"question": ["Of Peru?"], "answer": ["Lima"]}) == expected
    tokens = {name: expected[name] for name in ("input_ids", "labels")}
    assert adapter.encode(tokens) == expected
    padded = {"input_ids": [[*expected["input_ids"][0], 0]], "labels": [[*expected["labels"][0], -100]],
              "attention_mask": [[1] * len(expected["input_ids"][0]) + [0]]}  # fmt: skip
    assert adapter.encode(padded) == expected
    with pytest.raises(ValueError, match="these have instruction, input, output"):
        adapter.encode({"instruction": ["?"], "input": ["Peru"], "output": ["Lima"]})
