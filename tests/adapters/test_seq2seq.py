import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM

from hf_forward_inf.adapters import Seq2SeqAdapter, adapter_for
from hf_forward_inf.ascent.parameters import perturbed_names


@pytest.fixture
def adapter(model, tokenizer):
    return Seq2SeqAdapter(model, tokenizer)


def test_token_losses_are_zero_where_padded_and_sum_to_the_loss(adapter, candidates):
    batch = adapter.collate(adapter.encode(candidates[:8]))
    terms = adapter.term_losses(adapter.model, batch)
    assert terms.shape == batch["labels"].shape
    assert (terms[batch["labels"] == -100] == 0).all()
    assert (terms[batch["labels"] != -100] > 0).all()
    torch.testing.assert_close(adapter.loss(adapter.model, batch), terms.sum(dim=1))


def test_the_encoders_output_stands_in_for_the_inputs(adapter, candidates):
    batch = adapter.collate(adapter.encode(candidates[:8]))
    with torch.no_grad():
        short = adapter.run_shared(batch)
        assert "input_ids" not in short
        torch.testing.assert_close(adapter.loss(adapter.model, short), adapter.loss(adapter.model, batch))


def test_a_long_text_keeps_its_beginning_and_its_end_token(model, tokenizer):
    adapter = Seq2SeqAdapter(model, tokenizer, max_length=5)
    rows = {"inputs_pretokenized": ["Paris is the capital of France."], "targets_pretokenized": ["Paris"]}
    encoded = adapter.encode(rows)
    whole = tokenizer(rows["inputs_pretokenized"][0])["input_ids"]
    assert encoded["input_ids"] == [[*whole[:4], whole[-1]]]
    assert encoded["truncated"] == ["end"]


def test_answers_keep_sentinels_and_drop_padding(adapter, queries):
    answers = adapter.answer(queries[:])
    assert len(answers) == len(queries)
    assert not any("<pad>" in answer or "</s>" in answer for answer in answers)


def test_settings_tell_tokenizers_and_limits_apart(model, tokenizer):
    assert Seq2SeqAdapter(model, tokenizer).cache_key == Seq2SeqAdapter(model, tokenizer).cache_key
    assert Seq2SeqAdapter(model, tokenizer).cache_key != Seq2SeqAdapter(model, tokenizer, max_length=9).cache_key


def test_bart_is_known_too(tokenizer, candidates):
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
        decoder_start_token_id=1, eos_token_id=1, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    adapter = adapter_for(BartForConditionalGeneration(config).eval(), tokenizer)
    assert adapter.max_length == 64
    assert perturbed_names(adapter, None)
    batch = adapter.collate(adapter.encode(candidates[:4]))
    with torch.no_grad():
        own = adapter.model(**batch).loss
        mine = adapter.loss(adapter.model, batch).sum() / (batch["labels"] != -100).sum()
    torch.testing.assert_close(mine, own)


def test_columns_may_have_other_names(model, tokenizer, candidates):
    renamed = candidates.rename_columns({"inputs_pretokenized": "question", "targets_pretokenized": "answer"})
    adapter = Seq2SeqAdapter(model, tokenizer, input_column="question", target_column="answer")
    assert adapter.encode(renamed[:2])["labels"] == Seq2SeqAdapter(model, tokenizer).encode(candidates[:2])["labels"]


def test_models_without_a_decoder_are_refused(tokenizer):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=10)
    with pytest.raises(TypeError, match="AutoModelForSeq2SeqLM"):
        Seq2SeqAdapter(BertForMaskedLM(config), tokenizer)
