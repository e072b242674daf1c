import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, pipeline

from hf_forward_inf import AscentConfig, ForwardInf
from tests.helpers import texts


@pytest.fixture
def pipe(model, tokenizer, candidates):
    return pipeline("data-attribution", model=model, tokenizer=tokenizer, candidates=candidates, device=-1)


def test_a_row_is_traced_as_forward_inf_does(pipe, model, tokenizer, queries, candidates):
    found = ForwardInf(model, tokenizer).trace(queries.select([0]), candidates).top(0, 3).to_list()
    row = {key: queries[0][key] for key in ("inputs_pretokenized", "targets_pretokenized")}
    answer = pipe(row, top_k=3)
    assert answer == [{**{key: r[key] for key in ("rank", "score", "candidate")}, **r} for r in found]
    assert list(answer[0])[:3] == ["rank", "score", "candidate"]


def test_a_text_is_answered_by_the_model_first(pipe, queries):
    text = queries[0]["inputs_pretokenized"]
    asked = Dataset.from_dict({"inputs_pretokenized": [text]})
    assert pipe(text) == pipe(pipe.tracer.adapter.with_answers(asked)[0])
    assert len(pipe(text)) == 10


def test_a_list_gives_a_list_for_each_and_all_in_one_trace(pipe, queries, monkeypatch):
    texts = queries["inputs_pretokenized"][:]
    singly = [[row["candidate"] for row in pipe(text, top_k=2)] for text in texts]
    calls, trace = [], ForwardInf.trace
    monkeypatch.setattr(ForwardInf, "trace", lambda self, *a, **k: calls.append(1) or trace(self, *a, **k))
    assert [[row["candidate"] for row in rows] for rows in pipe(texts, top_k=2)] == singly
    assert len(calls) == 1
    assert pipe([]) == []


def test_options_of_the_tracer_are_taken(model, tokenizer, candidates):
    ascent = AscentConfig(direction="gradient", radius=0.3)
    pipe = pipeline(
        "data-attribution", model=model, tokenizer=tokenizer, candidates=candidates, ascent=ascent, top_k=4, device=-1,
        reduction="mean", units="base_loss", max_batch_length=99,
    )  # fmt: skip
    tracer = ForwardInf(model, tokenizer, ascent=ascent, reduction="mean", units="base_loss", max_batch_length=99)
    assert pipe.tracer.config == tracer.config and pipe.tracer.max_batch_length == 99
    assert len(pipe("a <extra_id_0>")) == 4


def test_it_loads_from_a_folder_as_from_the_hub(model, tokenizer, candidates, tmp_path, queries):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("data-attribution", model=str(tmp_path), candidates=candidates, device=-1)
    assert len(pipe(queries[0]["inputs_pretokenized"], top_k=1)) == 1


def test_bad_calls_are_refused(pipe, model, tokenizer):
    with pytest.raises(TypeError, match="A query is a text or a row"):
        pipe(3)
    with pytest.raises(TypeError, match="no option depth"):
        pipe("a <extra_id_0>", depth=3)
    with pytest.raises(ValueError, match=r"needs candidates=\.\.\."):
        pipeline("data-attribution", model=model, tokenizer=tokenizer, device=-1)("a <extra_id_0>")


def test_a_causal_model_answers_a_prompt_and_is_traced(tmp_path):
    words = {word: i for i, word in enumerate(["<end>", "Peru", "Lima", "?", "[UNK]"])}
    alphabet = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    alphabet.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = PreTrainedTokenizerFast(tokenizer_object=alphabet, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    network = GPT2LMHeadModel(GPT2Config(vocab_size=5, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0))
    for part in (network, tokens):
        part.save_pretrained(tmp_path)
    rows = Dataset.from_dict({"prompt": ["Peru ?", "Lima ?"], "completion": [" Lima", " Peru"]})
    pipe = pipeline("data-attribution", model=str(tmp_path), candidates=rows)
    (first,) = pipe("Peru ?", top_k=1)
    assert set(first) == {"rank", "score", "candidate", "prompt", "completion"}


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "MaskedLM"])
def test_a_model_is_loaded_with_the_head_that_it_was_saved_with(head, tmp_path):
    tokens = texts.tokenizer()
    config = BertConfig(
        vocab_size=len(texts.WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    network = texts.randomised(getattr(transformers, f"BertFor{head}")(config))
    for part in (network, tokens):
        part.save_pretrained(tmp_path)
    rows, asked = {
        "SequenceClassification": ({"sentence": texts.SENTENCES, "label": [0, 1, 2, 0, 1, 2]}, "yes"),
        "TokenClassification": ({"tokens": [["a", "cat"], ["yes"]], "ner_tags": [[0, 1], [2]]}, {"tokens": ["a"]}),
        "MaskedLM": ({"text": texts.SENTENCES}, "a [MASK] sat"),
    }[head]
    ascent = AscentConfig(direction="gradient", radius=0.3)
    candidates = Dataset.from_dict(rows)
    pipe = pipeline("data-attribution", model=str(tmp_path), candidates=candidates, ascent=ascent, device=-1)
    assert type(pipe.model) is type(network)
    answer = pipe(asked, top_k=2)
    expected = ForwardInf(network, tokens, ascent=ascent).trace_generation([asked], candidates).top(0, 2)
    assert [row["candidate"] for row in answer] == expected["candidate"][:]
    assert [row["score"] for row in answer] == pytest.approx(expected["score"][:], rel=1e-4)
