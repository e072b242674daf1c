"""Scores of text classifiers of many architectures against the same computed one unpadded row at a time."""

import warnings

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.curvature.perturber import Perturber
from hf_forward_inf.passes.candidate_pass import encode
from tests.helpers.texts import SENTENCES, WORDS, assert_close, plain_scores, randomised, tokenizer

IDS = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "num_labels": 3}
ENCODER = {
    **IDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 64,
}  # fmt: skip
DECODER = {**ENCODER, "num_key_value_heads": 1, "head_dim": 8}
ARCHITECTURES = {
    "bert": ENCODER,
    "roberta": ENCODER,
    "distilbert": {**IDS, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 64},
    "electra": {**ENCODER, "embedding_size": 12},
    "albert": {**ENCODER, "embedding_size": 12},
    "deberta-v2": {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "conv_kernel_size": 3},
    "mpnet": ENCODER,
    "modernbert": {**ENCODER, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 4},
    "xlnet": {**IDS, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
    "fnet": ENCODER,
    "convbert": {**ENCODER, "embedding_size": 16, "conv_kernel_size": 3, "head_ratio": 1},
    "funnel": {**IDS, "block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24},
    "xlm": {**IDS, "emb_dim": 16, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64, "pad_index": 0},
    "gpt2": {**IDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "llama": DECODER,
    "gemma2": DECODER,
    "t5": {**IDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0},
    "bart": {
        **IDS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 64,
        "decoder_start_token_id": 3, "forced_eos_token_id": 3,
    },
}  # fmt: skip
LABELS = [0, 1, 2, 0, 1, 2]
ALONE = {"xlnet", "fnet", "convbert"}


def classifier(kind, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **ARCHITECTURES[kind], **options)
    return randomised(AutoModelForSequenceClassification.from_config(config))


def loss_of(model, row):
    """The model's own loss of a row by itself."""
    read = tokenizer()(SENTENCES[row], return_tensors="pt")
    if model.config.model_type in ("distilbert", "bart", "llama", "gemma2", "mpnet", "modernbert", "t5"):
        del read["token_type_ids"]
    if model.config.model_type == "fnet":
        del read["attention_mask"]
    return model(**read, labels=torch.tensor([LABELS[row]])).loss


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_scores_are_those_of_rows_by_themselves(kind, tmp_path):
    model, rows = classifier(kind), Dataset.from_dict({"text": SENTENCES, "label": LABELS})
    everything = AscentConfig(direction="gradient", radius=0.3, modules=["all"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # conjugate gradients that stop early, and rows that must stay alone
        tracer = ForwardInf(model, tokenizer(), ascent=everything, cache_dir=tmp_path)
        found = tracer.trace(rows.select([1]), rows).scores[0]
        assert_close(found, plain_scores(model, lambda row: loss_of(model, row), 1, range(6), 0.3))
        assert tracer.adapter.batches_rows == (kind not in ALONE)

        # By default: the same step, taken from the library, under which rows are run by themselves.
        default = ForwardInf(model, tokenizer(), cache_dir=tmp_path)
        found = default.trace(rows.select([1]), rows).scores[0]
        (theta,) = step(default, rows, tmp_path).thetas
    with torch.no_grad():
        before = torch.stack([loss_of(model, row) for row in range(6)])
        for name, value in theta.items():
            model.get_parameter(name).copy_(value)
        risen = torch.stack([loss_of(model, row) for row in range(6)]) - before
    assert_close(found, risen)


def step(tracer, rows, cache):
    query = encode(tracer.adapter, rows.select([1]), "queries", cache)
    return Perturber(tracer.adapter, tracer.ascent, rows, cache).perturbation(query[:])


def test_a_decoder_without_a_padding_token_is_run_row_by_row():
    model, rows = classifier("gpt2"), Dataset.from_dict({"text": SENTENCES, "label": LABELS})
    model.config.pad_token_id = None
    tracer = ForwardInf(model, tokenizer(), ascent=AscentConfig(direction="gradient", radius=0.3))
    with pytest.warns(UserWarning, match="GPT2ForSequenceClassification gives a row in a batch can't be computed"):
        found = tracer.trace(rows.select([1]), rows).scores[0]
    assert_close(found, plain_scores(model, lambda row: loss_of(model, row), 1, range(6), 0.3))


def test_self_influence_and_token_scores_of_a_model_that_mixes_padding_in_are_those_of_rows_by_themselves():
    model, rows = classifier("fnet"), Dataset.from_dict({"text": SENTENCES, "label": LABELS})
    tracer = ForwardInf(model, tokenizer(), ascent=AscentConfig(direction="gradient", radius=0.3))
    with pytest.warns(UserWarning, match="FNetForSequenceClassification gives a row in a batch differs by up to"):
        own = tracer.self_influence(rows)
    expected = [plain_scores(model, lambda row: loss_of(model, row), i, [i], 0.3)[0] for i in range(6)]
    assert_close(own, expected)
    found = tracer.trace(rows.select([1]), rows, top_k=6)
    explained = tracer.explain(found).details
    by_row = dict(zip(explained["candidate"], explained["term_scores"], strict=True))
    assert_close(
        [by_row[i][0] for i in range(6)], plain_scores(model, lambda row: loss_of(model, row), 1, range(6), 0.3)
    )
